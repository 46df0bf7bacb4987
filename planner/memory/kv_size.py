"""How large a model's KV cache is, from its config alone: one token goes through the model on the meta device.

Formulas over a config's fields are wrong for someone (latent attention, heads of several sizes, shared layers, states
beside attention). So the model itself is asked: it is built without weights, and what its attention hands to the cache
is read. A second for a large model. May import: formats.errors, formats.kv, transformers.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from bitplan.formats.errors import FormatUnavailable, first_line
from bitplan.formats.kv.cache import keeps_tokens
from bitplan.formats.kv.rows import KVFormat, kv_format_named


@dataclass(frozen=True)
class LayerFacts:
    """What one layer keeps of a sequence. `heads` is 0 where it keeps no keys and values."""

    heads: int = 0
    key_size: int = 0
    value_size: int = 0
    window: int | None = None
    """Tokens that a sliding or chunked layer keeps at most."""
    itemsize: int = 0
    """Bytes of a value as the model has it."""
    state_bytes: int = 0
    """Convolution and recurrent states: the same at any length, never quantized."""

    def nbytes(self, format: KVFormat | None, context: int) -> int:
        """Bytes for one sequence of `context` tokens; None is the model's dtype."""
        tokens = min(context, self.window or context)
        if format is None:
            row = (self.key_size + self.value_size) * self.itemsize
        else:
            row = format.keys.nbytes(self.key_size) + format.values.nbytes(self.value_size)
        return self.heads * tokens * row + self.state_bytes


@dataclass(frozen=True)
class KVFacts:
    """What a model's cache holds, layer by layer."""

    layers: tuple[LayerFacts, ...]
    notes: tuple[str, ...]
    """What is not the same for every layer and token, in words."""

    def nbytes(self, kv_format: str, batch: int, context: int) -> int:
        """Bytes of a cache for `batch` sequences of `context` tokens each, as `kv_cache.new_cache` makes it.

        Counted is what holds tokens and states; the counter of 8 bytes that each layer has is not.
        """
        format = kv_format_named(kv_format)
        return batch * sum(layer.nbytes(format, context) for layer in self.layers)

    @property
    def attention_layers(self) -> int:
        return sum(layer.heads > 0 for layer in self.layers)

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """Every number of KV heads that a layer has; mostly one."""
        return tuple(sorted({layer.heads for layer in self.layers if layer.heads}))

    @property
    def head_sizes(self) -> tuple[tuple[int, int], ...]:
        """Every size of a key and of a value that a layer has; mostly one pair."""
        return tuple(sorted({(layer.key_size, layer.value_size) for layer in self.layers if layer.heads}))


def kv_facts(config: PreTrainedConfig, dtype: torch.dtype) -> KVFacts:
    """What the cache of a model of this config holds when it computes in `dtype`.

    Raises FormatUnavailable, saying why, where the config does not tell: models with an encoder, models that keep no
    keys and values or keep them elsewhere, and code that cannot run without data.
    """
    layers = tuple(_layer_facts(i, layer) for i, layer in enumerate(_after_one_token(config, dtype).layers))
    if not any(layer.heads for layer in layers):
        raise FormatUnavailable(f"no layer of {config.model_type} keeps keys and values")
    return KVFacts(layers, _notes(layers))


def kv_bytes(config: PreTrainedConfig, batch: int, context: int, kv_format: str, dtype: torch.dtype) -> int:
    """Bytes of the tensors of a cache for `batch` sequences of `context` tokens; see `KVFacts.nbytes`.

    Raises UnknownFormat, and FormatUnavailable as `kv_facts`.
    """
    return kv_facts(config, dtype).nbytes(kv_format, batch, context)


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache holds now in keys, values and states."""
    return sum(map(layer_bytes, cache.layers))


def layer_bytes(layer: Any) -> int:
    """Bytes that one layer of a cache holds now."""
    tokens = [getattr(layer, name, None) for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tokens if tensor is not None) + _state_bytes(layer)


@torch.no_grad()
def _after_one_token(config: PreTrainedConfig, dtype: torch.dtype) -> DynamicCache:
    """transformers' cache after one token of one sequence, on the meta device."""
    if config.is_encoder_decoder:
        raise FormatUnavailable(f"{config.model_type} has an encoder, whose length is not the context's")
    try:
        # The kinds of attention and of experts that run without data in any dtype.
        kinds = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **kinds).eval()
        held = DynamicCache(config=model.config)
        token = torch.zeros(1, 1, dtype=torch.long, device="meta")
        model(input_ids=token, past_key_values=held, use_cache=True)
    except Exception as error:
        name, reason = type(error).__name__, first_line(error)
        raise FormatUnavailable(
            f"the cache of {config.model_type} cannot be sized from its config:"
            f" {name if reason == name else f'{name}: {reason}'}"
        ) from error
    return held


def _layer_facts(index: int, layer: Any) -> LayerFacts:
    """Raises FormatUnavailable where the token has left no trace, or not its own alone."""
    where = f"layer {index} ({type(layer).__name__})"
    if hasattr(layer, "conv_states") and not _state_bytes(layer):
        raise FormatUnavailable(f"{where} keeps its state elsewhere than in the cache")
    if not keeps_tokens(layer):
        return LayerFacts(state_bytes=_state_bytes(layer))
    if layer.keys is None or layer.keys.ndim != 4 or layer.keys.shape[2] != 1:
        raise FormatUnavailable(f"{where} does not keep one key per head and token of the text")
    return LayerFacts(
        heads=layer.keys.shape[1],
        key_size=layer.keys.shape[3],
        value_size=layer.values.shape[3],
        window=getattr(layer, "sliding_window", None),
        itemsize=layer.keys.itemsize,
        state_bytes=_state_bytes(layer),
    )


def _state_bytes(layer: Any) -> int:
    kept = (*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values())
    return sum(state.nbytes for state in kept if state is not None)


def _notes(layers: tuple[LayerFacts, ...]) -> tuple[str, ...]:
    of = f"of {len(layers)} layers"
    notes = []
    for window, count in Counter(layer.window for layer in layers if layer.window).items():
        notes.append(f"{count} {of} keep the last {window} tokens")
    if count := sum(layer.state_bytes > 0 for layer in layers):
        size = sum(layer.state_bytes for layer in layers)
        notes.append(f"{count} {of} keep a state, {size:,} bytes per sequence at any length, never quantized")
    if count := sum(not layer.heads and not layer.state_bytes for layer in layers):
        notes.append(f"{count} {of} keep nothing of their own")
    return tuple(notes)
