"""Folders that hold more than a causal LM takes, and tokens that it does not know."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitplan.formats.errors import FormatUnavailable, ModelUnreadable, UsageError
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.export import export, write_export
from bitplan.planner.export.compressed_tensors import CompressedTensors
from bitplan.planner.export.gptq_layout import save_gptq
from bitplan.planner.export.gptqmodel import GptqModel
from bitplan.planner.export.lower import lower
from bitplan.planner.load import load_planned
from bitplan.planner.report.model_card import save
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.loss import log_probabilities
from bitplan.sensitivity.tasks.likelihood import log_likelihoods
from bitplan.sensitivity.tasks.task import TokenRow


def with_more(checkpoint: Path, folder: Path, *names: str) -> sources.Source:
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(2) for name in names}, folder / "model.safetensors", {"format": "pt"})
    return sources.find(folder)


def test_what_is_left_behind_is_said_once(checkpoint, tmp_path, capsys):
    source = with_more(checkpoint("llama"), tmp_path / "model", "mtp.head.weight", "\x1b.weight")
    for _ in range(2):
        sources.load_model(source)
    err = capsys.readouterr().err
    assert err.count("left behind, for LlamaForCausalLM does not take them: \\x1b.weight, mtp.head.weight") == 1


def test_a_tokenizer_model_alone_names_the_packages_that_read_it(checkpoint, tmp_path, monkeypatch):
    """Without them transformers takes it for tiktoken's, and names that."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    source = sources.find(folder)
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setattr(sources, "is_sentencepiece_available", lambda: False)
    monkeypatch.setattr(sources, "is_protobuf_available", lambda: False)
    with pytest.raises(ModelUnreadable, match=r"needs sentencepiece and protobuf: pip install sentencepiece protobuf$"):
        sources.load_tokenizer(source)
    monkeypatch.setattr(sources, "is_protobuf_available", lambda: True)
    with pytest.raises(ModelUnreadable, match=r"needs sentencepiece: pip install sentencepiece$"):
        sources.load_tokenizer(source)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "qzeros", "weight.absmax"])
def test_codes_are_not_taken_for_weights(checkpoint, tmp_path, suffix):
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    with pytest.raises(ModelUnreadable, match=f"holds {name}, so that its weights are codes"):
        sources.load_model(with_more(checkpoint("llama"), tmp_path / "model", name))


def test_tokens_beyond_the_embedding(checkpoint):
    model = sources.load_model(sources.find(checkpoint("llama")))
    with pytest.raises(UsageError, match="token 300, and the model's embedding has 258 rows"):
        log_probabilities(model, torch.tensor([[1, 300, 2]]))
    with pytest.raises(UsageError, match="token 300"):
        log_likelihoods(model, [TokenRow((1, 300), 1)])


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_exports_hold_the_tensors_that_the_model_does_not_take(checkpoint, session_of, tmp_path, layout):
    source = with_more(checkpoint("llama"), tmp_path / "model", "mtp.head.weight")
    session = session_of("llama")
    inside = [unit.name for unit in session.graph.units if "layers" in unit.name]
    plan = lower(uniform_plan(session, "int8", "nearest"), GptqModel(None, source), nearest=True)
    assert {unit.name for unit in plan.packed} == set(inside)
    facts = plan.provenance.model.model_copy(update={"weights_sha256": source.weights_sha256})
    plan = plan.for_model(facts)
    if layout == "gptq":
        save_gptq(load_planned(plan, source, "cpu"), plan, source, tmp_path / "out", False)
    else:
        exported = export(plan, layout, source=source)
        assert any("copied as they are" in note and "mtp.head.weight" in note for note in exported.notes)
        write_export(exported, tmp_path / "out", device="cpu")
    names = {name.rpartition(".")[0] for name in load_file(tmp_path / "out" / "model.safetensors")}
    stored = {name.rpartition(".")[0] for name in load_file(source.folder / "model.safetensors")}
    assert names == stored


def test_exports_refuse_what_the_checkpoint_stores_in_parts(session_of):
    session = session_of("mixtral")
    plan = lower(uniform_plan(session, "int8", "nearest"), CompressedTensors(None, session.source), nearest=True)
    with pytest.raises(FormatUnavailable, match=r"mlp.experts.gate_up_proj.* and 3 more under others, or in parts"):
        export(plan, "compressed-tensors", source=session.source)


def test_processors_are_saved_too(session_of, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    source = sources.find(folder)
    plan = uniform_plan(session_of("llama"), "int8", "nearest")
    save(load_planned(plan, source, "cpu"), plan, source, tmp_path / "out", False)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text(encoding="utf-8") == "{}"
