"""What the runners of the peers do alike: arguments, which layers must be quantized, checks, the folder, the last line.

A runner is a script run by its own environment's python, beside this file; nothing here imports bitplan. Its `quantize`
gets the arguments and returns a `Quantized`; what it raises becomes a result that says "failed", with the reason.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Quantized:
    """What a tool made: dequantized weights as [rows, columns] by layer name, the time it took, what to know of it."""

    weights: dict[str, torch.Tensor]
    seconds: float
    note: str
    group: int | None = None  # where it is not the one asked for
    allocation: dict[str, int] | None = None  # bits by layer name, where the tool chose them


def full_precision(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that every tool must quantize: all Linear and Conv1D but the head."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) and module is not head}


def rows(layer: torch.nn.Module) -> torch.Tensor:
    """The weight as [out, in], which is what all tools round; Conv1D keeps it the other way round."""
    weight = layer.weight.detach()
    return weight.T.contiguous() if isinstance(layer, Conv1D) else weight


def calibration(path: str) -> torch.Tensor:
    return load_file(path)["ids"]


def ragged(model: torch.nn.Module, group: int) -> list[str]:
    """The layers whose columns `group` does not divide."""
    return [name for name, layer in layers(model).items() if group and rows(layer).shape[1] % group]


def odd(model: torch.nn.Module) -> list[str]:
    """The layers with a side that 32 does not divide, which some tools' packing cannot hold."""
    return [name for name, layer in layers(model).items() if any(side % 32 for side in layer.weight.shape)]


def column_groups(columns: int, group: int) -> torch.Tensor:
    return torch.arange(columns) // (group or columns)


def require_grid(name: str, weight: torch.Tensor, bits: int, group_of: torch.Tensor) -> None:
    """Each row of `weight` must take at most 2^bits values within the columns of a group (`group_of`: column → group).

    A layer that a tool passed over does not, so this also finds those.
    """
    for group in group_of.unique():
        ordered = weight[:, group_of == group].sort(dim=1).values
        most = int((ordered.diff(dim=1) != 0).sum(dim=1).max()) + 1
        if most > 2**bits:
            raise ValueError(f"{name} holds {most} values in a group, more than {bits} bits can")


def save(arguments: argparse.Namespace, weights: dict[str, torch.Tensor]) -> None:
    """The full-precision model with these weights, and its tokenizer, as a plain folder."""
    model = full_precision(arguments.model)
    todo = layers(model)
    if set(weights) != set(todo):
        raise ValueError(f"left unquantized: {sorted(set(todo) - set(weights))}")
    for name, layer in todo.items():
        weight = weights[name].to(torch.float32)
        if torch.equal(weight, rows(layer)):
            raise ValueError(f"{name} came back unchanged")
        with torch.no_grad():
            layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)
    model.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)


def run(tool: str, quantize: Callable[[argparse.Namespace], Quantized], recipes: Iterable[str] = ()) -> None:
    """`recipes`: those that the tool has beside its default."""
    parser = argparse.ArgumentParser(description=f"Quantize a model with {tool}; write it dequantized.")
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--calibration", required=True, help='safetensors file: token blocks "ids"')
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--bits", type=int)
    budget.add_argument("--average", type=float, help="mean bits per weight with scales; the tool chooses each layer's")
    parser.add_argument("--group", type=int, required=True, help="columns that share a scale; 0: the whole row")
    parser.add_argument("--out", required=True)
    parser.add_argument("--recipe", choices=["default", *recipes], default="default")
    arguments = parser.parse_args()
    for path in ("model", "calibration", "out"):
        setattr(arguments, path, os.path.abspath(getattr(arguments, path)))

    # The tools print on stdout, from C too. What they print while imported comes before; the last line is the result.
    stdout = os.dup(1)
    os.dup2(2, 1)
    result = {"tool": tool, "version": importlib.metadata.version(tool), "bits": arguments.bits or arguments.average}
    result |= {"group": arguments.group, "recipe": arguments.recipe}
    try:
        # gptqmodel and auto-round leave files where they are run.
        with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
            made = quantize(arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        save(arguments, made.weights)
        result |= {"seconds": round(made.seconds, 3), "peak_bytes": peak, "quantized": len(made.weights)}
        result |= {"note": made.note}
        if made.group is not None:
            result["group"] = made.group
        if made.allocation is not None:
            result["allocation"] = made.allocation
    except (Exception, SystemExit) as error:  # auto-round exits where it cannot go on
        # A tool's refusal is a result of the benchmark; the trace tells it from a mistake made here.
        traceback.print_exc()
        result |= {"seconds": None, "peak_bytes": None, "quantized": 0}
        result |= {"note": f"{type(error).__name__}: {error}", "failed": True}
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(stdout, (json.dumps(result) + "\n").encode())
