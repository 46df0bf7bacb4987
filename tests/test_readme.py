"""The README's commands and snippets, run as written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMANDS = {name: re.findall(r"<!-- run -->\n```\n(.*?)```", page, re.S) for name, page in PAGES.items()}
SNIPPETS = [
    pytest.param(snippet, id=f"{name}-{i}")
    for name, page in PAGES.items()
    for i, snippet in enumerate(re.findall(r"```python\n(.*?)```", page, re.S))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def rehoused(text: str, place: Path) -> str:
    return re.sub(r"/tmp/(bitplan-\w+|planned)", str(place) + r"/\1", text)


@pytest.mark.xdist_group("demo plan")
@pytest.mark.parametrize("page", [name for name, blocks in COMMANDS.items() if blocks])
def test_commands(page, place):
    for line in "".join(COMMANDS[page]).strip().splitlines():
        words = shlex.split(rehoused(line, place))
        assert words[0] == "bitplan"
        command = [sys.executable, "-m", "planner.cli", *words[1:]]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        assert result.stdout


@pytest.mark.xdist_group("demo plan")
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets(snippet, place):
    result = subprocess.run(
        [sys.executable, "-c", rehoused(snippet, place)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_table_of_formats_names_them_all():
    from formats.table import FORMATS

    told = re.search(r"## Formats\n(.*?)\n## ", README, re.S).group(1)
    plain = {name for name in FORMATS if not re.match(r"(int\d|ternary|binary)-", name)}
    assert all(f"`{name}`" in told for name in plain)
