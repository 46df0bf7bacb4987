"""Quantized KV caches: transformers' caches with layers that store quantized rows.

transformers handles masks, sliding windows, positions, beams and recurrent states; only keys and values are quantized
when they are stored and dequantized when they are read. May import: formats.errors, formats.kv.rows, transformers'
caches, configurations and models.
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
"""Model types whose outputs change when the cache is longer than the text. About a hundred other types were checked."""

_KNOWN = {layer.update for layer in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)}


@cache
def quantized_class(original: Any, format: KVFormat) -> Any:
    """A subclass of the transformers cache layer `original` whose `keys` and `values` are uint8
    [batch, heads, tokens, bytes]; the layer's own handling of tokens applies to these rows."""

    class Quantized(original):
        _layer_type = None  # with a name, transformers would register the class for all models

        def lazy_initialization(self, *states: Tensor, **kwargs: Any) -> None:
            # `early_initialization` passes floats, `update` rows; a hybrid layer's states come by keyword, unquantized.
            if states and states[0].is_floating_point():
                states = (format.keys.encode(states[0]), format.values.encode(states[1]))
            super().lazy_initialization(*states, **kwargs)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Store float states [batch, heads, new tokens, head size]. Returns all keys and values for attention, in
            the same dtype; the new tokens' are quantized too, so a pass over a text has the loss of decoding it."""
            rows = format.keys.encode(key_states), format.values.encode(value_states)
            keys, values = super().update(*rows, *args, **kwargs)
            return (
                format.keys.decode(keys, key_states.shape[-1], key_states.dtype),
                format.values.decode(values, value_states.shape[-1], value_states.dtype),
            )

    Quantized.__name__ = Quantized.__qualname__ = "Quantized" + original.__name__
    return Quantized


def keeps_tokens(layer: Any) -> bool:
    """Whether a cache layer stores keys and values; others store a state of fixed size, or nothing.

    Raises FormatUnavailable for a layer that stores tokens in another way.
    """
    if not isinstance(layer, CacheLayerMixin):
        return False
    if type(layer).update not in _KNOWN or hasattr(layer, "update_indexer"):
        raise FormatUnavailable(
            f"cache layers of type {type(layer).__name__} store more than keys and values, which is not supported"
        )
    return True


def _quantize_layers(held: Cache, format: KVFormat) -> None:
    """Change the layers of an empty cache, in place, to quantized ones."""
    for layer in held.layers:
        if keeps_tokens(layer):
            layer.__class__ = quantized_class(cast(Any, type(layer)), format)
    if held.layer_class_to_replicate is not None:
        held.layer_class_to_replicate = quantized_class(held.layer_class_to_replicate, format)


class KVCache(StaticCache):
    """A cache for `max_cache_len` tokens of `batch` sequences, in a KV format.

    As in StaticCache, a layer's tensors are allocated by its first `update` and keep their size; a sliding layer holds
    its window. Reordering of beams and `reset` are supported; methods that change the batch or remove tokens raise
    FormatUnavailable, as does the constructor for models whose cache is not supported. `update` raises UsageError for
    another batch size; torch raises IndexError for tokens beyond `max_cache_len`, which `grow` raises.
    """

    def __init__(self, config: PreTrainedConfig, kv_format: str, batch: int, max_cache_len: int):
        if config.model_type in READ_LENGTH:
            raise FormatUnavailable(
                f"{config.model_type} takes the cache's length for the text's: only the KV format native is supported"
            )
        if config.is_encoder_decoder:
            raise FormatUnavailable(
                f"{config.model_type} has an encoder and so a pair of caches: only the KV format native is supported"
            )
        try:
            super().__init__(config=config, max_cache_len=max_cache_len)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatUnavailable(
                f"transformers has no preallocated cache for {config.model_type} ({error!r}): "
                "only the KV format native is supported"
            ) from error
        if not any(keeps_tokens(layer) for layer in self.layers):
            raise FormatUnavailable(f"no layer of {config.model_type} stores keys and values")
        self.config = config
        self.batch = batch
        self.kv_format = kv_format
        if format := kv_format_named(kv_format):
            _quantize_layers(self, format)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if len(key_states) != self.batch:
            raise UsageError(f"the cache was made for a batch of {self.batch}, not {len(key_states)}")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def grow(self, max_cache_len: int) -> None:
        """Make room for `max_cache_len` tokens. What is stored stays, in tensors of its own."""
        larger = KVCache(self.config, self.kv_format, self.batch, max_cache_len)
        for mine, other in zip(self.layers, larger.layers, strict=True):
            length = getattr(other, "max_cache_len", 0)  # a sliding layer's is its window at most
            if length <= getattr(mine, "max_cache_len", length):
                continue
            mine.max_cache_len = length  # type: ignore[union-attr]
            for name in ("keys", "values"):
                if (stored := getattr(mine, name, None)) is not None:
                    longer = stored.new_zeros(*stored.shape[:2], length, stored.shape[3])
                    longer[:, :, : stored.shape[2]] = stored
                    setattr(mine, name, longer)

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise FormatUnavailable("a preallocated cache cannot remove tokens or change its batch: create a new one")

    crop = batch_repeat_interleave = batch_select_indices = _refuse


