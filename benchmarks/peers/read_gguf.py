"""Run with .venv-gguf: a --tensor-type-file, by llama-quantize of .venv-llama-cpp, on a GGUF of the model.

The GGUF to start from is written here with the gguf package: weights and what llama.cpp must know of a Llama, without a
tokenizer, which quantizing does not need. What came out is read with the same package.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import gguf
import reading
import torch
from safetensors.torch import load_file

QUANTIZE = Path(__file__).parent / ".venv-llama-cpp" / "bin" / "llama-quantize"


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
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        there = names.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim == 1:
            writer.add_tensor(there, tensor.float().numpy())
        else:
            bits = tensor.to(torch.bfloat16).view(torch.uint8).numpy()
            writer.add_tensor(there, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(arguments: argparse.Namespace) -> reading.Found:
    with tempfile.TemporaryDirectory() as name:
        before, after = Path(name) / "before.gguf", Path(name) / "after.gguf"
        write(Path(arguments.model), before)
        command = [QUANTIZE, "--tensor-type-file", arguments.export, before, after, "Q8_0", "1"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        tensors = gguf.GGUFReader(after).tensors
        words = {tensor.name: tensor.tensor_type.name.lower() for tensor in tensors}
        return reading.Found(words, {tensor.name: int(tensor.n_bytes) for tensor in tensors})


if __name__ == "__main__":
    reading.run("gguf", read)
