"""What a model needs on its device beside its weights: KV cache and workspace, estimated on meta tensors.

The model's own forward runs without data, on the meta device, while every storage that it makes is counted from its
making to its end. So no formula stands for an architecture. What a forward hides from torch is added by name: what
attention keeps inside, and on CUDA the granularity of the allocator and cuBLAS' workspace.
May import: formats, sensitivity, planner.plan, planner.memory.kv_size/repeats.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from bitplan.formats.errors import BitplanError, first_line
from bitplan.formats.kernels.dispatch import Machine, as_if_on
from bitplan.formats.kv.cache import new_cache
from bitplan.formats.modules import pack_parameter
from bitplan.formats.table import format_named
from bitplan.planner.memory.kv_size import layer_bytes
from bitplan.planner.memory.repeats import find_repeats, skipped
from bitplan.planner.plan import Workload
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import UnitEntry
from bitplan.sensitivity.source import Source

CUBLAS = {9: 32 << 20, 10: 32 << 20}
"""Bytes that cuBLAS takes once, by major compute capability; 8.125 MiB elsewhere (torch's CUDAHooks)."""


INSIDE, SMALL = 1.02, 1 << 16
"""An allowance for what torch's ops make and drop inside themselves: a part, and bytes."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes beside the weights. The peaks hold what is live at once, the KV cache not counted."""

    kv_cache: int
    prefill: int
    decode: int

    @property
    def workspace(self) -> int:
        return max(self.prefill, self.decode)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside, while they live. `peak` is the most at once since `restart`."""

    def __init__(self, granule: int = 1):
        super().__init__()
        self.granule, self.now, self.peak = granule, 0, 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def restart(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in known and storage not in self.seen:
                    self.seen.add(storage)
                    size = -(-storage.nbytes() // self.granule) * self.granule
                    self.add(size)
                    weakref.finalize(storage, self.add, -size)
        return out


class AsOnMachine(TorchFunctionMode):
    """torch's fused attention as the machine runs it: on meta tensors torch would multiply it out. Its product of
    grouped rows, which on meta tensors is there in bfloat16 only. And conditions on data, which count as false."""

    def __init__(self, live: LiveBytes, on: Machine):
        super().__init__()
        self.live, self.on = live, on

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return False  # the cache is not empty, the mask cannot be left out
        if func == torch._grouped_mm and args[0].is_meta:
            rows, weight = args[:2]
            return rows.new_empty(len(rows), weight.shape[-1])
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value, *rest = args
            if query.shape[-1] == value.shape[-1]:
                return self.fused(query, key, rest[0] if rest else kwargs.get("attn_mask"))
        return func(*args, **kwargs)

    def fused(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, size = query.shape
        bias = None if mask is None or mask.dtype != torch.bool else torch.empty_like(mask, dtype=query.dtype)
        out = torch.empty_like(query)
        inside = torch.empty(batch, heads, length, device="meta")  # the sums of exponentials
        if self.on.kind == "cpu":
            # Tiles of queries by 512 keys, in float32 and in the model's type, for every thread.
            tile = 256 if length >= 768 else 64 if length >= 192 else 32
            keys = min(512, key.shape[2])
            values = tile * (keys * (1 if query.dtype == torch.float32 else 2) + 2 + size)
            packed = key.nbytes * 2 if query.dtype != torch.float32 else 0
            tiles = torch.empty(torch.get_num_threads() * values * 4 + packed, dtype=torch.uint8, device="meta")
            del tiles
        del bias, inside
        return out


def meta_model(source: Source, dtype: str, packed: Iterable[tuple[UnitEntry, str]]) -> PreTrainedModel:
    """The model on the meta device, no byte of it read, with units in their formats."""
    config = sources.transformers_config(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=source.trust_remote_code
        )
    for unit, format in packed:
        path, _, name = unit.parameter.rpartition(".")
        for holder in (path, *unit.tied):
            pack_parameter(model.get_submodule(holder), name, format_named(format))
    return model.eval().requires_grad_(False)


@contextmanager
def counting(on: Machine) -> Iterator[LiveBytes]:
    live = LiveBytes(1 if on.kind == "cpu" else 512)
    with torch.no_grad(), as_if_on(on), live, AsOnMachine(live, on):
        yield live


def estimate_memory(model: PreTrainedModel, workload: Workload, on: Machine) -> MemoryEstimate:
    """What `model`, on the meta device, needs on a machine for a workload of a given context. Raises BitplanError where
    its forward needs data."""
    fixed = 0 if on.kind == "cpu" else CUBLAS.get(on.capability[0], 8320 << 10)
    repeats = find_repeats(model)
    for left_out in (repeats, {}) if repeats else ({},):
        try:
            kept, peaks = _count(model, workload, on, left_out)
            break
        except (RuntimeError, NotImplementedError, TypeError, KeyError, IndexError, AttributeError) as error:
            if not left_out:
                raise BitplanError(
                    f"the memory of {type(model).__name__} cannot be estimated without its data"
                    f" ({first_line(error)}): give the budget by --budget, --bpw or --fraction"
                ) from error
    return MemoryEstimate(kept, *(fixed + int(peak * INSIDE) + SMALL for peak in peaks))


def _count(
    model: PreTrainedModel, workload: Workload, on: Machine, repeats: Mapping[int, int]
) -> tuple[int, list[int]]:
    """Bytes of the cache, and the peaks of a chunk and of a token beside it; `repeats`: block → the one that runs for
    it."""
    context = workload.context
    assert context is not None
    chunk = max(min(workload.prefill_chunk or context, context - 1), 1)
    with skipped(model, repeats), counting(on) as live:
        cache = _filled(model, workload, context, chunk)
        peaks = []
        for tokens in (chunk, 1):
            live.restart()
            _step(model, torch.empty(workload.batch, tokens, dtype=torch.long, device="meta"), cache)
            peaks.append(live.peak)
    sizes = [layer_bytes(layer) for layer in cache.layers]
    if any(sizes[number] for number in repeats):
        raise RuntimeError("a layer of the cache is filled by another block than its own")
    kept = sum(sizes)
    return kept + sum(sizes[like] for like in repeats.values()), [peak - kept for peak in peaks]


def _step(model: PreTrainedModel, ids: Tensor, cache: Cache) -> None:
    """As `generate` does it: logits of the last token alone, copied to float32 to choose from."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    out.logits[:, -1, :].to(copy=True, dtype=torch.float32).argmax(-1)


def _filled(model: PreTrainedModel, workload: Workload, context: int, chunk: int) -> Cache:
    """A cache that lacks one chunk and one token of the context."""
    token = torch.empty(workload.batch, 1, dtype=torch.long, device="meta")
    if workload.kv_format != "native":  # its tensors have their full size from the first token on
        empty = new_cache(model, workload.kv_format, workload.batch, context)
        model(input_ids=token, past_key_values=empty, use_cache=True)
        return empty
    probe = DynamicCache(config=model.config)
    model(input_ids=token, past_key_values=probe, use_cache=True)
    cache = DynamicCache(config=model.config)
    before = context - chunk - 1
    for index, layer in enumerate(probe.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None and before > 0:
            longer = [t.new_empty(*t.shape[:2], before, t.shape[-1]) for t in (keys, values)]
            cache.layers[index].update(*longer)  # type: ignore[union-attr]
    return cache
