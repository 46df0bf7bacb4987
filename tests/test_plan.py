import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import bitplan
from bitplan.formats.errors import FileInvalid
from bitplan.formats.table import FORMATS
from bitplan.planner.plan import KVCacheLoss, Plan, Workload
from bitplan.planner.report.show import plan_text
from bitplan.planner.report.tables import folded, layers
from bitplan.sensitivity.graph import ON_REQUEST
from bitplan.sensitivity.profile import Profile, read, write

SHA = "0" * 64
PART = {"sha256": SHA, "blocks": 4, "length": 64}
PROVENANCE = {
    "model": {
        "id": "some/model",
        "revision": None,
        "config_sha256": SHA,
        "weights_sha256": SHA,
        "dtype": "bfloat16",
        "parameters": 10_000,
    },
    "text": {"source": "text", "tokens": 256, "calibration": PART, "search": PART, "heldout": PART},
    "seed": 0,
    "device": "cpu",
    "versions": {"bitplan": "0"},
}


@st.composite
def plans(draw):
    units = []
    for i in range(draw(st.integers(1, 5))):
        name = draw(st.sampled_from(sorted(FORMATS)))
        rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 300))
        size = rows * columns * 2 if name == "bf16" else FORMATS[name].nbytes(rows, columns)
        full = f"model.layers.{i}.mlp.up_proj"
        units.append(
            {
                "name": full,
                "kind": "linear",
                "parameter": f"{full}.weight",
                "experts": 1,
                "rows": rows,
                "columns": columns,
            }
            | {"dtype": "bfloat16", "group": full, "format": name, "rounding": "nearest", "bytes": size}
        )
    kept = [{"name": "model.norm.weight", "shape": [64], "dtype": "bfloat16", "bytes": 128, "reason": "a vector"}]
    total = sum(entry["bytes"] for entry in units + kept)
    return Plan.model_validate(
        {
            "budget": {"requested": "x", "weights": total},
            "bytes": total,
            "bits_per_weight": total * 8 / 10_000,
            "shipped": "search",
        }
        | {"units": units, "unquantized": kept, "predicted": {"nll": 0.1, "bound": 0.1}, "provenance": PROVENANCE}
    )


@given(plans())
def test_a_plan_file_says_the_plan(plan):
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@given(plans())
def test_folding_loses_no_bytes(plan):
    assert sum(size for *_, size in folded(plan)) == sum(unit.bytes for unit in plan.units)
    assert "some/model" in plan_text(plan)


def test_layers_are_told_by_their_numbers():
    assert layers(["lm_head"]) == "" and layers(["h.3.a"]) == "3"
    assert layers([f"h.{i}.a" for i in (0, 1, 2, 5, 7, 8)]) == "0-2, 5, 7-8"
    assert layers([f"h.{i}.experts.{k}.a" for i in (1, 2) for k in range(4)]) == "1-2 (×8)"


@pytest.fixture(scope="module")
def example() -> dict:
    found: list[Plan] = []

    @given(plans())
    def collect(plan):
        found.append(plan)

    collect()
    several = [plan for plan in found if len(plan.units) > 1 and plan.units[0].format != plan.units[1].format]
    return several[0].model_dump(mode="json")


def changed(example: dict, path: str, value: object) -> dict:
    content = json.loads(json.dumps(example))
    *way, last = path.split(".")
    place = content
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("surprise", 1, "surprise: Extra inputs are not permitted"),
        ("units.0.surprise", 1, "units.0.surprise: Extra inputs"),
        ("bytes", -5, "bytes: Input should be greater than or equal to 0"),
        ("bytes", 3.5, "bytes: Input should be a valid integer"),
        ("bytes", 7, "the plan says 7 bytes"),
        ("units.0.bytes", 1, "1 bytes, but"),
        ("units.0.name", "../../etc/passwd", "units.0.name: String should match pattern"),
        ("units.0.name", "model.layers.*.mlp", "units.0.name: String should match pattern"),
        ("units.0.parameter", "/tmp/x", "units.0.parameter: String should match pattern"),
        ("units.0.name", "model.layers.1.mlp.up_proj", "is there more than once"),
        ("units.0.format", "int9", "unknown format 'int9'"),
        ("schema_version", 0, "schema_version: Input should be 6"),
        ("schema_version", 7, f"schema 7, which bitplan 0 wrote: bitplan {bitplan.__version__} reads up to 6"),
        ("provenance.model.weights_sha256", "abc", "weights_sha256: String should match pattern"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(example, tmp_path, path, value, message):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(changed(example, path, value)), encoding="utf-8")
    with pytest.raises(FileInvalid, match="is no valid plan file") as caught:
        read(file, Plan)
    assert message in str(caught.value)


