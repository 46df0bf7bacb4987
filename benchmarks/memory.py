"""Does a model take the memory that was estimated? `make bench-memory`.

Six plans × two contexts of a Llama of random weights: resident bytes, the most while loading, and the most while a
prompt is read by chunks and a token is decoded. On a GPU the figures are its allocator's. On a CPU they are, for use,
what torch's allocator reports to its profiler, and for loading, how far the process's anonymous memory grows, estimated
as the plan's bytes and the largest unit in bf16; loading and use run in processes of their own.
Random weights are fine for memory, never for quality. May import: everything.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Thread
from time import perf_counter, sleep
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import described
from benchmarks.shapes import LLAMA_8B
from bitplan.formats.kernels.dispatch import machine
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.evaluate.throughput import Allocated
from bitplan.planner.load import find_for, load_planned, resident_bytes
from bitplan.planner.memory.budget import plan_memory
from bitplan.planner.memory.footprint import Workload
from bitplan.planner.plan import Budget, Plan
from bitplan.planner.report.model_card import save
from bitplan.planner.report.tables import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.graph import build_graph
from bitplan.sensitivity.profile import read, write
from bitplan.sensitivity.session import _describe
from bitplan.sensitivity.texts.text import Blocks, Texts

SMALL = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
PLANS = {
    "int8": ("int8", "native"),
    "int4-g64": ("int4-g64", "native"),
    "int3-g64": ("int3-g64", "native"),
    "nf4": ("nf4", "native"),
    "mixed": ("int8 int4-g64 int3-g32 fp8", "native"),
    "mixed, KV int8": ("int8 int4-g64 int3-g32", "int8"),
}
"""Name → the formats that the units take in turn, and the KV cache's."""
CHUNK = 256


def make_model(config: LlamaConfig, folder: Path) -> None:
    """A checkpoint of seeded random weights in bf16, in shards."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def make_plan(source: sources.Source, formats: list[str], kv_format: str) -> Plan:
    """Formats in turn over the groups, rounded by `nearest` while loading."""
    model = sources.load_model(source)
    graph = build_graph(model, ())
    none = Blocks(torch.zeros(1, 8, dtype=torch.long))
    facts = _describe(source, Texts(none, none, none, none, "none", 8), "bfloat16", model.num_parameters(), "cpu")
    of = {name: uniform_plan(SimpleNamespace(graph=graph, provenance=facts), name, "nearest") for name in formats}  # type: ignore[arg-type]
    groups = list(dict.fromkeys(unit.group for unit in graph.units))
    choice = {group: formats[i % len(formats)] for i, group in enumerate(groups)}
    units = tuple(
        next(unit for unit in of[choice[asked.group]].units if unit.name == asked.name)
        for asked in of[formats[0]].units
    )
    total = sum(unit.bytes for unit in units) + sum(kept.bytes for kept in of[formats[0]].unquantized)
    return of[formats[0]].model_copy(
        update={
            "units": units,
            "bytes": total,
            "bits_per_weight": total * 8 / facts.model.parameters,
            "budget": Budget(requested=" ".join(formats), weights=total),
            "workload": Workload(kv_format=kv_format),
        }
    )


# One plan, in a process of its own


def anonymous() -> int:
    """Bytes of this process's memory that no file stands behind."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Grown:
    """How far this process's anonymous memory grows inside, looked at every millisecond; on a GPU its allocator's."""

    def __init__(self, device: str):
        self.device, self.bytes, self.going = device, 0, True

    def __enter__(self) -> "Grown":
        gc.collect()
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        self.before = anonymous() if self.device == "cpu" else torch.cuda.memory_allocated()
        self.thread = Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while self.going:
            self.bytes = max(self.bytes, anonymous() - self.before)
            sleep(0.001)

    def __exit__(self, *error: Any) -> None:
        self.going = False
        self.thread.join()
        if self.device != "cpu":
            self.bytes = torch.cuda.max_memory_allocated() - self.before


