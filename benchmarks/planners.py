"""Whose plan is better? `make bench-planners`.

A peer chooses the bits of each linear layer for an average, rounds by its own rounding and leaves embedding and head as
they are. Its result's bytes are counted in bitplan's formats of the same bits and groups. At equal bytes of linears and
at equal total bytes, bitplan plans and rounds too; and the peer's plan is rounded by bitplan, which tells planner and
rounding apart. All get the same calibration tokens and are evaluated on the same held-out ones. Each row's result is
kept in benchmarks/.results until --redo names the row.
May import: everything.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import models
from benchmarks.machine import described
from benchmarks.rounding import GROUP, HERE, Case, at_bytes, by_tool, ends_kept, judged, kept
from bitplan.planner.assemble import Finish, assemble
from bitplan.planner.plan import Plan
from bitplan.planner.report.tables import table
from bitplan.sensitivity.profile import unit_entry, unquantized_entry
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.texts.text import TOKENS

PEERS = {"AutoScheme": "auto-round", "auto_quantize": "modelopt"}
"""Planners → their environments (`peers/make.sh NAME`)."""


@dataclass(frozen=True)
class Arm:
    """How bitplan plans at a peer's bytes. Without trials the plan is the knapsack's."""

    whole: bool
    """Embedding and head are planned too, at equal total bytes."""
    trials: int = 0
    rounding: str | None = None

    @property
    def goal(self) -> float:
        """Nats above full precision, of the peer's."""
        return 0.3 if self.whole else 0.7


ARMS = {
    "linears": Arm(False),
    "linears, 20 trials": Arm(False, 20),
    "linears, tuned": Arm(False, rounding="tuned"),
    "everything": Arm(True),
    "everything, 20 trials": Arm(True, 20),
    "everything, tuned": Arm(True, rounding="tuned"),
}
REROUNDED = "its plan, gptq"


def plan_of(session: Session, bits: dict[str, int]) -> Plan:
    """A peer's allocation, to be rounded by bitplan. Its formats may differ within a group, so each unit is its own."""
    return assemble(
        [unit_entry(unit).model_copy(update={"group": unit.name}) for unit in session.graph.units],
        [unquantized_entry(tensor) for tensor in session.graph.unquantized],
        session.provenance,
        lambda unit: f"int{bits[unit.name]}-g{GROUP}",
        Finish("gptq"),
        "a peer's",
        "search",
    )


def finished(session: Session, plan: Plan, case: Case, bits: dict[str, int], began: float) -> dict[str, Any]:
    """A plan's figures, with the bytes of its linears."""
    return {**judged(session, plan, case, began), "linears": sum(u.bytes for u in plan.units if u.name in bits)}


def rerounded(case: Case, bits: dict[str, int], tokens: int) -> dict[str, Any]:
    session = ends_kept(case, case.texts(tokens))
    return finished(session, plan_of(session, bits), case, bits, time.perf_counter())


def ours(case: Case, arm: Arm, bits: dict[str, int], tokens: int) -> dict[str, Any]:
    """A plan of the total bytes of the peer's, which with embedding and head kept is at equal bytes of linears too."""
    texts = case.texts(tokens)
    bounded = ends_kept(case, texts)
    limit = plan_of(bounded, bits).bytes
    session = open_session(case.source, texts, device="cpu") if arm.whole else bounded
    began = time.perf_counter()
    plan = at_bytes(session, limit, Finish(arm.rounding), arm.trials)
    return finished(session, plan, case, bits, began)


def results(case: Case, peer: str, average: float, tokens: int, arms: list[str], redo: list[str]) -> dict[str, Any]:
    """Rows by name, the peer's first; none where it cannot."""
    name = f"{case.named(tokens)}.{peer}.{average:g}"
    first = kept(name, peer in redo, partial(by_tool, case, PEERS[peer], ["--average", average], tokens))
    if first.get("failed"):
        print(f"{peer}, {average:g} bits: {first['note']}")
        return {}
    bits = first["allocation"]
    again = kept(f"{name}.{REROUNDED}", REROUNDED in redo, partial(rerounded, case, bits, tokens))
    made = {peer: {**first, "linears": again["linears"], "bytes": again["bytes"]}, REROUNDED: again}
    for arm in arms:
        made[arm] = kept(f"{name}.{arm}", arm in redo, partial(ours, case, ARMS[arm], bits, tokens))
    return made


def lines(case: Case, peer: str, average: float, found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, result in found.items():
        nats, kl = (result[key] / found[peer][key] for key in ("nats", "kl"))
        size = (f"{result['linears']:,}", f"{result['bytes']:,}")
        loss = (f"{result[key]:.4f}" for key in ("nats", "nats_se", "kl", "kl_se"))
        goal = f"≤ {ARMS[name].goal:g}" if name in ARMS else ""
        rows.append((case.name, f"{average:g}", name, *size, *loss, f"{nats:.2f}", goal, f"{kl:.2f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    models.add_options(parser)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--averages", type=float, nargs="+", default=[3.5, 4.5], metavar="BITS")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--redo", nargs="+", default=[], choices=[*PEERS, REROUNDED, *ARMS])
    arguments = parser.parse_args()
    rows, notes = [], []
    for case in [Case(*files) for files in models.chosen(arguments)]:
        for peer in arguments.peers:
            subprocess.run([HERE / "peers" / "make.sh", PEERS[peer]], check=True, stdout=sys.stderr)
            for average in arguments.averages:
                found = results(case, peer, average, arguments.tokens, arguments.arms, arguments.redo)
                rows += lines(case, peer, average, found)
                if found:
                    notes.append(f"{peer}, {case.name}, {average:g} bits: {found[peer]['note']}")
    size, loss = ("bytes of linears", "total bytes"), ("nats above full precision", "± se", "KL", "± se")
    ratios = ("nats, of the peer's", "goal", "KL, of the peer's")
    print(table(("model", "bits", "plan", *size, *loss, *ratios), rows, left=3))
    print("\n" + "\n".join(notes))
    print(described())


if __name__ == "__main__":
    main()
