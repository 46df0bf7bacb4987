"""The KV cache in a format of its own: transformers' caches, their layers told to hold rows of bytes.

Masks, windows, positions, beams and states stay transformers'; keys and values alone are rounded on their way in and
read on their way out. May import: formats.errors, formats.kv_rows, transformers' caches, configurations and models.
"""

from functools import cache
from types import MethodType
from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation.configuration_utils import GenerationMode

from bitplan.formats.errors import FormatUnavailable, UsageError
from bitplan.formats.kv.rows import KV_FORMATS, KVFormat, kv_format_named

__all__ = ["KV_FORMATS", "KVCache", "kv_format_named", "new_cache", "use_kv_format"]

READ_LENGTH = {"git", "gpt_neo"}
"""Models that compute something else with a cache longer than the text. Some hundred other types were compared."""

_KNOWN = {layer.update for layer in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)}


@cache
def quantized_class(original: Any, format: KVFormat) -> Any:
    """One of transformers' cache layers, its `keys` and `values` uint8 [batch, heads, tokens, bytes]. What it does with
    tokens, it does with their bytes."""

    class Quantized(original):
        _layer_type = None  # under a name, the class would become that layer type's for all models

        def lazy_initialization(self, *states: Tensor, **kwargs: Any) -> None:
            # `early_initialization` gives floats, `update` rows; a hybrid layer's states come by keyword, as they are.
            if states and states[0].is_floating_point():
                states = (format.keys.encode(states[0]), format.values.encode(states[1]))
            super().lazy_initialization(*states, **kwargs)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Keep float states [batch, heads, new tokens, head size]; all that attention is to see, in their dtype.

            The new tokens come back rounded too, so that one pass over a text costs what decoding it would.
            """
            rows = format.keys.encode(key_states), format.values.encode(value_states)
            keys, values = super().update(*rows, *args, **kwargs)
            return (
                format.keys.decode(keys, key_states.shape[-1], key_states.dtype),
                format.values.decode(values, value_states.shape[-1], value_states.dtype),
            )

    Quantized.__name__ = Quantized.__qualname__ = "Quantized" + original.__name__
    return Quantized


def keeps_tokens(layer: Any) -> bool:
    """Whether a cache layer keeps keys and values; others keep a state of fixed size, or nothing.

    Raises FormatUnavailable for a layer that keeps tokens in a way of its own.
    """
    if not isinstance(layer, CacheLayerMixin):
        return False
    if type(layer).update not in _KNOWN or hasattr(layer, "update_indexer"):
        raise FormatUnavailable(
            f"cache layers of the type {type(layer).__name__} keep more than keys and values: not modelled here"
        )
    return True


def _quantize_layers(held: Cache, format: KVFormat) -> None:
    """Change an empty cache in place, so that it holds bytes."""
    for layer in held.layers:
        if keeps_tokens(layer):
            layer.__class__ = quantized_class(cast(Any, type(layer)), format)
    if held.layer_class_to_replicate is not None:
        held.layer_class_to_replicate = quantized_class(held.layer_class_to_replicate, format)


class KVCache(StaticCache):
    """A cache for `max_cache_len` tokens of `batch` sequences, in a KV format.

    As in StaticCache, a layer's tensors are made by its first `update` and keep their size; a sliding layer holds its
    window. Beams are reordered and `reset` empties it; what would change the size or take tokens back is refused.
    Raises FormatUnavailable for models that keep something else, UsageError where another batch comes; torch raises
    IndexError for tokens beyond `max_cache_len`.
    """

    def __init__(self, config: PreTrainedConfig, kv_format: str, batch: int, max_cache_len: int):
        if config.model_type in READ_LENGTH:
            raise FormatUnavailable(
                f"{config.model_type} reads the cache's length as the text's: only kv format native"
            )
        if config.is_encoder_decoder:
            raise FormatUnavailable(f"{config.model_type} has an encoder: its caches come in pairs, only as they are")
        try:
            super().__init__(config=config, max_cache_len=max_cache_len)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatUnavailable(
                f"transformers has no preallocated cache for {config.model_type} ({error!r}): only kv format native"
            ) from error
        if not any(keeps_tokens(layer) for layer in self.layers):
            raise FormatUnavailable(f"no layer of {config.model_type} keeps keys and values")
        self.batch = batch
        self.kv_format = kv_format
        if format := kv_format_named(kv_format):
            _quantize_layers(self, format)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if len(key_states) != self.batch:
            raise UsageError(f"the cache is for a batch of {self.batch}, not of {len(key_states)}")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise FormatUnavailable("a preallocated cache neither takes tokens back nor changes its batch: make another")

    crop = batch_repeat_interleave = batch_select_indices = _refuse


def new_cache(model: PreTrainedModel | PreTrainedConfig, kv_format: str, batch: int, max_cache_len: int) -> KVCache:
    """An empty cache for `model(input_ids, past_key_values=cache, use_cache=True)`."""
    if isinstance(model, PreTrainedModel):
        _refuse_own_cache(model)
        model = model.config
    return KVCache(model, kv_format, batch, max_cache_len)


def use_kv_format(model: PreTrainedModel, kv_format: str) -> None:
    """Let `model.generate(...)` keep its tokens in `kv_format`; "native" undoes it.

    The cache is as long as the call's own maximal length. A call's own `past_key_values`, `cache_implementation` or
    `use_cache=False` goes first. Assisted generation, which takes tokens back, gets a cache of this format that grows.
    Raises UnknownFormat, and FormatUnavailable where the model's cache cannot be had so.
    """
    model.__dict__.pop("_prepare_cache_for_generation", None)
    model.__dict__.pop("kv_format", None)
    if kv_format_named(kv_format) is not None:
        new_cache(model, kv_format, 1, 1)
        model.__dict__["kv_format"] = kv_format
        model.__dict__["_prepare_cache_for_generation"] = MethodType(_prepare_cache_for_generation, model)


def _refuse_own_cache(model: Any) -> None:
    if not model._supports_default_dynamic_cache():
        raise FormatUnavailable(f"{type(model).__name__} makes a cache of its own: only kv format native")


def _prepare_cache_for_generation(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
) -> None:
    """transformers' method of this name decides; where it takes its default, the format's cache is put there."""
    given = model_kwargs.get("past_key_values")
    type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length)
    made = model_kwargs.get("past_key_values")
    told = given is not None or generation_config.cache_implementation is not None
    if told or generation_config.use_cache is False or type(made) is not DynamicCache:
        return
    if mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
        format = kv_format_named(self.kv_format)
        assert format is not None
        _quantize_layers(made, format)
    else:
        batch = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        made = new_cache(self, self.kv_format, batch, max_cache_length)
    model_kwargs["past_key_values"] = made
