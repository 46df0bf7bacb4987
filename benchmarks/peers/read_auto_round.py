"""Run with .venv-auto-round: a layer_config, by a run of auto-round of one step on the CPU.

Every layer must come back on a grid of its bits and group size, and one of 16 bits as it was.
"""

import argparse
import json
from pathlib import Path

import job
import reading
import torch
from auto_round import AutoRound
from transformers import AutoTokenizer


def read(arguments: argparse.Namespace) -> reading.Found:
    layers = json.loads(Path(arguments.export).read_text(encoding="utf-8"))
    blocks = job.calibration(arguments.ids)
    source = job.full_precision(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = None
    tool = AutoRound(
        job.full_precision(arguments.model),
        tokenizer,
        layer_config=layers,
        dataset=[blocks],
        seqlen=blocks.shape[1],
        nsamples=len(blocks),
        batch_size=len(blocks),
        iters=1,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    model, resolved = tool.quantize()
    words = {}
    for name in job.layers(source):
        before, after = job.rows(source.get_submodule(name)), job.rows(model.get_submodule(name)).float()
        bits, group = resolved[name]["bits"], resolved[name]["group_size"]
        if bits == 16:
            assert torch.equal(before, after), f"{name} was to stay"
            words[name] = "16 bits"
            continue
        job.require_grid(name, after, bits, job.column_groups(after.shape[1], max(group, 0)))
        assert not torch.equal(before, after), f"{name} came back unchanged"
        words[name] = f"{bits} bits, group_size {group}"
    return reading.Found(words)


if __name__ == "__main__":
    reading.run("auto-round", read)
