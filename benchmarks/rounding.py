"""Whose codes are better? `make bench-rounding`, or `python -m benchmarks.rounding --help` for parts of it.

Each model is rounded by each method at 2, 3 and 4 bits in groups of 64: the same calibration tokens, the same held-out
tokens, embeddings and head left as they are so that every peer can take part. A second table plans them too. Each cell
is a process of its own, and its result is kept in benchmarks/.results until --redo names it. A healed row heals the
codes of the row before it; its seconds are both's.
May import: everything.
"""

import argparse
import itertools
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks import models
from bitplan.formats.table import DEFAULT_FORMATS
from bitplan.planner.assemble import Finish, quick_plan, uniform_plan
from bitplan.planner.demo import MODEL
from bitplan.planner.evaluate.trials import Effort
from bitplan.planner.load import load_planned
from bitplan.planner.plan import Budget, Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.report.figures.scatter import Dot, frontier_plot
from bitplan.planner.report.tables import table
from bitplan.planner.select import Selection
from bitplan.search.problem import problem_of
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.fingerprint import read_header
from bitplan.sensitivity.loss import Evaluation, Reference
from bitplan.sensitivity.session import Session, load_reference, open_session
from bitplan.sensitivity.texts.read import read_texts
from bitplan.sensitivity.texts.text import TOKENS, Texts

HERE = Path(__file__).parent
RESULTS = HERE / ".results"
OURS = ("nearest", "awq", "gptq", "yaqa", "tuned", "tuned+healed")
PLANS = ("plan", "plan+healed", "plan-whole", "plan-whole+healed")
"""Mixed plans at the bytes of the uniform one whose ends are kept, and at those of the one with everything planned."""
WHOLE = ("nearest", "gptq", *PLANS)
"""What the second table shows, of everything planned."""
PEERS = ("bitsandbytes", "hqq", "gptqmodel", "auto-round-rtn", "auto-round", "auto-round-best")
BLOCK = 256
GROUP = 64
BITS = (4, 3, 2)
LABEL = "KL to full precision, nats per token"


class Case:
    """A model and its texts, in blocks of `block` tokens; formats have groups of `group` weights, or if 0, rows."""

    def __init__(self, model: str, text: str, heldout: str, block: int = BLOCK, group: int = GROUP):
        self.source = sources.find(model)
        own = "" if (block, group) == (BLOCK, GROUP) else f".{block}.g{group}"
        self.name = ("demo" if Path(model) == MODEL else Path(model).name) + own
        self.files = (model, text, heldout)
        self.block, self.group = block, group

    def format(self, bits: int) -> str:
        return f"int{bits}-g{self.group}" if self.group else f"int{bits}-row"

    def named(self, tokens: int) -> str:
        """What results begin their names with."""
        return f"{self.name}.{tokens}"

    def texts(self, tokens: int) -> Texts:
        _, text, heldout = self.files
        return read_texts(self.source, files=[Path(text)], heldout=[Path(heldout)], tokens=tokens, length=self.block)


def healed(method: str) -> tuple[str, bool]:
    """The method whose codes another heals, or itself; and whether it heals."""
    return method.removesuffix("+healed"), method.endswith("+healed")


def ours(case: Case, method: str, bits: int, tokens: int, whole: bool) -> dict[str, Any]:
    """Round by bitplan in this process. `whole`: embeddings and head too."""
    texts = case.texts(tokens)
    rounding, distilled = healed(method)
    session = open_session(case.source, texts, device="cpu") if whole else ends_kept(case, texts)
    plan = uniform_plan(session, case.format(bits), rounding, distilled)
    return judged(session, plan, case, time.perf_counter())


def planned(case: Case, method: str, bits: int, tokens: int) -> dict[str, Any]:
    """The knapsack's plan at the bytes that `PLANS` says; its seconds are those of the audit, the solution and the
    rounding."""
    texts = case.texts(tokens)
    session = open_session(case.source, texts, device="cpu")
    kind, distilled = healed(method)
    limited = session if kind == "plan-whole" else ends_kept(case, texts)
    limit = uniform_plan(limited, case.format(bits)).bytes
    began = time.perf_counter()
    return judged(session, at_bytes(session, limit, Finish(distilled=distilled)), case, began)


def at_bytes(session: Session, limit: int, finish: Finish, trials: int = 0) -> Plan:
    """The plan within a number of bytes: the knapsack's, or with trials what a search selects."""
    problem, budget = problem_of(audit(session, DEFAULT_FORMATS)), Budget(requested=f"{limit} bytes", weights=limit)
    if not trials:
        return quick_plan(problem, budget, finish)
    return Selection(problem, session, finish, Effort.of(trials), device="cpu").within(budget)


