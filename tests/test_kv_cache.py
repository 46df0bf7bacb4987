"""A cache in a KV format is transformers' own, but that keys and values are rounded: any model, window, or pieces."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    BartConfig,
    DeepseekV3Config,
    DynamicCache,
    FalconH1Config,
    Gemma2Config,
    GPTNeoConfig,
    JambaConfig,
    MambaConfig,
    OpenAIGPTConfig,
    StaticCache,
)

from bitplan.formats.errors import FormatUnavailable, UnknownFormat, UsageError
from bitplan.formats.kv.cache import KVCache, new_cache, use_kv_format
from bitplan.formats.kv.rows import FP8, INT4, INT8, KV_FORMATS
from bitplan.planner.memory.kv_size import cache_bytes, kv_bytes, kv_facts
from tests import tiny

STATES = tiny.GQA | {"mamba_d_state": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
EXTRA = {
    "window": Gemma2Config(**tiny.GQA, head_dim=16, pad_token_id=0, sliding_window=8),
    "latent": DeepseekV3Config(
        **tiny.GQA | {"num_key_value_heads": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
        **{"kv_lora_rank": 40, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    ),
    "states": JambaConfig(
        **STATES,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_offset=0,
        use_mamba_kernels=False,
    ),
    "both": FalconH1Config(**STATES, head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1),
}
MODELS = [*tiny.CONFIGS, *EXTRA]
QUANTIZED = [name for name, format in KV_FORMATS.items() if format]
LENGTH = 20
IDS = torch.randint(2, 250, (2, LENGTH), generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def build(name: str, dtype: torch.dtype = torch.float64):
    """In float64, so that what two orders of summation differ by does not change a code."""
    with mock.patch.dict(tiny.CONFIGS, EXTRA):
        model = tiny.build(name, dtype)
    if not model._supports_default_dynamic_cache():
        pytest.skip("this transformers has a class of its own for this model's cache")
    if dtype == torch.float64:
        model.set_experts_implementation("batched_mm")
    return model


ROWS = {"fp8": FP8, "int8": INT8, "int4": INT4}
PARTS = {"fp8": ("fp8", "fp8"), "int8": ("int8", "int8"), "k8v4": ("int8", "int4"), "int4": ("int4", "int4")}


def parts(states: Tensor, group: int) -> tuple[Tensor, ...]:
    """Groups of a row, as few as `group` allows, and as even as whole values allow."""
    size = states.shape[-1]
    groups = -(-size // group)
    return states.split(-(-size // groups), -1)


def rounded(states: Tensor, name: str) -> Tensor:
    """What a row format makes of keys or values, as its definition has it."""
    made = []
    for part in parts(states.float(), {"fp8": states.shape[-1], "int8": 64, "int4": 32}[name]):
        largest = part.abs().amax(-1, keepdim=True)
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        if name == "int4":
            scale, low = ((high - low) / 15).half().float(), low.half().float()
            made.append(((part - low) / scale).round().clamp(0, 15) * scale + low)
        elif name == "int8":
            scale = (largest / 127).half().float()
            made.append((part / scale).round().clamp(-127, 127) * scale)
        else:
            scale = (largest / 448).half().float()
            value = (part / scale).clamp(-448, 448)
            step = 2 ** (value.abs().log2().floor().clamp(min=-6) - 3)
            made.append((value / step).round() * step * scale)
    return torch.cat(made, -1).to(states.dtype)


class Rounding(DynamicCache):
    """transformers' cache of floats, given rounded ones."""

    def __init__(self, config, name: str):
        super().__init__(config=config)
        self.name = name

    def update(self, key_states, value_states, *args, **kwargs):
        of_keys, of_values = PARTS[self.name]
        return super().update(rounded(key_states, of_keys), rounded(value_states, of_values), *args, **kwargs)


@torch.no_grad()
def logits(model, cache, pieces: tuple[int, ...] = (LENGTH,), ids: Tensor = IDS) -> Tensor:
    parts = ids[:, : sum(pieces)].split(list(pieces), 1)
    return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


