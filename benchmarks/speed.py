"""How fast are packed models, and how fast are others'? `make bench-speed`, or `python -m benchmarks.speed --help`.

A Llama of random weights (fine for speed, never for quality) in each format, embedding and head too, and in two mixed
plans: tokens per second decoded at batch 1, 4 and 16, and read from a prompt of 512. Then one weight at a time, by
kernel_speed. A row is

    [TOOL ]FORMAT[@DTYPE][+compile][ dequantized][ again]

DTYPE is the inputs', bf16 on a GPU, else fp32. "dequantized": the same codes with no kernel chosen, as a reference.
"again": once more at the end, to show how the machine drifts. Peers run in environments of their own. A row is kept in
benchmarks/.results until --redo names it, so that a run that was cut off goes on; all rows should come from one run.
May import: everything.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.kernel_speed import SIDES, lines, markdown, product
from benchmarks.machine import described
from benchmarks.peers.pace import BATCHES, DTYPES, PREFILL, empty_model, measure
from benchmarks.shapes import MIXED, SHAPES, formats_of, random_model
from benchmarks.speed_goals import goals
from bitplan.formats.kernels import dispatch as kernels

HERE = Path(__file__).parent
PATIENCE = 900
"""Seconds that a peer's row may take."""
UNIFORM = (
    *("int8", "int8-g64", "int6-g64", "int5-g64", "int4-g128", "int4-g64", "int4-g32", "int3-g64", "int2-g64"),
    *("nf4", "int8-bnb", "fp8", "ternary-g64", "binary-g64"),
)
REFERENCED = ("int8", "int4-g64")
"""Formats that are also run dequantized, right after."""
PEERS_CPU = (
    *("torchao int8@bf16", "torchao int8@bf16+compile", "torchao int4-g64@bf16", "gptqmodel int4-g64@bf16"),
    *("gptqmodel int8-g64@bf16", "bitsandbytes nf4@bf16", "bitsandbytes int8@bf16"),
)
"""bf16 is what their CPU kernels are for."""
PEERS_CUDA = (
    *("torchao int8", "torchao int8+compile", "torchao int4-g64", "torchao int4-g64+compile"),
    *("gptqmodel int4-g64", "gptqmodel int8-g64", "bitsandbytes nf4", "bitsandbytes int8"),
)
ROW = re.compile(r"(?:(torchao|gptqmodel|bitsandbytes) )?([a-z0-9.-]+?)(?:@(\w+))?(\+compile)?( dequantized)?( again)?")


@dataclass(frozen=True)
class Workload:
    shape: str
    device: str
    threads: int
    limit: float

    @property
    def baseline(self) -> str:
        return "fp32" if self.device == "cpu" else "bf16"

    @property
    def folder(self) -> Path:
        return HERE / ".results" / "speed" / f"{self.shape}.{self.device.replace(':', '')}.{self.threads}"

    def rows(self, peers: bool) -> list[str]:
        own = [self.baseline]
        for name in (*UNIFORM, *MIXED):
            own += [name, *([f"{name} dequantized"] if name in REFERENCED else [])]
        if self.device == "cpu":
            own += ["bf16", *(f"{name}@bf16" for name in REFERENCED), f"{REFERENCED[-1]}@bf16 dequantized"]
        theirs = PEERS_CPU if self.device == "cpu" else PEERS_CUDA
        return [*own, *(theirs if peers else ()), f"{self.baseline} again"]


def row(text: str, workload: Workload) -> dict[str, Any]:
    """Measure a row; one that cannot be says why."""
    found = ROW.fullmatch(text)
    if not found:
        raise SystemExit(f"unknown row {text!r}: see --help")
    tool, name, dtype, compiled, dequantized, _ = found.groups()
    dtype = dtype or (name if name in DTYPES else workload.baseline)
    if tool:
        return peer(tool, name, dtype, bool(compiled), workload)
    config = SHAPES[workload.shape]
    without = patch.object(kernels, "choose", lambda *_: kernels.Kernel("dequantize", "asked for"))
    try:
        formats = None if name in DTYPES else formats_of(name, config)
        model = random_model(config, workload.device, DTYPES[dtype], formats)
        with without if dequantized else nullcontext():
            return measure(model, workload.device, workload.limit, bool(compiled))
    except Exception as error:  # a row that fails is a result; the others are still to come
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def peer(tool: str, name: str, dtype: str, compiled: bool, workload: Workload) -> dict[str, Any]:
    """A row in a peer's own environment, which is made where it is missing."""
    peers = HERE / "peers"
    if subprocess.run([peers / "make.sh", tool], stdout=sys.stderr, check=False).returncode:
        return {"failed": "its environment could not be made"}
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[workload.shape].save_pretrained(folder)
        command: list[Any] = [peers / f".venv-{tool}" / "bin" / "python", peers / f"speed_{tool}.py"]
        command += ["--config", folder, "--format", name, "--dtype", dtype, "--device", workload.device]
        command += ["--threads", workload.threads, "--limit", workload.limit, *(["--compile"] if compiled else [])]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(workload.threads), "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                list(map(str, command)),
                capture_output=True,
                encoding="utf-8",
                env=environment,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {PATIENCE} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def kept(name: str, workload: Workload, redo: list[str], work: Any) -> dict[str, Any]:
    """A result, from its file where there is one; what failed is tried again."""
    path = workload.folder / f"{name.replace(' ', '_')}.json"
    if path.exists() and name not in redo and "all" not in redo:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "failed" not in found:
            return found
    print(f"{name} …", file=sys.stderr, flush=True)
    began = time.time()
    result = work() | {"at": began, "machine": described(workload.device)}
    result["took"] = time.time() - began
    workload.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result), encoding="utf-8")
    torch.compiler.reset()  # it holds compiled models
    gc.collect()
    if workload.device != "cpu":
        torch.cuda.empty_cache()
    return result


