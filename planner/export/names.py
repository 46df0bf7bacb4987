"""The names that a checkpoint gives its tensors: an export that holds weights keeps them, for servers know no others.

transformers joins, splits and renames some checkpoints' tensors while it loads them (the experts of Mixtral, the text
model inside of a VLM); a plan has the names of the loaded model. May import: formats.errors, planner.plan,
sensitivity.fingerprint/source.
"""

from collections.abc import Iterable

from safetensors import safe_open
from torch import Tensor

from bitplan.formats.errors import FormatUnavailable
from bitplan.planner.plan import Plan
from bitplan.sensitivity.fingerprint import read_header
from bitplan.sensitivity.source import Source


def _planned(plan: Plan) -> list[tuple[str, ...]]:
    """The names of each tensor of the loaded model."""
    return [tuple(unit.holders) for unit in plan.units] + [(entry.name,) for entry in plan.unquantized]


def _stored(source: Source) -> set[str]:
    return {name for path in source.files for name in read_header(path)[1]}


def _is_stored(names: Iterable[str], stored: set[str]) -> bool:
    """A checkpoint may leave out the prefix of the base model, which readers know."""
    return any(name in stored or name.partition(".")[2] in stored for name in names)


def refuse_renamed(plan: Plan, source: Source, target: str) -> None:
    """Raises FormatUnavailable where the loaded model has tensors that the checkpoint stores under other names."""
    stored = _stored(source)
    renamed = [names[0] for names in _planned(plan) if not _is_stored(names, stored)]
    if renamed:
        more = f" and {len(renamed) - 3} more" if len(renamed) > 3 else ""
        raise FormatUnavailable(
            f"{target} needs the checkpoint's own names, and {source.model} stores {', '.join(renamed[:3])}{more} under"
            f" others, or in parts: save the plan in bitplan's own layout (bitplan apply --save)"
        )


def beside(plan: Plan, source: Source) -> list[str]:
    """Tensors of the checkpoint that the loaded model does not take, such as a head for drafts (MTP)."""
    known = {name for names in _planned(plan) for name in names}
    known |= {name.partition(".")[2] for name in known}
    return sorted(name for name in _stored(source) if name not in known)


def read_beside(plan: Plan, source: Source) -> dict[str, Tensor]:
    """Those tensors, as the checkpoint has them."""
    wanted = set(beside(plan, source))
    read: dict[str, Tensor] = {}
    for path in source.files:
        with safe_open(path, "pt") as file:
            read |= {name: file.get_tensor(name) for name in sorted(wanted.intersection(file.keys()))}
    return read


def beside_text(names: list[str]) -> list[str]:
    """A note for `bitplan export`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"copied as they are, for the model does not take them: {', '.join(names[:3])}{more}"] if names else []
