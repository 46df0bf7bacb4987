"""Throughput and peak memory of a loaded model. May import: formats.kv."""

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from bitplan.formats.kv.cache import new_cache

STEPS = 16
"""Tokens decoded one by one; the median step counts."""


@dataclass(frozen=True)
class Throughput:
    """Of one sequence: the prompt in one pass, then tokens decoded one by one. `peak_bytes` includes the KV cache, but
    not the weights."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_bytes: int


class Allocated:
    """The peak memory that torch's allocator allocated inside the context: by its statistics on a GPU, by the events
    of torch's profiler on a CPU."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> "Allocated":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.seen.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self.seen.__exit__(*error)
        assert self.seen.profiler is not None and self.seen.profiler.kineto_results is not None
        now = 0
        events = [event for event in self.seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()  # type: ignore[attr-defined]
            self.bytes = max(self.bytes, now)


@torch.inference_mode()
def run(model: PreTrainedModel, ids: Tensor, kv_format: str = "native") -> Throughput:
    """Process a prompt, int64 [length] without its last tokens, and decode those: once to warm up, once to measure
    memory and once to measure time."""
    prompt, rest = ids[None, : -STEPS - 1].to(model.device), ids[None, -STEPS - 1 :].to(model.device)

    def cache() -> Cache:
        if kv_format == "native":
            return DynamicCache(config=model.config)
        return new_cache(model, kv_format, 1, len(ids))

    def step(tokens: Tensor, held: Cache) -> float:
        began = perf_counter()
        model(input_ids=tokens, past_key_values=held, use_cache=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return perf_counter() - began

    step(rest[:, :1], cache())
    with Allocated(model.device) as allocated:
        held = cache()
        step(prompt, held)
        step(rest[:, :1], held)
        del held
    held = cache()
    prefill = step(prompt, held)
    decode = median(step(rest[:, i : i + 1], held) for i in range(STEPS))
    return Throughput(prompt.shape[1] / prefill, 1 / decode, allocated.bytes)
