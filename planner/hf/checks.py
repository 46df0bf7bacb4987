"""Whether a checkpoint, and the model loaded from it, hold what the plan names: every tensor in its shape and type.

May import: formats, sensitivity.fingerprint, planner.plan.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitplan.formats.errors import PlanMismatch
from bitplan.formats.floats import FloatFormat
from bitplan.formats.table import format_named
from bitplan.planner.plan import Plan
from bitplan.sensitivity.fingerprint import read_header

HEADER_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
}
"""Types as safetensors' headers name them."""
BITS_OF = {torch.int16: torch.float16, torch.int32: torch.float32}
"""What scales are, by the integer type that holds their bits."""
SHOWN = 3


@dataclass(frozen=True)
class Stored:
    """A tensor as a plan has it. The shape is sorted: a plan does not say which way round a module holds a weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    names: tuple[str, ...]
    """Its own, and those of the parameters tied to it."""
    bits_of: torch.dtype | None = None
    """The float type whose bits an integer tensor holds."""


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and saved buffers, shared ones once; buffers computed at load are not counted."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


def stored(plan: Plan) -> Iterator[Stored]:
    """Every tensor of a plan's checkpoint."""
    for unit in plan.units:
        names = unit.holders
        if unit.is_native:
            shape = (unit.experts, unit.rows, unit.columns)[0 if unit.kind == "experts" else 1 :]
            yield Stored(tuple(sorted(shape)), getattr(torch, unit.dtype), tuple(names))
            continue
        format = format_named(unit.format)
        for suffix, (shape, dtype) in format.specs(unit.experts * unit.rows, unit.columns).items():
            floats = {"_scale": BITS_OF, "_zero": {torch.int16: torch.float16}}.get(suffix, {})
            bits_of = format.dtype if isinstance(format, FloatFormat) else floats.get(dtype)
            yield Stored(tuple(sorted(shape)), dtype, tuple(name + suffix for name in names), bits_of)
    for entry in plan.unquantized:
        yield Stored(tuple(sorted(entry.shape)), getattr(torch, entry.dtype), (entry.name,))


def check_names(plan: Plan, model: Any) -> None:
    """Raises PlanMismatch where a model, which may be on meta, has tensors that the plan does not name."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    known = {name for tensor in stored(plan) for name in tensor.names}
    known |= {name for name, source in tied.items() if source in known}
    if more := [name for name in model.state_dict(keep_vars=True) if name not in known and tied.get(name) not in known]:
        raise PlanMismatch(
            f"the plan does not name {_some(more)}, which {type(model).__name__} has: config.json describes another"
            f" model than the plan"
        )


def check_checkpoint(plan: Plan, files: Sequence[Path]) -> None:
    """Raises PlanMismatch where the files of a saved planned model lack a tensor of the plan, or have it in another
    shape or type; ModelUnreadable for a broken file."""
    found = {}
    for path in files:
        for name, entry in read_header(path)[1].items():
            found[name] = (tuple(sorted(entry["shape"])), HEADER_TYPES.get(entry["dtype"]))
    _compare(plan, found, f"the checkpoint {files[0].parent}" if files else "the checkpoint")


def check_loaded(plan: Plan, model: nn.Module) -> None:
    """Raises PlanMismatch where a loaded model is not what the plan names, to the byte, or has a parameter that is not
    finite."""
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    facts = {name: (tuple(sorted(tensor.shape)), tensor.dtype) for name, tensor in tensors.items()}
    _compare(plan, facts, "the loaded model")
    if (resident := resident_bytes(model)) != plan.bytes:
        raise PlanMismatch(f"the loaded model has {resident:,} bytes, but the plan {plan.bytes:,}")
    bits_of = {tensor.names[0]: tensor.bits_of for tensor in stored(plan)}
    parameters = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    if bad := [name for name, tensor in parameters.items() if not _is_finite(tensor, bits_of.get(name))]:
        raise PlanMismatch(f"the loaded model holds NaN or infinity in {_some(bad)}: fetch or save it again")


def _compare(plan: Plan, found: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]], what: str) -> None:
    missing, differing = [], []
    for tensor in stored(plan):
        facts = next((found[name] for name in tensor.names if name in found), None)
        if facts is None:
            missing.append(tensor.names[0])
        elif facts != (tensor.shape, tensor.dtype):
            differing.append(tensor.names[0])
    if missing:
        raise PlanMismatch(f"{what} lacks {_some(missing)}, which the plan names: fetch or save it again")
    if differing:
        raise PlanMismatch(f"{what} has {_some(differing)} in another shape or type than the plan: save it again")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more tensors" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _is_finite(tensor: torch.Tensor, bits_of: torch.dtype | None) -> bool:
    values = tensor.detach() if bits_of is None else tensor.detach().view(bits_of)
    if not values.is_floating_point() or values.itemsize < 2 or values.is_meta or not values.numel():
        return True
    least, most = torch.aminmax(values)  # NaN where one is, and no copy
    return bool(least.isfinite() and most.isfinite())
