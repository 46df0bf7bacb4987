"""A device: what it is, and what it has free. May import: formats, sensitivity.session."""

from dataclasses import dataclass

import torch

from bitplan.formats.errors import UsageError
from bitplan.formats.kernels.dispatch import Machine, machine
from bitplan.formats.sizes import parse_size
from bitplan.sensitivity.session import pick_device

CUDA_CONTEXT = 512 << 20
"""Bytes that a process's CUDA context and kernels take before the first tensor: an allowance, used where the memory is
named; a GPU that is queried has it in use already."""


@dataclass(frozen=True)
class Device:
    requested: str
    memory: int
    """Bytes of the whole, or of what is free."""
    context: int
    """Bytes of it that are in use before the model is loaded."""
    on: Machine


def find_device(gpu: str, device: str) -> Device:
    """The device of `--gpu SIZE` or `--gpu auto`. Raises UsageError where there is none to query."""
    if gpu != "auto":
        on = machine(pick_device(device)) if device != "auto" or torch.cuda.is_available() else Machine("cuda", (9, 0))
        return Device(f"a device of {gpu}", parse_size(gpu), 0 if on.kind == "cpu" else CUDA_CONTEXT, on)
    device = pick_device(device)
    if not device.startswith("cuda"):
        raise UsageError("--gpu auto queries the GPU, and there is none here: give its memory, as --gpu 24GiB")
    name = torch.cuda.get_device_name(device)
    return Device(f"what is free on {name}", free_memory(device), 0, machine(device))


def free_memory(device: str) -> int:
    """Bytes that a process can still allocate there."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as file:
        facts = dict(line.split(":") for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024
