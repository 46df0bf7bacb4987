"""Model and text → profile. May import: formats, sensitivity."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from bitplan.formats.base import Format
from bitplan.formats.errors import FormatUnavailable
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.kv.cache import KV_FORMATS
from bitplan.formats.scheme import QuantScheme, schemes_for
from bitplan.formats.table import format_named
from bitplan.sensitivity.curvature import sampled
from bitplan.sensitivity.estimate import RUN_ROWS, estimate, gptq_ratio, sample
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.loss import Reference, finite
from bitplan.sensitivity.measured import measure
from bitplan.sensitivity.profile import CacheRow, Profile, ProfileRow, unit_entry, unquantized_entry
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import locked

Rows = dict[tuple[str, QuantScheme], dict[str, Any]]


def sizes(session: Session, menu: tuple[str, ...], rounding: str | None = None) -> Profile:
    """A profile of bytes alone, every loss 0: what is needed to know whether a budget can be met at all."""
    rows = {
        (unit.name, choice): {"bytes": unit.nbytes(choice.format), "predicted_nll": 0.0}
        for unit in session.graph.units
        for choice in schemes_for(unit.native, menu, rounding)
    }
    return _profile(session, rows)


def audit(session: Session, menu: tuple[str, ...], rounding: str | None = None, measured: bool = False) -> Profile:
    """Score every unit in every format of the menu, and where asked measure it. Raises RoundingFailed."""
    session.gather()
    rows: Rows = {}
    wanted: list[tuple[Unit, QuantScheme]] = []
    ratios = gptq_ratios(session, [format_named(name) for name in menu])
    for unit in progress(session.graph.units, desc="formats", unit="unit"):
        drawn = sample(unit, session.swapper.weight(unit), session.store[unit])
        for scheme in schemes_for(unit.native, menu, rounding):
            loss = 0.0
            if scheme.format != unit.native:
                loss = estimate(drawn, scheme)
                if scheme.rounding == "gptq" and unit.kind != "embedding":
                    loss *= ratios[scheme.format]
                wanted.append((unit, scheme))
            if math.isfinite(loss):
                rows[unit.name, scheme] = {"bytes": unit.nbytes(scheme.format), "predicted_nll": max(0.0, loss)}
            else:
                print(f"{unit.name} cannot take {scheme}: a value overflows", file=sys.stderr)
    if not measured:
        return _profile(session, rows)
    reference = Reference(session.model, session.texts.search)
    journal = session.weight_cache.folder / f"measured-{session.texts.search.fingerprint[:16]}.jsonl"
    with locked(journal):
        found = measure(session.swapper, session.weight_cache, reference, wanted, journal)
    for (name, choice), evaluation in found.items():
        if (name, choice) in rows and not math.isfinite(evaluation.kl + evaluation.delta_nll):
            del rows[name, choice]
            print(f"{name} cannot take {choice}: its loss is not finite", file=sys.stderr)
        elif (name, choice) in rows:
            rows[name, choice] |= {
                "measured_nll": evaluation.delta_nll,
                "measured_nll_se": finite(evaluation.delta_nll_se),
                "measured_kl": evaluation.kl,
            }
    return _profile(session, rows, float(reference.nll.mean()))


def gptq_ratios(session: Session, formats: Sequence[Format]) -> dict[str, float]:
    """What GPTQ loses over what is estimated, by format, from running it on a few units."""
    units = sampled(session.graph.units)
    drawn = [sample(unit, session.swapper.weight(unit), session.store[unit], RUN_ROWS) for unit in units]
    integers = [format for format in formats if isinstance(format, IntegerFormat)]
    return {f.name: gptq_ratio(drawn, f) for f in progress(integers, desc="GPTQ on a few units", unit="format")}


def audit_cache(session: Session) -> tuple[CacheRow, ...]:
    """What each format of the KV cache costs by itself, where the model's cache can have it."""
    reference, rows = Reference(session.model, session.texts.search), []
    for name in progress([name for name in KV_FORMATS if name != "native"], desc="KV cache", unit="format"):
        try:
            found = reference.evaluate(session.model, name)
        except FormatUnavailable as reason:
            print(f"KV cache: {reason}", file=sys.stderr)
            break
        rows.append(CacheRow(format=name, kl=found.kl, kl_se=finite(found.kl_se), delta_nll=found.delta_nll))
    return tuple(rows)


def _profile(session: Session, rows: Rows, full_precision_nll: float | None = None) -> Profile:
    return Profile(
        provenance=session.provenance,
        full_precision_nll=full_precision_nll,
        units=tuple(unit_entry(unit) for unit in session.graph.units),
        unquantized=tuple(unquantized_entry(kept) for kept in session.graph.unquantized),
        rows=tuple(
            ProfileRow(unit=name, format=choice.format, rounding=choice.rounding, **row)
            for (name, choice), row in rows.items()
        ),
    )
