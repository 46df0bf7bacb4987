"""What an audit takes, by tier, over the size of a model of random weights. `make bench-audit`.

Each row is a process of its own: seconds without loading the model, and peak resident memory. "forward + backward" is
one pass over the same text as training makes it, with transformers alone, in float32 as the audit computes: the ratio
is to it, of processor time. "24 units" measures each alone in one format on the search text, a quarter of the tokens:
by running the whole model for each, or as the audit does, from the unit's block on. Each process has one thread.
`--sizes` takes millions of parameters (60, 250, 1500) or a shape of `benchmarks.shapes` (8b), `--tiers` the rows; with
`--device cuda` the peak is the device's. With `--peers`, other tools score their layers on the same text, in three
formats. May import: everything.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from benchmarks.machine import described

SIZES = {"60": (512, 1408, 14, 8192), "250": (1024, 2816, 20, 8192), "1500": (2048, 5632, 32, 32000)}
"""Millions of parameters → hidden size, intermediate size, layers, vocabulary."""
SHAPES = ("8b", "small", "tiny")
TIERS = (
    "forward + backward",
    "curvature",
    "curvature, 2 GiB",
    "curvature, one rank",
    "curvature, two ranks",
    "weights",
    "24 units, whole model",
    "24 units, from the block",
    "measured",
)
PEERS = {"AutoScheme": "auto-round", "ModelOpt gradient": "modelopt"}
"""Rows of other tools → their environments (`peers/make.sh NAME`), with the formats of PEER_FORMATS, bits and group."""
PEER_FORMATS = "8-128,4-64,2-64"
FORMATS = "int8,int6-g64,int5-g64,int4-g32,int4-g64,int4-g128,int3-g32,int3-g64,int3-g128,int2-g32,int2-g64,nf4"


def make(folder: Path, size: str, device: str) -> None:
    """A Llama of random bf16 weights, with a byte tokenizer."""
    import torch
    from transformers import LlamaConfig

    from benchmarks import shapes
    from tests.tiny import tokenizer

    if size in SHAPES:
        config = shapes.SHAPES[size]
    else:
        hidden, intermediate, layers, vocabulary = SIZES[size]
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 256,
            vocab_size=vocabulary,
            tie_word_embeddings=True,
        )
    shapes.random_model(config, device, torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def work(model: Path, tier: str, tokens: int, device: str) -> None:
    """One row, in this process: prints seconds on stdout, and on a GPU its peak in MiB."""
    import torch

    from bitplan.formats.scheme import QuantScheme
    from bitplan.sensitivity import ranks
    from bitplan.sensitivity import source as sources
    from bitplan.sensitivity.audit import audit
    from bitplan.sensitivity.curvature import evenly
    from bitplan.sensitivity.measured import Prefixes
    from bitplan.sensitivity.session import open_session
    from bitplan.sensitivity.texts.read import read_texts

    source = sources.find(model)
    texts = read_texts(source, tokens=tokens, length=512)
    device = ranks.start(device)
    if tier == "forward + backward":
        whole = sources.load_model(source, device).float().requires_grad_()
        began, busy = time.perf_counter(), time.process_time()
        for ids in texts.calibration.ids.split(1):
            ids = ids.to(device)
            logits = whole(input_ids=ids, use_cache=False).logits[0, :-1].float()
            torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    elif tier.startswith("24"):
        session = open_session(source, texts, device=device)
        units, reference = evenly(session.graph.units, 24), session.search_reference
        began, busy = time.perf_counter(), time.process_time()
        prefixes = Prefixes(session.chain(), reference) if "block" in tier else None
        for unit in units:
            weight = session.weight_cache.dequantized(unit, QuantScheme("int4-g64", "nearest"))
            if prefixes is None:
                session.swapper.exchange(unit, weight)
                reference.evaluate(session.model)
                session.swapper.restore(unit)
            else:
                prefixes.evaluate(unit.parameter, session.swapper.shaped(unit, weight))
    else:
        session = open_session(source, texts, device=device, memory=2 << 30 if "GiB" in tier else None)
        began, busy = time.perf_counter(), time.process_time()
        audit(session, tuple(FORMATS.split(",")), tier=tier.partition(",")[0])
    if ranks.rank() == 0:
        peak = [torch.cuda.max_memory_allocated() / (1 << 20)] if device.startswith("cuda") else []
        print(json.dumps([time.perf_counter() - began, time.process_time() - busy, *peak]))


def scored_by_peer(model: Path, row: str, tokens: int, device: str) -> tuple[float, float, float]:
    """As `measured`, but on the CPU."""
    from safetensors.torch import save_file

    from bitplan.sensitivity import source as sources
    from bitplan.sensitivity.texts.read import read_texts

    name = PEERS[row]
    subprocess.run(["bash", "benchmarks/peers/make.sh", name], check=True)
    source = sources.find(model)
    ids, tokenizer = read_texts(source, tokens=tokens, length=512).calibration.ids, sources.load_tokenizer(source)
    save_file({"ids": ids.clone()}, model / "ids.st")
    # Two blocks a line, since a line of fewer tokens than a block is passed over.
    lines = [json.dumps({"text": tokenizer.decode(block)}) for block in ids.repeat(1, 2).tolist()]
    (model / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    script = f"benchmarks/peers/score_{name.replace('-', '_')}.py"
    text = {"auto-round": ["--lines", str(model / "lines.jsonl"), "--samples", str(len(ids))]}
    command = [f"benchmarks/peers/.venv-{name}/bin/python", script, "--model", str(model), "--formats", PEER_FORMATS]
    return finished(
        [*command, *text.get(name, ["--ids", str(model / "ids.st")])], {**os.environ, "OMP_NUM_THREADS": "1"}
    )


def measured(model: Path, tier: str, tokens: int, device: str) -> tuple[float, float, float]:
    """Seconds, seconds of processor time (of the first process), and peak resident MiB of the largest process, or of
    the GPU."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "ranks" in tier else []
    command = [sys.executable, *launch, "-m", "benchmarks.audit", "--work", tier, "--model", str(model)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "BITPLAN_CACHE": cache, "OMP_NUM_THREADS": "1"}
        return finished([*command, "--tokens", str(tokens), "--device", device], environment)