@torch.inference_mode()
def use(model: Any, workload: Workload) -> None:
    """Read a prompt but for its last token by chunks, then decode one."""
    ids = torch.randint(0, model.config.vocab_size, (workload.batch, workload.context - 1), device=model.device)
    length = {"max_new_tokens": 2, "min_new_tokens": 2, "prefill_chunk_size": workload.prefill_chunk}
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)


def loading(plan: Plan, folder: Path, saved: Path, device: str) -> dict[str, Any]:
    """Round while loading, and save."""
    plan, source = find_for(plan, folder)
    with Grown(device) as grown:
        model = load_planned(plan, source, device)
    found = {"resident": resident_bytes(model), "load": grown.bytes}
    save(model, plan, source, saved, force=True)
    return found


def reloading(plan: Plan, saved: Path, device: str, contexts: list[int]) -> dict[str, Any]:
    """Load what was saved, and use it."""
    with Grown(device) as grown:
        began = perf_counter()
        model = AutoModelForCausalLM.from_pretrained(saved, device_map=None if device == "cpu" else device)
        seconds = perf_counter() - began
        # What is mapped from the file is read now.
        total = sum(int(parameter.view(torch.uint8)[..., ::512].sum()) for parameter in model.parameters())
    assert total
    found: dict[str, Any] = {"reload": grown.bytes, "reload_seconds": seconds, "runs": []}
    source = sources.find(saved)
    for context in contexts:
        workload = Workload(context=context, prefill_chunk=CHUNK, kv_format=plan.workload.kv_format)
        needs = plan_memory(plan, source, machine(device), workload)
        with Allocated(model.device) as using:
            use(model, workload)
        estimated = plan.bytes + needs.kv_cache + needs.workspace
        found["runs"].append({"context": context, "estimated": estimated, "peak": plan.bytes + using.bytes})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--8b", dest="large", action="store_true", help="a Llama-3-8B's shape")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1536])
    parser.add_argument("--job", nargs=4, metavar=("WHAT", "PLAN", "MODEL", "SAVED"), help="(one plan, as a child)")
    arguments = parser.parse_args()
    if arguments.job:
        what, file, folder, saved = arguments.job
        plan, device = read(Path(file), Plan), arguments.device
        if what == "load":
            print(json.dumps(loading(plan, Path(folder), Path(saved), device)))
        else:
            print(json.dumps(reloading(plan, Path(saved), device, arguments.contexts)))
        return
    print(described(arguments.device))
    with tempfile.TemporaryDirectory(prefix="bitplan-memory-") as place:
        folder = Path(place) / "model"
        make_model(LLAMA_8B if arguments.large else SMALL, folder)
        source, rows = sources.find(folder), []
        for name, (formats, kv_format) in PLANS.items():
            file = Path(place) / "plan.json"
            plan = make_plan(source, formats.split(), kv_format)
            write(file, plan)
            found: dict[str, Any] = {}
            for what in ("load", "use"):
                command = [sys.executable, "-m", "benchmarks.memory", "--job", what, str(file), str(folder)]
                command += [f"{place}/saved", "--device", arguments.device]
                command += ["--contexts", *map(str, arguments.contexts)]
                done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr}")
                found |= json.loads(done.stdout.splitlines()[-1])
            print(name, json.dumps(found), file=sys.stderr)
            rows += report(name, plan, found)
    head = ("plan", "", "planned or estimated", "measured", "measured / estimated")
    print(table(head, rows, left=2))


def report(name: str, plan: Plan, found: dict[str, Any]) -> list[tuple[str, ...]]:
    largest = max(2 * unit.experts * unit.rows * unit.columns for unit in plan.units)
    lines = [
        ("resident", plan.bytes, found["resident"]),
        ("load, rounding on the way", plan.bytes + largest, found["load"]),
        ("load of the saved checkpoint", plan.bytes, found["reload"]),
        *((f"use, {run['context']:,} tokens", run["estimated"], run["peak"]) for run in found["runs"]),
    ]
    return [(name, what, f"{told:,}", f"{seen:,}", f"{seen / told:.4f}") for what, told, seen in lines]


if __name__ == "__main__":
    main()
