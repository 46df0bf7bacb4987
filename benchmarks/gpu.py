"""All that only a GPU shows, in ten minutes on one card: `make gpu`. Without a GPU it says so.

The gpu tests (among them each kernel against dequantized weights), tokens per second beside bf16 at batch 1, 4 and 16
on the shape of an 8B model, and estimated memory beside measured. A step
that takes longer than its share is stopped, and counts as failed. May import: everything.
"""

import subprocess
import sys
import time

import torch

from benchmarks.machine import described

STEPS: dict[str, tuple[str, int]] = {
    "gpu tests, kernels against dequantized weights": ("pytest -n 0 -m gpu", 190),
    "tokens per second, batch 1, 4, 16": (
        "benchmarks.speed --device cuda --8b --no-peers --no-kernels --limit 1 --redo all"
        " --rows bf16,int8,int4-g128,int3-g64",
        190,
    ),
    "memory, estimated and measured": ("benchmarks.memory --device cuda --contexts 512", 190),
}
"""What is run as `python -m`, and the seconds that it may take."""


def step(command: str, seconds: int) -> str | None:
    """Run a step; why it failed, or None."""
    try:
        done = subprocess.run([sys.executable, "-m", *command.split()], timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"took more than {seconds} s"
    return f"exit code {done.returncode}" if done.returncode else None


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: what only a GPU shows is not run")
        return
    print(described("cuda"), flush=True)
    failed = False
    for name, (command, seconds) in STEPS.items():
        print(f"\n# {name}", flush=True)
        began = time.perf_counter()
        reason = step(command, seconds)
        failed = failed or reason is not None
        print(f"{name}: {reason or 'done'}, {time.perf_counter() - began:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