def finished(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, encoding="utf-8")
    assert child.stdout is not None
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    seconds, busy, peak, *_ = (*json.loads(out.strip().splitlines()[-1]), usage.ru_maxrss / 1024)
    return seconds, busy, peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["60", "250"], choices=[*SIZES, *SHAPES])
    parser.add_argument("--tiers", nargs="+", default=list(TIERS[:-1]), choices=TIERS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", action="store_true", help="also AutoScheme and ModelOpt (an hour)")
    parser.add_argument("--work", choices=TIERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.model, arguments.work, arguments.tokens, arguments.device)
        return
    formats = FORMATS.count(",") + 1
    print(f"{described(arguments.device)}; {arguments.tokens} calibration tokens, {formats} formats (peers: 3)")
    print(f"{'size':>6}  {'tier':24} {'seconds':>9} {'of CPU':>7} {'ratio':>6} {'peak MiB':>9}")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            # In a process of its own: what this one takes counts in its children's peaks.
            making = get_context("spawn").Process(target=make, args=(Path(folder), size, arguments.device))
            making.start()
            making.join()
            if making.exitcode:
                raise SystemExit(f"no model of size {size} could be made")
            plain = None
            for tier in [*arguments.tiers, *(PEERS if arguments.peers else ())]:
                row = scored_by_peer if tier in PEERS else measured
                seconds, busy, peak = row(Path(folder), tier, arguments.tokens, arguments.device)
                plain = plain or (busy if tier == "forward + backward" else None)
                ratio = f"{busy / plain:.2f}" if plain else "–"
                print(f"{size:>6}  {tier:24} {seconds:>9.1f} {busy:>7.1f} {ratio:>6} {peak:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
