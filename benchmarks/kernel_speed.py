"""One weight at a time: our kernels against dequantizing and multiplying, and against torch's float products.

Part of `make bench-speed`; `python -m benchmarks.kernel_speed --help` runs it alone. The weights are 4096×14336 and
14336×4096, as many copies in turn as no cache holds. May import: benchmarks, formats.
"""

import argparse
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch.nn.functional import linear as multiply

from benchmarks.machine import described
from benchmarks.peers.pace import DTYPES, copy_bandwidth, graphed, normal_, timed
from benchmarks.shapes import random_tensors
from bitplan.formats.base import Format, Tensors
from bitplan.formats.kernels import dispatch as kernels
from bitplan.formats.table import format_named

SIDES = ((4096, 14336), (14336, 4096))
BATCHES = (1, 4, 16, 64)
CACHES = 1 << 28
"""More bytes than any cache holds."""


def product(name: str, rows: int, columns: int, device: str, limit: float) -> dict[str, Any]:
    """Seconds of [batch, columns] times a weight of `rows` at each batch size: by the chosen kernel, and dequantized;
    of a float type, by torch. `name` may end with the inputs' type: int4-g64@bf16."""
    name, _, inputs = name.partition("@")
    dtype = DTYPES.get(inputs or name) or (torch.float32 if device == "cpu" else torch.bfloat16)
    result: dict[str, Any] = {"copy": copy_bandwidth(device), "kernel": "torch", "batches": {}}
    ways: dict[str, Callable[[torch.Tensor, Tensors], object]]
    if name in DTYPES:
        made = {"": normal_(torch.empty(rows, columns, dtype=dtype, device=device))}
        ways = {"seconds": lambda x, tensors: multiply(x, tensors[""])}
    else:
        format, made = format_named(name), random_tensors(format_named(name), rows, columns, device)
        result["kernel"] = kernels.choose(format, columns, dtype, kernels.machine(device)).name
        ways = {
            "seconds": lambda x, tensors: kernels.linear(format, x, tensors, columns, None),
            "dequantized": lambda x, tensors: Format.linear(format, x, tensors, columns, None),
        }
        if result["kernel"] == "dequantize":
            del ways["seconds"]
    result["bytes"] = sum(tensor.nbytes for tensor in made.values())
    copies = [made, *({s: t.clone() for s, t in made.items()} for _ in range(CACHES // result["bytes"]))]
    with torch.no_grad():
        for batch in BATCHES:
            x = torch.randn(batch, columns, device=device).to(dtype)
            cell = result["batches"][str(batch)] = {}
            for way, call in ways.items():
                cell[way] = _seconds(lambda tensors, call=call, x=x: call(x, tensors), copies, device, limit)
    return result


def _seconds(call: Callable[[Tensors], object], copies: list[Tensors], device: str, limit: float) -> float:
    """Of a call, on the copies in turn; on a GPU all of them in one graph, as a call is shorter than its launch."""
    if device == "cpu":
        turn = cycle(copies)
        return float(timed(lambda: call(next(turn)), device, limit)["seconds"])
    work, _ = graphed(lambda: [call(tensors) for tensors in copies], device)
    return float(timed(work, device, limit)["seconds"]) / len(copies)


def lines(found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Of products by name: head and rows. A cell is milliseconds by the kernel / dequantized."""
    batches = [f"batch {batch}, ms" for batch in BATCHES]
    rows = [("kernel / dequantized", "kernel", "bytes", *batches, "GB/s", "of copy")]
    for name, result in found.items():
        cells = [_cell(result["batches"][str(batch)]) for batch in BATCHES]
        first = result["batches"]["1"]
        speed = result["bytes"] / first.get("seconds", first.get("dequantized"))
        told = (f"{speed / 1e9:.1f}", f"{speed / result['copy']:.0%}")
        rows.append((name, result["kernel"], f"{result['bytes']:,}", *cells, *told))
    return rows


def _cell(cell: dict[str, float]) -> str:
    return " / ".join(f"{1e3 * cell[way]:.2f}" if way in cell else "–" for way in ("seconds", "dequantized"))


def markdown(rows: list[tuple[str, ...]]) -> str:
    ruled = [rows[0], ("---", *("---:" for _ in rows[0][1:])), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--formats", default="fp32,bf16,int8,int4-g64", metavar="A,B,…")
    parser.add_argument("--sides", type=int, nargs=2, metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--limit", type=float, default=0.5, help="seconds for each figure")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for sides in [tuple(arguments.sides)] if arguments.sides else SIDES:
        names = arguments.formats.split(",")
        found = {name: product(name, *sides, arguments.device, arguments.limit) for name in names}
        print(f"\n{sides[0]}×{sides[1]}\n\n{markdown(lines(found))}")
    print(f"\n{described(arguments.device)}")


if __name__ == "__main__":
    main()
