"""Saved planned checkpoints that are not what they say: plain transformers must refuse them, by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitplan.formats.errors import BitplanError, FileInvalid, ModelUnreadable, PlanMismatch
from bitplan.planner.hf.quantizer import PlanConfig
from tests.test_pretrained import mixed_plan

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(session_of, checkpoint, tmp_path_factory) -> Path:
    """A tied Llama with a unit in each of many formats, saved."""
    plan = mixed_plan(session_of("llama-tied"))
    folder = tmp_path_factory.mktemp("saved")
    AutoModelForCausalLM.from_pretrained(
        checkpoint("llama-tied"), quantization_config=PlanConfig(plan)
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(folder: Path, error: type[BitplanError] = PlanMismatch) -> str:
    with pytest.raises(error) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def a(tensors: Tensors, ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


ENDINGS = (
    "q_proj.weight",
    "weight_scale",
    "weight_zero",
    "input_layernorm.weight",
    "embed_tokens.weight",
    "norm.weight",
)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_tensor_that_is_missing_is_named(copy, ending):
    names = []
    rewrite(copy, lambda tensors: (names.append(a(tensors, ending)), tensors.pop(names[0])))
    assert names[0] in refused(copy) and "lacks" in refused(copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_tensor_of_another_type_is_named(copy, ending, dtype):
    names = []

    def change(tensors):
        name = a(tensors, ending)
        names.append(name)
        changed = tensors[name].to(dtype)
        names.append("same" if changed.dtype == tensors[name].dtype else "")
        tensors[name] = changed

    rewrite(copy, change)
    if names[1]:
        AutoModelForCausalLM.from_pretrained(copy)
    else:
        assert names[0] in refused(copy) and "another shape or type" in refused(copy)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_tensor_of_another_shape_is_named(copy, ending):
    names = []

    def change(tensors):
        names.append(a(tensors, ending))
        tensors[names[0]] = tensors[names[0]][..., :-1].contiguous()

    rewrite(copy, change)
    assert names[0] in refused(copy) and "another shape or type" in refused(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ending", ["weight_scale", "input_layernorm.weight", "norm.weight"])
def test_a_tensor_that_is_not_finite_is_named(copy, ending, value):
    names = []

    def change(tensors):
        names.append(a(tensors, ending))
        tensor = tensors[names[0]]
        bits = {torch.int16: torch.float16, torch.int32: torch.float32}.get(tensor.dtype, tensor.dtype)
        tensor.view(bits).view(-1)[-1] = value

    rewrite(copy, change)
    assert names[0] in refused(copy) and "NaN or infinity" in refused(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("hidden_size", 128),
        ("vocab_size", 300),
        ("model_type", "gpt2"),
    ],
)
def test_a_config_of_another_model_is_refused(copy, field, value):
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config[field] = value
    config.pop("layer_types", None)
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "plan" in refused(copy)


def drop(plan: dict, name: str) -> None:
    del plan[name]


PLANS: dict[str, Callable[[dict], object]] = {
    "unit gone": lambda plan: plan["units"].pop(),
    "norm gone": lambda plan: plan["unquantized"].pop(0),
    "other format": lambda plan: plan["units"][0].update(format="int2-g32"),
    "other rows": lambda plan: plan["units"][0].update(rows=7),
    "huge rows": lambda plan: plan["units"][0].update(rows=1 << 70),
    "no parameter": lambda plan: plan["units"][1].update(parameter=plan["units"][1]["name"] + ".bias"),
    "no module": lambda plan: plan["units"][1].update(name="model.nothing", parameter="model.nothing.weight"),
    "dtype": lambda plan: plan["provenance"]["model"].update(dtype="nn"),
    "integer dtype": lambda plan: plan["provenance"]["model"].update(dtype="int8"),
    "unit dtype": lambda plan: plan["units"][0].update(dtype="complex64"),
    "no units": lambda plan: plan.update(units=[]),
    "tie": lambda plan: plan["units"][0].update(tied=["model.norm"]),
    "tie to itself": lambda plan: plan["units"][1].update(tied=[plan["units"][1]["name"]]),
    "tie to a unit": lambda plan: plan["units"][1].update(tied=[plan["units"][2]["name"]]),
    "tied twice": lambda plan: plan["units"][1].update(tied=plan["units"][0]["tied"] * 2),
    "tie to nothing": lambda plan: plan["units"][0].update(tied=["model.nothing"]),
    "kv": lambda plan: plan["workload"].update(kv_format="x" * 10_000),
    "surprise": lambda plan: plan.update(surprise=1),
    "no provenance": lambda plan: drop(plan, "provenance"),
    "no versions": lambda plan: plan["provenance"].update(versions={}),
}


@pytest.mark.parametrize("change", PLANS.values(), ids=PLANS)
def test_a_plan_of_another_model_is_refused(copy, change):
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    plan = config["quantization_config"]["plan"]
    change(plan)
    plan["bytes"] = sum(e.get("bytes", 0) for e in plan["units"] + plan["unquantized"])  # so that the sum is no excuse
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert len(refused(copy, (PlanMismatch, FileInvalid))) < 2100  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [None, 7, [], "plan", {"units": 3}], ids=str)
def test_what_is_no_plan_is_refused(copy, content):
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["plan"] = content
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "quantization_config" in refused(copy, FileInvalid)


def test_a_file_that_is_cut_is_refused(copy):
    path = copy / "model.safetensors"
    os.truncate(path, path.stat().st_size - 8)
    assert "cut short" in refused(copy, ModelUnreadable)


def test_untouched_it_loads(saved):
    AutoModelForCausalLM.from_pretrained(saved)