def new_cache(model: PreTrainedModel | PreTrainedConfig, kv_format: str, batch: int, max_cache_len: int) -> KVCache:
    """An empty cache for `model(input_ids, past_key_values=cache, use_cache=True)`. Raises UnknownFormat, and
    FormatUnavailable if the model's cache does not support `kv_format`."""
    if isinstance(model, PreTrainedModel):
        _refuse_own_cache(model)
        model = model.config
    return KVCache(model, kv_format, batch, max_cache_len)


def use_kv_format(model: PreTrainedModel, kv_format: str) -> None:
    """Make `model.generate(...)` use a KV cache in `kv_format`; "native" restores the default.

    The cache is allocated for the call's maximal length. The arguments `past_key_values`, `cache_implementation` and
    `use_cache=False` of a call take precedence. Assisted generation, which removes tokens, gets a growing cache of the
    same format. Raises UnknownFormat, and FormatUnavailable if the model's cache does not support it.
    """
    model.__dict__.pop("_prepare_cache_for_generation", None)
    model.__dict__.pop("kv_format", None)
    if kv_format_named(kv_format) is not None:
        new_cache(model, kv_format, 1, 1)
        model.__dict__["kv_format"] = kv_format
        model.__dict__["_prepare_cache_for_generation"] = MethodType(_prepare_cache_for_generation, model)


def _refuse_own_cache(model: Any) -> None:
    if not model._supports_default_dynamic_cache():
        raise FormatUnavailable(
            f"{type(model).__name__} creates its own kind of cache: only the KV format native is supported"
        )


def _prepare_cache_for_generation(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
) -> None:
    """Run transformers' method of this name, and replace the cache by a quantized one if it chose the default."""
    given = model_kwargs.get("past_key_values")
    if isinstance(given, KVCache):  # a next turn: the ids are those of all turns, or only what is new
        new = generation_config.max_new_tokens
        ids = max_cache_length + 1 - (new or 0)
        known = [model_kwargs[name] for name in ("attention_mask", "position_ids") if name in model_kwargs]
        lengths = [tensor.shape[-1] for tensor in known if tensor is not None]
        all_turns = new is not None and lengths and max(lengths) <= ids
        given.grow(max_cache_length + (0 if all_turns else int(given.get_seq_length())))
    type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length)
    made = model_kwargs.get("past_key_values")
    requested = given is not None or generation_config.cache_implementation is not None
    if requested or generation_config.use_cache is False or type(made) is not DynamicCache:
        return
    if mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
        format = kv_format_named(self.kv_format)
        assert format is not None
        _quantize_layers(made, format)
    else:
        batch = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        made = new_cache(self, self.kv_format, batch, max_cache_length)
    model_kwargs["past_key_values"] = made