def kl(model, cache) -> float:
    exact = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    return float((exact.exp() * (exact - logits(model, cache).log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_attention_sees_rounded_keys_and_values_in_whatever_pieces_they_come(self, name):
        model = build(name)
        for kv_format in QUANTIZED:
            expected = logits(model, Rounding(model.config, kv_format))
            assert not torch.allclose(expected, logits(model, None), atol=1e-4)
            for pieces in ((LENGTH,), (1,) * LENGTH, (3, 1, 7, 6, 1, 1, 1)):
                if name in ("states", "both"):  # their states run in float32, by other formulas for other pieces
                    expected = logits(model, Rounding(model.config, kv_format), pieces)
                got = logits(model, new_cache(model, kv_format, 2, LENGTH + 3), pieces)
                assert torch.allclose(got, expected, atol=1e-5), (kv_format, pieces, (got - expected).abs().max())

    def test_bytes_are_estimated_by_the_config(self, name):
        for dtype in (torch.float32, torch.bfloat16):
            model = build(name, dtype)
            facts = kv_facts(model.config, dtype)
            for kv_format in KV_FORMATS:
                cache = new_cache(model, kv_format, 2, LENGTH)
                logits(model, cache, (5,))
                held = [value for layer in cache.layers for value in vars(layer).values()]
                held += [state for states in held if isinstance(states, dict) for state in states.values()]
                tensors = [value for value in held if isinstance(value, Tensor) and value.ndim]
                total = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
                assert facts.nbytes(kv_format, 2, LENGTH) == cache_bytes(cache) == total
                kept = {layer.keys.dtype for layer in cache.layers if getattr(layer, "keys", None) is not None}
                assert kept == {dtype if kv_format == "native" else torch.uint8}

    def test_generates_as_stepping_by_hand_does(self, name):
        model = build(name)
        use_kv_format(model, "int8")
        made = model.generate(IDS, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
        assert isinstance(made.past_key_values, KVCache)
        assert cache_bytes(made.past_key_values) == kv_bytes(model.config, 2, LENGTH + 4, "int8", torch.float64)
        cache, ids = new_cache(model, "int8", 2, LENGTH + 5), IDS
        step = logits(model, cache, (LENGTH,), ids)
        for _ in range(5):
            token = step[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            step = logits(model, cache, (1,), token)
        assert torch.equal(made.sequences, ids)


class TestRows:
    @given(
        name=st.sampled_from(list(ROWS)),
        shape=st.tuples(*[st.integers(1, 3)] * 2, st.integers(0, 4), st.integers(1, 140)),
        seed=st.integers(0, 10**6),
        spread=st.floats(0.01, 1000),
        middle=st.floats(-3, 3),
    )
    def test_values_come_back_within_half_a_step(self, name, shape, seed, spread, middle):
        states = spread * (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + middle)
        size = shape[-1]
        rows = ROWS[name].encode(states)
        assert rows.dtype == torch.uint8 and rows.shape == (*shape[:-1], ROWS[name].nbytes(size))
        back = ROWS[name].decode(rows, size, torch.float64)
        group, top = {"fp8": (size, 448), "int8": (64, 127), "int4": (32, 15)}[name]
        for part, got in zip(parts(states.double(), group), parts(back, group), strict=True):
            largest = part.abs().amax(-1, keepdim=True)
            if name == "fp8":
                half = torch.maximum(part.abs() / 16, largest / 448 / 2**10)
            elif name == "int8":
                half = largest / 127 / 2
            else:
                half = (part.amax(-1, keepdim=True) - part.amin(-1, keepdim=True)) / 15 / 2
            # Scales and lows are in fp16, of 11 bits and at least 2^-24: that moves the ends of the grid by so much.
            assert ((got - part).abs() <= half + largest / 2**10 + top / 2**25).all()

    def test_bits_per_value(self):
        def bits(name: str, size: int) -> float:
            format = KV_FORMATS[name]
            return (format.keys.nbytes(size) + format.values.nbytes(size)) * 4 / size

        assert [bits(name, 128) for name in QUANTIZED] == [8.125, 8.25, 6.625, 5]
        assert [bits(name, 64) for name in QUANTIZED] == [8.25, 8.25, 6.625, 5]

    @pytest.mark.parametrize("name", ROWS)
    def test_chunks_change_nothing(self, name, monkeypatch):
        states = torch.randn(2, 3, 5, 75)
        rows = ROWS[name].encode(states)
        values = ROWS[name].decode(rows, 75, torch.float32)
        monkeypatch.setattr("bitplan.formats.kv.rows.CHUNK", 7)
        assert torch.equal(ROWS[name].encode(states), rows)
        assert torch.equal(ROWS[name].decode(rows, 75, torch.float32), values)

    @pytest.mark.parametrize("name", ROWS)
    def test_zeros_are_zero_bytes(self, name):
        empty = torch.zeros(1, 1, 2, ROWS[name].nbytes(45), dtype=torch.uint8)
        assert not ROWS[name].encode(torch.zeros(1, 1, 2, 45)).any()
        assert not ROWS[name].decode(empty, 45, torch.bfloat16).any()


class TestQuality:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "window"])
    def test_more_bits_are_nearer_to_native(self, name):
        model = build(name)
        found = {of: kl(model, new_cache(model, of, 2, LENGTH)) for of in QUANTIZED}
        assert 0 < found["int8"] < min(found["fp8"], found["k8v4"]) and found["fp8"] < found["int4"]
        assert found["int8"] < 3e-5 and found["fp8"] < 1e-3 and found["int4"] < 1e-2
        assert kl(model, new_cache(model, "native", 2, LENGTH)) < 1e-12


class TestGenerate:
    def test_left_padding_changes_nothing(self):
        model = build("llama")
        use_kv_format(model, "int4")
        alone = model.generate(IDS[:1, 6:], max_new_tokens=4, **GREEDY)
        mask = torch.ones_like(IDS)
        mask[0, :6] = 0
        beside = model.generate(IDS, attention_mask=mask, max_new_tokens=4, **GREEDY)
        assert torch.equal(beside[:1, 6:], alone)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "window"])
    def test_beams(self, name):
        model = build(name)
        options = {"num_beams": 3, "max_new_tokens": 6, **GREEDY}
        expected = model.generate(IDS, past_key_values=Rounding(model.config, "int4"), **options)
        use_kv_format(model, "int4")
        assert torch.equal(model.generate(IDS, **options), expected)

    @pytest.mark.parametrize("name", ["llama", "window"])
    def test_prompts_in_chunks(self, name):
        model = build(name)
        use_kv_format(model, "int4")
        options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
        whole = model.generate(IDS, **options)
        chunked = model.generate(IDS, prefill_chunk_size=6, **options)
        assert torch.equal(whole.sequences, chunked.sequences)
        assert torch.allclose(torch.stack(whole.logits), torch.stack(chunked.logits), atol=1e-5)

    @pytest.mark.parametrize("name", ["llama", "window", "states"])
    def test_a_next_turn_goes_on_with_the_returned_cache(self, name):
        """Given all ids so far, or the new ones with a mask of all."""
        model = build(name)
        use_kv_format(model, "int4")
        for whole in (True, False):
            turns = []
            for cache in (Rounding(model.config, "int4"), None):
                told = {"max_new_tokens": 5, "return_dict_in_generate": True, **GREEDY}
                first = model.generate(IDS[:, :9], past_key_values=cache, **told)
                ids = torch.cat([first.sequences, IDS[:, 9:]], 1)
                new = ids if whole else ids[:, 13:]
                kept = first.past_key_values
                turns.append(
                    model.generate(new, attention_mask=torch.ones_like(ids), past_key_values=kept, **told).sequences
                )
            assert torch.equal(*turns)
            assert isinstance(kept, KVCache)

    def test_what_the_call_says_goes_first(self):
        model = build("llama")
        use_kv_format(model, "int8")
        options = {"max_new_tokens": 2, "return_dict_in_generate": True, **GREEDY}
        own = DynamicCache(config=model.config)
        assert model.generate(IDS, past_key_values=own, **options).past_key_values is own
        assert type(model.generate(IDS, cache_implementation="static", **options).past_key_values) is StaticCache
        assert model.generate(IDS, use_cache=False, **options).past_key_values is None
        use_kv_format(model, "native")
        assert type(model.generate(IDS, **options).past_key_values) is DynamicCache
        assert "_prepare_cache_for_generation" not in vars(model)

    def test_assisted_generation_takes_tokens_back(self):
        for name in ("llama", "window"):
            model, assistant = build(name), build("llama-tied")
            use_kv_format(model, "int8")
            use_kv_format(assistant, "int4")
            alone = model.generate(IDS[:1], max_new_tokens=12, **GREEDY)
            with mock.patch.object(DynamicCache, "crop", autospec=True, side_effect=DynamicCache.crop) as crop:
                helped = model.generate(IDS[:1], max_new_tokens=12, assistant_model=assistant, **GREEDY)
                seen = [call.args[0].layers[0].keys.dtype for call in crop.call_args_list]
            assert torch.equal(helped, alone)
            assert torch.uint8 in seen

    def test_decoding_compiles_to_one_graph(self):
        model = build("llama", torch.float32)
        expected = logits(model, new_cache(model, "int8", 2, LENGTH), (15, 1, 1, 1, 1))
        count = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=count, fullgraph=True)
        cache = new_cache(model, "int8", 2, LENGTH)
        got = [logits(model, cache, (15,))] + [logits(compiled, cache, (1,), IDS[:, i:]) for i in range(15, 19)]
        assert torch.allclose(torch.cat(got, 1), expected, atol=1e-5)
        assert count.frame_count == 1


