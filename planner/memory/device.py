"""A device: what it is, and what it has free. May import: formats, sensitivity.session."""

from dataclasses import dataclass
from pathlib import Path

import psutil
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
    """Bytes that a process can still allocate there: on a CPU, what the system has available and what the limits of the
    process's control groups leave of it."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return min([psutil.virtual_memory().available, *cgroup_free()])


def cgroup_free(mounts: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left under the memory limit of each control group (v1 and v2) that the process is in, the groups above it
    included, since each of them limits it. Empty where there are none, as outside of Linux. `membership` has a line
    "hierarchy:controllers:path" for each hierarchy."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    roots: tuple[Path, ...]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots, names = (mounts, mounts / "unified"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            roots = (mounts / "memory",)
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, of which only the end, or the root alone, is mounted.
        here = Path(path.lstrip("/"))
        folders = {root / part for root in roots for part in (here, *here.parents) if ".." not in part.parts}
        left += [free for folder in folders if (free := _group_free(folder, *names)) is not None]
    return left


def _group_free(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Limit minus usage of one group, None where it sets no limit. Pages of files that were not read lately (a
    checkpoint's, say) count as used, but the kernel gives them back before it refuses an allocation."""
    try:
        most = (folder / limit).read_text(encoding="utf-8").strip()
        used = int((folder / usage).read_text(encoding="utf-8"))
        if most == "max":
            return None
        facts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return max(0, int(most) - used + int(facts.get(reclaimable, 0)))
    except OSError:
        return None
