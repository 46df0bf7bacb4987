"""Exports, read back by plain readers of the tests' own. The real ones: benchmarks/exports.py."""

import json
import re
from functools import partial

import pytest
import torch

from bitplan.formats.errors import FormatUnavailable, PlanMismatch, UsageError
from bitplan.formats.table import FORMATS
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.export import NEED_MODEL, TARGETS, export
from bitplan.planner.export.gguf import Gguf
from bitplan.planner.export.gptq_layout import save_gptq
from bitplan.planner.load import load_planned
from bitplan.planner.plan import PlannedUnit, Workload
from bitplan.sensitivity.profile import Profile, ProfileRow, UnitEntry
from bitplan.sensitivity.session import Session
from bitplan.testing import ExportTests
from tests.test_export_gguf import fake_gguf, resized
from tests.test_gptq_layout import HEADS, opened, spread_plan

THREE = ("int8", "int4-g32", "int3-g32")
OF = {
    "gptqmodel": (*THREE, "native"),
    "compressed-tensors": (*THREE, "fp8", "native"),
    "torchao": ("int8", "int4-g32", "fp8", "native"),
    "gguf": (*THREE, "native"),
    "auto-round": (*THREE, "native"),
}


@pytest.fixture(autouse=True)
def gguf(monkeypatch):
    fake_gguf(monkeypatch)


@pytest.fixture(scope="module")
def session(checkpoint) -> Session:
    return opened(checkpoint, "llama-tied", torch.float32, HEADS["llama-tied"])


ReadBack = tuple[int, int, bool | None] | None
"""A module's bits, group size (-1: the row; 0: not in the file) and symmetry (None: not in the file); None: floats."""


def read_gguf(text: str, name: str) -> ReadBack:
    there = name.replace("model.layers.", "blk.").replace("self_attn.", "attn_").replace("mlp.", "ffn_")
    there = re.sub("attn_o_proj$", "attn_output", there).replace("_proj", "") + ".weight"
    lines = [line.rpartition("=") for line in text.splitlines()]
    found = next(type for pattern, _, type in lines if re.search(pattern, there))
    return None if found in ("f32", "bf16") else (int(re.search(r"\d", found).group()), 0, None)


def read_auto_round(text: str, name: str) -> ReadBack:
    entry = json.loads(text)[name]
    return None if entry["bits"] == 16 else (entry["bits"], entry["group_size"], entry["sym"])


def read_torchao(text: str, name: str) -> ReadBack:
    entry = json.loads(text)["quant_type"]["default"]["_data"]["fqn_to_config"][name]
    kind, data = (entry["_type"], entry["_data"]) if entry else (None, {})
    known = {"Int8WeightOnlyConfig": (8, -1, True), "Float8WeightOnlyConfig": (8, -1, None), None: None}
    return known[kind] if kind in known else (4, data["group_size"], False)


def read_gptqmodel(text: str, name: str) -> ReadBack:
    content = json.loads(text)
    for rule, entry in content["dynamic"].items():
        if re.match(rule[2:], name):
            return (entry["bits"], entry["group_size"], None) if rule[0] == "+" else None
    return content["bits"], content["group_size"], None


def read_compressed(text: str, name: str) -> ReadBack:
    content = json.loads(text)
    found = [group for group in content["config_groups"].values() if name in group["targets"]]
    assert len(found) == (name not in content["ignore"])
    if not found:
        return None
    weights, is_float = found[0]["weights"], found[0]["format"] == "float-quantized"
    assert is_float == (weights["type"] == "float")
    return weights["num_bits"], weights.get("group_size", -1), None if is_float else weights["symmetric"]


READERS = {"gptqmodel": read_gptqmodel, "compressed-tensors": read_compressed, "torchao": read_torchao}
READERS |= {"gguf": read_gguf, "auto-round": read_auto_round}


def expected_of(target: str, unit: PlannedUnit) -> ReadBack:
    """What is to be read of a unit in a target's file."""
    if unit.is_native:
        return None
    format = FORMATS[unit.format]
    group = getattr(format, "group", 0)
    group = group if 0 < group < unit.columns else -1
    symmetric = None if unit.format == "fp8" or target == "gptqmodel" else unit.format == "int8"
    return (int(format.bits), 0, None) if target == "gguf" else (int(format.bits), group, symmetric)


