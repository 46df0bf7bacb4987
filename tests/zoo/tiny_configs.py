"""A tiny configuration of each causal LM class of the installed transformers, as far as one can be made by rule."""

import inspect
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 258),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_dim"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}


def causal_types() -> list[str]:
    """Types of config that have a causal LM class, sorted."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The class's config with every size that it knows made small. Raises what the class raises."""
    kind = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__annotations__", {})}
    known |= {other for name, other in getattr(kind, "attribute_map", {}).items() if name in SMALL}
    if "qk_rope_head_dim" in known:  # there head_dim is that of the rotated part
        known -= {"head_dim", "num_key_value_heads"}
    default = kind()
    return kind(**{name: value for name, value in SMALL.items() if name in known and hasattr(default, name)})
