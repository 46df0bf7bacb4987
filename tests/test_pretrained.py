"""The plug-in on real checkpoints: bytes, values and logits, before saving and after reading back."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM

import bitplan
from bitplan.formats.errors import CodesMissing, ModelUnreadable, PlanMismatch
from bitplan.formats.modules import Packed
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import format_named
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.codes import codes_folder, unit_path
from bitplan.planner.hf.quantizer import PlanConfig
from bitplan.planner.load import load, resident_bytes
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.store import load_tensors
from bitplan.sensitivity.weight_cache import from_file
from tests import tiny

IDS = torch.arange(3, 43).unsqueeze(0)
MIX = [
    "int4-g32",
    "int3-g32-s4",
    "nf4",
    "fp8",
    "int8",
    "int3-g64",
    "bf16",
    "binary-g64",
    "int8-bnb",
    "int5-g128",
    "fp16",
    "fp32",
    "int2-g32",
]


def mixed_plan(session) -> Plan:
    """Every format somewhere: groups take the formats in turn."""
    plan = uniform_plan(session, "int4-g64", "nearest")
    groups = list(dict.fromkeys(unit.group for unit in plan.units))
    units = []
    for unit, own in zip(plan.units, session.graph.units, strict=True):
        name = MIX[groups.index(unit.group) % len(MIX)]
        units.append(unit.model_copy(update={"format": name, "bytes": own.nbytes(name)}))
    total = sum(unit.bytes for unit in units) + sum(entry.bytes for entry in plan.unquantized)
    content = plan.model_dump() | {"units": [unit.model_dump() for unit in units], "bytes": total}
    return Plan.model_validate(content)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def on_disk(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_load_save_reload(name, dtype, session_of, checkpoint, tmp_path):
    session, folder = session_of(name, dtype), checkpoint(name, dtype)
    plan = mixed_plan(session)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PlanConfig(plan))
    assert resident_bytes(model) == plan.bytes
    # Each unit's weight is what its rounding gives for the checkpoint's weight.
    for unit, own in zip(plan.units, session.graph.units, strict=True):
        if unit.is_native:
            continue
        module = model.get_submodule(unit.parameter.rpartition(".")[0])
        assert isinstance(module, Packed)
        expected = session.weight_cache.dequantized(own, QuantScheme(unit.format, unit.rounding))
        slot = module.slots[unit.parameter.rpartition(".")[2]]
        tensors = module.tensors(unit.parameter.rpartition(".")[2])
        assert_close(slot.format.dequantize(tensors, slot.columns, torch.float32), expected, rtol=0, atol=0)
    # The model computes what a plain model with those weights computes.
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for unit, own in zip(plan.units, session.graph.units, strict=True):
        weight = session.weight_cache.dequantized(own, QuantScheme(unit.format, unit.rounding)).to(dtype)
        parameter = plain.get_parameter(unit.parameter)
        shaped = weight.unflatten(0, (own.experts, own.rows)) if parameter.ndim == 3 else weight
        parameter.data = shaped if shaped.shape == parameter.shape and own.kind != "conv1d" else shaped.mT.contiguous()
    found, expected = logits(model), logits(plain)
    # LLM.int8 rounds inputs; with bfloat16, products of fp32 and fp16 weights are computed in float32, which
    # differs by as much as the processor makes it.
    tolerance = 0.07 if dtype == torch.bfloat16 else 0.02
    assert (found - expected).norm() < tolerance * expected.norm()
    # Saved and read back by plain transformers, it is the same to the bit, in memory and on disk.
    model.save_pretrained(tmp_path)
    assert on_disk(tmp_path) == plan.bytes
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert resident_bytes(again) == plan.bytes
    assert again.dtype == model.dtype == dtype
    assert torch.equal(logits(again), found)
    assert not any(
        p.requires_grad
        for m in again.modules()
        if isinstance(m, Packed)
        for p in m._parameters.values()
        if p is not None and not p.is_floating_point()
    )


def test_generation_by_greedy_search_is_the_plain_models(session_of, checkpoint):
    session = session_of("llama-tied")
    model = load(uniform_plan(session, "int8"), checkpoint("llama-tied"), device="cpu")
    out = model.generate(input_ids=IDS[:, :5], max_new_tokens=8, do_sample=False, pad_token_id=0)
    step = IDS[:, :5]
    for _ in range(8):
        step = torch.cat((step, model(input_ids=step).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, step)


def test_codes_made_with_text_are_used_later_without(session_of, checkpoint):
    session = session_of("llama")
    plan = uniform_plan(session, "int3-g32")
    assert {unit.rounding for unit in plan.units} == {"gptq"}
    round_missing(plan, session)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=PlanConfig(plan))
    for unit in session.graph.units:
        tensors = load_tensors(unit_path(codes_folder(plan), unit.name))
        expected = format_named("int3-g32").dequantize(from_file(tensors), unit.columns, torch.float32)
        assert_close(model.get_submodule(unit.name).dequantized(), expected, rtol=0, atol=0)
        nearest = session.weight_cache.dequantized(unit, QuantScheme("int3-g32", "nearest"))
        assert not torch.equal(expected, nearest)


def test_without_codes_and_text_loading_names_the_command(session_of, checkpoint, monkeypatch, tmp_path):
    plan = uniform_plan(session_of("llama"), "int5-g128")
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path))
    with pytest.raises(CodesMissing, match="bitplan apply PLAN --text FILE"):
        AutoModelForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=PlanConfig(plan))


def test_load_makes_the_codes_from_the_plans_text(session_of, checkpoint, monkeypatch, tmp_path):
    session = session_of("llama")
    plan = uniform_plan(session, "int5-g64")
    round_missing(plan, session)
    expected = logits(load(plan, checkpoint("llama"), device="cpu"))
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path))
    # The plan's text is the standard library, which every Python carries.
    assert torch.equal(logits(load(plan, checkpoint("llama"), device="cpu")), expected)


def test_a_checkpoint_that_holds_a_tied_pair_twice(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    from bitplan.sensitivity import source as sources
    from bitplan.sensitivity.session import open_session
    from bitplan.sensitivity.texts.read import read_texts

    shutil.copytree(checkpoint("llama-tied"), tmp_path / "twice")
    file = tmp_path / "twice" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    source = sources.find(tmp_path / "twice")
    session = open_session(source, read_texts(source, tokens=1024, length=64), device="cpu")
    plan = uniform_plan(session, "int4-g64", "nearest")
    model = load(plan, tmp_path / "twice", device="cpu")
    assert resident_bytes(model) == plan.bytes
    # transformers 5.0 leaves such a pair untied, later ones tie it; the plan sees what the model has.
    tied = any(unit.kind == "tied" for unit in plan.units)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_model_whose_every_parameter_is_packed_has_a_dtype(tmp_path):
    from transformers import AutoModelForCausalLM as Auto
    from transformers import OlmoConfig

    from bitplan.sensitivity import source as sources
    from bitplan.sensitivity.session import open_session
    from bitplan.sensitivity.texts.read import read_texts

    config = OlmoConfig(**tiny.GQA, pad_token_id=0)
    Auto.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "olmo")
    tiny.tokenizer().save_pretrained(tmp_path / "olmo")
    source = sources.find(tmp_path / "olmo")
    session = open_session(source, read_texts(source, tokens=1024, length=64), device="cpu")
    model = load(uniform_plan(session, "int8"), tmp_path / "olmo", device="cpu")
    assert model.dtype == model.model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "saved")), logits(model))


def test_weights_that_lie_there_twice_are_those_that_transformers_loads(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    once = sources.find(folder).weights_sha256
    save_file({"layers.0.wq.weight": torch.ones(4, 4)}, folder / "consolidated.safetensors")
    assert sources.find(folder).weights_sha256 == once

    sharded = tmp_path / "sharded"
    tiny.build("llama").save_pretrained(sharded, max_shard_size="100KB")
    (sharded / "consolidated.safetensors").write_bytes(b"")
    assert sources.find(sharded).weights_sha256 == once
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelUnreadable, match=f"lacks {lost.name}"):
        sources.find(sharded)


def test_other_weights_are_refused(session_of, checkpoint):
    plan = uniform_plan(session_of("llama"), "int8")
    with pytest.raises(PlanMismatch, match="config and weights differ"):
        AutoModelForCausalLM.from_pretrained(checkpoint("llama-tied"), quantization_config=PlanConfig(plan))
    with pytest.raises(PlanMismatch, match="config and weights differ"):
        load(plan, checkpoint("llama-tied"), device="cpu")


def test_a_plan_beside_a_planned_checkpoint_is_refused(session_of, checkpoint, tmp_path):
    plan = uniform_plan(session_of("llama"), "int8")
    load(plan, checkpoint("llama"), device="cpu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SavedPlanConfig but you are passing a PlanConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PlanConfig(plan))


def test_another_dtype_is_not_taken_in_silence(session_of, checkpoint):
    plan = uniform_plan(session_of("llama"), "int8")
    with pytest.warns(UserWarning, match="is not used"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint("llama"), quantization_config=PlanConfig(plan), dtype=torch.float16
        )
    assert resident_bytes(model) == plan.bytes


def test_configs_are_equal_where_plans_are(session_of):
    session = session_of("llama")
    one, other = uniform_plan(session, "int8"), uniform_plan(session, "nf4")
    assert PlanConfig(one) == PlanConfig(one.model_dump(mode="json"))
    assert PlanConfig(one) != PlanConfig(other)


@pytest.mark.parametrize("order", ["import bitplan; import transformers", "import transformers; import bitplan"])
def test_a_saved_folder_loads_after_importing_planner_in_either_order(order, session_of, checkpoint, tmp_path):
    plan = uniform_plan(session_of("llama"), "int4-g64", "nearest")
    load(plan, checkpoint("llama"), device="cpu").save_pretrained(tmp_path)
    code = (
        f"{order}\nfrom transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"print(sum(p.nbytes for p in m.parameters()), type(m.lm_head).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert result.stdout.split() == [str(plan.bytes), "PackedLinear"]


def test_a_saved_folder_without_planner_fails_instead_of_guessing(session_of, checkpoint, tmp_path):
    load(uniform_plan(session_of("llama"), "int8"), checkpoint("llama"), device="cpu").save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert result.returncode != 0
    assert "size mismatch" in result.stderr.lower() or "mismatch" in result.stderr.lower()


def test_importing_planner_imports_neither_torch_nor_transformers():
    code = (
        "import sys, bitplan; print([m for m in ('torch', 'transformers', 'optuna', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert result.stdout.strip() == "[]"


def test_device_maps_see_packed_sizes(session_of, checkpoint):
    from transformers.quantizers.auto import AutoHfQuantizer

    plan = uniform_plan(session_of("llama"), "int4-g64", "nearest")
    quantizer = AutoHfQuantizer.from_config(PlanConfig(plan), pre_quantized=False)
    model = tiny.build("llama")
    quantizer._process_model_before_weight_loading(
        model, checkpoint_files=[str(p) for p in checkpoint("llama").glob("*.safetensors")]
    )
    total = sum(p.numel() * quantizer.param_element_size(model, n, p) for n, p in model.named_parameters())
    assert total == plan.bytes


def test_packed_classes_keep_their_ancestry():
    model = tiny.build("gemma")
    from bitplan.formats.modules import pack_parameter

    original = type(model.model.embed_tokens)
    packed = pack_parameter(model.model.embed_tokens, "weight", format_named("int8"))
    assert isinstance(packed, original)
    assert isinstance(packed, torch.nn.Embedding)
    assert type(packed).__name__ == f"Packed{original.__name__}"
    assert "weight=int8" in repr(packed)


def test_config_file_holds_the_plan(session_of, checkpoint, tmp_path):
    plan = uniform_plan(session_of("llama"), "int8")
    load(plan, checkpoint("llama"), device="cpu").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert content["quant_method"] == "bitplan"
    assert bitplan.Plan.model_validate(content["plan"]) == plan


def test_a_base_model_is_refused_by_the_name_of_the_class_that_loads_it(session_of, checkpoint, tmp_path):
    plan = uniform_plan(session_of("llama-tied"), "int8", "nearest")
    config = PlanConfig(plan)
    AutoModelForCausalLM.from_pretrained(checkpoint("llama-tied"), quantization_config=config).save_pretrained(tmp_path)
    words = r"LlamaModel is a part of it: load it with AutoModelForCausalLM\.from_pretrained.*, whose \.model that is"
    with pytest.raises(PlanMismatch, match=words):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(PlanMismatch, match=words):
        AutoModel.from_pretrained(checkpoint("llama-tied"), quantization_config=config)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma", "mixtral"])
def test_a_model_that_is_copied_and_cast_computes_as_an_unpacked_one(name, session_of, checkpoint):
    plan = mixed_plan(session_of(name))
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), quantization_config=PlanConfig(plan))
    found, cast = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(cast), found) and resident_bytes(cast) == plan.bytes
    assert cast.to(torch.bfloat16) is cast and cast.dtype == torch.bfloat16
    assert logits(cast).dtype == torch.bfloat16
    assert (logits(cast).float() - found).norm() < 0.05 * found.norm()
    assert torch.equal(logits(model), found) and model.dtype == torch.float32  # the copy was its own
    assert torch.equal(logits(copy.deepcopy(model).to(torch.float64).to(torch.float32)), found)
    with pytest.raises(ValueError, match="not supported for quantized model"):  # as transformers has it
        model.half()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_on_cuda_the_logits_are_the_cpus(name, session_of, checkpoint):
    plan = mixed_plan(session_of(name))
    cpu, cuda = (load(plan, checkpoint(name), device=device) for device in ("cpu", "cuda"))
    with torch.no_grad():
        found = cuda(input_ids=IDS.cuda()).logits.cpu()
    assert (found - logits(cpu)).norm() < 0.02 * logits(cpu).norm()