def test_a_format_that_only_another_version_has_names_the_version(example, tmp_path):
    file = tmp_path / "plan.json"
    content = changed(example, "units.0.format", "int4-g16")
    content["provenance"]["versions"]["bitplan"] = "9.1.0"
    file.write_text(json.dumps(content), encoding="utf-8")
    own = f"this is {bitplan.__version__}: install that version or a later one"
    with pytest.raises(FileInvalid, match=f"unknown format 'int4-g16': bitplan 9.1.0 made this file, {re.escape(own)}"):
        read(file, Plan)


def test_nan_is_refused(example, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(changed(example, "bits_per_weight", float("nan"))), encoding="utf-8")
    with pytest.raises(FileInvalid):
        read(file, Plan)
    with pytest.raises(ValidationError, match="finite number"):
        Plan.model_validate(example | {"bits_per_weight": float("nan")})


@pytest.mark.parametrize(("format", "rounding"), [("int4-g64", "best"), ("nf4", "gptq"), ("fp8", "awq")])
def test_a_rounding_fits_its_format(example, format, rounding):
    unit = example["units"][0]
    size = FORMATS[format].nbytes(unit["rows"], unit["columns"])
    content = changed(example, "bytes", example["bytes"] - unit["bytes"] + size)
    content["units"][0] |= {"format": format, "bytes": size}
    assert Plan.model_validate(content).units[0].format == format
    content["units"][0]["rounding"] = rounding
    with pytest.raises(ValidationError, match=f"{format} has no rounding '{rounding}'"):
        Plan.model_validate(content)


def test_an_older_plan_without_distillation_is_read(example):
    assert example.pop("distilled") is False
    assert not Plan.model_validate(example).distilled


def test_a_plan_of_schema_5_was_healed_on_its_calibration_text(example):
    del example["provenance"]["text"]["healing"]
    limited = example | {"latency": {"requested": "x", "limit": 0.03, "device": "cpu", "predicted": 0.02}}
    plan = Plan.model_validate(limited | {"schema_version": 5})
    assert Plan.model_validate_json(plan.model_dump_json()) == plan and plan.latency.predicted == 0.02
    assert plan.schema_version == 6
    assert plan.provenance.text.part("healing") == plan.provenance.text.calibration


def test_schema_3_is_read():
    """Made by the version before: `kept`, `healed`, `asked` and `kv_cache` had other names or places."""
    file = Path(__file__).parent / "data" / "plan-schema-3.json"
    old, plan = json.loads(file.read_text(encoding="utf-8")), read(file, Plan)
    assert [entry.name for entry in plan.unquantized] == [entry["name"] for entry in old["kept"]]
    assert (plan.budget.requested, plan.distilled) == (old["budget"]["asked"], old["healed"])
    old["kv_cache"] = {"format": "int8", "context": 64, "batch": 2, "chunk": 16, "kl": 0.5, "kl_se": 0.1}
    plan = Plan.model_validate(old)
    assert plan.workload == Workload(kv_format="int8", context=64, batch=2, prefill_chunk=16)
    assert plan.kv_cache_loss == KVCacheLoss(kl=0.5, kl_se=0.1)
    old["kept"][0]["reason"] = "kept on request"
    assert Plan.model_validate(old).unquantized[0].reason == ON_REQUEST


def test_groups_agree(example):
    content = changed(example, "units.1.group", example["units"][0]["name"])
    with pytest.raises(ValidationError, match="but its group"):
        Plan.model_validate(content)


@given(st.integers(0, 400))
def test_a_truncated_file_is_said(cut):
    text = json.dumps({"budget": {"requested": "x" * 400, "weights": 3}})[:cut]
    folder = Path(os.environ["BITPLAN_CACHE"])
    (folder / "cut.json").write_text(text, encoding="utf-8")
    with pytest.raises(FileInvalid):
        read(folder / "cut.json", Plan)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileInvalid, match=r"cannot read .*none: No such file"):
        read(tmp_path / "none", Profile)


def test_nothing_half_written(example, tmp_path):
    plan = Plan.model_validate(example)
    write(tmp_path / "new" / "plan.json", plan)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.json"]
    assert read(tmp_path / "new" / "plan.json", Plan) == plan


def test_the_schema_is_pinned():
    """A change of the file's shape is seen here: write the new schema, and raise schema_version if old files break."""
    pinned = Path(__file__).parent / "plan.schema.json"
    assert json.loads(pinned.read_text(encoding="utf-8")) == Plan.model_json_schema()
