"""The statistics against plain hooks and autograd, the predicted loss against the sum it abbreviates."""

import pytest
import torch
from torch.testing import assert_close

from bitplan.formats.errors import RoundingFailed
from bitplan.formats.rounding.gptq import Hessian, gptq_codes
from bitplan.formats.scheme import QuantScheme
from bitplan.formats.table import format_named
from bitplan.sensitivity import curvature
from bitplan.sensitivity.chain import Chain
from bitplan.sensitivity.curvature import gather, sampled
from bitplan.sensitivity.estimate import estimate, gptq_ratio, sample
from bitplan.sensitivity.graph import Unit, build_graph
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.moments import moments
from bitplan.sensitivity.statistics import Statistics, StatisticsStore, pivots
from bitplan.sensitivity.swapper import WeightSwapper
from bitplan.sensitivity.texts.text import Blocks
from tests import tiny
from tests.test_shrinkage import shrunk

IDS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))


def gathered(name, tmp_path):
    model = tiny.build(name)
    graph = build_graph(model)
    store = StatisticsStore(tmp_path)
    gather(lambda: Chain(model, graph, "cpu"), graph, graph.units, Blocks(IDS), store, seed=5)
    return model, {unit.name: unit for unit in graph.units}, store


def by_hand(model, module, ids=IDS):
    """Inputs and output gradients of one module, with the same labels drawn."""
    seen = {}
    handle = module.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    xs, gs = [], []
    model.get_input_embeddings().weight.requires_grad_(True)
    for i, row in enumerate(ids.split(1)):
        logits = model(input_ids=row, use_cache=False).logits[:, :-1].flatten(0, 1)
        draws = torch.rand(row.shape[1], generator=torch.Generator().manual_seed(5 * 1_000_003 + i))[:-1]
        chances = logits.detach().double().softmax(-1).cumsum(-1)
        labels = torch.searchsorted(chances, draws.double()[:, None] * chances[:, -1:], right=True).squeeze(-1)
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
    moment, _ = shrunk([part.flatten(0, -2) for part in xs])
    found = store[units[unit]]
    assert_close(found.inputs[0], moment.diagonal(), rtol=1e-4, atol=1e-5)
    assert_close(found.pivots[0], pivots(Hessian(moment), moment), rtol=1e-2, atol=1e-4)
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
        assert_close(found.inputs[expert], mine.square().sum(0) / IDS.numel(), rtol=1e-4, atol=1e-5)
        assert found.routed[expert] == len(mine)
    assert (found.gradients > 0).any(-1).all()


