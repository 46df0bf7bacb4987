"""Do the real readers of GPTQ's layout compute what the plan computes? `python -m benchmarks.gptq_layout`.

The embedded model is planned twice, its embedding kept: 4 bits everywhere, and 2, 3, 4, 8 bits and bf16 in turn. Both
are written with planner.gptq_layout; gptqmodel reads both and auto-gptq, which knows one setting for all, the first,
each in an environment of its own (made where it is missing: 6 GB for auto-gptq's old torch). All multiply in float32 on
the CPU, so a difference beyond its rounding is a misread code, scale or zero point: then the exit code is 1.
May import: everything.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitplan.planner.assemble import uniform_plan
from bitplan.planner.demo import CALIBRATION, HELDOUT, MODEL
from bitplan.planner.export.gptq_layout import save_gptq
from bitplan.planner.load import load_planned
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.report.tables import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.texts.read import read_texts

PEERS = Path(__file__).parent / "peers"
TEXTS = 8
LIMIT = 1e-5
"""Largest difference of a logit, as a share of the largest logit: some eighty roundings of a float32."""


@dataclass(frozen=True)
class Reader:
    name: str
    make: tuple[str, ...]
    plans: tuple[str, ...]

    @property
    def python(self) -> Path:
        return PEERS / f".venv-{self.name}" / "bin" / "python"

    @property
    def script(self) -> Path:
        return PEERS / f"read_{self.name.replace('-', '_')}.py"


READERS = (
    Reader("gptqmodel", ("make.sh", "gptqmodel"), ("4 bits", "2, 3, 4, 8 bits, bf16")),
    Reader("auto-gptq", ("make-auto-gptq.sh",), ("4 bits",)),
)


def plans_of(session: Session) -> dict[str, Plan]:
    """The uniform plan, and one whose groups take five formats in turn."""
    uniform = uniform_plan(session, "int4-g64")
    turns = [uniform_plan(session, name) for name in ("int4-g64", "int3-g64", "int2-g32", "int8", "bf16")]
    groups = list(dict.fromkeys(unit.group for unit in uniform.units))
    units = [turns[groups.index(unit.group) % len(turns)].units[i] for i, unit in enumerate(uniform.units)]
    size = sum(unit.bytes for unit in units) + sum(entry.bytes for entry in uniform.unquantized)
    mixed = uniform.model_dump() | {"units": [unit.model_dump() for unit in units], "bytes": size}
    return {"4 bits": uniform, "2, 3, 4, 8 bits, bf16": Plan.model_validate(mixed)}


def read(reader: Reader, folder: Path, ids: Path, out: Path) -> tuple[Tensor, str]:
    """The logits by a reader, and its version."""
    command: list[str | Path] = [reader.python, reader.script, "--model", folder, "--ids", ids, "--out", out]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{reader.name} could not read {folder.name}:\n{done.stderr[-3000:]}")
    with safe_open(out, "pt") as file:
        return file.get_tensor("logits"), file.metadata()["version"]


def main() -> None:
    for reader in READERS:
        subprocess.run([PEERS / reader.make[0], *reader.make[1:]], check=True, stdout=sys.stderr)
    source = sources.find(MODEL)
    texts = read_texts(source, files=[CALIBRATION], heldout=[HELDOUT])
    session = open_session(source, texts, keep=("model.embed_tokens",), device="cpu")
    rows, right = [], True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = texts.heldout.ids[:TEXTS].contiguous()
        save_file({"ids": ids}, folder / "ids.safetensors")
        for title, plan in plans_of(session).items():
            round_missing(plan, session)
            model = load_planned(plan, source, "cpu")
            save_gptq(model, plan, source, folder / title, force=False)
            torch.nn.Module.float(model)  # what is kept; codes are integers and stay
            with torch.no_grad():
                own = model(input_ids=ids).logits
            for reader in (reader for reader in READERS if title in reader.plans):
                found, version = read(reader, folder / title, folder / "ids.safetensors", folder / "out.safetensors")
                change = (found - own).abs().max() / own.abs().max()
                p, q = own.double().log_softmax(-1), found.double().log_softmax(-1)
                kl = (p.exp() * (p - q)).sum(-1).mean()
                right &= bool(change <= LIMIT)
                rows.append((reader.name, version, title, f"{(found - own).abs().max():.1e}", f"{kl:.0e}"))
    print(table(("reader", "version", "plan", "max |Δ logit|", "mean KL"), rows, left=3))
    if not right:
        raise SystemExit(f"a logit differs by more than {LIMIT} of the largest")


if __name__ == "__main__":
    main()
