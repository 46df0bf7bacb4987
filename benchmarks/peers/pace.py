"""How fast a model runs: one measurement for bitplan and for its peers, who run it in environments of their own.

A decoded token is one forward and an argmax, over a StaticCache of 128 positions that begins with a prompt of 16; a
prefill reads a prompt of 512 tokens into such a cache and makes the last logits. On a GPU both are CUDA graphs, for all
alike. A peer's script gives `run` its builders. May import: torch, transformers.
"""

import argparse
import importlib.metadata
import json
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import chdir
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, StaticCache

BATCHES = (1, 4, 16)
PROMPT, CONTEXT, PREFILL = 16, 128, 512
STEPS, REPEATS = 8, 5
"""Timed calls in a row, and how often: the median is told."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVIATION = 0.02
"""Of random weights, about what trained ones have, so that activations stay finite."""


# Models of random weights


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


@torch.no_grad()
def fill(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Give a model on meta random weights: what is not on meta stays, what was tied is tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    tensor = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
                    made[id(parameter)] = nn.Parameter(normal_(tensor) if tensor.ndim > 1 else tensor)
                module._parameters[name] = made[id(parameter)]
    with torch.device(device):  # its buffer is computed, not stored
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.requires_grad_(False)


def normal_(tensor: Tensor) -> Tensor:
    """Fill with normal values; a million of them, over and over, as torch takes many seconds for more."""
    flat = tensor.flatten()
    block = torch.randn(min(len(flat), 1 << 20), device=tensor.device).mul_(DEVIATION).to(tensor.dtype)
    for part in flat.split(len(block)):
        part.copy_(block[: len(part)])
    return tensor


def weight_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of all weights, shared ones once, and those that a decoded token reads: all but an embedding that is not
    the head too, of which it looks up a row."""
    sizes = {id(tensor): stored(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    head = {id(tensor) for tensor in model.get_output_embeddings().parameters()}
    embedding = list(model.get_input_embeddings().parameters())
    looked_up = sum(sizes[id(tensor)] for tensor in embedding if id(tensor) not in head)
    return sum(sizes.values()), sum(sizes.values()) - looked_up


def stored(tensor: Any) -> int:
    """Bytes of a tensor, or of those that a tensor subclass is made of."""
    if not isinstance(tensor, Tensor):
        return 0
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


# Time


def seconds(work: Callable[[], object], device: str, calls: int = 1) -> float:
    """Of one of `calls` calls in a row; on a GPU from event to event."""
    if not device.startswith("cuda"):
        began = perf_counter()
        for _ in range(calls):
            work()
        return (perf_counter() - began) / calls
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1000 / calls


def timed(work: Callable[[], object], device: str, limit: float, steps: int = STEPS) -> dict[str, Any]:
    """Median seconds of a call: REPEATS times `steps`, after a warm-up; fewer, two at least, where that takes more than
    `limit` seconds. `spread` is (slowest - fastest) / median of the repeats."""
    once = seconds(work, device)
    if once < limit and steps > 1:  # it may have been the warm-up that took so long
        once = seconds(work, device)
    calls = max(1, min(steps, int(limit / REPEATS / once)))
    repeats = max(2, min(REPEATS, int(limit / once))) if calls == 1 else REPEATS
    found = [seconds(work, device, calls) for _ in range(repeats)]
    middle = median(found)
    return {"seconds": middle, "spread": (max(found) - min(found)) / middle, "calls": calls * repeats}


def graphed(work: Callable[[], object], device: str) -> tuple[Callable[[], object], str]:
    """`work` as a CUDA graph, or as it is: then why, if not because there is no GPU."""
    if not device.startswith("cuda"):
        return work, ""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return work, f"no CUDA graph: {str(error).splitlines()[0]}"
    return graph.replay, ""


def copy_bandwidth(device: str) -> float:
    """Bytes per second of copying a tensor far larger than any cache, those read and those written."""
    source = torch.ones(1 << (30 if device.startswith("cuda") else 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device, limit=0.5)["seconds"]


@torch.no_grad()
def measure(model: PreTrainedModel, device: str, limit: float, compiled: bool = False) -> dict[str, Any]:
    """Seconds of a decoded step at each batch size and of a prefill, each in some `limit` seconds; the bytes of the
    weights, and how many of them a step reads."""
    # Not "reduce-overhead": its CUDA graphs would lie inside ours.
    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
    size, read = weight_bytes(model)
    result: dict[str, Any] = {"bytes": size, "read": read, "copy": [copy_bandwidth(device)], "decode": {}, "notes": []}
    vocabulary = model.config.vocab_size
    for batch in BATCHES:
        cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        prompt = torch.randint(vocabulary, (batch, PROMPT), device=device)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def step(ids: Tensor = ids, cache: StaticCache = cache) -> None:
            logits = forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids.copy_(logits[:, -1].argmax(-1, keepdim=True))

        # The cache holds them all: one that compiles, three before a graph is made, two before time is taken, 40 timed.
        if compiled:
            step()
        work, note = graphed(step, device)
        result["decode"][str(batch)] = timed(work, device, limit)
        result["notes"] += [f"batch {batch}, {note}"] if note else []
    cache = StaticCache(config=model.config, max_cache_len=PREFILL)
    prompt = torch.randint(vocabulary, (1, PREFILL), device=device)

    def prefill() -> None:
        cache.reset()
        forward(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)  # makes the cache, outside of a graph
    if compiled:
        prefill()
    work, note = graphed(prefill, device)
    result["prefill"] = timed(work, device, limit, steps=1)
    result["notes"] += [f"prefill, {note}"] if note else []
    result["copy"].append(copy_bandwidth(device))
    return result


# Peers


Build = Callable[[str, PreTrainedConfig, torch.dtype, str], tuple[PreTrainedModel, str]]
"""(format, config, dtype, device) → a model of random weights in the tool's format of that name, and what to know."""


def run(tool: str, build: Build) -> None:
    """Measure the row that the arguments ask for, and print a line of JSON. What `build` raises is why it cannot be."""
    parser = argparse.ArgumentParser(description=f"Time {tool} on a model of random weights.")
    parser.add_argument("--config", required=True, help="a folder with config.json")
    parser.add_argument("--format", required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--limit", type=float, required=True)
    arguments = parser.parse_args()
    config = AutoConfig.from_pretrained(os.path.abspath(arguments.config))
    torch.set_num_threads(arguments.threads)
    # The tools print on stdout, from C too. The last line is the result.
    stdout = os.dup(1)
    os.dup2(2, 1)
    result: dict[str, Any] = {"version": f"{tool} {importlib.metadata.version(tool)}, torch {torch.__version__}"}
    try:
        with tempfile.TemporaryDirectory() as scratch, chdir(scratch):  # gptqmodel leaves files where it is run
            model, note = build(arguments.format, config, DTYPES[arguments.dtype], arguments.device)
            result |= measure(model, arguments.device, arguments.limit, arguments.compile)
            result["notes"] += [note] if note else []
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        result["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    os.write(stdout, (json.dumps(result) + "\n").encode())
