"""Imports go one way: formats → sensitivity → search → planner → testing; each file says what it is for, and names the
encoding of every text that it reads or writes."""

import ast
import re
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "bitplan"
ROOMS = ("formats", "sensitivity", "search", "planner", "testing")
FILES = [path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))]


def room_of(module: str) -> str:
    """bitplan.search.knapsack → search."""
    return module.removeprefix("bitplan.").split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
class TestFiles:
    def test_imports_no_room_to_its_right(self, path):
        place = ROOMS.index(path.relative_to(PACKAGE).parts[0])
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {room_of(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported.add(room_of(node.module or ""))
                imported |= {room_of(f"{node.module}.{alias.name}") for alias in node.names}
        assert not imported & set(ROOMS[place + 1 :])

    def test_says_what_it_is_for_and_what_it_may_import(self, path):
        source = path.read_text(encoding="utf-8")
        if source.strip():
            told = ast.get_docstring(ast.parse(source))
            assert told
            assert path.name in ("__init__.py", "errors.py") or "May import:" in told


def without_encoding(source: str) -> list[int]:
    """The lines that read or write text in the encoding of the machine (on Windows rarely UTF-8)."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        given = [ast.unparse(word) for word in call.args]
        modes = [mode for word in (*given, named.get("mode", "")) for mode in re.findall(r"'([abrtwx+]+)'", word)]
        match ast.unparse(call.func).split("."):
            case [_, *_, "read_text"]:
                text = not given
            case [_, *_, "write_text"]:
                text = len(given) == 1
            case ["open"] | [_, *_, "open"]:
                text = not any("b" in mode for mode in modes) and ast.unparse(call.func) != "os.open"
            case [*_, "NamedTemporaryFile" | "TemporaryFile" | "SpooledTemporaryFile"]:
                text = any("b" not in mode for mode in modes)
            case _:
                text = "True" in (named.get("text"), named.get("universal_newlines"))
        if text and "encoding" not in named:
            found.append(call.lineno)
    return found


class TestEncodings:
    def test_named_everywhere(self):
        folders = [ROOT / name for name in (*ROOMS[:-1], "src/bitplan/testing", "tests", "benchmarks")]
        paths = (path for folder in folders for path in folder.rglob("*.py") if "site-packages" not in path.parts)
        assert not {path: lines for path in paths if (lines := without_encoding(path.read_text(encoding="utf-8")))}

    @pytest.mark.parametrize(
        ("source", "missing"),
        [
            ("path.read_text()", True),
            ("path.read_text('utf-8')", False),
            ("(folder / 'a').write_text(text)", True),
            ("path.write_text(text, encoding='utf-8')", False),
            ("open(path, 'a')", True),
            ("path.open()", True),
            ("open(path, 'rb')", False),
            ("os.open(path, flags)", False),
            ("tempfile.NamedTemporaryFile()", False),
            ("tempfile.NamedTemporaryFile('w')", True),
            ("subprocess.run(command, text=True)", True),
        ],
    )
    def test_what_is_looked_for(self, source, missing):
        assert bool(without_encoding(source)) == missing


def named_modules(told: str) -> set[str]:
    """The modules of the project after "May import:"; in `formats.errors/sizes` two that lie side by side."""
    found = set()
    for name in re.findall(rf"\b(?:{'|'.join(ROOMS)})\b(?:\.\w+)*(?:/\w+)*", told.partition("May import:")[2]):
        first, *beside = name.split("/")
        found |= {first, *(".".join([*first.split(".")[:-1], other]) for other in beside)}
    return found


def test_modules_that_may_be_imported_exist():
    known = {name.removeprefix("bitplan.") for name in modules()}
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in FILES}
    stale = {(str(path), name) for path, told in docstrings.items() for name in named_modules(told) - known}
    assert not stale


def test_neighbours_are_read_by_their_full_names():
    told = "Sums. May import: torch, search, sensitivity.graph/store, transformers' caches."
    assert named_modules(told) == {"search", "sensitivity.graph", "sensitivity.store"}


ORDER = (
    ("plan",),
    ("codes", "assemble", "memory"),
    ("hf",),
    ("quantize",),
    ("load",),
    ("evaluate",),
    ("select", "report"),
    ("export", "demo", "manager"),
    ("commands",),
    ("cli",),
)
"""The rooms of planner/ by floor: a room imports from the floors before its own."""


def modules() -> dict[str, Path]:
    """bitplan.search.knapsack → its file; packages by their own name."""
    names = (".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in FILES)
    return {f"bitplan.{name.removesuffix('.__init__')}": path for name, path in zip(names, FILES, strict=True)}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the project that a file imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found & set(known)


def test_no_module_imports_itself_by_way_of_others():
    known = modules()
    graph = nx.DiGraph((name, other) for name, path in known.items() for other in imports(path, known) - {name})
    assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)


def test_the_rooms_of_the_planner_are_the_drawn_ones():
    floor = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
    names = {path.stem for path in (ROOT / "planner").iterdir() if not path.stem.startswith("__")}
    assert names == set(floor)
    known = modules()
    for name, path in known.items():
        if name.startswith("bitplan.planner."):
            room = name.split(".")[2]
            for other in imports(path, known):
                above = other.split(".")[2] if other.startswith("bitplan.planner.") else room
                assert above == room or floor[above] < floor[room], f"{name} imports {other}"
