"""Run with .venv-gguf: a --tensor-type-file, by llama-quantize of .venv-llama-cpp, on a GGUF of the model.

What came out is read with the gguf package.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import gguf
import gguf_model
import reading

QUANTIZE = Path(__file__).parent / ".venv-llama-cpp" / "bin" / "llama-quantize"


def read(arguments: argparse.Namespace) -> reading.Found:
    with tempfile.TemporaryDirectory() as name:
        before, after = Path(name) / "before.gguf", Path(name) / "after.gguf"
        gguf_model.write(Path(arguments.model), before)
        command = [QUANTIZE, "--tensor-type-file", arguments.export, before, after, "Q8_0", "1"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        tensors = gguf.GGUFReader(after).tensors
        words = {tensor.name: tensor.tensor_type.name.lower() for tensor in tensors}
        return reading.Found(words, {tensor.name: int(tensor.n_bytes) for tensor in tensors})


if __name__ == "__main__":
    reading.run("gguf", read)
