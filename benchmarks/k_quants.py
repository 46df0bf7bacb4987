"""Plans beside llama.cpp's K-quants at equal file bytes. `make bench-k-quants`.

llama-quantize (`peers/make-llama-cpp.sh`) quantizes a Llama with an importance matrix of the calibration text: the mean
squares of each layer's inputs, as bitplan gathers them. Its file is dequantized with the gguf package, and evaluated
here, beside the knapsack's plan whose tensors take as many bytes. Rows are kept in benchmarks/.results until --redo.
May import: everything.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch

from benchmarks.machine import described
from benchmarks.peers import gguf_model
from benchmarks.rounding import HERE, Case, at_bytes, figures, judged, kept
from bitplan.planner.assemble import Finish
from bitplan.planner.report.tables import table
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.texts.text import TOKENS

QUANTIZE = HERE / "peers" / ".venv-llama-cpp" / "bin" / "llama-quantize"
TYPES = ("Q4_K_M", "Q3_K_M")
GOAL = 0.6
"""KL of the plan over that of the K-quant."""


def importance(session: Session) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs of each weight, by its name in GGUF; a tied head's under the embedding's."""
    session.gather()
    named = gguf_model.names(session.model.config.num_hidden_layers)
    return {
        named.get_name(unit.parameter, try_suffixes=(".weight",)): found[0]
        for unit in session.graph.units
        if (found := session.store[unit].inputs) is not None
    }


def peer(case: Case, kind: str, tokens: int) -> dict[str, Any]:
    """A K-quant's figures, the bytes of its tensors, and how many have which type."""
    texts = case.texts(tokens)
    session = open_session(case.source, texts, device="cpu")
    squares, reference = importance(session), session.reference(texts.heldout)
    with tempfile.TemporaryDirectory() as name:
        before, matrix, after = (Path(name) / part for part in ("before.gguf", "matrix.dat", "after.gguf"))
        gguf_model.write(Path(case.source.folder), before)
        gguf_model.write_importance(squares, matrix)
        began = time.perf_counter()
        command = [QUANTIZE, "--imatrix", matrix, before, after, kind, "1"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        tensors = gguf.GGUFReader(after).tensors
        model = session.model  # from here on with the K-quant's weights
        named = gguf_model.names(model.config.num_hidden_layers)
        parameters = {named.get_name(key, try_suffixes=(".weight",)): p for key, p in model.named_parameters()}
        for tensor in tensors:
            weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            parameters[tensor.name].data = weight.view(parameters[tensor.name].shape)
        kinds = Counter(tensor.tensor_type.name for tensor in tensors)
        nbytes = sum(int(tensor.n_bytes) for tensor in tensors)
    return {**figures(reference.evaluate(model)), "bytes": nbytes, "seconds": seconds, "types": dict(kinds)}


def ours(case: Case, limit: int, tokens: int) -> dict[str, Any]:
    session = open_session(case.source, case.texts(tokens), device="cpu")
    began = time.perf_counter()
    return judged(session, at_bytes(session, limit, Finish()), case, began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("model", "text", "heldout"):
        parser.add_argument(name, metavar=name.upper())
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--redo", action="store_true")
    arguments = parser.parse_args()
    subprocess.run([HERE / "peers" / "make-llama-cpp.sh"], check=True, stdout=sys.stderr)
    case, rows = Case(arguments.model, arguments.text, arguments.heldout), []
    for kind in arguments.types:
        named = f"{case.named(arguments.tokens)}.{kind}"
        theirs = kept(named, arguments.redo, partial(peer, case, kind, arguments.tokens))
        made = partial(ours, case, theirs["bytes"], arguments.tokens)
        for name, found in ((kind, theirs), ("plan", kept(f"{named}.plan", arguments.redo, made))):
            losses = [f"{found[key]:.4f}" for key in ("nats", "nats_se", "kl", "kl_se")]
            ratio = "" if found is theirs else f"{found['kl'] / theirs['kl']:.2f}"
            types = ", ".join(f"{count} {each}" for each, count in found.get("types", {}).items())
            rows.append((name, f"{found['bytes']:,}", *losses, ratio, f"{found['seconds']:.0f}", types))
    head = (
        "",
        "bytes",
        "nats above full precision",
        "± se",
        "KL",
        "± se",
        f"of KL (goal {GOAL})",
        "seconds",
        "tensors",
    )
    print(table(head, rows, left=1))
    print(described())


if __name__ == "__main__":
    main()
