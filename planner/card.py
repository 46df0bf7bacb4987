"""The model card and the files of a saved plan. May import: planner.plan/show, sensitivity.store/source."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import PreTrainedModel

from formats.errors import BitplanError, ModelUnreadable, UsageError
from planner.plan import Plan
from planner.show import plan_text
from sensitivity import source as sources
from sensitivity.profile import write
from sensitivity.source import Source
from sensitivity.store import refuse_overwrite

CARD = """---
base_model: {id}
library_name: transformers
tags: [bitplan, quantized]
---
# {name}, planned

Mixed precision by bitplan: {bytes:,} bytes, {bits:.3f} bits per weight.

```python
import planner  # pip install bitplan; registers the packed formats with transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

```
{text}
```
"""


def refuse_folder(folder: Path | None, force: bool) -> None:
    """Raises UsageError where `folder` exists and may not be replaced: without `force`, or when it holds no model."""
    refuse_overwrite(folder, force)
    if folder is not None and folder.exists() and not ((folder / "config.json").exists() or _is_empty(folder)):
        raise UsageError(f"{folder} holds something else than a model: give another name")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


@contextmanager
def written_beside(folder: Path, force: bool) -> Iterator[Path]:
    """A new folder to write into, which is renamed to `folder` at the end, or removed where that is not reached.

    Raises BitplanError where the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise BitplanError(f"cannot write {folder}: {error.strerror}") from None
    try:
        yield part
        for file in part.iterdir():
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors' writer leaves its file to the user alone
        part.chmod(0o755)
        if folder.exists() and force:
            shutil.rmtree(folder)
        os.rename(part, folder)
    except OSError as error:
        raise BitplanError(f"cannot write {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_papers(part: Path, plan: Plan, source: Source, card: str) -> None:
    """The tokenizer, plan.json and the model card, `card` filled in."""
    with suppress(ModelUnreadable):  # a model without a tokenizer is saved without one
        sources.load_tokenizer(source).save_pretrained(part)
    write(part / "plan.json", plan)
    facts = plan.provenance.model
    name = Path(facts.id).name
    text = card.format(id=name, name=name, bytes=plan.bytes, bits=plan.bits_per_weight, text=plan_text(plan))
    (part / "README.md").write_text(text)


def save(model: PreTrainedModel, plan: Plan, source: Source, folder: Path, force: bool) -> None:
    """Write a planned model as a checkpoint folder: weights, config, tokenizer, plan.json, model card.

    Everything is written beside and renamed at the end. Raises BitplanError where the folder cannot be written.
    """
    with written_beside(folder, force) as part:
        model.save_pretrained(part)
        write_papers(part, plan, source, CARD)
