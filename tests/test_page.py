"""The pages of `audit`, `compare` and `explain`: what they hold, and how they behave in a browser."""

import csv
import html
import json
import random
import re
import shutil
import subprocess

import pytest

from bitplan.planner.report.losses import losses_of
from bitplan.planner.report.page.audit import audit_page
from bitplan.planner.report.page.render import render
from bitplan.sensitivity.profile import Profile
from tests.test_cli import LITTLE, run  # noqa: F401 (a fixture)

CHROMIUM = shutil.which("chromium")
FORMATS = ("int8", "int6-g64", "int5-g64", "int4-g32", "int4-g64", "int4-g128")
FORMATS += ("int3-g32", "int3-g64", "int3-g128", "int2-g32", "int2-g64", "nf4")
KINDS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def made_profile(layers: int, measured: int = 0) -> Profile:
    """A profile of a model of so many layers with random losses; the first `measured` units have measured ones too."""
    from bitplan.formats.table import FORMATS as TABLE

    draw = random.Random(0)
    names = ["model.embed_tokens", *(f"model.layers.{i}.{part}.{kind}" for i in range(layers) for part in KINDS
             for kind in KINDS[part]), "lm_head"]  # fmt: skip
    units, rows = [], []
    for name in names:
        kind = "embedding" if "embed" in name else "linear"
        shape = {"experts": 1, "rows": 256, "columns": 256}
        units.append(
            {"name": name, "kind": kind, "parameter": f"{name}.weight", "dtype": "bfloat16", "group": name} | shape
        )
        rows.append(
            {"unit": name, "format": "bf16", "rounding": "nearest", "bytes": 2 * 256 * 256, "predicted_nll": 0.0}
        )
        level = draw.lognormvariate(0, 1)
        for format in FORMATS:
            size = TABLE[format].nbytes(256, 256)
            loss = level * draw.uniform(0.8, 1.2) * 4.0 ** -(8 * size / 256**2)
            row = {"unit": name, "format": format, "rounding": "nearest", "bytes": size, "predicted_nll": loss}
            if len(units) <= measured:
                row |= {
                    "measured_nll": loss,
                    "measured_nll_se": 0.1 * loss,
                    "measured_kl": loss * draw.uniform(0.9, 1.1),
                }
            rows.append(row)
    part = {"sha256": "0" * 64, "blocks": 2, "length": 64}
    model = {"id": "/some/where/<Model> & Co", "revision": None, "config_sha256": "0" * 64, "weights_sha256": "0" * 64}
    text = {"source": "text.txt", "tokens": 128, "calibration": part, "search": part, "heldout": part}
    provenance = {"model": model | {"dtype": "bfloat16", "parameters": 256 * 256 * len(names) + 64}, "text": text}
    unquantized = {"name": "model.norm.weight", "shape": (64,), "dtype": "bfloat16", "bytes": 128, "reason": "a vector"}
    provenance |= {"seed": 0, "device": "cpu", "versions": {"bitplan": "0"}}
    return Profile(provenance=provenance, units=units, unquantized=[unquantized], rows=rows)


def test_a_page_of_80_layers_is_one_file_below_a_megabyte():
    profile = made_profile(80, measured=60)
    page = render(audit_page(profile))
    assert len(page.encode()) < 1_000_000
    assert re.findall(r"<title>(.*?)</title>", page)[0] == html.escape("<Model> & Co")
    assert "/some/where" not in page
    without_names = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|<link|@import|\bsrc=(?!\"data:)|url\((?!#)", without_names)
    ids = re.findall(r"<[^>]*\sid=\"([^\"]+)\"", page)
    assert len(ids) == len(set(ids))


