"""What a page is made of, and the page. May import: jinja2, formats.errors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitplan.formats.errors import BitplanError

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class PageFigure:
    title: str
    svg: str
    caption: str
    by_format: bool = False
    """Its colours are those of the format that is chosen on the page."""
    ends: Sequence[tuple[str, str]] = ()
    """For each format of the page, what stands at the two ends of its scale."""
    gradient: str = ""


@dataclass(frozen=True)
class PageTable:
    """Cells are text; the first `left` columns are words, the others numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    note: str = ""
    name: str = ""


@dataclass(frozen=True)
class Page:
    title: str
    lead: str
    figures: Sequence[PageFigure]
    tables: Sequence[PageTable]
    provenance: Mapping[str, str]
    findings: Sequence[str] = ()
    formats: Sequence[str] = ()
    """To choose from on the page."""
    chosen: str = ""
    colours: Mapping[str, str] = field(default_factory=dict)
    """Format → CSS rules that hold while it is chosen."""
    data: Any = None
    """What the script needs to rank the units again for another format."""


def refuse_without_report(path: Path | None) -> None:
    """Raises BitplanError where a page is requested and matplotlib is not installed; called before any work."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if path is not None and missing:
        raise BitplanError(f"--html needs {' and '.join(missing)}: pip install 'bitplan[report]'")


def render(page: Page) -> str:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    data = None if page.data is None else json.dumps(page.data, separators=(",", ":")).replace("<", "\\u003c")
    css, js = (FOLDER / "page.css").read_text("utf-8"), (FOLDER / "page.js").read_text("utf-8")
    return environment.get_template("layout.html").render(page=page, data=data, css=css, js=js)
