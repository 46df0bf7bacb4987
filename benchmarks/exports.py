"""Do the real readers of exports read what the plan says? `python -m benchmarks.exports [TARGET …]`.

The embedded model is planned with formats in turn, its embedding kept but for GGUF, and exported to each target. Each
reader, in an environment of its own that is made where it is missing, says what it took each module for, and where it
loads the weights, their bytes and the model's logits. Those of targets that hold the plan's codes must equal ours to
the rounding of the type that the reader runs in; torchao rounds itself, so that its difference is one of rounding and
only told. Where words, bytes or logits differ, the exit code is 1. TARGET may also be a server's name.
May import: everything.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.gptq_layout import LIMIT, PEERS, READERS
from benchmarks.gptq_layout import read as read_checkpoint
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.demo import CALIBRATION, HELDOUT, MODEL
from bitplan.planner.export import Exported, export, write_export
from bitplan.planner.export.gguf import SIZES, Gguf
from bitplan.planner.export.gptq_layout import save_gptq
from bitplan.planner.load import load_planned
from bitplan.planner.plan import Plan
from bitplan.planner.report.tables import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.texts.read import read_texts

TEXTS = 8
HALF_LIMIT = 5e-3
"""LIMIT where the reader runs in float16: some ten roundings of it."""


@dataclass(frozen=True)
class Case:
    target: str
    formats: tuple[str, ...]
    environment: str
    script: str
    keeps_embedding: bool = True
    limit: float = LIMIT
    server: str = ""
    """Who reads the checkpoint, where that is not the target's own package."""


CASES = (
    Case("gptqmodel", ("int8", "int4-g64", "int3-g32", "bf16"), "gptqmodel", "read_gptqmodel_config.py"),
    Case(
        "compressed-tensors", ("int8", "int4-g64", "int2-g32"), "compressed-tensors-0.17", "read_compressed_tensors.py"
    ),
    Case("compressed-tensors", ("int8", "int4-g64", "int3-g32"), "compressed-tensors", "read_compressed_tensors.py"),
    Case(
        "compressed-tensors",
        ("fp8", "int8-g64", "int5-row", "bf16"),
        "compressed-tensors",
        "read_compressed_tensors.py",
    ),
    Case(
        "compressed-tensors",
        ("int4-g128", "int4-g64", "int4-g32", "bf16"),
        "vllm",
        "read_vllm.py",
        limit=HALF_LIMIT,  # vLLM's own kernel for the CPU has no float32
        server="vllm",
    ),
    Case(
        "compressed-tensors",
        ("int8", "int6-g64", "int5-row", "int4-g64", "int3-g32", "int2-g64", "fp8", "bf16"),
        "vllm",
        "read_vllm.py",
        server="vllm",
    ),
    Case("gptqmodel", ("int8", "bf16"), "vllm", "read_vllm.py", server="vllm"),
    Case("torchao", ("int8", "fp8", "bf16"), "torchao", "read_torchao.py"),
    Case("torchao", ("int8", "int4-g64", "int4-g32", "bf16"), "torchao", "read_torchao.py"),
    Case("gguf", ("int8", "int4-g64", "int3-g32"), "gguf", "read_gguf.py", keeps_embedding=False),
    Case(
        "gguf",
        ("int6-g64", "int5-g64", "int2-g64", "bf16", "fp16", "nf4", "ternary-g64"),
        "gguf",
        "read_gguf.py",
        keeps_embedding=False,
    ),
    Case("auto-round", ("int8", "int4-g64", "int3-g32", "bf16"), "auto-round", "read_auto_round.py"),
)


def mixed(session: Session, formats: tuple[str, ...]) -> Plan:
    """The plan whose groups take the formats in turn, each rounded to nearest."""
    turns = [uniform_plan(session, name, "nearest") for name in formats]
    groups = list(dict.fromkeys(unit.group for unit in turns[0].units))
    units = [turns[groups.index(unit.group) % len(turns)].units[i] for i, unit in enumerate(turns[0].units)]
    size = sum(unit.bytes for unit in units) + sum(entry.bytes for entry in turns[0].unquantized)
    parts = {"units": [unit.model_dump() for unit in units], "bytes": size}
    return Plan.model_validate(turns[0].model_dump() | parts)


def ask(case: Case, exported: Path, ids: Path, out: Path) -> tuple[dict[str, str], dict[str, int], Tensor | None, str]:
    """What a reader took each module for, its bytes, the logits of the first tokens or of all, and its version."""
    command: list[str | Path] = [PEERS / f".venv-{case.environment}" / "bin" / "python", PEERS / case.script]
    command += ["--model", MODEL, "--export", exported, "--ids", ids, "--out", out]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{case.target} could not read its export:\n{done.stderr[-3000:]}")
    with safe_open(out, "pt") as file:
        said = file.metadata()
        logits = file.get_tensor("logits") if "logits" in file.keys() else None  # noqa: SIM118 (a file is no dict)
    return json.loads(said["words"]), json.loads(said["nbytes"]), logits, said["version"]


