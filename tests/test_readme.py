"""The pages' commands and snippets, run as written; their links, and their table of formats, hold."""

import re
import shlex
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest

from bitplan.planner.cli import main
from bitplan.planner.demo import CALIBRATION, HELDOUT, MODEL
from bitplan.planner.load import load, resident_bytes
from bitplan.planner.plan import Plan
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.profile import read
from bitplan.sensitivity.session import load_reference
from bitplan.sensitivity.texts.read import read_texts

ROOT = Path(__file__).parent.parent
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
COMMANDS = {name: "".join(re.findall(r"<!-- run -->\n```\n(.*?)```", page, re.S)) for name, page in PAGES.items()}
SNIPPETS = {name: "\n".join(re.findall(r"```python\n(.*?)```", page, re.S)) for name, page in PAGES.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def rehoused(text: str, place: Path) -> str:
    return re.sub(r"/tmp/(?=bitplan-)", f"{place}/", text)


@pytest.mark.parametrize("page", [name for name, lines in COMMANDS.items() if lines])
def test_commands(page, place, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for line in rehoused(COMMANDS[page], place).replace("\\\n", "").splitlines():
        command, *words = shlex.split(line)
        assert command == "bitplan"
        code, (out, err) = main(words), capsys.readouterr()
        assert code == 0, f"{line}\n{err}"
        assert out, line


def test_a_bundled_plan_is_what_it_says():
    """Its codes are those that the README's `apply` has made in this cache."""
    plan, source = read(ROOT / "plans" / "demo-4-bpw.json", Plan), sources.find(MODEL)
    heldout = read_texts(source, files=[CALIBRATION], heldout=[HELDOUT]).heldout
    assert heldout.fingerprint == plan.provenance.text.heldout.sha256
    model = load(plan, MODEL, device="cpu", text=[CALIBRATION])
    assert resident_bytes(model) == plan.bytes
    # Another processor adds in another order: codes on an edge may fall otherwise.
    kl = Reference(load_reference(source, "cpu"), heldout).evaluate(model).kl
    assert kl == pytest.approx(plan.measured.kl, rel=0.05)


@pytest.mark.parametrize("page", [name for name, lines in SNIPPETS.items() if lines])
def test_snippets(page, place):
    """A page's snippets are one script, which finds what the commands have made."""
    script = rehoused(SNIPPETS[page], place)
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for path, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", PAGES[page]):
        target = folder / (path or page)
        assert target.exists(), path
        if heading:
            names = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names}, heading


def table_of_formats() -> dict[str, str]:
    """Names as docs/formats.md has them → the formula of their bytes."""
    section = re.search(r"## What is stored\n(.*?)\n## ", PAGES["formats.md"], re.S).group(1)
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    return {name: cells[-1] for cells in rows for name in re.findall(r"`(\S+)`", cells[0])}


def value(formula: str, **numbers: int) -> int:
    """What a formula such as 4r⌈cB/32⌉ + 2rG comes to."""
    tokens = re.findall(r"size|[rcBG]|\d+|[⌈⌉()+/]", formula)
    joined = ""
    for before, token in zip(["", *tokens], tokens, strict=False):
        times = before not in ("", "⌈", "(", "+", "/") and token not in ("⌉", ")", "+", "/")
        joined += ("*" if times else "") + {"⌈": "ceil(", "⌉": ")"}.get(token, token)
    return eval(joined, {"ceil": ceil, **numbers})


def test_the_table_of_formats_has_them_all_and_their_bytes():
    from bitplan.formats.table import FORMATS

    formulas = {
        re.compile(
            name.replace("intB", r"int(?P<B>\d)").replace("-gN", r"-(g(?P<N>\d+)|row)").replace("-g32-", "-g(?P<N>32)-")
        ): formula
        for name, formula in table_of_formats().items()
    }
    for name, format in FORMATS.items():
        [(found, formula)] = [(m, f) for pattern, f in formulas.items() if (m := pattern.fullmatch(name))]
        facts = {key: int(number) for key, number in found.groupdict().items() if number}
        for r, c in ((1, 64), (3, 100), (7, 33), (128, 256)):
            groups = ceil(c / facts["N"]) if "N" in facts else 1
            size = int(format.bits) // 8
            assert value(formula, r=r, c=c, B=facts.get("B", 0), G=groups, size=size) == format.nbytes(r, c), name


def test_the_rules_and_the_kernels_are_told_of_every_kind_of_format():
    for heading in ("Which, and when", "What runs it"):
        section = re.search(rf"## {heading}\n(.*?)\n## ", PAGES["formats.md"], re.S).group(1)
        plain = [name for name in table_of_formats() if not name.startswith("intB")]
        assert all(f"`{name}" in section for name in plain), heading


@pytest.mark.parametrize(("column", "on"), [(1, "cpu"), (2, "cuda:8.9")])
def test_the_table_of_kernels_is_right(column, on):
    import torch

    from bitplan.formats.kernels.dispatch import choose, named_machine
    from bitplan.formats.table import FORMATS

    section = re.search(r"## What runs it\n(.*?)\n## ", PAGES["formats.md"], re.S).group(1)
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    kernels = {name: cells[column].strip() for cells in rows for name in re.findall(r"`(\S+)`", cells[0])}
    for name, format in FORMATS.items():
        like = re.sub(r"-(g\d+|row)", "-gN", re.sub(r"^int\d-(g|row)", r"intB-\1", name))
        kernel = choose(format, 4096, torch.bfloat16, named_machine(on)).name
        assert kernel in kernels[like] or kernels[like] == "the same", (name, kernel)