def table(found: dict[str, dict[str, Any]], workload: Workload, weights: int) -> str:
    """A row of figures for each model, each beside its ratio to the baseline's."""
    heads = [f"batch {batch}" for batch in BATCHES]
    rows: list[tuple[str, ...]] = [("", "bytes", "bits", *heads, f"prefill {PREFILL}", "GB/s", "of copy", "spread")]
    base = found.get(workload.baseline, {})
    for name, result in found.items():
        if "failed" in result:
            rows.append((name, f"cannot: {result['failed']}", *[""] * (len(rows[0]) - 2)))
            continue
        cells = [result["decode"][str(batch)] for batch in BATCHES] + [result["prefill"]]
        bases = [base["decode"][str(batch)] for batch in BATCHES] + [base["prefill"]] if "decode" in base else cells
        shown = []
        for tokens, cell, other in zip((*BATCHES, PREFILL), cells, bases, strict=True):
            speed = tokens / cell["seconds"]
            shown.append(f"{speed:.{1 if speed < 100 else 0}f} ({other['seconds'] / cell['seconds']:.2f}×)")
        read = result["read"] / cells[0]["seconds"]
        copied = sum(result["copy"]) / len(result["copy"])
        spread = max(cell["spread"] for cell in cells)
        told = (f"{read / 1e9:.1f}", f"{read / copied:.0%}", f"{spread:.0%}")
        rows.append((name, f"{result['bytes']:,}", f"{8 * result['bytes'] / weights:.2f}", *shown, *told))
    return markdown(rows)


def notes(found: dict[str, dict[str, Any]], workload: Workload) -> list[str]:
    """What a reader must know beside the figures."""
    told = [f"{name}: {note}" for name, result in found.items() for note in result.get("notes", [])]
    if peers := dict.fromkeys(result["version"] for result in found.values() if "version" in result):
        told += [*peers, "peers leave the embedding in floats; a step reads but a row of it"]
    kept = [result.get("copy", []) for result in found.values()]
    copies = [speed / 1e9 for speeds in kept for speed in (speeds if isinstance(speeds, list) else [speeds])]
    told.append(
        f"copy bandwidth, bytes read and written: {min(copies):.1f} to {max(copies):.1f} GB/s" if copies else ""
    )
    ends = [result["at"] + result["took"] for result in found.values()]
    span = max(ends) - min(result["at"] for result in found.values())
    told.append(f"from first to last row {span / 60:.0f} minutes")
    if span > sum(result["took"] for result in found.values()) + 600:
        told.append("the rows come from several runs: ratios mix what the machine did at other times (--redo all)")
    return [*filter(None, told), described(workload.device)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", metavar="A,B,…", help="instead of all")
    for name in SHAPES:
        parser.add_argument(f"--{name}", dest="shape", action="store_const", const=name)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--kernels", action=argparse.BooleanOptionalAction, default=True, help="one weight at a time")
    parser.add_argument("--limit", type=float, default=3, help="seconds for each figure of a row, about")
    parser.add_argument("--redo", default="", metavar="A,B,…", help="rows to measure again, or: all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = arguments.shape or ("small" if arguments.device == "cpu" else "8b")
    workload = Workload(shape, arguments.device, arguments.threads, arguments.limit)
    redo = arguments.redo.split(",")
    names = arguments.rows.split(",") if arguments.rows else workload.rows(arguments.peers)
    with tempfile.TemporaryDirectory() as compiled:  # what a killed process leaves in the usual place may be broken
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled
        found = {name: kept(name, workload, redo, lambda name=name: row(name, workload)) for name in names}
    products: dict[str, dict[str, Any]] = {}
    for rows, columns in SIDES if arguments.kernels else ():
        for name in dict.fromkeys((workload.baseline, "bf16", *UNIFORM)):
            key = f"{name} {rows}×{columns}"
            work = lambda: product(name, rows, columns, workload.device, workload.limit / 10)  # noqa: B023, E731
            products[key] = kept(key, workload, redo, work)
    weights = empty_model(SHAPES[shape], torch.bfloat16).num_parameters()
    if arguments.json:
        print(json.dumps({"machine": described(arguments.device), "shape": shape, "rows": found, "kernels": products}))
        return
    print(f"Tokens per second (× {workload.baseline}), {shape}, {weights:,} weights, {arguments.device}\n")
    print(table(found, workload, weights))
    for rows, columns in SIDES if arguments.kernels else ():
        own = {key.split()[0]: result for key, result in products.items() if key.endswith(f" {rows}×{columns}")}
        print(f"\nOne weight of {rows}×{columns}: milliseconds\n\n{markdown(lines(own))}")
    print(f"\n{markdown(goals(found, products, workload.device))}\n")
    print("\n".join(notes(found | products, workload)))


if __name__ == "__main__":
    main()
