"""Several processes that share one audit, as torchrun starts them: each takes a part of the text or of the units.

One process alone is rank 0 of 1, and every function here does nothing. Sums go over gloo on CPUs and NCCL on GPUs.
May import: formats.errors.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bitplan.formats.errors import BitplanError, UsageError, first_line

T = TypeVar("T")


def start(device: str) -> str:
    """Join the others where torchrun has started this process. Returns the rank's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence[T]) -> list[T]:
    """This rank's items: every world-th."""
    return list(items[rank() :: world()])


def add(tensors: Iterable[Tensor]) -> None:
    """Make each tensor the sum of all ranks', in place; a tensor that comes twice is added once. Raises BitplanError
    where another rank has ended."""
    if world() == 1:
        return
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        if tensor.numel():
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:
                raise _ended(error) from None


def gathered(value: Any) -> list[Any]:
    """Every rank's value, by rank. Raises BitplanError where another rank has ended."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise _ended(error) from None
    return values


def refuse_disagreement(**facts: str) -> None:
    """Raises UsageError where the ranks do not work on the same things, which `facts` name."""
    for others in gathered(facts):
        if differing := [name for name, value in facts.items() if others[name] != value]:
            raise UsageError(
                f"the ranks do not have the same {' and '.join(differing)}: give the same command, files and versions"
                " on every machine"
            )


def _ended(error: RuntimeError) -> BitplanError:
    return BitplanError(
        f"another rank has ended ({first_line(error)}): see its own message, then give the same command again; blocks"
        " that were finished are kept"
    )
