"""The machine that figures come from, in a line. May import: torch."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def described(device: str = "cpu") -> str:
    """Processor or GPU, cores, threads, and versions."""
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        found = [
            line.partition(":")[2].strip()
            for line in facts.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        name = found[0] if found else name
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {packages}"
