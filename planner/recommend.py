"""Which format for which purpose, with the evidence that there is for this model.

The rules are those of the field (BF16 for training, INT8 for inference, INT4 AWQ where cost counts, mixed precision for
sensitive layers, 1 bit as research); beside each answer stand the rows that `compare` has measured, or that none has.
May import: formats, sensitivity, planner.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from formats.errors import UsageError
from planner.compare import Line, recalled
from planner.session import Session
from planner.uniform import uniform_plan

PURPOSES = {
    "training": (
        "bf16",
        "BF16 has float32's range: FP16 overflows above 65,504 and loses gradients below 6e-8, so that it needs loss"
        " scaling",
    ),
    "inference": ("int8", "INT8 halves BF16's bytes for a loss that is mostly too small to see"),
    "cost": ("int4-g128", "INT4 quarters BF16's bytes; AWQ or GPTQ choose the codes, and which is better is measured"),
    "fit": ("mixed", "sensitive layers keep more bits than the others, and the whole keeps within the device"),
}
EVIDENCE = {
    "training": (("bf16", None), ("fp16", None)),
    "inference": (("bf16", None), ("int8", None), ("fp8", None), ("int4-g128", None)),
    "cost": (("int8", None), ("int4-g128", "awq"), ("int4-g128", "gptq"), ("nf4", None)),
    "fit": (("int8", None), ("int4-g64", None), ("int3-g64", None), ("binary-g64", None)),
}
"""Formats with their rounding (None: the default) whose rows bear on the answer."""


@dataclass(frozen=True)
class Activation:
    """The largest magnitude that any module puts out on some text."""

    module: str
    largest: float

    @property
    def of_fp16(self) -> float:
        """As a part of FP16's limit."""
        return self.largest / torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Advice:
    purpose: str
    format: str
    why: str
    rows: tuple[Line, ...]
    """What `compare` has measured on this text."""
    missing: tuple[str, ...]
    """What it has not."""
    activation: Activation | None = None

    def as_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "purpose": self.purpose,
            "format": self.format,
            "why": self.why,
            "not_measured": list(self.missing),
        }
        if self.activation:
            facts |= {"largest_activation": self.activation.largest, "largest_activation_at": self.activation.module}
        return {**facts, "rows": [line.as_dict() for line in self.rows]}


def recommend(session: Session, purpose: str, device: str = "auto") -> Advice:
    """The answer for a purpose. Raises UsageError for another word."""
    if purpose not in PURPOSES:
        raise UsageError(f"--for {purpose!r}: there are {', '.join(PURPOSES)}")
    rows, missing = [], []
    for format, rounding in EVIDENCE[purpose]:
        plain = format in ("fp32", "bf16", "fp16")
        row = format if plain else uniform_plan(session, format, rounding)
        name = row if isinstance(row, str) else row.budget.asked
        line = recalled(session, name, row, device)
        if line is None:
            missing.append(format if rounding is None else f"{format} by {rounding}")
        else:
            rows.append(line)
    activation = largest_activation(session) if purpose == "training" else None
    return Advice(purpose, *PURPOSES[purpose], tuple(rows), tuple(missing), activation)


@torch.no_grad()
def largest_activation(session: Session) -> Activation:
    """Over all modules' outputs on the held-out text, in full precision."""
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                found[name] = max(found.get(name, 0.0), float(value.abs().max()))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in session.model.named_modules() if name]
    try:
        for ids in session.texts.heldout.ids.split(1):
            session.model(input_ids=ids.to(session.model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    module = max(found, key=lambda name: found[name])
    return Activation(module, found[module])