class TestTargets(ExportTests):
    @pytest.fixture(params=TARGETS.values(), ids=TARGETS)
    def target(self, request):
        return request.param

    @pytest.fixture
    def formats(self, target):
        return OF[target.name]

    @pytest.fixture
    def read(self, target):
        return READERS[target.name]

    @pytest.fixture
    def expected(self, target):
        return partial(expected_of, target.name)

    @pytest.fixture
    def source(self, session):
        return session.source

    @pytest.fixture
    def make_plan(self, target, session):
        """Plans for the model of `session`, for GGUF as if it were wider: llama.cpp's blocks need 256 columns."""

        def make_plan(names):
            plan = spread_plan(session, names)
            return resized(plan, 64, 256) if target is Gguf else plan

        return make_plan


def test_joined_experts_are_refused_by_gptqs_layout_with_nearest_too(checkpoint):
    session = opened(checkpoint, "mixtral", torch.float32, HEADS["llama"])
    plan = uniform_plan(session, "int4-g32", "nearest")
    words = r"gptqmodel does not support model\.layers\.0\..*experts.*, the joined experts of a block, in any format$"
    for nearest in (False, True):
        with pytest.raises(FormatUnavailable, match=words):
            export(plan, "gptqmodel", nearest=nearest, source=session.source)


def test_a_plan_without_a_unit_that_gptqs_layout_takes(session):
    plan = uniform_plan(session, "fp32", None)
    with pytest.raises(FormatUnavailable, match=r"no unit has one that it takes: bitplan's own layout takes it"):
        export(plan, "gptqmodel", nearest=True, source=session.source)


def test_nearest_is_nearest_in_bytes_and_costs_what_the_profile_says(session):
    plan = spread_plan(session, ("int4-g32", "nf4"))
    losses = {"nf4": 0.5, "int4-g32": 0.75}
    rows = tuple(
        ProfileRow(unit=unit.name, format=format, rounding="nearest", bytes=unit.nbytes(format), predicted_nll=loss)
        for unit in plan.units
        for format, loss in losses.items()
    )
    units = tuple(UnitEntry(**{name: getattr(unit, name) for name in UnitEntry.model_fields}) for unit in plan.units)
    profile = Profile(provenance=plan.provenance, units=units, unquantized=plan.unquantized, rows=rows)
    exported = export(plan, "auto-round", nearest=True, profile=profile)
    changed = [line for line in exported.lines if line.planned == "nf4"]
    # 64 columns: nf4 takes 36 bytes, int4-g32 37, int4-g64 34.5 and int5-g64 42.6; 96: 72 (two blocks) and 55.5 or 63.
    assert {line.format for line in changed if "down_proj" not in line.unit} == {"int4-g32"}
    assert all(line.nats == 0.25 for line in changed if line.format == "int4-g32")
    assert all(line.nats == 0.0 for line in exported.lines if line.planned != "nf4")
    total = sum(line.bytes for line in exported.lines) + sum(entry.bytes for entry in plan.unquantized)
    assert exported.bytes == total
    other = profile.model_copy(
        update={
            "provenance": plan.provenance.model_copy(
                update={"model": plan.provenance.model.model_copy(update={"weights_sha256": "0" * 64})}
            )
        }
    )
    with pytest.raises(PlanMismatch, match="another model's"):
        export(plan, "auto-round", nearest=True, profile=other)


def test_embeddings_are_refused_but_by_gguf_and_kept_by_nearest(checkpoint, monkeypatch):
    fake_gguf(monkeypatch)
    session = opened(checkpoint, "llama-tied", torch.float32, ())
    plan = uniform_plan(session, "int4-g32", "nearest")
    for target in TARGETS:
        if target == "gguf":
            wide = resized(plan, 64, 256)
            assert "^token_embd\\.weight$=q4_k\n" in export(wide, target, source=session.source).text
            continue
        with pytest.raises(FormatUnavailable, match=r"an embedding and the head.*--keep model.embed_tokens"):
            export(plan, target, source=session.source)
        exported = export(plan, target, nearest=True, source=session.source)
        assert [line.format for line in exported.lines if line.unit == "model.embed_tokens"] == ["fp32"]
        assert sum(line.planned != line.format for line in exported.lines) == 1


