"""How well do cheap scores order units and formats, against measuring each alone? `make bench-prediction`.

Each unit of the embedded model is exchanged alone in each format and the KL to full precision is measured; the table
gives Spearman's rank correlation of five scores with it: the estimated loss that plans are made from, the same from
the codes and whole second moments, and three that others use: the weight's squared error, that error times the inputs
(the output's error), and the bits. May import: everything.
"""

import json
import platform
import sys
import time

import torch
from scipy.stats import spearmanr

from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import FORMATS
from bitplan.planner.demo import CALIBRATION, HELDOUT, MODEL
from bitplan.planner.report.tables import table
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.read import read_texts

DEFAULT_FORMATS = ("int6-g64", "int4-g64", "int3-g64", "int2-g64")


def main() -> None:
    source = sources.find(MODEL)
    session = open_session(source, read_texts(source, files=[CALIBRATION], heldout=[HELDOUT]), device="cpu")
    began = time.perf_counter()
    profile = audit(session, DEFAULT_FORMATS)
    predicted_seconds = time.perf_counter() - began
    profile = audit(session, DEFAULT_FORMATS, tier="measured")
    measured_seconds = time.perf_counter() - began - predicted_seconds
    rows = [row for row in profile.rows if row.measured_kl is not None]
    names = ("estimated", "codes and whole moments", "output error", "weight error", "fewer bits")
    scores: dict[str, list[float]] = {name: [] for name in names}
    units = session.swapper.units
    moments = {u.name: a[0] for u, a in session.weight_cache.moments([u for u in session.graph.units])}
    for row in rows:
        unit = units[row.unit]
        scheme = QuantScheme(row.format, row.rounding)
        change = session.weight_cache.dequantized(unit, scheme) - session.swapper.weight(unit)
        squares = ((change @ moments[row.unit]) * change).sum(-1)
        found = session.store[unit]
        assert found.gradients is not None
        run = float(squares @ found.gradients[0]) / 2
        if found.frequencies is not None and found.lookup_gradients is not None:
            run += float((change.square() @ found.lookup_gradients) @ found.frequencies) / 2
        scores["estimated"].append(row.predicted_nll)
        scores["codes and whole moments"].append(run)
        scores["output error"].append(float(squares.sum()))
        scores["weight error"].append(float(change.square().sum()))
        scores["fewer bits"].append(-FORMATS[row.format].bits)
    kl = [row.measured_kl for row in rows]
    table_rows = []
    for name, values in scores.items():
        cells = [f"{spearmanr(values, kl).statistic:.3f}"]
        for format in DEFAULT_FORMATS:
            at = [i for i, row in enumerate(rows) if row.format == format]
            one = len({values[i] for i in at}) == 1
            cells.append("–" if one else f"{spearmanr([values[i] for i in at], [kl[i] for i in at]).statistic:.3f}")
        table_rows.append((name, *cells))
    print(table(("Spearman with measured KL", "all", *DEFAULT_FORMATS), table_rows))
    facts = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    facts |= {"predicting_seconds": round(predicted_seconds), "measuring_seconds": round(measured_seconds)}
    print(json.dumps(facts), file=sys.stderr)


if __name__ == "__main__":
    main()
