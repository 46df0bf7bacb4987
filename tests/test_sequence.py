"""Codes chosen block by block: what lies on disk, what it was chosen from, and how it resumes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitplan.formats.modules import Packed, canonical, is_transposed
from bitplan.formats.rounding import Hessian, rounding_for
from bitplan.formats.rounding.gptq import gptq_codes
from bitplan.formats.table import FORMATS, format_named
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.codes import codes_folder, missing_codes, unit_path, unquantized_path
from bitplan.planner.load import load, load_planned, make_codes, resident_bytes
from bitplan.planner.plan import Plan
from bitplan.planner.quantize import segment
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.quantize.folding import fold_scales
from bitplan.planner.quantize.sequential import Sequence
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.store import load_tensors
from bitplan.sensitivity.texts.read import read_texts
from bitplan.sensitivity.weight_cache import from_file
from tests import tiny
from tests.test_shrinkage import shrunk

ARCHITECTURES = ["llama", "gpt2", "opt", "mixtral", "qwen3-moe", "gemma2"]
IDS = torch.arange(3, 43).unsqueeze(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for each test, and learning that takes no time."""
    monkeypatch.setattr(segment, "STEPS", 3)
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def reopened(session: Session, whole: bool = True) -> Session:
    """The same model and text, opened anew, with a bank that lies in the cache of now."""
    return open_session(session.source, session.texts, device="cpu", whole=whole)


def planned(session: Session, choices: dict[str, str]) -> Plan:
    """A plan by unit name: "format" or "format/rounding"; "*" is for all others. Groups must agree."""
    plan = uniform_plan(session, "int8", "nearest")
    units = []
    for unit, own in zip(plan.units, session.graph.units, strict=True):
        name, _, rounding = choices.get(unit.name, choices["*"]).partition("/")
        name = own.native if name == "native" else name
        rounding = "nearest" if name == own.native else rounding_for(FORMATS[name], rounding or "nearest")
        units.append(unit.model_copy(update={"format": name, "rounding": rounding, "bytes": own.nbytes(name)}))
    total = sum(unit.bytes for unit in units) + sum(entry.bytes for entry in plan.unquantized)
    return Plan.model_validate(plan.model_dump() | {"units": [u.model_dump() for u in units], "bytes": total})


def weight_on_disk(plan: Plan, name: str) -> torch.Tensor:
    unit = next(unit for unit in plan.units if unit.name == name)
    tensors = load_tensors(unit_path(codes_folder(plan), name))
    assert tensors is not None
    return format_named(unit.format).dequantize(from_file(tensors), unit.columns, torch.float32)