def test_what_servers_join_agrees(checkpoint):
    keep = (*HEADS["llama-tied"], "model.layers.0.self_attn.k_proj")
    session = opened(checkpoint, "llama-tied", torch.float32, keep)
    plan = uniform_plan(session, "int4-g32", "nearest")
    with pytest.raises(FormatUnavailable, match=r"layers\.0\.self_attn\.q_proj.*join with k_proj as qkv_proj.*--keep"):
        export(plan, "compressed-tensors", source=session.source)
    exported = export(plan, "compressed-tensors", nearest=True, source=session.source)
    native = {line.unit for line in exported.lines if line.format == "fp32"}
    assert native == {f"model.layers.0.self_attn.{part}_proj" for part in "qv"}
    config = json.loads(exported.text)
    kept = {"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.qkv_proj", "model.embed_tokens"}
    assert native | kept == set(config["ignore"])
    assert export(plan, "auto-round", source=session.source).changes == []


def test_the_bytes_told_for_gptq_are_those_of_the_checkpoint(session, tmp_path):
    plan = spread_plan(session, OF["gptqmodel"])
    exported = export(plan, "gptqmodel", source=session.source)
    size = save_gptq(load_planned(plan, session.source, "cpu"), plan, session.source, tmp_path / "out", force=False)
    assert exported.bytes == size
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config == json.loads(exported.text)


def test_conv1d_and_experts_are_told_apart(checkpoint):
    gpt2 = opened(checkpoint, "gpt2", torch.float32, HEADS["gpt2"])
    plan = uniform_plan(gpt2, "int8", "nearest")
    assert json.loads(export(plan, "auto-round").text)["transformer.h.0.attn.c_attn"]["bits"] == 8
    for target in ("torchao", "compressed-tensors"):
        with pytest.raises(FormatUnavailable, match=r"c_attn.*a Conv1D.*--keep"):
            export(plan, target, source=gpt2.source)
    moe = opened(checkpoint, "qwen3-moe", torch.float32, HEADS["llama"])
    plan = uniform_plan(moe, "int8", "nearest")
    with pytest.raises(FormatUnavailable, match=r"mlp.experts.gate_up_proj.*the joined experts of a block"):
        export(plan, "compressed-tensors", source=moe.source)
    exported = export(plan, "torchao", nearest=True)
    assert {line.format for line in exported.lines if "experts" in line.unit} == {"fp32"}


def test_an_untied_head_is_told_to_torchao(checkpoint):
    session = opened(checkpoint, "llama", torch.float32, ("model.embed_tokens",))
    plan = uniform_plan(session, "int8", "nearest")
    config = json.loads(export(plan, "torchao").text)
    assert config["include_input_output_embeddings"] is True
    assert "lm_head" in config["quant_type"]["default"]["_data"]["fqn_to_config"]
    kept = opened(checkpoint, "llama", torch.float32, HEADS["llama"])
    config = json.loads(export(uniform_plan(kept, "int8", "nearest"), "torchao").text)
    assert config["include_input_output_embeddings"] is False
    # A module with a bias goes by its weight: transformers would quantize the bias too.
    names = config["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert "model.layers.0.self_attn.q_proj.weight" in names and "model.layers.0.mlp.up_proj" in names


def test_bad_words(session):
    plan = uniform_plan(session, "int8", "nearest")
    with pytest.raises(UsageError, match="unknown target 'ggml': there are gptqmodel, compressed-tensors"):
        export(plan, "ggml")
    for target in NEED_MODEL:
        with pytest.raises(UsageError, match="needs the plan's model"):
            export(plan, target)
    told = export(plan.model_copy(update={"workload": Workload(kv_format="int8")}), "auto-round")
    assert any("KV cache format, int8" in note for note in told.notes)
