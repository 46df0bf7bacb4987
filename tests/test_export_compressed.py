"""compressed-tensors' layouts, read back bit by bit in Python's integers. The real reader: benchmarks/exports.py."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bitplan.formats.errors import BitplanError
from bitplan.formats.integers import Grid, IntegerFormat
from bitplan.formats.modules import Packed
from bitplan.formats.table import FORMATS
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.export import export, write_export
from bitplan.planner.export.compressed_tensors import to_compressed
from bitplan.planner.load import load_planned
from bitplan.planner.plan import PlannedUnit
from tests.test_gptq_layout import HEADS, opened, spread_plan, stream

FORMATS_THERE = ("int8", "int4-g32", "int3-g32", "fp8", "native")


@pytest.fixture
def session(checkpoint):
    return opened(checkpoint, "llama-tied", torch.float32, HEADS["llama-tied"])


@given(
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    zero_point=st.sampled_from(["asymmetric", "symmetric"]),
    group=st.sampled_from([0, 32, 64]),
    rows=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_code_scale_and_zero_is_read_back_from_compressed_tensors(bits, zero_point, group, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    format, columns = IntegerFormat("", bits, group, zero_point), 64
    groups = format.groups(columns)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    zero = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    scale = torch.randn(rows, groups, generator=generator).abs().half()
    tensors = format.store(codes, Grid(scale.float(), zero))
    facts = {"name": "a", "kind": "linear", "parameter": "a.weight", "experts": 1, "dtype": "float32", "group": "a"}
    unit = PlannedUnit(
        **facts, rows=rows, columns=columns, format="x", rounding="nearest", bytes=format.nbytes(rows, columns)
    )
    FORMATS["x"] = format
    try:
        written = to_compressed(tensors, unit)
    finally:
        del FORMATS["x"]
    assert written["weight_shape"].tolist() == [rows, columns] and written["weight_shape"].dtype == torch.int64
    read = torch.tensor([stream(row, bits)[:columns] for row in written["weight_packed"].tolist()])
    middle = torch.full((rows, groups), 1 << (bits - 1))
    if zero_point == "asymmetric":
        assert written["weight_zero_point"].shape == (-(-rows * bits // 32), groups)
        middle = torch.tensor([stream(column, bits)[:rows] for column in written["weight_zero_point"].T.tolist()]).T
    else:
        assert "weight_zero_point" not in written
    step = columns // groups
    value = (read - middle.repeat_interleave(step, 1)) * written["weight_scale"].float().repeat_interleave(step, 1)
    assert torch.equal(value, format.dequantize(tensors, columns, torch.float32))


def test_the_checkpoint_holds_the_plans_values_and_the_bytes_told(session, tmp_path):
    plan = spread_plan(session, FORMATS_THERE)
    exported = export(plan, "compressed-tensors", source=session.source)
    size = write_export(exported, tmp_path / "out", device="cpu")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert size == exported.bytes == sum(tensor.nbytes for tensor in found.values())
    model = load_planned(plan, session.source, "cpu")
    for unit in plan.units:
        module = model.get_submodule(unit.name)
        if unit.format == "fp8":
            weight = found[f"{unit.name}.weight"].float() * found[f"{unit.name}.weight_scale"].float()
            assert found[f"{unit.name}.weight"].dtype == torch.float8_e4m3fn
            assert isinstance(module, Packed) and torch.equal(weight, module.dequantized())
        elif unit.is_native:
            assert torch.equal(found[f"{unit.name}.weight"], module.weight)
        else:
            assert f"{unit.name}.weight" not in found
    assert "lm_head.weight" not in found and "model.embed_tokens.weight" in found
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == json.loads(exported.text)
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert config["model_type"] == "llama"
    assert {"README.md", "plan.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_one_layout_is_no_mix_and_a_folder_in_the_way_stays(session, tmp_path):
    plan = uniform_plan(session, "int4-g32", "nearest")
    exported = export(plan, "compressed-tensors", source=session.source)
    config = json.loads(exported.text)
    assert config["format"] == "pack-quantized" and len(config["config_groups"]) == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("", encoding="utf-8")
    with pytest.raises(BitplanError, match="cannot write"):
        write_export(exported, tmp_path / "out", device="cpu")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other"]


def test_what_servers_join_is_named_too(session):
    plan = spread_plan(session, FORMATS_THERE)
    config = json.loads(export(plan, "compressed-tensors", source=session.source).text)
    places = {name: i for i, group in enumerate(config["config_groups"].values()) for name in group["targets"]}
    places |= dict.fromkeys(config["ignore"], -1)
    for layer in (0, 1):
        for joined, members in {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}.items():
            block, own = f"model.layers.{layer}", joined.partition(".")[0]
            assert {places[f"{block}.{own}.{member}_proj"] for member in members} == {places[f"{block}.{joined}"]}


def test_the_notes_tell_who_reads_what(session):
    def notes(format: str, target: str = "compressed-tensors") -> str:
        plan = uniform_plan(session, format, "nearest")
        return " ".join(export(plan, target, source=session.source).notes)

    assert "Humming" in notes("int3-g32") and "Humming" not in notes("int4-g32")
    assert "0.18" in notes("int4-g32") and "0.18" not in notes("int8")
    for refused in ("int4-g32", "int8-g32", "int3-g32"):
        assert "refuse this" in notes(refused, "gptqmodel")
    assert "vLLM reads these too" in notes("int8", "gptqmodel")
