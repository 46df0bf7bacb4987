"""How long do ten rows of `bitplan compare` take, from an empty cache? `python -m benchmarks.compare`.

Seven formats and the three plans of the embedded model, on the bundled task: codes are made, models loaded, evaluated
and timed. The picture of the frontier in the README is drawn from the rows. Exit code 1 where it takes longer than
GOAL or a row has no figures. May import: everything.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import described
from bitplan.planner.demo import CALIBRATION, HELDOUT, MODEL
from bitplan.planner.report.figures.scatter import Dot, frontier_plot
from bitplan.planner.report.page.compare import is_plan
from bitplan.planner.report.tables import table

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "frontier.svg"
FORMATS = "bf16,fp8,int8,int4-g64,nf4,int3-g64,int2-g64"
GOAL = 300
"""Seconds, on two cores."""
SHOWN = {
    "name": "",
    "resident_bytes": ",.0f",
    "bits_per_weight": ".3f",
    "ppl": ".3f",
    "kl": ".5f",
    "completion mean_other": ".1%",
    "decode_tokens_per_s": ".0f",
}


def picture(rows: list[dict[str, str]]) -> str:
    """KL over bits per weight, on white."""
    dots = [
        Dot(name.removeprefix("uniform "), float(row["bits_per_weight"]), float(row["kl"]), name, is_plan(name))
        for row in rows
        if (name := row["name"]) and row["kl"]
    ]
    return frontier_plot(dots, ylabel="KL to full precision, nats per token", alone=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        page, sheet = Path(folder) / "page.html", Path(folder) / "rows.csv"
        command = [
            sys.executable,
            "-m",
            "bitplan.planner.cli",
            "compare",
            MODEL.relative_to(ROOT),
            "--formats",
            FORMATS,
        ]
        command += ["--text", CALIBRATION, "--heldout", HELDOUT, "--task", MODEL.parent / "task" / "completion.jsonl"]
        command += ["--plan", *sorted((ROOT / "plans").glob("*.json")), "--html", page, "--csv", sheet]
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"BITPLAN_CACHE": folder}, stdout=sys.stderr)
        seconds = time.perf_counter() - began
        rows = list(csv.DictReader(sheet.open(encoding="utf-8")))
    PICTURE.write_text(picture(rows), encoding="utf-8")
    cells = [[format(float(row[name]), how) if how else row[name] for name, how in SHOWN.items()] for row in rows]
    print(table([name.replace("_", " ") for name in SHOWN], cells))
    print(f"{len(rows)} rows in {seconds:.0f} s, goal {GOAL} s; {described()}")
    return int(seconds > GOAL or any(row["note"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