def differing(exported: Exported, words: dict[str, str], nbytes: dict[str, int]) -> Iterator[str]:
    """Every unit that the reader took for something else than was told, or that has other bytes there."""
    target = exported.target
    for unit, line in zip(exported.plan.units, exported.lines, strict=True):
        there = target.names(unit.parameter) if isinstance(target, Gguf) else [unit.name]
        for name in there:
            if words.get(name) != line.word:
                yield f"{name} is {words.get(name)!r}, not {line.word!r}"
        if nbytes and sum(nbytes[name] for name in there) != line.bytes:
            yield f"{unit.name} takes {sum(nbytes[name] for name in there)} bytes, not {line.bytes}"
    if nbytes and (target.holds_codes or isinstance(target, Gguf)):  # the reader counted the kept tensors too
        total = sum(nbytes.values())
        if total != exported.bytes:
            yield f"all takes {total} bytes, not {exported.bytes}"


def block_sizes() -> Iterator[str]:
    """Where our table of GGUF's types differs from the package's."""
    import gguf

    for name, size in SIZES.items():
        if tuple(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]) != size:
            yield f"{name} is {size} here"


def prepare(cases: list[Case]) -> None:
    for name in dict.fromkeys(case.environment for case in cases):
        subprocess.run([PEERS / "make.sh", name], check=True, stdout=sys.stderr)
    if any(case.target == "gguf" for case in cases):
        subprocess.run([PEERS / "make-llama-cpp.sh"], check=True, stdout=sys.stderr)
        # The export itself needs the gguf package, which is plain Python.
        sys.path += map(str, (PEERS / ".venv-gguf" / "lib").glob("python*/site-packages"))


def own_logits(session: Session, plan: Plan, ids: Tensor) -> Tensor:
    model = load_planned(plan, session.source, "cpu")
    torch.nn.Module.float(model)  # what is kept; codes are integers and stay
    with torch.no_grad():
        return model(input_ids=ids).logits


def main() -> None:
    wanted = set(sys.argv[1:]) or {case.target for case in CASES}
    cases = [case for case in CASES if {case.target, case.server} & wanted]
    prepare(cases)
    source = sources.find(MODEL)
    texts = read_texts(source, files=[CALIBRATION], heldout=[HELDOUT])
    ids = texts.heldout.ids[:TEXTS].contiguous()
    sessions = {kept: open_session(source, texts, ("model.embed_tokens",) * kept, "cpu") for kept in (True, False)}
    rows, wrong = [], list(block_sizes()) if "gguf" in wanted else []
    with tempfile.TemporaryDirectory() as name:
        file, out = Path(name) / "ids.safetensors", Path(name) / "out.safetensors"
        save_file({"ids": ids}, file)
        for i, case in enumerate(cases):
            session = sessions[case.keeps_embedding]
            plan, place = mixed(session, case.formats), Path(name) / f"export-{i}"
            exported = export(plan, case.target, source=source)
            write_export(exported, place, device="cpu")
            folder = place.with_suffix(".gptq")
            if case.target == "gptqmodel":  # the weights that these settings belong to
                save_gptq(load_planned(plan, source, "cpu"), plan, source, folder, force=False)
            words, nbytes, logits, version = ask(case, folder if folder.exists() and case.server else place, file, out)
            found = list(differing(exported, words, nbytes))
            if case.target == "gptqmodel" and not case.server:
                logits, _ = read_checkpoint(READERS[0], folder, file, out)
            reader = f"{case.target} in {case.server}" if case.server else case.target
            change = "–"
            if logits is not None:
                own = own_logits(session, plan, ids)[:, : logits.shape[1]]
                change = f"{(logits - own).abs().max():.1e} of {own.abs().max():.0f}"
                if case.target != "torchao" and (logits - own).abs().max() > case.limit * own.abs().max():
                    found.append(f"a logit of {reader} differs by more than {case.limit} of the largest")
            what = f"{len(exported.lines)} units" + (f", {sum(nbytes.values()):,} bytes" if nbytes else "")
            row = (f"{reader} {version}", ", ".join(case.formats), what, change, "no" if found else "yes")
            print(*row, sep="  ", file=sys.stderr, flush=True)
            rows.append(row)
            wrong += found
    print(table(("reader", "plan", "read", "max |Δ logit|", "as told"), rows, left=3))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
