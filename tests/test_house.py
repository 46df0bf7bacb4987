"""Imports go one way: formats → sensitivity → search → planner, and each file says what it is for."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("formats", "sensitivity", "search", "planner")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def room_of(module: str) -> str:
    """bitplan.search.knapsack → search."""
    return module.removeprefix("bitplan.").split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
class TestFiles:
    def test_imports_no_room_to_its_right(self, path):
        place = ROOMS.index(path.relative_to(ROOT).parts[0])
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {room_of(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported.add(room_of(node.module or ""))
                imported |= {room_of(f"{node.module}.{alias.name}") for alias in node.names}
        assert not imported & set(ROOMS[place + 1 :])

    def test_says_what_it_is_for_and_what_it_may_import(self, path):
        source = path.read_text()
        if source.strip():
            told = ast.get_docstring(ast.parse(source))
            assert told
            assert path.name in ("__init__.py", "errors.py") or "May import:" in told