def correlated(columns, tokens=4000, seed=0):
    """A second moment of inputs that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x.T @ x / tokens / columns


def test_pivots_are_what_an_error_at_a_columns_turn_costs():
    """GPTQ itself tells what each weight was at its turn: the errors' cost by the damped H is exact, by another form
    it holds on average over rows."""
    hessian, weight = Hessian(correlated(64)), torch.randn(2048, 64, generator=torch.Generator().manual_seed(1))
    codes, grid, aimed = gptq_codes(weight, format_named("int6-g32"), [hessian])
    rounded = format_named("int6-g32").dequantize(format_named("int6-g32").store(codes, grid), 64, torch.float32)
    change, errors = rounded - weight, (rounded - aimed).square()
    upper, back = hessian.factor, hessian.order.argsort()
    damped = torch.linalg.inv(upper.T @ upper)[back][:, back]
    assert_close(errors @ pivots(hessian, damped), ((change @ damped) * change).sum(-1), rtol=1e-3, atol=1e-3)
    other = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(2)))
    cost = (errors @ pivots(hessian, other)).mean()
    assert_close(cost, ((change @ other) * change).sum(-1).mean(), rtol=0.15, atol=0)


def test_pivots_by_the_moment_itself_need_no_product():
    moment = correlated(64)
    moment[5] = moment[:, 5] = 0  # a column that no input reached
    hessian = Hessian(moment)
    assert_close(pivots(hessian), pivots(hessian, moment), rtol=1e-4, atol=1e-6)


class TestEstimate:
    def drawn(self, rows=1024, kept=10**9):
        generator = torch.Generator().manual_seed(1)
        moment, weight = correlated(64), torch.randn(rows, 64, generator=generator)
        gradients = torch.randn(1, rows, generator=generator).exp()
        unit = Unit("u", "linear", "u.weight", 1, rows, 64, torch.float32)
        found = Statistics(
            inputs=moment.diagonal()[None],
            pivots=pivots(Hessian(moment), moment)[None],
            gradients=gradients,
            moment=moment[None],
        )
        return sample(unit, weight, found, kept)

    def run(self, drawn, name):
        """The whole quadratic form of what the rounding makes."""
        moment, format = drawn.statistics.moment[0], format_named(name)
        codes, grid, _ = gptq_codes(drawn.weight, format, [Hessian(moment)])
        change = format.dequantize(format.store(codes, grid), 64, torch.float32) - drawn.weight
        return float(((change @ moment) * change).sum(-1) @ drawn.statistics.gradients[0] / 2)

    @pytest.mark.parametrize("name", ["int6-g64", "int4-g32", "int3-g64"])
    def test_is_what_gptq_loses(self, name):
        drawn = self.drawn()
        estimated = estimate(drawn, QuantScheme(name, "gptq"))
        assert_close(estimated, self.run(drawn, name), rtol=0.1 if name == "int6-g64" else 0.25, atol=0)
        assert_close(estimated * gptq_ratio([drawn], format_named(name)), self.run(drawn, name), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("scheme", [QuantScheme("int3-g64", "gptq"), QuantScheme("fp8", "nearest")])
    def test_from_some_rows_is_that_from_all(self, scheme):
        assert len(self.drawn(kept=200).weight) < 210
        assert_close(estimate(self.drawn(kept=200), scheme), estimate(self.drawn(), scheme), rtol=0.03, atol=0)

    def test_lookups_and_products_add_up(self):
        generator = torch.Generator().manual_seed(1)
        weight, errors = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator)
        g, a, f, width = (torch.rand(n, generator=generator) for n in (4, 6, 4, 6))
        unit = Unit("u", "tied", "u.weight", 1, 4, 6, torch.float32)
        both = sample(unit, weight, Statistics(a[None], a[None], g[None], None, f, width, width))
        expected = 0.5 * sum((g[o] * a[j] + f[o] * width[j]) * errors[o, j] for o in range(4) for j in range(6))
        assert_close(both.loss(errors), float(expected), rtol=1e-5, atol=0)

    def test_overflow_of_a_row_that_counts_for_nothing_is_seen(self):
        drawn = self.drawn()
        weight = drawn.weight.clone()
        weight[7] *= 1e6
        found = Statistics(**vars(drawn.statistics) | {"gradients": drawn.statistics.gradients.clone()})
        found.gradients[0, 7] = 0
        unit = Unit("u", "linear", "u.weight", 1, len(weight), 64, torch.float32)
        spoiled = sample(unit, weight, found, 100)
        assert not torch.tensor(estimate(spoiled, QuantScheme("int4-g32", "gptq"))).isfinite()


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
class TestThePass:
    def same(self, units, one, other):
        for unit in units.values():
            for name, tensor in vars(one[unit]).items():
                if tensor is not None:
                    size = float(tensor.abs().max())
                    assert_close(getattr(other[unit], name), tensor, rtol=1e-3, atol=1e-4 * size)

    def test_in_pieces_and_in_files_is_the_same(self, name, tmp_path, monkeypatch):
        _, units, whole = gathered(name, tmp_path / "whole")
        monkeypatch.setattr(curvature, "PASS_BYTES", 40_000)
        monkeypatch.setattr("bitplan.sensitivity.chain.LOGIT_BYTES", 7_000)
        monkeypatch.setattr(curvature, "IN_MEMORY", 0)
        _, _, parts = gathered(name, tmp_path / "parts")
        self.same(units, whole, parts)

    def test_of_a_model_whose_blocks_are_no_chain_is_the_same(self, name, tmp_path, monkeypatch, capsys):
        _, units, whole = gathered(name, tmp_path / "whole")
        monkeypatch.setattr(Chain, "_refuse", lambda self: "for this test")
        _, _, other = gathered(name, tmp_path / "other")
        assert "for this test: the statistics are gathered with the whole model in memory" in capsys.readouterr().err
        self.same(units, whole, other)

    @pytest.mark.parametrize("after", range(1, 9, 2))
    def test_goes_on_after_an_interruption_with_the_same_bytes(self, name, after, tmp_path, monkeypatch):
        _, units, whole = gathered(name, tmp_path / "whole")
        write, written = StatisticsStore.write, []

        def interrupted(self, unit, statistics):
            if len(written) == after:
                raise KeyboardInterrupt
            written.append(unit.name)
            write(self, unit, statistics)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StatisticsStore, "write", interrupted)
            gathered(name, tmp_path / "parts")
        again = []
        monkeypatch.setattr(StatisticsStore, "write", lambda *a: (again.append(a[1].name), write(*a)))
        _, _, parts = gathered(name, tmp_path / "parts")
        assert sorted(written + again) == sorted(units)
        for unit in units.values():
            assert parts.path(unit).read_bytes() == whole.path(unit).read_bytes()
        assert {path.suffix for path in parts.folder.iterdir()} == {".safetensors"}

    def test_gathering_again_does_nothing(self, name, tmp_path, monkeypatch):
        gathered(name, tmp_path)
        monkeypatch.setattr(curvature, "Chain", lambda *a: pytest.fail("gathered twice"))
        gathered(name, tmp_path)

    def test_which_units_are_kept_changes_no_score(self, name, tmp_path):
        """Units that read one tensor do not need each other's files; units to sample may be asked for later."""
        _, units, whole = gathered(name, tmp_path)
        model = tiny.build(name)
        graph = build_graph(model, ("*.q_proj",))
        gather(lambda: Chain(model, graph, "cpu"), graph, graph.units, Blocks(IDS), whole, seed=5)
        alone = StatisticsStore(tmp_path / "alone")
        gather(lambda: Chain(model, graph, "cpu"), graph, graph.units, Blocks(IDS), alone, seed=5)
        assert all(whole[unit].moment is not None for unit in sampled(graph.units))
        self.same({unit.name: units[unit.name] for unit in graph.units}, alone, whole)

    def test_moments_are_those_of_the_statistics(self, name, tmp_path):
        model, units, store = gathered(name, tmp_path)
        graph = build_graph(model)
        wanted = [unit for unit in units.values() if unit.kind != "embedding"]
        pairs = [(unit.name, moment) for unit, moment in moments(Chain(model, graph, "cpu"), graph, wanted, IDS)]
        assert sorted(name for name, _ in pairs) == sorted(unit.name for unit in wanted)  # none of them twice
        found = dict(pairs)
        for unit in wanted:
            diagonal = found[unit.name].diagonal(dim1=-2, dim2=-1)
            assert_close(diagonal, store[unit].inputs, rtol=1e-3, atol=1e-5)
            if store[unit].moment is not None:
                assert_close(found[unit.name], store[unit].moment, rtol=1e-3, atol=1e-5)


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
        drawn = sample(unit, swapper.weight(unit), store[unit], 10**9)
        predicted.append(drawn.loss(change.square()))
    predicted, measured = torch.tensor(predicted).log(), torch.tensor(measured).log()
    assert torch.corrcoef(torch.stack((predicted, measured)))[0, 1] > 0.9
    assert (predicted - measured).mean().abs() < 0.5  # within a factor of e^0.5


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def test_gradients_that_are_not_finite_name_the_unit_and_another_attention(tmp_path):
    model = tiny.build("llama")
    model.set_attn_implementation("sdpa")
    attention = model.model.layers[1].self_attn
    attention.q_proj.register_forward_hook(lambda m, args, out: _BrokenBackward.apply(out))
    graph = build_graph(model)
    with pytest.raises(RoundingFailed, match=r"layers\.1\.self_attn\.q_proj: its gradients .* \"eager\".*'sdpa'"):
        gather(lambda: Chain(model, graph, "cpu"), graph, graph.units, Blocks(IDS), StatisticsStore(tmp_path))
    model.set_attn_implementation("eager")
    with pytest.raises(RoundingFailed, match=r"q_proj: its gradients hold NaN or infinity on the calibration text$"):
        gather(lambda: Chain(model, graph, "cpu"), graph, graph.units, Blocks(IDS), StatisticsStore(tmp_path))
