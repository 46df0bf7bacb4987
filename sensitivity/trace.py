"""Sees every place where a unit's weight meets an input, whatever module wrote it.

Inside `Trace`, products and lookups are recognised by the weight's storage: so a tied head, an expert's slice of a
3-D parameter and a subclassed embedding are all seen. May import: torch only.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LINEAR = {torch.nn.functional.linear, torch._C._nn.linear}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
BATCHED_PRODUCTS = {torch.bmm, Tensor.bmm}
SUMMED_PRODUCTS = {torch.addmm, Tensor.addmm}


@dataclass(frozen=True)
class Use:
    """One meeting of a weight and an input."""

    parameter: str
    expert: int
    """Index into a 3-D parameter, 0 otherwise."""
    lookup: bool
    """Rows are taken by index: `input` is int64 ids; otherwise a product: `input` is [..., columns]."""
    input: Tensor
    output: Tensor


class Trace(TorchFunctionMode):
    """Calls `seen(use)` for each use of `parameters` (name → parameter). Looked-up rows come out requiring grad,
    so that a backward pass reaches every output though no parameter asks for a gradient."""

    def __init__(self, parameters: dict[str, Tensor], seen: Callable[[Use], None]):
        super().__init__()
        self.owners: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        """By storage: where transformers splits a checkpoint's tensor, several parameters are views of one."""
        for name, parameter in parameters.items():
            self.owners[parameter.untyped_storage().data_ptr()].append((name, parameter))
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in BATCHED_PRODUCTS and isinstance(args[1], Tensor) and self.owner(args[1]) is not None:
            # A product for each expert, so that each has an output of its own.
            pairs = zip(args[0].unbind(), args[1].unbind(), strict=True)
            return torch.stack([self.__torch_function__(torch.mm, types, pair) for pair in pairs])
        out = func(*args, **kwargs)
        if func in LINEAR:
            x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            self._meet(weight, x, out)
        elif func in PRODUCTS and isinstance(args[1], Tensor):
            self._meet(args[1], args[0], out)
        elif func in SUMMED_PRODUCTS and isinstance(args[2], Tensor):
            self._meet(args[2], args[1], out)
        elif func in (torch.nn.functional.embedding, torch.embedding):
            ids, weight = (args[0], args[1]) if func is torch.nn.functional.embedding else (args[1], args[0])
            found = self.owner(weight)
            if found is not None:
                if torch.is_grad_enabled():
                    out = out.requires_grad_().clone()
                self.seen(Use(found[0], 0, True, ids, out))
        return out

    def owner(self, weight: Tensor) -> tuple[str, Tensor] | None:
        """The parameter that a tensor is, or is a part of."""
        found = self.owners.get(weight.untyped_storage().data_ptr(), [])
        starts = [(parameter.storage_offset(), name, parameter) for name, parameter in found]
        at = weight.storage_offset()
        whole = next(((name, parameter) for start, name, parameter in starts if start == at), None)
        parts = ((name, parameter) for start, name, parameter in starts if start <= at < start + parameter.numel())
        return whole or next(parts, None)

    def touches(self, args: tuple) -> list[str]:
        """Names of the parameters that are themselves among `args`."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        found = (self.owner(tensor) for tensor in tensors)
        return [owner[0] for owner, tensor in zip(found, tensors, strict=True) if owner and owner[1] is tensor]

    def _meet(self, weight: Tensor, x: Tensor, out: Tensor) -> None:
        found = self.owner(weight)
        if found is not None:
            name, parameter = found
            start = weight.storage_offset() - parameter.storage_offset()
            expert = start // parameter.stride(0) if parameter.ndim == 3 and weight.ndim == 2 else 0
            self.seen(Use(name, expert, False, x, out))
