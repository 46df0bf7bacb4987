"""Memory estimated on meta tensors, against what torch's CPU allocator reports of a real run."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from bitplan.formats.errors import BitplanError
from bitplan.formats.kernels.dispatch import Machine
from bitplan.formats.kv.cache import new_cache
from bitplan.formats.modules import pack_parameter
from bitplan.formats.table import FORMATS
from bitplan.planner.evaluate.throughput import Allocated
from bitplan.planner.memory import footprint
from bitplan.planner.memory.footprint import INSIDE, SMALL, Workload, estimate_memory
from bitplan.planner.memory.kv_size import cache_bytes
from bitplan.planner.memory.repeats import find_repeats
from tests import tiny

CPU = Machine("cpu")
DENSE = ["llama", "gpt2", "opt", "qwen3", "gemma2", "gpt-neox", "phi"]


def on_meta(name: str, dtype: torch.dtype):
    with torch.device("meta"):
        config = copy.deepcopy(tiny.CONFIGS[name])
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


@torch.no_grad()
def used(model, workload: Workload) -> tuple[int, int]:
    """The KV cache's bytes, and the most that a real prefill by chunks and one step need beside it."""
    ids = torch.randint(0, 250, (workload.batch, workload.context), generator=torch.Generator().manual_seed(0))
    caches = []

    def run():
        cache = DynamicCache(config=model.config)
        if workload.kv_format != "native":
            cache = new_cache(model, workload.kv_format, workload.batch, workload.context)
        last = workload.context - 1
        first = last % workload.prefill_chunk
        ends = [
            *([first] if first else []),
            *range(first + workload.prefill_chunk, last + 1, workload.prefill_chunk),
            last + 1,
        ]
        for start, stop in zip([0, *ends], ends, strict=False):
            logits = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            logits[:, -1, :].to(copy=True, dtype=torch.float32).argmax(-1)
        caches.append(cache)

    with Allocated(torch.device("cpu")) as allocated:
        run()
    most = allocated.bytes
    return cache_bytes(caches[0]), most - cache_bytes(caches[0])


@pytest.mark.parametrize("kv_format", ["native", "int8", "int4"])
@pytest.mark.parametrize("name", DENSE)
def test_estimated_is_what_a_run_takes(name, kv_format):
    if name == "opt" and kv_format != "native":
        pytest.skip("its positions are read from data where the cache is preallocated")
    workload = Workload(context=100, batch=2, prefill_chunk=32, kv_format=kv_format)
    estimated = estimate_memory(on_meta(name, torch.float32), workload, CPU)
    kept, most = used(tiny.build(name), workload)
    assert estimated.kv_cache == kept
    assert most <= estimated.workspace <= INSIDE * most * 1.01 + SMALL


@pytest.mark.parametrize("format", ["int4-g64", "int3-g32", "int8", "fp8", "ternary-g64"])
def test_packed_weights_too(format):
    def packed(model):
        for layer in model.model.layers:
            for module in (layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.q_proj):
                tensors = None if module.weight.is_meta else FORMATS[format].quantize(module.weight)
                pack_parameter(module, "weight", FORMATS[format])
                for suffix, tensor in (tensors or {}).items():
                    module._parameters["weight" + suffix].data = tensor
        return model

    workload = Workload(context=64, batch=1, prefill_chunk=16)
    estimated = estimate_memory(packed(on_meta("llama", torch.float32)), workload, CPU)
    _, most = used(packed(tiny.build("llama")), workload)
    assert most <= estimated.workspace <= INSIDE * most * 1.1 + SMALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts(dtype):
    workload = Workload(context=64, batch=2, prefill_chunk=32)
    estimated = estimate_memory(on_meta("mixtral", dtype), workload, CPU)
    kept, most = used(tiny.build("mixtral", dtype), workload)
    assert estimated.kv_cache == kept and most <= estimated.workspace


@pytest.mark.parametrize(("name", "kv_format", "layers", "like"), [("llama", "native", 6, 2), ("gemma2", "int8", 8, 1)])
def test_blocks_like_others_need_not_run(name, kv_format, layers, like, monkeypatch):
    facts = tiny.CONFIGS[name].to_dict() | {"num_hidden_layers": layers}
    config = type(tiny.CONFIGS[name])(**{key: value for key, value in facts.items() if key != "layer_types"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    pack_parameter(model.model.layers[5].self_attn.o_proj, "weight", FORMATS["int4-g32"])
    workload = Workload(context=100, batch=2, prefill_chunk=32, kv_format=kv_format)
    left_out = find_repeats(model)
    assert 5 not in left_out and len(left_out) == like
    quick = estimate_memory(model, workload, CPU)
    monkeypatch.setattr(footprint, "find_repeats", lambda model: {})
    whole = estimate_memory(model, workload, CPU)
    assert quick.kv_cache == whole.kv_cache
    # A pass over all blocks counts the last token's keys and values, which come later, as cache.
    token = whole.kv_cache // 100
    assert whole.workspace - 1024 <= quick.workspace <= whole.workspace + 2 * token


def test_a_gpus_allocator_rounds_up_and_its_blas_takes_its_part():
    model = on_meta("llama", torch.bfloat16)
    here, there = (
        estimate_memory(model, Workload(context=64), CPU),
        estimate_memory(model, Workload(context=64), Machine("cuda", (9, 0))),
    )
    assert there.workspace > 32 << 20
    assert there.kv_cache == here.kv_cache == 2 * 2 * 2 * 16 * 64 * 2  # layers, keys and values, heads, size, bytes


def test_more_context_takes_more_and_a_window_caps_it():
    model = on_meta("llama", torch.float32)
    sizes = [estimate_memory(model, Workload(context=context), CPU).kv_cache for context in (32, 64, 128)]
    assert sizes == [sizes[0], 2 * sizes[0], 4 * sizes[0]]
    config = copy.deepcopy(tiny.CONFIGS["gemma2"])
    config.sliding_window = 16
    with torch.device("meta"):
        windowed = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    short, long = (
        estimate_memory(windowed, Workload(context=context, prefill_chunk=8), CPU).kv_cache for context in (64, 128)
    )
    assert long - short == 64 * 2 * 2 * 16 * 4  # only one of two layers grows


def test_a_forward_that_reads_its_data_is_refused():
    model = on_meta("llama", torch.float32)
    model.forward = lambda input_ids, **kwargs: input_ids.sum().item()
    with pytest.raises(BitplanError, match=r"cannot be estimated.*--budget"):
        estimate_memory(model, Workload(context=8), CPU)