def test_the_csv_has_every_unit_and_format(run, checkpoint, tmp_path, monkeypatch):  # noqa: F811
    page, sheet = tmp_path / "page.html", tmp_path / "sheet.csv"
    asked = ("audit", checkpoint("llama"), *LITTLE, "--formats", "int8,int4-g64", "--rounding", "nearest")
    code, out, err = run(*asked, "--html", page, "--csv", sheet)
    assert code == 0, err
    assert f"<title>{checkpoint('llama').name}</title>" in page.read_text(encoding="utf-8")
    with open(sheet, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 16 and {row["kind"] for row in rows if row["layer"] == "1"} == {
        f"{part}.{kind}" for part in KINDS for kind in KINDS[part]
    }
    assert "mlp.down_proj" in out and "█" in out and "layers.0.mlp.gate_proj" not in out.split("unit, in")[0]
    assert sum("model.layers" in line for line in run(*asked, "--all")[1].splitlines()) == 14
    assert run(*asked, "--html", page)[0] == 2  # it exists
    monkeypatch.setattr("bitplan.planner.report.page.render.find_spec", lambda name: None)
    code, out, err = run(*asked, "--html", tmp_path / "other.html")
    assert (code, out) == (1, "") and "--html needs matplotlib and jinja2: pip install 'bitplan[report]'" in err


@pytest.fixture
def in_browser(tmp_path):
    """in_browser(page, script) → what the script, run in the page in a frame as wide as a phone, puts into `told`."""
    if CHROMIUM is None:
        pytest.skip("no chromium")

    def call(page: str, script: str) -> dict:
        inner = page.replace("</body>", f"<script>const told = {{}};\n{script}\n"
                             "parent.document.body.textContent = JSON.stringify(told)</script></body>")  # fmt: skip
        frame = f'<body><iframe style="width: 390px; height: 800px" srcdoc="{html.escape(inner)}"></iframe></body>'
        file = tmp_path / "frame.html"
        file.write_text(f"<!doctype html><meta charset=utf-8>{frame}", encoding="utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
        out = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=120).stdout
        return json.loads(html.unescape(re.search(r"<body>(.*?)</body>", out, re.S).group(1)))

    return call


def test_the_page_of_an_audit_in_a_browser(in_browser):
    profile = made_profile(4, measured=9)
    losses = losses_of(profile)
    told = in_browser(
        render(audit_page(profile)),
        """
        told.overflow = document.documentElement.scrollWidth - innerWidth;
        const cells = [...document.querySelectorAll(".mark.cell")], cell = cells[0];
        const fill = () => cells.map(each => getComputedStyle(each.querySelector("path")).fill);
        const first = () => document.querySelector("#ranking tbody tr").cells[0].textContent;
        told.before = [fill(), first()];
        document.querySelector("input[value=int2-g64]").click();
        told.after = [fill(), first()];
        const heads = document.querySelectorAll("#ranking th button");
        const column = i => [...document.querySelectorAll("#ranking tbody tr")].map(row => row.cells[i].textContent);
        heads[1].click(); told.falling = column(1).map(Number);
        heads[1].click(); told.rising = column(1).map(Number);
        heads[0].click(); told.names = column(0);
        cell.focus(); told.note = document.getElementById("note").textContent;
        cell.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
        told.next = document.activeElement.dataset.note;
        told.stops = document.querySelectorAll("svg.plot [tabindex='0']").length;
        told.plots = document.querySelectorAll("svg.plot").length;
        """,
    )
    assert told["overflow"] <= 0
    for format, (_, first) in ((losses.usual, told["before"]), ("int2-g64", told["after"])):
        assert first == max(losses.rows, key=lambda unit: losses.per_mib(unit, format))
    assert told["before"][0] != told["after"][0] and len(set(told["after"][0])) > 10
    assert len(told["falling"]) == 30
    assert told["falling"] == sorted(told["falling"], reverse=True) and told["rising"] == sorted(told["rising"])
    assert told["names"] == sorted(told["names"])
    assert told["note"].startswith("model.embed_tokens\n") and "int2-g64: " in told["note"]
    assert told["next"].startswith("model.layers.0.self_attn.q_proj\n")
    assert told["stops"] == told["plots"] == 4
