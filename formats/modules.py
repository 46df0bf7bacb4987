"""Modules that run packed weights: a module keeps its place, its bias and its attributes, and changes its class.

`pack_parameter` turns a Linear, Conv1D, Embedding (or a subclass), or one 3-D parameter of an experts module, into
its packed twin. A parameter p becomes integer parameters p, p_scale, p_zero. May import: formats.base/kernels, torch,
transformers' Conv1D.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitplan.formats.base import Format, Tensors
from bitplan.formats.kernels.dispatch import linear


@dataclass(frozen=True)
class Slot:
    """How one parameter is packed. Its weight is [experts * rows, columns]; `experts` is 1 but for 3-D parameters."""

    format: Format
    experts: int
    rows: int
    columns: int
    transposed: bool
    """The parameter holds [columns, rows] (Conv1D, some experts)."""
    dtype: torch.dtype
    """The checkpoint's type: what looked-up rows and dequantized weights come out as."""


def canonical(weight: Tensor, transposed: bool) -> Tensor:
    """A parameter as [experts * rows, columns]."""
    weight = weight.transpose(-1, -2) if transposed else weight
    return weight.reshape(-1, weight.shape[-1])


LAYOUTS = {"Llama4TextExperts": True, "JetMoeParallelExperts": False}
"""Classes of experts that do not state their layout → whether it is transposed: [experts, inputs, outputs]."""


def _layout(module: nn.Module) -> bool | None:
    """Whether a module holds its weights transposed, where it is of a class in LAYOUTS."""
    return next((LAYOUTS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in LAYOUTS), None)


def is_experts(module: nn.Module) -> bool:
    """A module with 3-D parameters, an expert to a slice, of the kind whose layout transformers or LAYOUTS states."""
    stated = hasattr(module, "is_transposed") or _layout(module) is not None
    return stated and any(p.ndim == 3 for p in module._parameters.values() if p is not None)


def is_transposed(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or getattr(module, "is_transposed", False) is True or _layout(module) is True


class _Shadows(threading.local):
    """Tensors that modules answer with in this thread alone: others may run the same modules at the same time."""

    def __init__(self) -> None:
        self.of: dict[int, Tensors] = {}
        """By the module's id."""


_SHADOWS = _Shadows()


class Packed(nn.Module):
    """Holds the packed parameters' slots. The packed tensors are ordinary parameters without gradients."""

    slots: dict[str, Slot]

    def tensors(self, name: str = "weight") -> Tensors:
        suffixes = self.slots[name].format.specs(1, 1)
        return {suffix: self._parameters[name + suffix] for suffix in suffixes}  # type: ignore[misc]

    def dequantized(self, name: str = "weight") -> Tensor:
        """The weight as the original parameter held it: its shape, its orientation, its dtype."""
        slot = self.slots[name]
        weight = slot.format.dequantize(self.tensors(name), slot.columns, slot.dtype)
        if slot.experts > 1 or "weight" not in self.slots:
            weight = weight.unflatten(0, (slot.experts, slot.rows))
        return weight.transpose(-1, -2) if slot.transposed else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What torch calls for `.to(…)` and its kin: dequantized weights come out as float parameters do."""
        super()._apply(fn, recurse)
        for name, slot in self.slots.items():
            self.slots[name] = replace(slot, dtype=fn(torch.empty(0, dtype=slot.dtype)).dtype)
        return self

    def extra_repr(self) -> str:
        packed = ", ".join(f"{name}={slot.format.name}" for name, slot in self.slots.items())
        return ", ".join(filter(None, (super().extra_repr(), packed)))


class PackedLinear(Packed):
    """Linear or Conv1D: the format multiplies, with its own kernel where it has one."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        slot = self.slots["weight"]
        return linear(slot.format, x, self.tensors(), slot.columns, self.bias)


class Shadowed(Packed):
    """Packed modules whose own code reads the weight: it finds another tensor by the parameter's name."""

    @contextmanager
    def shadowed(self, values: Tensors) -> Iterator[None]:
        """While inside, in this thread, attributes named in `values` answer with these tensors instead of the packed
        parameters."""
        before = _SHADOWS.of.get(id(self))
        _SHADOWS.of[id(self)] = values
        try:
            yield
        finally:
            if before is None:
                del _SHADOWS.of[id(self)]
            else:
                _SHADOWS.of[id(self)] = before

    def __getattr__(self, name: str) -> Any:
        # Parameters do not lie in __dict__, so every read of one comes here.
        shadows = _SHADOWS.of.get(id(self), {})
        return shadows[name] if name in shadows else super().__getattr__(name)


class PackedEmbedding(Shadowed, nn.Embedding):
    """Embedding: only the rows looked up are dequantized."""

    def forward(self, input: Tensor) -> Tensor:
        slot = self.slots["weight"]
        return slot.format.take_rows(self.tensors(), input, slot.columns, slot.dtype)


class PackedOther(Shadowed):
    """Any other forward (experts, subclasses): runs as written, on weights dequantized for the call."""

    def forward(self, *args, **kwargs):
        with self.shadowed({name: self.dequantized(name) for name in self.slots}):
            return super().forward(*args, **kwargs)


@cache
def packed_class(original: Any) -> type[Packed]:
    """The packed twin of a module class."""
    name = "Packed" + original.__name__
    if original.forward in (nn.Linear.forward, Conv1D.forward):
        return type(name, (PackedLinear, original), {})
    if original.forward is nn.Embedding.forward:
        return type(name, (PackedEmbedding, original), {})
    if issubclass(original, nn.Embedding) and "super" in original.forward.__code__.co_names:
        # Scaled or shifted lookups: their super().forward finds PackedEmbedding's. They may ask the weight's dtype,
        # device and shape. Whatever else they do with it gives NaN, which no output hides.
        def forward(self, *args, **kwargs):
            slot = self.slots["weight"]
            device = self.tensors()[""].device
            stand_in = torch.full((1, 1), torch.nan, dtype=slot.dtype, device=device).expand(slot.rows, slot.columns)
            with self.shadowed({"weight": stand_in}):
                return original.forward(self, *args, **kwargs)

        return type(name, (original, PackedEmbedding), {"forward": forward})
    return type(name, (PackedOther, original), {})


def pack_parameter(module: nn.Module, name: str, format: Format, *, placeholder: bool = False) -> Packed:
    """Change `module` in place so that its parameter `name` is packed in `format`, with zeros for tensors.

    With `placeholder`, the parameter itself stays the float one until packed tensors are set by a loader.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    transposed = is_transposed(module)
    rows, columns = parameter.shape[-2:] if not transposed else parameter.shape[:-3:-1]
    experts = parameter.shape[0] if parameter.ndim == 3 else 1
    slot = Slot(format, experts, rows, columns, transposed, parameter.dtype)
    if not isinstance(module, Packed):
        module.__class__ = packed_class(cast(Any, type(module)))
        module.__dict__["slots"] = {}
    assert isinstance(module, Packed)
    module.slots[name] = slot
    for suffix, tensor in format.zeros(experts * rows, columns, parameter.device).items():
        if suffix or not placeholder:
            module.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))
    return module
