"""A profile file is checked against itself when it is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.formats.errors import FileInvalid
from bitplan.formats.table import FORMATS
from bitplan.sensitivity.profile import Profile, ProfileRow, UnitEntry, read
from tests.test_plan import PROVENANCE

UNITS = [
    UnitEntry(name=f"layers.{i}.{part}", kind="linear", parameter=f"layers.{i}.{part}.weight", experts=1, rows=8 + i,
              columns=64, dtype="bfloat16", group=f"layers.{i}.{group}")
    for i in range(2)
    for part, group in (("q", "qk"), ("k", "qk"), ("down", "down"))
]  # fmt: skip
ROWS = [
    ProfileRow(unit=unit.name, format=format, rounding=rounding, bytes=unit.nbytes(format), predicted_nll=0.5,
               measured_nll=0.25, measured_nll_se=0.1, measured_kl=0.3)
    for unit in UNITS
    for format, rounding in (("bf16", "nearest"), ("int4-g64", "gptq"), ("int4-g64", "nearest"), ("nf4", "nearest"))
]  # fmt: skip
CONTENT = {
    "provenance": PROVENANCE,
    "units": [unit.model_dump() for unit in UNITS],
    "unquantized": [{"name": "norm.weight", "shape": [64], "dtype": "bfloat16", "bytes": 128, "reason": "a vector"}],
    "rows": [row.model_dump() for row in ROWS],
    "kv_cache": [{"format": "int8", "kl": 0.1, "kl_se": None, "delta_nll": 0.1}],
}
UNIT = {
    "rows": st.integers(1, 999).map(lambda by: lambda old: old + by),
    "columns": st.integers(1, 999).map(lambda by: lambda old: old + by),
    "dtype": st.sampled_from(["int8", "nonsense"]).map(lambda new: lambda old: new),
    "name": st.just(lambda old: f"{old}_other"),
}
ROW = {
    "unit": st.just(lambda old: f"{old}_other"),
    "format": st.sampled_from(sorted({*FORMATS, "int4", "nonsense"} - {"bf16", "fp16"})).map(
        lambda new: lambda old: new
    ),
    "rounding": st.sampled_from(["nonsense", "awq2", ""]).map(lambda new: lambda old: new),
    "bytes": st.integers(-999, 999).filter(bool).map(lambda by: lambda old: old + by),
    "predicted_nll": st.sampled_from([-1.0, float("nan"), float("inf"), None]).map(lambda new: lambda old: new),
    "measured_nll": st.sampled_from([None, float("nan"), float("inf")]).map(lambda new: lambda old: new),
    "measured_kl": st.sampled_from([None, float("nan"), float("inf")]).map(lambda new: lambda old: new),
    "measured_nll_se": st.sampled_from([-1.0, float("nan")]).map(lambda new: lambda old: new),
}


def checked(content, folder):
    path = folder / "profile.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return read(path, Profile)


def test_the_profile_itself_is_read(tmp_path):
    assert len(checked(CONTENT, tmp_path).rows) == len(ROWS)


@given(st.data())
def test_any_one_change_is_refused(tmp_path_factory, data):
    content = json.loads(json.dumps(CONTENT))
    part, changes = data.draw(st.sampled_from([("units", UNIT), ("rows", ROW)]))
    entry = data.draw(st.sampled_from(content[part]))
    name = data.draw(st.sampled_from(sorted(changes)))
    old = entry[name]
    entry[name] = data.draw(changes[name])(old)
    unit = next((unit for unit in UNITS if unit.name == entry.get("unit")), None)
    if name == "format" and entry[name] in FORMATS and unit and unit.nbytes(entry[name]) == entry["bytes"]:
        return  # another format that takes the same bytes
    with pytest.raises(FileInvalid, match="is no valid profile file"):
        checked(content, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rows"].append(c["rows"][0]), "row layers.0.q in bf16/nearest is there more than once"),
        (lambda c: c["units"].append(c["units"][0]), "tensor layers.0.q is there more than once"),
        (lambda c: c["units"][0].update(name="layers.0.k"), "tensor layers.0.k is there more than once"),
        (lambda c: c["rows"][0].update(unit="layers.9.q"), "a row is of layers.9.q, which is no unit of the profile"),
        (lambda c: c["rows"].__delitem__(slice(4)), "unit layers.0.q has no row"),
        (lambda c: c["rows"][0].update(format="int4-g65"), "unit layers.0.q: unknown format 'int4-g65'"),
        (lambda c: c["rows"][3].update(rounding="gptq"), "unit layers.0.q: nf4 has no rounding 'gptq'"),
        (lambda c: c["rows"][0].update(bytes=1), "unit layers.0.q: 1 bytes, but bf16 takes 1024"),
        (lambda c: c["rows"][0].update(measured_kl=None), "bf16 has some of its measured figures, and not the others"),
        (lambda c: c["units"][0].update(dtype="int8"), "unit layers.0.q: unknown dtype 'int8'"),
        (
            lambda c: c.update(rows=c["rows"][:1] + c["rows"][5:]),
            "unit layers.0.k has no format that its group layers.0.qk shares",
        ),
        (lambda c: c["unquantized"][0].update(bytes=127), "norm.weight: 127 bytes, but its shape takes 128"),
        (lambda c: c["kv_cache"][0].update(format="int9"), "the KV cache has an unknown format 'int9'"),
        (lambda c: c["kv_cache"].append(c["kv_cache"][0]), "KV cache format int8 is there more than once"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    content = json.loads(json.dumps(CONTENT))
    change(content)
    with pytest.raises(FileInvalid) as refused:
        checked(content, tmp_path)
    assert message in str(refused.value)