def exchange(model: PreTrainedModel, parameter: str, weight: torch.Tensor) -> None:
    """Put a weight [experts * rows, columns] in the place of a plain model's."""
    held, owner = model.get_parameter(parameter), model.get_submodule(parameter.rpartition(".")[0])
    weight = weight.unflatten(0, (held.shape[0], -1)) if held.ndim == 3 else weight
    held.data = (weight.mT if is_transposed(owner) else weight).contiguous().to(held.dtype)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        *((name, "gptq") for name in ARCHITECTURES),
        *(("llama", "awq"), ("gpt2", "awq"), ("mixtral", "tuned"), ("gemma2", "tuned")),
    ],
)
def test_the_loaded_model_has_the_codes_and_vectors_on_disk(name, rounding, session_of, tmp_path):
    session = session_of(name)
    plan = uniform_plan(session, "int3-g32", rounding)
    assert len(missing_codes(plan)) == len(plan.units)
    round_missing(plan, session)
    assert not missing_codes(plan)
    model = load_planned(plan, session.source, "cpu")
    assert resident_bytes(model) == plan.bytes
    plain = AutoModelForCausalLM.from_pretrained(session.source.folder)
    for unit in plan.units:
        path, _, parameter = unit.parameter.rpartition(".")
        module, expected = model.get_submodule(path), weight_on_disk(plan, unit.name)
        assert isinstance(module, Packed)
        assert torch.equal(canonical(module.dequantized(parameter), is_transposed(module)), expected)
        exchange(plain, unit.parameter, expected)
    changed = []
    for entry in plan.unquantized:
        original = plain.get_parameter(entry.name)
        kept = load_tensors(unquantized_path(codes_folder(plan), entry.name))
        if kept is not None:
            assert kept["tensor"].dtype == original.dtype
            changed.append(not torch.equal(kept["tensor"], original))  # ones may be the best scale of some
            original.data = kept["tensor"]
        assert torch.equal(model.get_parameter(entry.name), original)
    assert any(changed) == (rounding == "awq")
    expected = logits(plain)
    assert_close(logits(model), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


@torch.no_grad()
def inputs_of(model: PreTrainedModel, path: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a module is given, [blocks, tokens, columns], and to which experts each token goes, where it says so."""
    seen: list[tuple] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args))
    for row in ids.split(1):
        model(input_ids=row, use_cache=False)
    handle.remove()
    x = torch.cat([args[0].flatten(0, -2) for args in seen])
    return x, torch.cat([args[1] for args in seen]) if len(seen[0]) > 1 else None


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama", "model.layers.0.self_attn.q_proj"),
        ("llama", "model.layers.0.self_attn.v_proj"),
        ("llama", "model.layers.0.mlp.down_proj"),
        ("llama", "model.layers.1.self_attn.o_proj"),
        ("llama", "lm_head"),
        ("gpt2", "transformer.h.0.attn.c_attn"),
        ("opt", "model.decoder.layers.1.fc2"),
        ("gemma2", "model.layers.1.mlp.up_proj"),
        ("mixtral", "model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_gptq_gets_the_inputs_of_the_rounded_model_and_aims_at_the_full_ones(name, target, session_of):
    """Oracle: a plain model that holds the codes of all that runs before, its inputs taken by hooks."""
    session = session_of(name)
    plan = uniform_plan(session, "int3-g32", "gptq")
    round_missing(plan, session)
    graph = {unit.name: unit for unit in session.graph.units}
    unit = graph[target]
    step = graph[session.graph.readers.get(target, target)].order
    full, rounded = (AutoModelForCausalLM.from_pretrained(session.source.folder) for _ in range(2))
    for other in graph.values():
        if graph[session.graph.readers.get(other.name, other.name)].order < step:
            exchange(rounded, other.parameter, weight_on_disk(plan, other.name))
    ids, path = session.texts.calibration.ids, unit.parameter.rpartition(".")[0]
    (x0, _), (x, routes) = inputs_of(full, path, ids), inputs_of(rounded, path, ids)
    if unit.experts == 1:
        hessians = [Hessian(*shrunk([x], [x0]))]
        assert not torch.equal(x, x0)
    else:
        hessians = [Hessian(*shrunk([x[(routes == expert).any(-1)]])) for expert in range(unit.experts)]
    format = format_named("int3-g32")
    weight = session.swapper.weight(unit)
    codes, grid, _ = gptq_codes(weight, format, hessians)
    expected = format.dequantize(format.store(codes, grid), unit.columns, torch.float32)
    found = weight_on_disk(plan, target)
    # Sums run in another order, so that a code on an edge may fall otherwise, and what follows it in its row.
    assert torch.isclose(found, expected, rtol=1e-3, atol=1e-6).float().mean() > 0.95
    alone = gptq_codes(weight, format, [Hessian(torch.eye(unit.columns))] * unit.experts)
    nearest = format.dequantize(format.store(*alone[:2]), unit.columns, torch.float32)
    assert torch.isclose(found, nearest, rtol=1e-3, atol=1e-6).float().mean() < 0.9


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_gptq_of_a_tied_embedding_counts_what_the_head_reads(name, session_of):
    session = session_of(name)
    plan = uniform_plan(session, "int3-g32", "gptq")
    round_missing(plan, session)
    (unit,) = (unit for unit in session.graph.units if unit.kind == "tied")
    full = AutoModelForCausalLM.from_pretrained(session.source.folder)
    x, _ = inputs_of(full, "lm_head", session.texts.calibration.ids)
    moment, _ = shrunk([x])
    format, weight = format_named("int3-g32"), session.swapper.weight(unit)

    def coded(hessian: Hessian) -> torch.Tensor:
        codes, grid, _ = gptq_codes(weight, format, [hessian])
        return format.dequantize(format.store(codes, grid), unit.columns, torch.float32)

    statistics, found = session.store[unit], weight_on_disk(plan, unit.name)
    (hessian,) = statistics.hessians(moment.unsqueeze(0))
    assert torch.isclose(found, coded(hessian), rtol=1e-3, atol=1e-6).float().mean() > 0.95
    (lookups,) = statistics.hessians(torch.zeros_like(moment).unsqueeze(0))
    assert torch.isclose(found, coded(lookups), rtol=1e-3, atol=1e-6).float().mean() < 0.9


class TestQuality:
    """KL of the whole model on the calibration text."""

    @staticmethod
    def losses(session: Session, format: str, *roundings: str) -> list[float]:
        reference = Reference(session.model, session.texts.calibration)
        found = []
        for rounding in roundings:
            plan = uniform_plan(session, format, rounding)
            round_missing(plan, session)
            found.append(reference.evaluate(load_planned(plan, session.source, "cpu")).kl)
        return found

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
    def test_gptq_and_awq_lose_less_than_nearest(self, name, session_of):
        nearest, awq, gptq = self.losses(session_of(name), "int2-g32", "nearest", "awq", "gptq")
        assert gptq < 0.6 * nearest
        assert awq < nearest

    def test_a_tied_pair_is_rounded_once_for_both(self, session_of):
        session = session_of("llama-tied")
        nearest, tuned = self.losses(session, "int2-g32", "nearest", "tuned")
        assert tuned < 0.6 * nearest
        plan = uniform_plan(session, "int2-g32", "tuned")
        model = load_planned(plan, session.source, "cpu")
        tied = next(unit for unit in plan.units if unit.kind == "tied")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.dequantized(), weight_on_disk(plan, tied.name))


@pytest.mark.parametrize(
    ("name", "changes", "unfolded"),
    [
        ("llama", ["input_layernorm.weight", "post_attention_layernorm.weight"], ["self_attn.o_proj"]),
        ("gemma2", ["input_layernorm.weight", "pre_feedforward_layernorm.weight"], ["self_attn.o_proj"]),
        ("gpt2", ["ln_1.bias", "ln_1.weight", "ln_2.bias", "ln_2.weight"], ["attn.c_proj", "mlp.c_proj"]),
        (
            "opt",  # relu and values that no heads share let scales through, into biases too
            [f"{norm}.{part}" for norm in ("final_layer_norm", "self_attn_layer_norm") for part in ("bias", "weight")],
            [],
        ),
        ("mixtral", ["input_layernorm.weight"], ["self_attn.o_proj"]),
    ],
)
def test_awqs_scales_change_nothing_before_rounding(name, changes, unfolded, session_of):
    session = session_of(name)
    steps = Sequence(uniform_plan(session, "int3-g32", "awq"), session)
    first = steps.segment(0, None, None).outputs(None, {})
    work = steps.segment(1, first, first)
    before = work.outputs(first, {})[:]
    left = fold_scales(work, work.units)
    prefix = steps.chain.paths[0] + "."
    assert {name for name in work.changed if "norm" in name or "ln_" in name} == {prefix + name for name in changes}
    assert all(
        (name in work.changed) == (not unfolded) for name in (f"{prefix}fc1.bias", f"{prefix}self_attn.v_proj.bias")
    )
    assert sorted(left) == [prefix + path for path in unfolded]
    assert any(not torch.equal(work.now[parameter], weight) for parameter, weight in work.originals.items())
    assert_close(work.outputs(first, work.now)[:], before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_awqs_scales_change_nothing_where_one_activation_is_massive(checkpoint, tmp_path):
    """As in trained models, one column of the residual stream is thousands of times the others."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 7] = 0
    tensors["model.embed_tokens.weight"][ord(" "), 7] = 5000.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    source = sources.find(folder)
    session = open_session(source, read_texts(source, tokens=1024, length=64), device="cpu")
    steps = Sequence(uniform_plan(session, "int3-g32", "awq"), session)
    first = steps.segment(0, None, None).outputs(None, {})
    work = steps.segment(1, first, first)
    before = work.outputs(first, {})[:] - first[:]
    fold_scales(work, work.units)
    after = work.outputs(first, work.now)[:] - first[:]
    others = [column for column in range(64) if column != 7]
    scale = float(before[..., others].abs().max())
    assert_close(after[..., others], before[..., others], rtol=0, atol=0.01 * scale)


def test_many_formats_in_one_plan(session_of, tmp_path):
    session = session_of("llama", torch.bfloat16)
    layer = "model.layers.{}.{}".format
    choices = {layer(0, f"self_attn.{part}_proj"): "int4-g64/tuned" for part in "qkv"}
    choices |= {layer(0, "self_attn.o_proj"): "nf4", layer(0, "mlp.down_proj"): "fp8"}
    choices |= {layer(0, f"mlp.{part}_proj"): "int3-g32/awq" for part in ("gate", "up")}
    choices |= {layer(1, f"self_attn.{part}_proj"): "int8-bnb" for part in "qkv"}
    choices |= {layer(1, "self_attn.o_proj"): "native", layer(1, "mlp.down_proj"): "int4-g32/gptq"}
    choices |= {layer(1, f"mlp.{part}_proj"): "int8/nearest" for part in ("gate", "up")}
    plan = planned(session, choices | {"model.embed_tokens": "int4-g64/gptq", "*": "native"})
    assert plan.rounding == "gptq and tuned and nearest and awq"
    round_missing(plan, session)
    native = {unit.name for unit in plan.units if unit.is_native}
    assert native == {layer(1, "self_attn.o_proj"), "lm_head"}
    model = load_planned(plan, session.source, "cpu")
    plain = AutoModelForCausalLM.from_pretrained(session.source.folder, dtype=torch.float32)
    for unit in plan.packed:
        exchange(plain, unit.parameter, weight_on_disk(plan, unit.name))
    scaled = {layer(0, "post_attention_layernorm.weight")}
    assert {path.stem for path in (codes_folder(plan) / "unquantized").iterdir()} == scaled
    for name in scaled:
        plain.get_parameter(name).data = load_tensors(unquantized_path(codes_folder(plan), name))["tensor"].float()
    expected = logits(plain)
    assert (logits(model).float() - expected).norm() < 0.05 * expected.norm()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and resident_bytes(again) == plan.bytes


class TestOneBlock:
    """Models whose blocks cannot run alone."""

    @pytest.mark.parametrize("way", [tiny.reading_text, tiny.unchained], ids=lambda way: way.__name__)
    @pytest.mark.parametrize("rounding", ["gptq", "awq", "tuned"])
    def test_are_rounded_as_one(self, way, rounding, checkpoint, monkeypatch, capsys):
        way(monkeypatch)
        source = sources.find(checkpoint("llama"))
        session = open_session(source, read_texts(source, tokens=1024, length=64), device="cpu")
        plan = uniform_plan(session, "int3-g32", rounding)
        round_missing(plan, session)
        said = capsys.readouterr().err
        assert "the model is rounded as one block" in said
        # Nowhere in one block of everything is it known what a scale may be folded into.
        assert ("only clipped" in said) == (rounding == "awq")
        reference = Reference(session.model, session.texts.calibration)
        model = load_planned(plan, source, "cpu")
        for unit in plan.units:
            module = model.get_submodule(unit.parameter.rpartition(".")[0])
            assert torch.equal(module.dequantized(), weight_on_disk(plan, unit.name))
        nearest = load_planned(uniform_plan(session, "int3-g32", "nearest"), source, "cpu")
        assert reference.evaluate(model).kl < (1 if rounding == "awq" else 0.5) * reference.evaluate(nearest).kl


def test_units_kept_on_request_stay_out_of_it_on_another_machine(session_of, checkpoint):
    """The plan of a model with kept units is applied by a session that was opened without them."""
    source = session_of("llama").source
    session = open_session(source, session_of("llama").texts, ("*mlp*",), "cpu")
    plan = uniform_plan(session, "int4-g64", "gptq")
    assert sum(entry.reason == "unquantized on request" for entry in plan.unquantized) == 6
    make_codes(plan, source, device="cpu")
    model = load(plan, source.folder, device="cpu")
    assert resident_bytes(model) == plan.bytes
    assert not isinstance(model.model.layers[0].mlp.up_proj, Packed)
