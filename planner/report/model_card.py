"""The model card and the files of a saved plan. May import: planner.plan/report, sensitivity."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import exp
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from bitplan.formats.errors import ModelUnreadable, UsageError
from bitplan.planner.plan import Plan
from bitplan.planner.report.show import plan_text
from bitplan.planner.report.tables import with_error
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import write
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.store import refuse_full_disk, refuse_overwrite, writing

CARD = """---
{facts}
---
# {name}, {title}

{reading}

| | |
|---|---|
{rows}

## The plan

```
{plan}
```
"""


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is laid out and read, in a card's words."""

    title: str
    reading: str
    tags: tuple[str, ...] = ()


OWN = Layout(
    "planned",
    """Mixed precision by bitplan. Load it in plain transformers:

```python
import bitplan  # pip install bitplan; registers the packed formats with transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```""",
)


def card_text(plan: Plan, layout: Layout) -> str:
    """The README.md of a saved plan: what it is made from, how to load it, budget, held-out figures, the plan."""
    model = plan.provenance.model
    name = Path(model.id).name
    base = model.id if model.revision else name  # a folder's path says nothing to others
    facts = ModelCardData(
        base_model=base,
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["bitplan", "quantized", *layout.tags],
    )
    rows = {"base model": f"{base}, weights {model.weights_sha256[:12]}"} | _card_rows(plan)
    return CARD.format(
        facts=facts.to_yaml().strip(),
        name=name,
        title=layout.title,
        reading=layout.reading,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        plan=plan_text(plan).replace(model.id, base, 1),
    )


def _card_rows(plan: Plan) -> dict[str, str]:
    bits = f"{plan.bits_per_weight:.3f} bits per weight"
    rows = {
        "budget": f"{plan.budget.requested}: {plan.budget.weights:,} bytes",
        "plan": f"{plan.bytes:,} bytes in bitplan's own packing, {bits}",
    }
    if plan.measured:
        m = plan.measured
        rows[f"on {m.tokens:,} held-out tokens of {plan.provenance.text.source}"] = (
            f"perplexity {m.ppl:.3f} (full precision {exp(min(m.nll - m.delta_nll, 700.0)):.3f}),"
            f" KL {with_error(f'{m.kl:.5f}', m.kl_se)} nats per token"
        )
    if plan.search and plan.search.task and plan.measured and plan.measured.task:
        task = plan.measured.task
        rows[f"on {task.items} held-out items of {plan.search.task.name}"] = (
            f"{task.quantized:.4f} (full precision {task.baseline:.4f}; difference {task.low:+.4f} … {task.high:+.4f}"
            " at 95 %)"
        )
    if plan.uniform and plan.uniform.measured:
        u, m = plan.uniform, plan.uniform.measured
        rows["best uniform that fits"] = (
            f"{u.format}, {u.bytes:,} bytes: perplexity {m.ppl:.3f}, KL {with_error(f'{m.kl:.5f}', m.kl_se)}"
        )
    return rows | {"made by": f"bitplan {plan.provenance.versions['bitplan']}"}


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

    Of a symbolic link, what it points to is replaced. An old folder is renamed aside and removed once the new one is
    in its place. Raises BitplanError where the folder cannot be written; the old one is then as it was.
    """
    target = Path(os.path.realpath(folder))
    with writing(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield part
            for file in part.iterdir():
                file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors' writer leaves its file to the user alone
            part.chmod(0o755)
            _replace(target, part, force)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _replace(target: Path, part: Path, force: bool) -> None:
    """Rename the folder `part` to `target`, in place of an old folder with `force`."""
    if not (force and target.is_dir()):
        os.rename(part, target)
        return
    old = part.with_name(f"{part.name}.old")
    os.rename(target, old)
    try:
        os.rename(part, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Of models that also take images, sound or video."""


def write_papers(part: Path, plan: Plan, source: Source, layout: Layout) -> None:
    """The tokenizer, what prepares a model's other inputs, plan.json and the model card."""
    for name in PROCESSORS:
        if (source.folder / name).is_file():
            shutil.copy(source.folder / name, part)
    with suppress(ModelUnreadable):  # a model without a tokenizer is saved without one
        sources.load_tokenizer(source).save_pretrained(part)
    write(part / "plan.json", plan)
    (part / "README.md").write_text(card_text(plan, layout), encoding="utf-8")


def save(model: PreTrainedModel, plan: Plan, source: Source, folder: Path, force: bool) -> None:
    """Write a planned model as a checkpoint folder: weights, config, tokenizer, plan.json, model card.

    Everything is written beside and renamed at the end. Raises BitplanError where the folder cannot be written.
    """
    with written_beside(folder, force) as part:
        refuse_full_disk(part.parent, plan.bytes)
        model.save_pretrained(part)
        write_papers(part, plan, source, OWN)
