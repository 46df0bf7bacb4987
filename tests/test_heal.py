"""Healing: what it trains, what it leaves, and that it never harms."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from bitplan.formats.base import as_floats
from bitplan.formats.errors import RoundingFailed
from bitplan.formats.rounding import rounding_for
from bitplan.formats.table import FORMATS, format_named
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.codes import codes_folder, missing_codes, unit_path, unquantized_path
from bitplan.planner.hf.quantizer import PlanConfig
from bitplan.planner.load import load, load_planned, resident_bytes
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.planner.quantize import distillation as heal
from bitplan.planner.quantize import segment
from bitplan.planner.quantize.distillation import Distillation, round_missing
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.store import load_tensors
from bitplan.sensitivity.texts.read import recall_texts
from bitplan.sensitivity.weight_cache import from_file
from tests.test_learning import keep_the_last

IDS = torch.arange(3, 43).unsqueeze(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for each test; few and short steps."""
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    for name, value in {"STEPS": 6, "TOKENS": 256, "LOOK": 2}.items():
        monkeypatch.setattr(heal, name, value)
    monkeypatch.setattr(segment, "STEPS", 3)
    return tmp_path / "cache"


def stored(plan: Plan, name: str) -> dict[str, torch.Tensor]:
    tensors = load_tensors(unit_path(codes_folder(plan), name))
    assert tensors is not None
    return from_file(tensors)


def held(model: torch.nn.Module, unit: PlannedUnit) -> dict[str, torch.Tensor]:
    """The stored tensors of a unit in a loaded model."""
    path, _, name = unit.parameter.rpartition(".")
    return model.get_submodule(path).tensors(name)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def undistilled(plan: Plan) -> Plan:
    return plan.model_copy(update={"distilled": False})


