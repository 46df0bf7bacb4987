"""The conformance tests that CONTRIBUTING.md shows are collected here, as another package would write them."""

import re
from pathlib import Path

GUIDE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
for snippet in re.findall(r"```python\n(.*?)```", GUIDE, re.S):
    exec(snippet)


def test_all_three_kinds_are_shown():
    assert {"TestMyFormat", "TestMyRounding", "TestMyTarget"} <= set(globals())
