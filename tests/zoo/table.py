"""docs/zoo.md: `python -m tests.zoo.table` (a quarter of an hour on one core)."""

import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("BITPLAN_CACHE", tempfile.mkdtemp())

import torch
import transformers

from bitplan.formats.errors import first_line, printable
from tests.zoo.tiny_configs import causal_types
from tests.zoo.walk import FORMAT, NotTiny, walk

HEAD = """# Architectures

Each causal LM class of transformers {version} of which a tiny random model can be made by rule: planned in
{format}, saved, read back by plain transformers. "Works" means: equal logits to the bit, and planned = resident = saved
bytes. "Planned" is the part of all weights that has codes. Made by `python -m tests.zoo.table`.

| Model type | Result | Planned | Unquantized because |
|---|---|---:|---|
"""


def row(name: str) -> str | None:
    """A line of the table, or None where no tiny model is made."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            walked = walk(name, Path(folder))
        except NotTiny:
            return None
        except Exception as error:
            reason = printable(first_line(error)).replace("|", "/").replace(folder, "…")[:160]
            return f"| {name} | {type(error).__name__}: {reason} | – | |"
    return f"| {name} | works | {walked.planned:.0%} | {'; '.join(walked.reasons)} |"


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines, absent = [], []
    for name in sys.argv[1:] or causal_types():
        line = row(name)
        print(line or f"{name}: no tiny model", file=sys.stderr, flush=True)
        lines += [line] if line else []
        absent += [] if line else [name]
    text = HEAD.format(version=transformers.__version__, format=FORMAT) + "\n".join(lines) + "\n"
    works = sum("| works |" in line for line in lines)
    text += f"\n{works} of {len(lines)} work. No tiny model by rule: {', '.join(absent)}.\n"
    (Path(__file__).parent.parent.parent / "docs" / "zoo.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
