"""Model and text → profile. May import: formats, sensitivity."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor

from bitplan.formats.base import Format
from bitplan.formats.errors import FormatUnavailable
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.kv.cache import KV_FORMATS
from bitplan.formats.scheme import QuantScheme, schemes_for
from bitplan.formats.table import format_named
from bitplan.sensitivity import ranks
from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.curvature import evenly, sampled
from bitplan.sensitivity.estimate import RUN_ROWS, estimate, gptq_ratio, relative_error, sample
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.loss import Evaluation, Reference, finite
from bitplan.sensitivity.measured import Measured, Prefixes, known, measure
from bitplan.sensitivity.profile import CacheRow, Check, CheckRow, Profile, ProfileRow, unit_entry, unquantized_entry
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import locked, sha256

Rows = dict[tuple[str, QuantScheme], dict[str, Any]]


@dataclass(frozen=True)
class Around:
    """What all other units are while one is measured: unit → scheme; `label` is what a person called it."""

    label: str
    schemes: dict[str, QuantScheme]


def sizes(session: Session, formats: tuple[str, ...], rounding: str | None = None) -> Profile:
    """A profile of bytes alone, every loss 0: what is needed to know whether a budget can be met at all."""
    rows = {
        (unit.name, scheme): {"bytes": unit.nbytes(scheme.format), "predicted_nll": 0.0}
        for unit in session.graph.units
        for scheme in schemes_for(unit.native, formats, rounding)
    }
    return _profile(session, rows)


def audit(
    session: Session,
    formats: tuple[str, ...],
    rounding: str | None = None,
    tier: str = "curvature",
    around: Around | None = None,
    check: int = 0,
) -> Profile:
    """Score every unit in every one of the formats. `tier`: "curvature" predicts losses from second moments, "measured"
    also measures each, with all other units unquantized or as `around` has them, and "weights" takes the weights'
    relative errors for losses, without any text. `check`: units that are measured to check and rescale what is
    predicted. Raises RoundingFailed."""
    if tier != "weights":
        session.gather()
    rows: Rows = {}
    wanted: list[tuple[Unit, QuantScheme]] = []
    ratios = gptq_ratios(session, [format_named(name) for name in formats]) if tier != "weights" else {}
    own = {
        unit.name: _scored(session, unit, schemes_for(unit.native, formats, rounding), ratios, tier)
        for unit in progress(ranks.share(session.graph.units), desc="formats", unit="unit")
    }
    losses = {name: scored for part in ranks.gathered(own) for name, scored in part.items()}
    for unit in session.graph.units:
        for scheme, loss in losses[unit.name].items():
            if not math.isfinite(loss):
                print(f"{unit.name} cannot take {scheme}: a value overflows", file=sys.stderr)
                continue
            rows[unit.name, scheme] = {"bytes": unit.nbytes(scheme.format), "predicted_nll": max(0.0, loss)}
            if scheme.format != unit.native:
                wanted.append((unit, scheme))
    if tier == "measured":
        return _measured(session, rows, wanted, around)
    profile = _profile(session, rows).model_copy(update={"tier": tier})
    return checked(session, profile, wanted, check) if check and tier == "curvature" else profile


def _scored(
    session: Session, unit: Unit, schemes: Sequence[QuantScheme], ratios: dict[str, float], tier: str
) -> dict[QuantScheme, float]:
    """The unit's loss in each scheme, as `tier` predicts it; `ratios` are those of `gptq_ratios`."""
    weight = session.swapper.weight(unit)
    drawn = sample(unit, weight, session.store[unit]) if tier != "weights" else None
    losses = {}
    for scheme in schemes:
        loss = 0.0
        if scheme.format != unit.native:
            loss = relative_error(weight, scheme) if drawn is None else estimate(drawn, scheme)
            if scheme.rounding == "gptq" and unit.kind != "embedding":
                loss *= ratios.get(scheme.format, 1.0)
        losses[scheme] = loss
    return losses


def _measured(session: Session, rows: Rows, wanted: list[tuple[Unit, QuantScheme]], around: Around | None) -> Profile:
    found, reference, base = measure_units(session, wanted, around)
    kl, nll = (base.kl, base.delta_nll) if base else (0.0, 0.0)
    for (name, scheme), evaluation in found.items():
        if not math.isfinite(evaluation.kl + evaluation.delta_nll):
            del rows[name, scheme]
            print(f"{name} cannot take {scheme}: its loss is not finite", file=sys.stderr)
            continue
        rows[name, scheme] |= {
            "measured_nll": evaluation.delta_nll - nll,
            "measured_nll_se": finite(evaluation.delta_nll_se),
            "measured_kl": evaluation.kl - kl,
        }
    made = _profile(session, rows, float(reference.nll.mean()))
    return made.model_copy(update={"tier": "measured", "around": around.label if around else None})


