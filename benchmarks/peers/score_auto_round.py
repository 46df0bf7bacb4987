"""Run with .venv-auto-round: what auto-round's AutoScheme takes to score a model's layers in several formats.

The last line of stdout is a JSON list: seconds, and seconds of processor time, of the scoring alone.
"""

import argparse
import json
import os
import time

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.auto_scheme.gen_auto_scheme import GenScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer


class Scored(Exception):
    """Ends the run once the layers are scored."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--lines", required=True, help="JSON lines with a text each, of at least 512 tokens")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--formats", required=True, help="bits-group, by commas")
    arguments = parser.parse_args()
    stdout = os.dup(1)
    os.dup2(2, 1)
    schemes = [map(int, name.split("-")) for name in arguments.formats.split(",")]
    options = [QuantizationScheme(bits=bits, group_size=group, sym=True) for bits, group in schemes]
    scoring = GenScheme.get_layer_config

    def timed(self: GenScheme) -> None:
        began, busy = time.perf_counter(), time.process_time()
        scoring(self)
        raise Scored(time.perf_counter() - began, time.process_time() - busy)

    GenScheme.get_layer_config = timed
    tool = AutoRound(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(arguments.model),
        scheme=AutoScheme(avg_bits=4.5, options=options, nsamples=arguments.samples, seqlen=512, batch_size=1),
        dataset=arguments.lines,
        seqlen=512,
        nsamples=arguments.samples,
        iters=0,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    try:
        tool.quantize()
    except Scored as found:
        os.write(stdout, (json.dumps(found.args) + "\n").encode())


if __name__ == "__main__":
    main()