class TestCache:
    def test_reordering_swaps_what_was_said(self):
        for name in ("llama", "window"):
            model = build(name)
            caches = [new_cache(model, "int4", 2, LENGTH) for _ in range(2)]
            logits(model, caches[0], (12,))
            logits(model, caches[1], (12,), IDS.flip(0))
            caches[0].reorder_cache(torch.tensor([1, 0]))
            later = IDS[:, 12:]
            assert torch.allclose(logits(model, caches[0], (8,), later), logits(model, caches[1], (8,), later))

    def test_reset_empties(self):
        for name in ("llama", "window"):
            model = build(name)
            cache = new_cache(model, "int4", 2, LENGTH)
            first = logits(model, cache)
            cache.reset()
            assert torch.equal(logits(model, cache), first)

    def test_refusals(self):
        model = build("llama")
        cache = new_cache(model, "int8", 2, LENGTH)
        logits(model, cache, (4,))
        for change in (cache.crop, cache.batch_repeat_interleave, cache.batch_select_indices):
            with pytest.raises(FormatUnavailable, match="create a new one"):
                change(-1)
        with pytest.raises(UsageError, match="batch of 2, not 1"):
            logits(model, cache, (4,), IDS[:1])
        with pytest.raises(IndexError):
            logits(model, cache, (LENGTH,))
        with pytest.raises(UnknownFormat, match="native, fp8, int8, k8v4, int4"):
            use_kv_format(model, "int3")
        with pytest.raises(UnknownFormat):
            kv_bytes(model.config, 1, 1, "int3", torch.float32)

    def test_models_whose_cache_is_something_else(self):
        layer = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "hidden_size": 64}
        for config in (BartConfig(), GPTNeoConfig(**layer)):
            with pytest.raises(FormatUnavailable, match=config.model_type):
                new_cache(config, "int8", 1, 8)
        for config in (BartConfig(), MambaConfig(num_hidden_layers=2), OpenAIGPTConfig(n_layer=2)):
            with pytest.raises(FormatUnavailable):
                kv_facts(config, torch.float32)


class TestFacts:
    def test_window(self):
        facts = kv_facts(EXTRA["window"], torch.bfloat16)
        assert (facts.attention_layers, facts.kv_heads, facts.head_sizes) == (2, (2,), ((16, 16),))
        assert facts.notes == ("1 of 2 layers keep the last 8 tokens",)
        assert facts.nbytes("native", 3, 100) == 3 * 2 * (16 + 16) * 2 * (100 + 8)

    def test_states(self):
        model = build("states")
        facts = kv_facts(model.config, torch.float32)
        assert facts.attention_layers == 1
        assert facts.notes[0].startswith("1 of 2 layers keep a state, ")
        state = facts.nbytes("native", 1, 0)
        assert f"{state:,} bytes" in facts.notes[0]
        assert facts.nbytes("k8v4", 2, 10) == 2 * (state + 10 * 2 * (INT8.nbytes(16) + INT4.nbytes(16)))