def ends_kept(case: Case, texts: Texts) -> Session:
    """A session in which embeddings and head are no units."""
    session = open_session(case.source, texts, device="cpu")
    ends = (session.model.get_input_embeddings(), session.model.get_output_embeddings())
    kept = [u.name for u in session.graph.units if u.kind == "embedding" or _owner(session.model, u.name) in ends]
    return open_session(case.source, texts, tuple(kept), device="cpu")


def judged(session: Session, plan: Plan, case: Case, began: float) -> dict[str, Any]:
    """Round a plan; its figures on the held-out text, and the seconds since `began`."""
    round_missing(plan, session)
    seconds = time.perf_counter() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluation = Reference(session.model, session.texts.heldout).evaluate(load_planned(plan, case.source, "cpu"))
    return {**figures(evaluation), "seconds": seconds, "peak_bytes": peak, "bytes": plan.bytes, "note": ""}


def figures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "nats": evaluation.delta_nll,
        "nats_se": evaluation.delta_nll_se,
        "kl": evaluation.kl,
        "kl_se": evaluation.kl_se,
        "ppl": evaluation.ppl,
    }


def _owner(model: torch.nn.Module, name: str) -> torch.nn.Module:
    return model.get_submodule(name)


def peer(case: Case, method: str, bits: int, tokens: int) -> dict[str, Any]:
    """Round by a peer."""
    tool = tool_of(method)
    recipe = ["--recipe", method.removeprefix(f"{tool}-")] if tool != method else []
    return by_tool(case, tool, ["--bits", bits, *recipe], tokens)


def tool_of(method: str) -> str:
    """The peer that a method is a recipe of."""
    return method.removesuffix("-best").removesuffix("-rtn")


def by_tool(case: Case, tool: str, options: list[Any], tokens: int) -> dict[str, Any]:
    """Quantize by a peer in its own environment, evaluate here."""
    texts = case.texts(tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"ids": texts.calibration.ids.contiguous()}, folder / "ids.safetensors")
        python = HERE / "peers" / f".venv-{tool}" / "bin" / "python"
        command: list[Any] = [python, HERE / "peers" / f"run_{tool.replace('-', '_')}.py"]
        command += ["--model", case.source.folder, "--calibration", folder / "ids.safetensors", "--group", case.group]
        command += ["--out", folder / "out", *options]
        done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            return {"failed": True, "note": done.stderr.strip().splitlines()[-1]}
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        if result.get("failed"):
            return {"failed": True, "note": result["note"]}
        reference = Reference(load_reference(case.source, "cpu"), texts.heldout)
        evaluation = reference.evaluate(
            AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).eval()
        )
    return {
        **figures(evaluation),
        **{name: result.get(name) for name in ("seconds", "peak_bytes", "note", "allocation")},
    }


def cell(case: Case, method: str, bits: int, tokens: int, whole: bool, redo: bool) -> dict[str, Any]:
    """A result, from its file where there is one."""
    name = cell_name(case, method, bits, tokens, whole)
    return kept(name, redo, partial(made, case, method, bits, tokens, whole))


def cell_name(case: Case, method: str, bits: int, tokens: int, whole: bool) -> str:
    return f"{case.named(tokens)}.{method}{'.whole' if whole else ''}.{bits}"


def place(name: str) -> Path:
    """The file of a result."""
    return RESULTS / f"{name}.json"


