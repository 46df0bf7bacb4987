"""The README's commands and snippets, run as written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.search(r"<!-- run -->\n```\n(.*?)```", README, re.S).group(1).strip().splitlines()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def rehoused(text: str, place: Path) -> str:
    return text.replace("/tmp/bitplan-readme", str(place)).replace("/tmp/planned", str(place / "snippet"))


@pytest.mark.xdist_group("demo plan")
def test_commands(place):
    for line in COMMANDS:
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
