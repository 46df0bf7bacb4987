"""A GGUF file of a Llama in full precision, and the importance matrix that llama-quantize takes.

Written with the gguf package: weights and what llama.cpp must know of a Llama, without a tokenizer, which quantizing
does not need.
"""

import json
import struct
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor


def names(layers: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)


def write(folder: Path, path: Path) -> None:
    """As llama.cpp's converter: vectors in float32, the rest in bfloat16."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    named = names(config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        there = named.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim == 1:
            writer.add_tensor(there, tensor.float().numpy())
        else:
            bits = tensor.to(torch.bfloat16).view(torch.uint8).numpy()
            writer.add_tensor(there, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_importance(inputs: dict[str, Tensor], path: Path) -> None:
    """Mean squares of each tensor's inputs, float32 [columns] by the tensor's name in GGUF, in llama.cpp's older format
    of importance matrices: a count, then of each its name, one call, and the values."""
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(inputs)))
        for name, squares in inputs.items():
            encoded = name.encode()
            file.write(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", 1, len(squares)))
            file.write(squares.float().contiguous().numpy().tobytes())