def measure_units(
    session: Session, wanted: Sequence[tuple[Unit, QuantScheme]], around: Around | None = None
) -> tuple[Measured, Reference, Evaluation | None]:
    """What each pair costs on the search text, the reference, and the evaluation of what they were measured around. The
    ranks share the pairs out."""
    units = session.swapper.units
    others = [(units[name], scheme) for name, scheme in around.schemes.items()] if around else []
    label = f"-{sha256(around.label, repr(sorted(around.schemes.items())))[:8]}" if around else ""
    name = f"measured-{session.texts.search.fingerprint[:16]}{label}"
    journal = session.weight_cache.folder / f"{name}{f'-{ranks.rank()}' if ranks.world() > 1 else ''}.jsonl"
    mine = ranks.share(wanted)
    with locked(journal):
        done = known(session.weight_cache.folder.glob(f"{name}*.jsonl"))
        session.weight_cache.prepare([*others, *(p for p in mine if (p[0].name, p[1]) not in done)])
        reference, chain = session.search_reference, session.chain()
        prefixes = Prefixes(chain, reference, session.in_memory, _weights(session, chain, around))
        parts = ranks.gathered(measure(session.swapper, session.weight_cache, prefixes, mine, journal, done))
        whole = {pair: evaluation for part in parts for pair, evaluation in part.items()}
        found = {pair: whole[pair] for pair in ((unit.name, scheme) for unit, scheme in wanted)}
        return found, reference, prefixes.evaluate(None, None) if around else None


def _weights(session: Session, chain: Chain, around: Around | None) -> Callable[[int], dict[str, Tensor]]:
    """A segment's weights in what all units are measured around, by its number; they stay in memory where no limit
    forbids."""
    schemes = around.schemes if around else {}

    def weights(segment: int) -> dict[str, Tensor]:
        units = [unit for unit in chain.seen(segment) if unit.name in schemes]
        made = {unit: session.weight_cache.dequantized(unit, schemes[unit.name]) for unit in units}
        return {unit.parameter: session.swapper.shaped(unit, weight).to(chain.device) for unit, weight in made.items()}

    return weights if session.memory else cache(weights)


def checked(session: Session, profile: Profile, wanted: Sequence[tuple[Unit, QuantScheme]], units: int) -> Profile:
    """The profile, with a sample of its rows measured, and its predictions rescaled to what was measured."""
    predicted = {(row.unit, QuantScheme(row.format, row.rounding)): row.predicted_nll for row in profile.rows}
    pairs = sampled_pairs([pair for pair in wanted if predicted[pair[0].name, pair[1]] > 0], units)
    if len(pairs) < 3:
        return profile
    found, *_ = measure_units(session.brief, pairs)
    rows = tuple(
        CheckRow(
            unit=name,
            format=scheme.format,
            rounding=scheme.rounding,
            predicted_nll=predicted[name, scheme],
            measured_nll=evaluation.delta_nll,
            measured_kl=evaluation.kl,
        )
        for (name, scheme), evaluation in found.items()
        if math.isfinite(evaluation.kl + evaluation.delta_nll)
    )
    ratio = median(row.measured_kl / row.predicted_nll for row in rows) if rows else 0.0
    if ratio <= 0:
        return profile
    rank = float(spearmanr([r.predicted_nll for r in rows], [r.measured_kl for r in rows]).statistic)
    check = Check(rows=rows, spearman=rank if math.isfinite(rank) else None, ratio=ratio)
    rescaled = tuple(row.model_copy(update={"predicted_nll": ratio * row.predicted_nll}) for row in profile.rows)
    return profile.model_copy(update={"check": check, "rows": rescaled})


def sampled_pairs(wanted: Sequence[tuple[Unit, QuantScheme]], units: int) -> list[tuple[Unit, QuantScheme]]:
    """As many units at even distances through the model, each in another of its schemes in turn."""
    by_unit: dict[Unit, list[QuantScheme]] = defaultdict(list)
    for unit, scheme in wanted:
        by_unit[unit].append(scheme)
    picked = evenly(list(by_unit), units)
    return [(unit, by_unit[unit][i % len(by_unit[unit])]) for i, unit in enumerate(picked)]


def gptq_ratios(session: Session, formats: Sequence[Format]) -> dict[str, float]:
    """What GPTQ loses over what is estimated, by format, from running it on a few units."""
    units = sampled(session.graph.units)
    drawn = [sample(unit, session.swapper.weight(unit), session.store[unit], RUN_ROWS) for unit in units]
    integers = [format for format in formats if isinstance(format, IntegerFormat)]
    return {f.name: gptq_ratio(drawn, f) for f in progress(integers, desc="GPTQ on a few units", unit="format")}


def audit_cache(session: Session) -> tuple[CacheRow, ...]:
    """What each format of the KV cache costs by itself, where the model's cache can have it."""
    rows = []
    for name in progress([name for name in KV_FORMATS if name != "native"], desc="KV cache", unit="format"):
        try:
            found = session.search_reference.evaluate(session.model, name)
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
        unquantized=tuple(unquantized_entry(tensor) for tensor in session.graph.unquantized),
        rows=tuple(
            ProfileRow(unit=name, format=scheme.format, rounding=scheme.rounding, **row)
            for (name, scheme), row in rows.items()
        ),
    )
