"""The chain against the model that it was cut from."""

import pytest
import torch
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from bitplan.sensitivity.chain import Chain, find_blocks
from bitplan.sensitivity.graph import build_graph
from tests import tiny

IDS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))


def chain_of(model) -> Chain:
    return Chain(model, build_graph(model), "cpu")


@torch.no_grad()
def through(chain: Chain, ids: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Logits, a segment at a time; each is given the weights that are its own."""
    x = torch.zeros(0)
    for segment in range(len(chain)):
        own = {unit.parameter for unit in chain.units[segment]}
        if segment == len(chain) - 1:
            own |= {unit.parameter for unit in chain.units[0]}  # a tied head reads what the lookup holds
        exchanged = {name: weight for name, weight in (weights or {}).items() if name in own}
        x = chain.run(segment, chain.module(segment), x, ids, exchanged)
    return x


@torch.no_grad()
def whole(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
class TestEveryArchitecture:
    def test_segments_one_after_the_other_are_the_model(self, name):
        model = tiny.build(name)
        chain = chain_of(model)
        assert chain.why is None
        assert len(chain) == 2 + 2
        expected = whole(model)
        assert_close(through(chain, IDS), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        # And again at another length and batch, whose masks and positions are others.
        short = IDS[:1, :7]
        assert_close(through(chain, short), whole(model, short), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    def test_exchanged_weights_are_those_of_the_model_that_has_them(self, name):
        model = tiny.build(name)
        chain = chain_of(model)
        parameters = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(1)
        changed = {
            unit.parameter: torch.randn(parameters[unit.parameter].shape, generator=generator) * 0.08
            for units in chain.units
            for unit in units
        }
        found, before = through(chain, IDS, changed), whole(model)
        for parameter, weight in changed.items():
            parameters[parameter].data.copy_(weight)
        expected = whole(model)
        assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert not torch.allclose(before, expected, atol=0.1)

    def test_every_unit_is_in_one_segment_where_it_runs(self, name):
        model = tiny.build(name)
        graph = build_graph(model)
        chain = Chain(model, graph, "cpu")
        assert sorted(u.name for units in chain.units for u in units) == sorted(u.name for u in graph.units)
        for segment, units in enumerate(chain.units):
            for unit in units:
                if unit.kind in ("embedding", "tied"):
                    assert segment == 0
                elif 0 < segment < len(chain) - 1:
                    assert unit.name.startswith(chain.name(segment) + ".")
                else:
                    assert not any(unit.name.startswith(path + ".") for path in chain.paths)
                assert chain.local(segment, unit.parameter) in dict(chain.module(segment).named_parameters())
            assert [u.order for u in units] == sorted(u.order for u in units)

    def test_originals_are_untouched(self, name):
        model = tiny.build(name, torch.bfloat16)
        graph = build_graph(model)
        before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
        chain = Chain(model, graph, "cpu")
        through(chain, IDS)
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(before)
        for key, (tensor, values) in before.items():
            assert after[key] is tensor
            assert torch.equal(tensor, values)
        for module in model.modules():
            assert "forward" not in module.__dict__
            assert not module._forward_hooks and not module.training

    def test_a_model_in_16_bits_is_computed_in_32(self, name):
        model = tiny.build(name, torch.bfloat16)
        chain = chain_of(model)
        assert chain.why is None
        found = through(chain, IDS)
        assert {p.dtype for p in chain.module(1).parameters()} == {torch.float32}
        assert all(p.is_meta for path in chain.paths for p in chain.outer.get_submodule(path).parameters())
        expected = whole(model.float())
        assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_blocks_are_the_members_of_the_largest_list():
    model = tiny.build("gpt2")
    assert find_blocks(model) == ["transformer.h.0", "transformer.h.1"]
    model.small = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(9)])
    assert find_blocks(model) == ["transformer.h.0", "transformer.h.1"]
    assert find_blocks(torch.nn.Linear(2, 2)) == []


class TestRefused:
    """Models whose blocks cannot run alone; they then run as one segment, with the same logits."""

    def refused(self, why: str, model=None) -> None:
        model = model or tiny.build("llama")
        expected = whole(model)
        chain = chain_of(model)
        assert why in (chain.why or "")
        assert len(chain) == 2
        assert [unit.kind for unit in chain.units[0]] == ["embedding"]
        assert len(chain.units[1]) >= 7
        assert torch.equal(through(chain, IDS), expected)
        assert torch.equal(whole(model), expected)

    def test_blocks_that_are_given_the_embedded_text(self, monkeypatch):
        tiny.reading_text(monkeypatch)
        self.refused("its blocks are given what depends on the text")

    def test_blocks_that_are_not_chained(self, monkeypatch):
        tiny.unchained(monkeypatch)
        self.refused("its blocks do not hand one tensor on to the next")

    def test_blocks_that_do_not_all_run(self):
        model = tiny.build("llama")
        model.config.num_hidden_layers = 1
        self.refused("its blocks do not run once each", model)

    def test_blocks_that_need_what_the_model_left_in_them(self, monkeypatch):
        forward, of_block = LlamaModel.forward, LlamaDecoderLayer.forward

        def leaving(self, input_ids=None, **kwargs):
            for block in self.layers:
                block.left = self.embed_tokens(input_ids)
            try:
                return forward(self, input_ids=input_ids, **kwargs)
            finally:
                for block in self.layers:
                    del block.left

        def finding(self, hidden_states, *args, **kwargs):
            return of_block(self, hidden_states + getattr(self, "left", 0.0), *args, **kwargs)

        monkeypatch.setattr(LlamaModel, "forward", leaving)
        monkeypatch.setattr(LlamaDecoderLayer, "forward", finding)
        self.refused("its blocks compute something else alone than in the whole model")
