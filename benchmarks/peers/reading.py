"""What the readers of exports do alike: arguments, words, the answer. Nothing here imports bitplan.

A reader is a script run by its own environment's python, beside this file. Its `read` gets the arguments and returns a
`Found`, which says of each module, in the words of the target, what the reader itself took it for.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Found:
    words: dict[str, str]
    """Module or tensor → what the reader took it for."""
    nbytes: dict[str, int] = field(default_factory=dict)
    """Module or tensor → bytes that it takes there, where the reader holds weights."""
    logits: torch.Tensor | None = None


def logits(model: torch.nn.Module, arguments: argparse.Namespace) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=load_file(arguments.ids)["ids"]).logits.float().contiguous()


def run(package: str, read: Callable[[argparse.Namespace], Found]) -> None:
    parser = argparse.ArgumentParser(description=f"Read an export with {package}; write what was found.")
    parser.add_argument("--model", required=True, help="the folder of the full-precision model")
    parser.add_argument("--export", required=True, help="what was exported: a file or a folder")
    parser.add_argument("--ids", required=True, help="a safetensors file with `ids` [texts, tokens]")
    parser.add_argument("--out", required=True, help="a safetensors file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = read(arguments)
    tensors = {} if found.logits is None else {"logits": found.logits}
    said = {"version": version(package), "words": json.dumps(found.words), "nbytes": json.dumps(found.nbytes)}
    save_file(tensors, arguments.out, said)
