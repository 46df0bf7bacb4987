"""Models whose code does what few do: parts without gradients, blocks that return lists, experts without a layout."""

import pytest
import torch
from transformers import AutoModelForCausalLM, JetMoeConfig, Llama4TextConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from bitplan.planner.assemble import uniform_plan
from bitplan.planner.load import load_planned
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.graph import build_graph
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.text import Blocks, Texts
from tests import tiny

IDS = torch.arange(3, 67).view(4, 16)


def opened(folder):
    blocks = Blocks(IDS)
    return open_session(sources.find(folder), Texts(blocks, blocks, blocks, blocks, "numbers", 64), device="cpu")


def test_a_part_without_gradients_is_listed(monkeypatch):
    forward = LlamaMLP.forward

    def cut(self, x):
        with torch.no_grad():
            return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", cut)
    graph = build_graph(tiny.build("llama"))
    reasons = {entry.name: entry.reason for entry in graph.unquantized}
    assert "runs without gradients" in reasons["model.layers.0.mlp.up_proj.weight"]
    assert not any("mlp" in unit.name for unit in graph.units)
    assert any("q_proj" in unit.name for unit in graph.units)


def test_early_cycles_without_gradients_are_stood_for_by_the_last(monkeypatch, checkpoint):
    forward = LlamaMLP.forward

    def cycles(self, x):
        with torch.no_grad():
            early = forward(self, x)
        return forward(self, x + 0.1 * early)

    monkeypatch.setattr(LlamaMLP, "forward", cycles)
    session = opened(checkpoint("llama"))
    session.gather()
    unit = next(unit for unit in session.graph.units if "up_proj" in unit.name)
    found = session.store[unit]
    assert found.gradients.isfinite().all() and found.gradients.sum() > 0
    assert found.routed.tolist() == [IDS.numel()]


@pytest.mark.parametrize("place", [0, 1])
def test_blocks_that_return_more_or_a_list(monkeypatch, checkpoint, place, capsys):
    forward, call = LlamaDecoderLayer.forward, LlamaDecoderLayer.__call__

    def wrapped(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        return (None, out) if place else [out]

    monkeypatch.setattr(LlamaDecoderLayer, "forward", wrapped)
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", lambda self, *a, **k: call(self, *a, **k)[place])
    session = opened(checkpoint("llama"))
    chain = session.chain()
    assert chain.paths == [] and "do not return hidden states first" in chain.why


def test_a_config_without_a_vocabulary_size():
    model = tiny.build("llama")
    del model.config.vocab_size
    assert build_graph(model).units


EXPERTS = {
    "llama4": Llama4TextConfig(
        **tiny.GQA, head_dim=16, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1, pad_token_id=0
    ),
    "jetmoe": JetMoeConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_whose_class_states_no_layout(name, monkeypatch, tmp_path):
    monkeypatch.setitem(tiny.CONFIGS, name, EXPERTS[name])
    folder = tiny.saved(name, tmp_path / name)
    session = opened(folder)
    experts = [unit for unit in session.graph.units if unit.kind == "experts"]
    assert experts and {unit.experts for unit in experts} == {4}
    session.gather()
    plan = uniform_plan(session, "int8", "nearest")
    part = sum(unit.experts * unit.rows * unit.columns for unit in plan.packed) / plan.provenance.model.parameters
    assert part > 0.9
    model = load_planned(plan, session.source, "cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits, expected = model(input_ids=IDS).logits, plain(input_ids=IDS).logits
    assert (logits - expected).abs().mean() < 0.05 * expected.std()  # a token may be routed elsewhere
    # Each expert's inputs and outputs have the sides that the codes have.
    found = session.store[experts[0]]
    assert found.inputs.shape == (4, experts[0].columns) and found.gradients.shape == (4, experts[0].rows)
    assert found.gradients.sum() > 0