def mixed(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def references(session: Session) -> tuple[Reference, Reference]:
    """On the healing and the search text."""
    return Reference(session.model, session.texts.healing), Reference(session.model, session.texts.search)


@pytest.mark.parametrize(("name", "rounding"), [("llama-tied", "awq"), ("gpt2", "nearest"), ("mixtral", "nearest")])
def test_scales_and_vectors_are_trained_and_nothing_else(name, rounding, session_of, tmp_path, monkeypatch):
    monkeypatch.setattr(heal, "SCALE_RATE", 0.01)  # so few steps must be large ones
    session = session_of(name)
    plan = uniform_plan(session, "int2-g32", rounding, distilled=True)
    before = undistilled(plan)
    assert plan.bytes == before.bytes and plan.rounding == f"{rounding}, distilled"
    round_missing(plan, session)
    assert not missing_codes(plan) and not missing_codes(before)
    # Never worse than the codes alone, as loaded, on the text that stopped it; and at two bits better.
    _, search = references(session)
    model, start = load_planned(plan, session.source, "cpu"), load_planned(before, session.source, "cpu")
    assert search.evaluate(model).kl < search.evaluate(start).kl
    assert resident_bytes(model) == plan.bytes == resident_bytes(start)
    trained = 0
    for unit in plan.units:
        ours, theirs = stored(plan, unit.name), held(start, unit)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[suffix], theirs[suffix]) for suffix in ours if suffix != "_scale")
        assert ours["_scale"].dtype == theirs["_scale"].dtype == torch.int16
        trained += not torch.equal(ours["_scale"], theirs["_scale"])
    assert trained > 0.8 * len(plan.units)
    vectors = {entry.name for entry in plan.unquantized if len(entry.shape) == 1}
    kept = {path.name.removesuffix(".safetensors") for path in (codes_folder(plan) / "unquantized").iterdir()}
    assert kept == vectors
    moved = 0
    for entry in plan.unquantized:
        same = torch.equal(model.get_parameter(entry.name), start.get_parameter(entry.name))
        assert same or entry.name in vectors
        moved += not same
    assert moved
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_large_logits_are_computed_when_used_and_change_nothing(session_of, monkeypatch):
    session = session_of("llama-tied")
    plan = uniform_plan(session, "int2-g32", "nearest", distilled=True)
    round_missing(plan, session)
    usual = {unit.name: stored(plan, unit.name) for unit in plan.units}
    shutil.rmtree(codes_folder(plan))
    monkeypatch.setattr(heal, "IN_MEMORY", 0)
    monkeypatch.setattr(heal, "LOGIT_BYTES", 1)  # a block at a time
    made = []
    monkeypatch.setattr(heal, "Reference", lambda *args, **kept: made.append(Reference(*args, **kept)) or made[-1])
    round_missing(plan, session)
    (found,), (_, expected) = made, references(session)
    assert not isinstance(found.log_p, torch.Tensor)
    torch.testing.assert_close(found.log_p[1], expected.log_p[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.nll, expected.nll, rtol=0, atol=1e-4)
    for unit in plan.units:
        now, before = (
            as_floats(each["_scale"], torch.float16).float() for each in (stored(plan, unit.name), usual[unit.name])
        )
        torch.testing.assert_close(now, before, rtol=0.02, atol=1e-3 * float(before.max()))


def test_what_is_kept_is_the_best_state_seen_as_stored(session_of, monkeypatch):
    session = session_of("llama")
    plan = uniform_plan(session, "int2-g32", "nearest", distilled=True)
    looked, look = [], Distillation._look
    monkeypatch.setattr(Distillation, "_look", lambda self, search: looked.append(look(self, search)) or looked[-1])
    round_missing(plan, session)
    assert len(looked) == 1 + 3
    _, search = references(session)
    found = search.evaluate(load_planned(plan, session.source, "cpu")).kl
    assert found == pytest.approx(min(looked), rel=1e-4)
    start = search.evaluate(load_planned(undistilled(plan), session.source, "cpu")).kl
    assert looked[0] == pytest.approx(start, rel=1e-4)


def test_where_training_only_harms_the_start_is_kept(session_of, monkeypatch):
    monkeypatch.setattr(heal, "SCALE_RATE", 3.0)
    session = session_of("llama")
    plan = uniform_plan(session, "int4-g64", "gptq", distilled=True)
    looked, look = [], Distillation._look
    monkeypatch.setattr(Distillation, "_look", lambda self, search: looked.append(look(self, search)) or looked[-1])
    round_missing(plan, session)
    assert min(looked[1:]) > looked[0]
    for unit in plan.units:
        ours, theirs = stored(plan, unit.name), stored(undistilled(plan), unit.name)
        assert all(torch.equal(ours[suffix], theirs[suffix]) for suffix in theirs)
    for entry in plan.unquantized:
        kept = load_tensors(unquantized_path(codes_folder(plan), entry.name))
        assert torch.equal(kept["tensor"], session.model.get_parameter(entry.name))


def test_scales_of_every_format_get_gradients_and_steps(session_of):
    """Formats in turn: the loss reaches every scale, through experts, tied heads and bitsandbytes' formats."""
    for name in ("llama-tied", "qwen3-moe"):
        session = session_of(name, torch.bfloat16)
        turns = ("nf4", "fp8", "int8-bnb", "int8", "int3-g32", "binary-g64")
        plan = uniform_plan(session, "int8", "nearest", distilled=True)
        groups = list(dict.fromkeys(unit.group for unit in plan.units))
        units = []
        for unit, own in zip(plan.units, session.graph.units, strict=True):
            format = turns[groups.index(unit.group) % len(turns)]
            rounding = rounding_for(FORMATS[format], "nearest")
            changes = {"format": format, "rounding": rounding, "bytes": own.nbytes(format)}
            units.append(unit.model_copy(update=changes))
        total = sum(unit.bytes for unit in units) + sum(entry.bytes for entry in plan.unquantized)
        plan = Plan.model_validate(plan.model_dump() | {"units": [u.model_dump() for u in units], "bytes": total})
        student = sources.load_model(session.source, "cpu", quantization_config=PlanConfig(undistilled(plan)))
        healing = Distillation(student, plan)
        floats = {unit.parameter + suffix for unit in units for suffix in format_named(unit.format).floats}
        assert floats <= healing.trained.keys()
        student(input_ids=session.texts.calibration.ids[:8]).logits.logsumexp(-1).sum().backward()
        for parameter, (value, _) in healing.trained.items():
            assert value.grad is not None, parameter
            assert value.grad.isfinite().all()
            # Keys' biases shift all of a row's scores alike, which changes nothing.
            assert (value.grad != 0).any() or parameter.endswith("k_proj.bias"), parameter
        trained = {id(value) for value, _ in healing.trained.values()}
        assert all(id(p) in trained for p in student.parameters() if p.requires_grad)
        plan = plan.model_copy(update={"distilled": True})
        round_missing(plan, session)
        model = load_planned(plan, session.source, "cpu")
        assert resident_bytes(model) == plan.bytes
        for unit in units:
            scale = format_named(unit.format).floats["_scale"]
            assert as_floats(stored(plan, unit.name)["_scale"], scale).isfinite().all()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_checkpointing_changes_nothing(name, session_of, monkeypatch):
    session = session_of(name)
    plan = uniform_plan(session, "int3-g32", "nearest", distilled=True)
    healed, search = references(session)
    found = []
    for memory in (1 << 30, 0):
        monkeypatch.setattr(heal, "IN_MEMORY", memory)
        student = sources.load_model(session.source, "cpu", quantization_config=PlanConfig(undistilled(plan)))
        healing = Distillation(student, plan)
        blocks = [m for m in student.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(blocks) == (memory == 0)
        assert all(m.training == (m in blocks) for m in student.modules() if m is not student)
        healing.run(healed.blocks, lambda i: healed.log_p[i].unsqueeze(0), search)
        found.append({key: value.detach().clone() for key, (value, _) in healing.trained.items()})
        healing._state.unlink()
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_its_loss_has_the_gradients_of_the_kl(session_of, monkeypatch):
    monkeypatch.setattr(heal, "mixed_precision", lambda device: mixed(False))
    session = session_of("llama-tied")
    plan = uniform_plan(session, "int2-g32", "nearest", distilled=True)
    healed, _ = references(session)
    student = sources.load_model(session.source, "cpu", quantization_config=PlanConfig(undistilled(plan)))
    healing = Distillation(student, plan)
    ids, aim = healed.blocks.ids[:2], healed.log_p[:2]
    log_q = student(input_ids=ids).logits[:, :-1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, aim, reduction="sum", log_target=True) / aim[..., 0].numel()
    parameters = [value for value, _ in healing.trained.values()]
    expected = torch.autograd.grad(kl, parameters)
    assert_close(torch.autograd.grad(healing._loss(ids, aim.clone()), parameters), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("module", [segment, heal])
def test_products_of_bfloat16_learn_as_well(module, session_of, monkeypatch):
    session = session_of("llama-tied")
    keep_the_last(monkeypatch)
    plan = uniform_plan(session, "int2-g32", "nearest" if module is heal else "tuned", distilled=module is heal)
    _, search = references(session)
    found = []
    for enabled in (False, True):
        monkeypatch.setattr(module, "mixed_precision", lambda device, enabled=enabled: mixed(enabled))
        round_missing(plan, session)
        found.append(search.evaluate(load_planned(plan, session.source, "cpu")).kl)
        shutil.rmtree(codes_folder(plan))
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)


class TestResuming:
    @pytest.mark.parametrize("cut", [1, 5])
    def test_an_interrupted_run_ends_as_it_would_have_to_the_byte(self, cut, session_of, cache, monkeypatch):
        session = session_of("llama")
        plan = uniform_plan(session, "int2-g32", "gptq", distilled=True)
        round_missing(plan, session)
        expected = files(codes_folder(plan))
        assert not any("healing" in name for name in expected)
        shutil.rmtree(codes_folder(plan))
        step, steps = torch.optim.AdamW.step, []

        def interrupted(self, *args, **kwargs):
            if len(steps) == cut:
                raise KeyboardInterrupt
            steps.append(1)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            round_missing(plan, session)
        assert len(missing_codes(plan)) == len(plan.units)
        assert not missing_codes(undistilled(plan))
        steps.clear()
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: steps.append(1) or step(self, *a, **k))
        round_missing(plan, session)
        assert len(steps) == 6 - cut // 2 * 2  # from the last look on
        assert files(codes_folder(plan)) == expected

    def test_interrupted_while_writing_it_writes_the_same(self, session_of, monkeypatch):
        session = session_of("llama")
        plan = uniform_plan(session, "int2-g32", "gptq", distilled=True)
        round_missing(plan, session)
        expected = files(codes_folder(plan))
        shutil.rmtree(codes_folder(plan))
        saved = heal.save_tensors

        def interrupted(path, tensors):
            if path.name.startswith("model.layers.1.mlp"):
                raise KeyboardInterrupt
            saved(path, tensors)

        monkeypatch.setattr(heal, "save_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            round_missing(plan, session)
        monkeypatch.setattr(heal, "save_tensors", saved)
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: pytest.fail("trained again"))
        round_missing(plan, session)
        assert files(codes_folder(plan)) == expected

    def test_healed_plans_are_made_by_load_from_the_plans_text(self, session_of, tmp_path, monkeypatch):
        session = session_of("llama", torch.bfloat16)
        plan = uniform_plan(session, "int2-g32", "gptq", distilled=True)
        round_missing(plan, session)
        expected = files(codes_folder(plan))
        monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "other"))
        load(plan, session.source.folder, device="cpu")
        assert files(codes_folder(plan)) == expected

    def test_a_plan_that_names_no_healing_text_is_healed_on_its_calibration_text(self, session_of):
        session = session_of("llama")
        plan = uniform_plan(session, "int2-g32", "gptq", distilled=True)
        facts = session.provenance
        assert facts.text.healing != facts.text.calibration
        older = plan.model_copy(
            update={"provenance": facts.model_copy(update={"text": facts.text.model_copy(update={"healing": None})})}
        )
        healing = recall_texts(older.provenance.text, session.source).healing
        assert torch.equal(healing.ids, session.texts.calibration.ids)
        assert codes_folder(older) != codes_folder(plan)


def test_every_block_of_the_text_is_drawn_before_any_comes_again():
    """Over 30 steps of 4 among 10 blocks, in another order each time."""
    drawn = torch.cat([heal._drawn(10, 4, step) for step in range(30)]).view(12, 10)
    assert torch.equal(drawn.sort(1).values, torch.arange(10).expand(12, 10))
    assert len({tuple(each) for each in drawn.tolist()}) == 12
    assert len(heal._drawn(3, 8, 5)) == 3


def test_a_loss_that_is_not_finite_is_said(session_of, monkeypatch):
    session = session_of("llama")
    plan = uniform_plan(session, "int2-g32", "gptq", distilled=True)
    monkeypatch.setattr(heal, "SCALE_RATE", float("nan"))
    with pytest.raises(RoundingFailed, match="healing: the loss is nan at step 1; plan without --heal"):
        round_missing(plan, session)
    assert len(missing_codes(plan)) == len(plan.units)
