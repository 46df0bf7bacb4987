"""Tiny random models of many architectures, and a byte tokenizer for them."""

import copy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

VOCABULARY = 258
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = COMMON | {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS = {
    "llama": LlamaConfig(**GQA, tie_word_embeddings=False, attention_bias=True),
    "llama-tied": LlamaConfig(**GQA, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    ),
    "opt": OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=128, pad_token_id=1),
    "qwen3": Qwen3Config(**GQA, head_dim=16, tie_word_embeddings=True),
    "gemma": GemmaConfig(**GQA, head_dim=16, pad_token_id=0),
    "gemma2": Gemma2Config(**GQA, head_dim=16, pad_token_id=0),
    "gpt-neox": GPTNeoXConfig(**COMMON, intermediate_size=96, max_position_embeddings=128),
    "phi": PhiConfig(**COMMON, intermediate_size=96, max_position_embeddings=128, pad_token_id=None),
    "mixtral": MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": Qwen2MoeConfig(**GQA, **EXPERTS, shared_expert_intermediate_size=48),
    "qwen3-moe": Qwen3MoeConfig(**GQA, **EXPERTS, head_dim=16),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A seeded random model, its weights large enough that logits differ."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])  # saving a model writes into its config
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
        elif parameter.std() == 0:
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.05)
    return model.to(dtype).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; 256 and 257 begin and end a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model's checkpoint folder, with a tokenizer."""
    build(name, dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def reading_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's blocks are given the embedded text beside the hidden states, and add it."""
    forward, of_block = LlamaModel.forward, LlamaDecoderLayer.forward

    def giving(self, input_ids=None, **kwargs):
        return forward(self, input_ids=input_ids, told=self.embed_tokens(input_ids), **kwargs)

    def reading(self, hidden_states, *args, told=None, **kwargs):
        return of_block(self, hidden_states + 0.5 * told, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", giving)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", reading)


def unchained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of Llama's blocks, the hidden states are changed."""
    call = LlamaDecoderLayer.__call__

    def doubling(self, hidden_states, *args, **kwargs):
        return call(self, 2 * hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "__call__", doubling)


class ListedExperts(torch.nn.Module):
    """A mixture of experts as remote code writes it: Linears in a module list, each run on the tokens routed to it."""

    NUMBER = 8

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, 32
        self.gate = torch.nn.Linear(width, self.NUMBER, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "gate_proj": torch.nn.Linear(width, inner, bias=False),
                    "up_proj": torch.nn.Linear(width, inner, bias=False),
                    "down_proj": torch.nn.Linear(inner, width, bias=False),
                }
            )
            for _ in range(self.NUMBER)
        )

    def forward(self, x):
        flat = x.flatten(0, -2)
        scores = self.gate(flat)
        scores[:, -1] = -torch.inf  # no token ever reaches the last expert
        weights, chosen = scores.softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            at = (chosen == i).nonzero().squeeze(-1)
            if len(at):
                here = flat[at]
                inner = torch.nn.functional.silu(expert["gate_proj"](here)) * expert["up_proj"](here)
                out = out.index_add(0, at, expert["down_proj"](inner) * weights[at, None])
        return out.view_as(x)


def listing_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's MLPs become mixtures of experts in a module list."""
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP", ListedExperts)
