"""The statistics against plain hooks and autograd, the predicted loss against the sum it abbreviates."""

import pytest
import torch
from torch.testing import assert_close

from bitplan.sensitivity.curvature import Statistics, StatisticsStore, gather
from bitplan.sensitivity.graph import build_graph
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.swapper import WeightSwapper
from bitplan.sensitivity.texts.text import Blocks
from tests import tiny

IDS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))


def gathered(name, tmp_path):
    model = tiny.build(name)
    graph = build_graph(model)
    store = StatisticsStore(tmp_path, graph)
    gather(model, graph.units, Blocks(IDS), store, seed=5)
    return model, {unit.name: unit for unit in graph.units}, store


def by_hand(model, module, ids=IDS):
    """Inputs and output gradients of one module, with the same labels drawn."""
    seen = {}
    handle = module.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    xs, gs = [], []
    generator = torch.Generator().manual_seed(5)
    model.get_input_embeddings().weight.requires_grad_(True)
    for row in ids.split(1):
        logits = model(input_ids=row, use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        gs.append(torch.autograd.grad(loss, seen["y"])[0].flatten(0, -2))
        xs.append(seen["x"].detach())
    handle.remove()
    return xs, torch.cat(gs)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("llama", "model.layers.0.self_attn.k_proj"),
        ("llama", "lm_head"),
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("opt", "model.decoder.layers.0.fc1"),
        ("phi", "model.layers.1.self_attn.v_proj"),
    ],
)
def test_products(name, unit, tmp_path):
    model, units, store = gathered(name, tmp_path)
    xs, g = by_hand(model, model.get_submodule(unit))
    x = torch.cat([part.flatten(0, -2) for part in xs])
    found = store[units[unit]]
    assert_close(found.inputs[0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert_close(found.gradients[0], g.square().mean(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "unit"), [("llama", "model.embed_tokens"), ("gpt2", "transformer.wte"), ("gemma", "model.embed_tokens")]
)
def test_lookups(name, unit, tmp_path):
    model, units, store = gathered(name, tmp_path)
    found = store[units[unit]]
    assert_close(found.frequencies, torch.bincount(IDS.flatten(), minlength=tiny.VOCABULARY) / IDS.numel())
    module = model.get_submodule(unit)
    _, g = by_hand(model, module)
    scale = getattr(module, "scalar_embed_scale", 1)  # Gemma's module scales its output after the lookup
    assert_close(found.lookup_gradients, (g * scale).square().mean(0), rtol=1e-3, atol=1e-6)
    assert (found.inputs is not None) == (units[unit].kind == "tied")


def test_experts_count_the_tokens_routed_to_them(tmp_path):
    model, units, store = gathered("mixtral", tmp_path)
    unit = units["model.layers.0.mlp.experts.gate_up_proj"]
    experts = model.get_submodule("model.layers.0.mlp.experts")
    seen = []
    handle = experts.register_forward_hook(lambda m, args, out: seen.append((args[0], args[1])))
    model(input_ids=IDS)
    handle.remove()
    x, routes = seen[0][0].flatten(0, -2), seen[0][1]
    found = store[unit]
    for expert in range(4):
        mine = x[(routes == expert).any(-1)]
        assert_close(found.inputs[expert], mine.T @ mine / IDS.numel(), rtol=1e-4, atol=1e-5)
    assert (found.gradients > 0).any(-1).all()


def test_loss_is_half_the_weighted_quadratic_form():
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(50, 6, generator=generator), torch.rand(4, generator=generator)
    change = torch.randn(4, 6, generator=generator)
    inputs = x.T @ x / 50
    expected = 0.5 * sum(g[o] * (change[o] @ inputs @ change[o]) for o in range(4))
    assert_close(Statistics(inputs[None], g[None]).loss(change), float(expected), rtol=1e-5, atol=0)
    frequencies, width = torch.rand(4, generator=generator), torch.rand(6, generator=generator)
    looked = 0.5 * sum(frequencies[v] * width[h] * change[v, h] ** 2 for v in range(4) for h in range(6))
    both = Statistics(inputs[None], g[None], frequencies, width)
    assert_close(both.loss(change), float(expected + looked), rtol=1e-5, atol=0)


def test_gathering_in_passes_changes_nothing(tmp_path, monkeypatch):
    _, units, whole = gathered("llama-tied", tmp_path / "whole")
    monkeypatch.setattr("bitplan.sensitivity.curvature.PASS_BYTES", 40_000)
    _, _, parts = gathered("llama-tied", tmp_path / "parts")
    for unit in units.values():
        for name, tensor in vars(whole[unit]).items():
            if tensor is not None:
                assert_close(getattr(parts[unit], name), tensor)


def test_gathering_again_does_nothing(tmp_path, monkeypatch):
    model, _, store = gathered("llama", tmp_path)
    monkeypatch.setattr("bitplan.sensitivity.curvature._one_pass", lambda *a: pytest.fail("gathered twice"))
    gather(model, build_graph(model).units, Blocks(IDS), store, seed=5)


def test_prediction_follows_the_measured_kl_of_small_changes(tmp_path):
    """Random small changes of each unit: the predicted order is the measured order, and the size is right."""
    model, units, store = gathered("llama", tmp_path)
    swapper = WeightSwapper(model, tuple(units.values()))
    reference = Reference(model, Blocks(IDS))
    predicted, measured = [], []
    for unit in units.values():
        change = torch.randn(unit.rows, unit.columns, generator=torch.Generator().manual_seed(unit.order)) * 0.01
        swapper.exchange(unit, swapper.weight(unit) + change)
        measured.append(reference.evaluate(model).kl)
        swapper.restore(unit)
        predicted.append(store[unit].loss(change))
    predicted, measured = torch.tensor(predicted).log(), torch.tensor(measured).log()
    assert torch.corrcoef(torch.stack((predicted, measured)))[0, 1] > 0.9
    assert (predicted - measured).mean().abs() < 0.5  # within a factor of e^0.5