def kept(name: str, redo: bool, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result under a name, from its file where there is one."""
    path = place(name)
    if path.exists() and not redo:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    print(f"{name} …", file=sys.stderr, flush=True)
    result = make()
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result), encoding="utf-8")
    return result


def made(case: Case, method: str, bits: int, tokens: int, whole: bool) -> dict[str, Any]:
    """A result, of a process of its own."""
    if method in PEERS:
        return peer(case, method, bits, tokens)
    rounding, distilled = healed(method)
    cache = RESULTS / f"{cell_name(case, rounding, bits, tokens, whole)}.cache"
    before = cell(case, rounding, bits, tokens, whole, False)["seconds"] if distilled else 0.0
    if not distilled:
        shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.rounding", "--one", method, str(bits), "--tokens", str(tokens)]
    command += ["--block", str(case.block), "--group", str(case.group)]
    command += ["--case", *case.files, *(["--whole"] if whole else [])]
    environment = os.environ | {"BITPLAN_CACHE": str(cache)}
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment, check=True)
    result = json.loads(done.stdout)
    result["seconds"] += before
    return result


def picture(cases: list[Case], tokens: int) -> str:
    """KL over bits per weight of every result of the second table that there is, of this run or an earlier one."""
    dots = []
    for case in cases:
        shapes = [entry["shape"] for path in case.source.files for entry in read_header(path)[1].values()]
        for method, bits, whole in itertools.product(WHOLE, BITS, (True, False)):
            own = method in PLANS
            if place(cell_name(case, method, bits, tokens, whole)).exists() and (whole or not own):
                result = cell(case, method, bits, tokens, whole, False)
                label = f"{case.format(bits)} {method}{'' if whole else ', ends bf16'}"
                name = method.replace("-whole", "").replace("+", ", ") if own else label
                size = result["bytes"] * 8 / sum(map(math.prod, shapes))  # a tied weight lies in the file once
                dots.append(Dot(name, size, result["kl"], name, own))
    return frontier_plot(dots, ylabel=LABEL, alone=True)


def shown(result: dict[str, Any]) -> list[str]:
    if result.get("failed"):
        return ["cannot", "", "", "", ""]
    peak = result["peak_bytes"] / 2**20
    figures = (f"{result['nats']:+.4f}", f"{result['nats_se']:.4f}", f"{result['kl']:.4f}")
    return [*figures, f"{result['seconds']:.0f}", f"{peak:.0f}"]


def means(found: dict[tuple[str, int], list[dict[str, Any]]], chosen: list[int]) -> list[tuple[str, ...]]:
    """Mean nats of each method at each bit-width, and its mean seconds."""
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        cells, seconds = [], []
        for bits in chosen:
            results = found[method, bits]
            whole = not any(result.get("failed") for result in results)
            cells.append(f"{sum(r['nats'] for r in results) / len(results):.4f}" if whole else "–")
            seconds += [result["seconds"] for result in results] if whole else []
        rows.append((method, *cells, f"{sum(seconds) / len(seconds):.0f}" if seconds else "–"))
    return rows


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """A cell of ours, in this process."""
    method, bits = arguments.one
    case = Case(*arguments.case, arguments.block, arguments.group)
    if method in PLANS:
        return planned(case, method, int(bits), arguments.tokens)
    return ours(case, method, int(bits), arguments.tokens, arguments.whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    models.add_options(parser)
    parser.add_argument("--methods", default=",".join((*OURS, *PEERS)), metavar="A,B,…")
    parser.add_argument("--bits", default=",".join(map(str, BITS)), metavar="4,3,2")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--block", type=int, default=BLOCK, help="tokens of a block")
    parser.add_argument("--group", type=int, default=GROUP, help="weights that share a scale; 0: a row's")
    parser.add_argument("--redo", default="", metavar="A,B,…", help="methods to run again")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the second table's KL over its sizes as SVG")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "BITS"), help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments)))
        return
    methods = arguments.methods.split(",")
    for tool in sorted({tool_of(method) for method in methods if method in PEERS}):
        subprocess.run([HERE / "peers" / "make.sh", tool], check=True, stdout=sys.stderr)
    cases = [Case(*files, arguments.block, arguments.group) for files in models.chosen(arguments)]
    redo = arguments.redo.split(",")
    rows, whole, notes = [], [], {}
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    chosen = [int(bits) for bits in arguments.bits.split(",")]
    for bits in chosen:
        for case in cases:
            for method in methods:
                if method in PLANS:
                    continue
                result = cell(case, method, bits, arguments.tokens, False, method in redo)
                rows.append((str(bits), case.name, method, *shown(result)))
                found[method, bits].append(result)
                if result["note"]:
                    notes[f"{method}, {case.name}, {bits} bits"] = result["note"]
            for method in WHOLE:
                if method in methods:
                    result = cell(case, method, bits, arguments.tokens, True, method in redo)
                    whole.append((str(bits), case.name, method, f"{result['bytes']:,}", *shown(result)[:3]))
                    if method not in PLANS:
                        kept = cell(case, method, bits, arguments.tokens, False, False)
                        whole.append(("", "", "  ends kept", f"{kept['bytes']:,}", *shown(kept)[:3]))
    if arguments.picture and set(WHOLE) & set(methods):
        arguments.picture.write_text(picture(cases, arguments.tokens), encoding="utf-8")
    head = ("bits", "model", "method", "nats above full precision", "± se", "KL", "seconds", "peak MiB")
    print(table(head, rows, left=3))
    print("\nMeans over the models, for methods that can do them all:\n")
    print(table(("nats above full precision", *(f"{bits} bits" for bits in chosen), "seconds"), means(found, chosen)))
    print("\nEverything planned, embeddings and head too:\n")
    print(table(("bits", "model", "method", "bytes", *head[3:6]), whole, left=3))
    print("\n" + "\n".join(f"{where}: {note}" for where, note in notes.items()))
    print(
        f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
