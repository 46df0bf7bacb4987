"""A matplotlib figure as SVG for a page: text stays text, colours follow the page, marks carry their exact numbers.

matplotlib writes literal colours, a font list with every text, ids that repeat from figure to figure, and ten digits
a coordinate. All of that is rewritten here, so that one figure serves a light page, a dark one and paper, and eighty
layers stay small. May import: matplotlib.
"""

import io
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
INK, MUTED, GRID, FIRST, SECOND, GROUND = (f"#01020{digit}" for digit in range(6))
"""Colours that stand for the page's own."""
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    GROUND: "var(--ground)",
}
PAPER = {INK: "#222", MUTED: "#666", GRID: "#ddd", FIRST: "#1d4ed8", SECOND: "#c2410c", GROUND: "#fff"}
"""The same for a file that stands alone, on white."""
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
"""For `matplotlib.rc_context`, in which a figure is made."""


@dataclass
class Plot:
    """A figure, and what its marks say when pointed at."""

    name: str
    """Unique in a page: ids begin with it."""
    title: str
    """For those who cannot see it."""
    figure: Figure
    notes: dict[str, str] = field(default_factory=dict)
    """Id of a mark → its exact numbers."""
    classes: dict[str, str] = field(default_factory=dict)
    """Id of a mark → its class."""

    def mark(self, artist: Artist, note: str, kind: str = "") -> str:
        """Give an artist its note and class. Returns its id in the SVG."""
        gid = f"{self.name}-{len(self.notes)}"
        artist.set_gid(gid)
        self.notes[gid] = note
        if kind:
            self.classes[gid] = kind
        return gid


def svg(plot: Plot, alone: bool = False) -> str:
    """The figure as an `<svg>` element; `alone`: as a file of its own, on white."""
    out = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": plot.name}):
        plot.figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ET.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for element in root.iter():
        _rewrite(element, plot, used, PAPER if alone else VARIABLES)
    root.attrib |= {"role": "group", "aria-label": plot.title, "class": "plot"}
    if alone:
        root.attrib |= {"font-family": "system-ui, sans-serif", "style": "background: #fff"}
    else:
        root.attrib.pop("width"), root.attrib.pop("height")
    ET.register_namespace("", SVG)
    return ET.tostring(root, encoding="unicode") + "\n"


def _references(root: ET.Element) -> list[str]:
    return [value for element in root.iter() for value in element.attrib.values() if "#" in value]


def _rewrite(element: ET.Element, plot: Plot, used: set[str], colours: dict[str, str]) -> None:
    found = element.attrib
    name = found.get("id", "")
    if name in plot.notes:
        _annotate(element, plot.notes[name], plot.classes.get(name, ""))
    elif name in used:
        found["id"] = f"{plot.name}-{name}"
    else:
        found.pop("id", None)
    if LINK in found:
        found["href"] = re.sub("^#", f"#{plot.name}-", found.pop(LINK))
    if "clip-path" in found:
        found["clip-path"] = found["clip-path"].replace("#", f"#{plot.name}-")
    for key in found.keys() & {"d", "transform", "x", "y", "points"}:
        short = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number.group()):.1f}", found[key])
        found[key] = " ".join(short.split())
    if "style" in found:
        style = re.sub(r"font: (?:\w+ )*([\d.]+px) [^;]*", r"font-size: \1", found["style"])
        for literal, own in colours.items():
            style = style.replace(literal, own)
        found["style"] = style
    element.tail = None  # line breaks between elements
    if element.text and not element.text.strip():
        element.text = None


def _annotate(element: ET.Element, text: str, kind: str) -> None:
    """Make a mark of an element: its class, and what it says when pointed at."""
    element.set("class", f"mark {kind}".strip())
    if kind == "cell":  # there are hundreds: their lines are in the page's style
        for path in element:
            path.set("style", path.get("style", "").partition(";")[0])
    note = ET.Element("title")
    note.text = text
    element.insert(0, note)
