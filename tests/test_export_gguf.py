"""The file for llama-quantize, with a stand-in for the gguf package. The real one: benchmarks/exports.py."""

import re
import sys
from types import ModuleType

import pytest
import torch

from bitplan.formats.errors import FormatUnavailable
from bitplan.formats.table import FORMATS
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.export import export
from bitplan.planner.export.gguf import SIZES, _spellings
from bitplan.planner.plan import Plan
from bitplan.sensitivity.session import Session
from tests.test_gptq_layout import HEADS, opened


def fake_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the gguf package that is asked: architectures, and names of a Llama's tensors."""
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "input_layernorm": "attn_norm"}
    parts |= {f"mlp.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")}

    class Names:
        def get_name(self, name: str, try_suffixes: tuple[str, ...]) -> str | None:
            ends = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
            if name in ends:
                return ends[name]
            layer, suffix = re.match(r"model\.layers\.(\d+)\.(.*?)(?:\.weight|$)", name), ".weight"
            found = layer and parts.get(layer.group(2))
            return f"blk.{layer.group(1)}.{found}" + (suffix if name.endswith(suffix) else "") if found else None

    module = ModuleType("gguf")
    module.MODEL_ARCH_NAMES = {0: "gpt2", 1: "llama", 2: "qwen3moe"}
    module.get_tensor_name_map = lambda arch, layers: Names()
    monkeypatch.setitem(sys.modules, "gguf", module)


def resized(plan: Plan, rows: int, columns: int) -> Plan:
    """The plan as if all of its units had these sides, for what follows from shapes alone."""
    units = []
    for unit in plan.units:
        size = rows * columns * 4 if unit.is_native else FORMATS[unit.format].nbytes(rows, columns)
        units.append(unit.model_dump() | {"rows": rows, "columns": columns, "bytes": size})
    total = sum(unit["bytes"] for unit in units) + sum(entry.bytes for entry in plan.unquantized)
    return Plan.model_validate(plan.model_dump() | {"units": units, "bytes": total})


@pytest.fixture
def session(checkpoint, monkeypatch) -> Session:
    fake_gguf(monkeypatch)
    return opened(checkpoint, "llama-tied", torch.float32, HEADS["llama-tied"])


def test_gguf_types_follow_the_columns(session):
    def types(format: str, columns: int) -> set[str]:
        plan = resized(uniform_plan(session, format, "nearest"), 64, columns)
        exported = export(plan, "gguf", source=session.source)
        for line in exported.lines:
            block, size = SIZES[line.word]
            assert line.bytes == 64 * columns // block * size
        return {line.word for line in exported.lines}

    assert types("int4-g64", 256) == {"q4_k"} and types("int4-g32", 96) == {"q4_1"}
    assert types("int8", 96) == {"q8_0"} and types("nf4", 64) == {"iq4_nl"} and types("bf16", 33) == {"bf16"}
    with pytest.raises(FormatUnavailable, match=r"whose 96 columns are not whole blocks of q3_k: .*--formats"):
        types("int3-g32", 96)
    plan = resized(uniform_plan(session, "int3-g32", "nearest"), 64, 96)
    exported = export(plan, "gguf", nearest=True, source=session.source)
    assert {(line.format, line.word) for line in exported.lines} == {("int4-g128", "q4_1")}


def test_gguf_takes_joined_experts_apart_and_counts_vectors_in_float32(checkpoint, monkeypatch):
    fake_gguf(monkeypatch)
    session = opened(checkpoint, "qwen3-moe", torch.bfloat16, HEADS["llama"])
    plan = uniform_plan(session, "int8", "nearest")
    exported = export(plan, "gguf", source=session.source, nearest=True)
    for part in ("gate", "up", "down"):
        assert f"^blk\\.0\\.ffn_{part}_exps\\.weight$=q8_0\n" in exported.text
    assert "^token_embd\\.weight$=bf16\n" in exported.text and "^output\\.weight$=bf16\n" in exported.text
    assert "^blk\\.0\\.ffn_gate_inp\\.weight$=f32\n" in exported.text
    kept = exported.bytes - sum(line.bytes for line in exported.lines)
    weights = {entry.name: entry.bytes // 2 for entry in plan.unquantized}
    wide = {name: 2 for name in weights if name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert kept == sum(count * wide.get(name, 4) for name, count in weights.items())


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.1.mixer.up_proj.weight", "backbone.layers.1.mixer.up_proj.weight"),
        ("model.layers.1.mixer.experts.up_proj", "model.layers.1.mlp.experts.up_proj"),
        ("model.layers.0.block_sparse_moe.experts.down_proj", "model.layers.0.mlp.experts.down_proj"),
        ("model.layers.0.shared_mlp.input_linear.weight", "model.layers.0.mlp.shared_expert.gate_up_proj.weight"),
    ],
)
def test_names_as_the_gguf_package_has_them(name, there):
    assert there in _spellings(name) and _spellings(name)[0] == name


def test_gguf_says_what_it_lacks(session, checkpoint, monkeypatch):
    plan = uniform_plan(session, "int8", "nearest")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FormatUnavailable, match="pip install gguf"):
        export(plan, "gguf", source=session.source)
    fake_gguf(monkeypatch)
    other = opened(checkpoint, "opt", torch.float32, HEADS["opt"])
    with pytest.raises(FormatUnavailable, match=r"no architecture 'opt'.*pip install -U gguf"):
        export(uniform_plan(other, "int8", "nearest"), "gguf", source=other.source)
    gpt2 = opened(checkpoint, "gpt2", torch.float32, HEADS["gpt2"])
    for nearest in (False, True):
        with pytest.raises(
            FormatUnavailable, match=r"h.0.attn.c_attn.* and 5 more, for which GGUF has no name, in any format"
        ):
            export(uniform_plan(gpt2, "int8", "nearest"), "gguf", nearest=nearest, source=gpt2.source)
