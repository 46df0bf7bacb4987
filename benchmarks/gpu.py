"""All that only a GPU shows, in ten minutes on one card: `make gpu`. Without a GPU it says so.

The gpu tests (among them each kernel against dequantized weights), tokens per second beside bf16 at batch 1, 4 and 16
on the shape of an 8B model, estimated memory beside measured, and an audit of the shape of an 8B model. A step that
takes longer than its share, and what the steps before have left of theirs, is stopped, and counts as failed.
May import: everything.
"""

import os
import signal
import subprocess
import sys
import time

import torch

from benchmarks.machine import described

STEPS: dict[str, tuple[str, int]] = {
    "gpu tests, kernels against dequantized weights": ("pytest -n 0 -m gpu", 120),
    "tokens per second, batch 1, 4, 16": (
        "benchmarks.speed --device cuda --8b --no-peers --no-kernels --limit 1 --redo all"
        " --rows bf16,int8,int4-g128,int3-g64",
        130,
    ),
    "memory, estimated and measured": ("benchmarks.memory --device cuda --contexts 512", 90),
    "audit, 2,048 tokens, 12 formats": (
        "benchmarks.audit --device cuda --sizes 8b --tiers curvature --tokens 2048",
        240,
    ),
}
"""What is run as `python -m`, and the seconds that it may take."""


def step(command: str, seconds: float) -> str | None:
    """Run a step; why it failed, or None."""
    process = subprocess.Popen([sys.executable, "-m", *command.split()], start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.wait()
        return f"took more than {seconds:.0f} s"
    return f"exit code {code}" if code else None


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: what only a GPU shows is not run")
        return
    print(described("cuda"), flush=True)
    failed, left = False, 0.0
    for name, (command, seconds) in STEPS.items():
        print(f"\n# {name}", flush=True)
        began = time.perf_counter()
        reason = step(command, seconds + left)
        left = max(0.0, left + seconds - (time.perf_counter() - began))
        failed = failed or reason is not None
        print(f"{name}: {reason or 'done'}, {time.perf_counter() - began:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
