"""Rounding by the model's loss: coordinate descent, and errors spread over rows."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from bitplan.formats.errors import RoundingFailed
from bitplan.formats.integers import Grid, IntegerFormat
from bitplan.formats.rounding import Hessian, yaqa
from bitplan.formats.rounding.descent import descend, fitted
from bitplan.formats.rounding.gptq import gptq_codes, spread
from bitplan.formats.rounding.yaqa import yaqa_codes
from bitplan.formats.table import format_named
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.codes import codes_folder, unit_path
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.quantize.segment import Segment
from bitplan.sensitivity.gradients import draw, output_gradients
from bitplan.sensitivity.session import SEED
from bitplan.sensitivity.store import load_tensors
from bitplan.testing.formats import weights
from bitplan.testing.roundings import hessian
from tests.test_shrinkage import shrunk

NAMES = ("int3-g32", "int2-row", "int2-g64-z16", "int8", "ternary-g64", "binary-g32")
"""One of each kind of zero point, and one whose groups are rows."""


def values(format: IntegerFormat, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    columns = codes.shape[1]
    return format.decode(codes, Grid(format.over_columns(grid.scale, columns), format.over_columns(grid.zero, columns)))


def lost(change: torch.Tensor, matrix: torch.Tensor, outputs: torch.Tensor | None = None) -> torch.Tensor:
    """The objective by its definition: of each row, or with G the trace."""
    change, matrix = change.double(), matrix.double()
    if outputs is None:
        return ((change @ matrix) * change).sum(-1)
    return (outputs.double() @ change @ matrix @ change.T).trace()


@pytest.mark.parametrize("name", NAMES)
class TestDescent:
    def test_never_raises_a_rows_objective(self, name):
        format, target, inputs = format_named(name), weights(8, 160, 3), hessian(160)
        codes, grid, _ = gptq_codes(target, format, [inputs])
        before = lost(values(format, codes, grid) - target, inputs.objective)
        for sweeps in (1, 2, 4):
            found, fitted_grid, aimed = descend(target, codes, grid, inputs.objective, format, sweeps)
            after = lost(values(format, found, fitted_grid) - target, inputs.objective)
            assert (after <= before * (1 + 1e-5)).all()
            if sweeps == 1:
                assert after.sum() < 0.995 * before.sum()
            before = after
            wide = Grid(format.over_columns(fitted_grid.scale, 160), format.over_columns(fitted_grid.zero, 160))
            assert torch.equal(format.encode(aimed, wide), found)
            assert torch.equal(fitted_grid.scale, fitted_grid.scale.half().float())
            stored = format.dequantize(format.store(found, fitted_grid), 160, torch.float32)
            assert_close(stored, values(format, found, fitted_grid))

    def test_no_other_scale_of_half_precision_is_better_for_the_codes(self, name):
        format, target, matrix = format_named(name), weights(4, 32, 5), hessian(32).objective
        grid = format.fitted_grids(target, matrix.diagonal())
        codes = format.encode(target, Grid(format.over_columns(grid.scale, 32), format.over_columns(grid.zero, 32)))
        value = values(format, codes, grid)
        slope = (value - target) @ matrix
        group, stored = Grid(grid.scale[:, 0], grid.zero[:, 0]), format.scales_beside(grid)
        found = fitted(codes.T, value.T, slope.T, matrix, group, format, stored)
        least = lost(values(format, codes, Grid(found.scale[:, None], found.zero[:, None])) - target, matrix)
        near = (found.scale.half().view(torch.int16) + torch.arange(-200, 201)[:, None]).short().view(torch.float16)
        for scale in near.float():
            other = lost(values(format, codes, Grid(scale[:, None], found.zero[:, None])) - target, matrix)
            assert (other >= least * (1 - 1e-5)).all()


def test_no_single_code_can_be_better_and_few_codes_together(monkeypatch):
    format = IntegerFormat("tiny", 2, group=0)
    target, matrix = weights(6, 4, 8), hessian(4).objective
    grid = format.fitted_grids(target, matrix.diagonal())
    start = format.encode(target, grid)
    codes, grid, _ = descend(target, start, grid, matrix, format, 8)
    own = lost(values(format, codes, grid) - target, matrix)
    for row in range(6):
        here = Grid(grid.scale[row : row + 1], grid.zero[row : row + 1])
        every = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float32)
        all_of = lost(format.decode(every, here) - target[row], matrix)
        near = (every != codes[row]).sum(-1) == 1
        assert (all_of[near] >= own[row] * (1 - 1e-5)).all()
        assert own[row] <= 1.5 * all_of.min() + 1e-6


class TestYaqa:
    @pytest.fixture
    def outputs(self):
        return hessian(48, 9)

    @pytest.mark.parametrize("name", ["int4-g32", "int2-g64", "int3-row"])
    def test_loses_less_of_the_models_loss_than_gptq(self, name, outputs):
        format, weight, inputs = format_named(name), weights(48, 96, 4), hessian(96)

        def loss(codes, grid):
            return lost(values(format, codes, grid) - weight, inputs.matrix, outputs.matrix)

        plain = gptq_codes(weight, format, [inputs])[:2]
        alone = yaqa_codes(weight, format, [inputs], None)
        both = yaqa_codes(weight, format, [inputs], outputs)
        assert loss(*both) < 0.85 * loss(*plain)
        assert loss(*both) < 0.85 * loss(*alone)

    def test_rows_take_errors_as_explicit_inverses_say(self, outputs, monkeypatch):
        monkeypatch.setattr(yaqa, "ROWS", 16)
        monkeypatch.setattr(yaqa, "BLOCKS", 3)
        format, weight, inputs = format_named("int3-g32"), weights(48, 64, 4), hessian(64)
        codes, grid = yaqa_codes(weight, format, [inputs], outputs)
        matrix = outputs.matrix.double() + outputs.damped[1].mean() * torch.eye(48, dtype=torch.float64)
        left, value = weight.double().clone(), torch.zeros(48, 64, dtype=torch.float64)
        order = outputs.matrix.diagonal().argsort(descending=True, stable=True)
        for block in range(3):
            done, rest = order[16 * block : 16 * (block + 1)], order[16 * (block + 1) :]
            target = left[done].float()
            found = descend(target, *spread(target, format, inputs)[:2], inputs.objective, format)
            value[done] = values(format, *found[:2]).double()
            change = value[done] - left[done]
            # The change of the rest that costs least, given that of the block: the gradient over it is zero.
            left[rest] -= torch.linalg.solve(matrix[rest][:, rest], matrix[rest][:, done] @ change)
        mine = values(format, codes, grid)
        assert torch.isclose(mine, value.float(), rtol=1e-3, atol=1e-3).float().mean() > 0.97

    def test_independent_rows_are_rounded_alone(self, monkeypatch):
        monkeypatch.setattr(yaqa, "ROWS", 32)
        format, weight, inputs = format_named("int4-g32"), weights(40, 64, 4), hessian(64)
        alone, together = (yaqa_codes(weight, format, [inputs], g) for g in (None, Hessian(torch.eye(40))))
        assert_close(values(format, *together), values(format, *alone))

    def test_experts_have_their_own_inputs(self):
        format, weight, inputs = format_named("int4-g32"), weights(8, 64, 4), [hessian(64), hessian(64, 7)]
        codes, _ = yaqa_codes(weight, format, inputs, None)
        apart = [yaqa_codes(part, format, [own], None)[0] for part, own in zip(weight.split(4), inputs, strict=True)]
        assert torch.equal(codes, torch.cat(apart))

    def test_an_output_moment_beyond_damping_is_an_error(self):
        broken = Hessian(torch.tensor([[1.0, 50.0], [50.0, 1.0]]))
        with pytest.raises(RoundingFailed, match=r"output gradients.*positive definite"):
            yaqa_codes(weights(2, 64), format_named("int4-g32"), [hessian(64)], broken)


class TestInSequence:
    def test_output_moments_are_the_whole_models(self, session_of):
        session = session_of("llama")
        chain, ids, name = session.chain(), session.texts.calibration.ids, "model.layers.0.mlp.up_proj"
        gradients = output_gradients(chain, ids[:3], SEED)
        assert gradients[-1] is None
        true = torch.cat([chain.run(0, chain.module(0), torch.zeros(0), row, {}) for row in ids.split(1)])
        plan = uniform_plan(session, "int4-g32", "yaqa")
        segment = Segment(plan, session, chain, 1, true, true, {}, gradients=gradients[1])
        found = segment.output_moments([unit for unit in segment.units if unit.name == name])[name].matrix
        seen = {}
        handle = session.model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.update(y=out))
        runs = []
        embedded = session.model.get_input_embeddings()
        for i, row in enumerate(ids[:3].split(1)):
            x = embedded(row).detach().requires_grad_()
            logits = session.model(inputs_embeds=x, use_cache=False).logits[0, :-1]
            draws = torch.rand(row.shape[1], generator=torch.Generator().manual_seed(SEED * 1_000_003 + i))[:-1]
            loss = torch.nn.functional.cross_entropy(logits, draw(logits.detach(), draws), reduction="sum")
            runs.append(torch.autograd.grad(loss, seen["y"])[0][0])
        handle.remove()
        expected, _ = shrunk(runs)
        assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

    def test_an_interrupted_plan_goes_on_to_the_same_codes(self, session_of):
        session = session_of("llama-tied")
        plan = uniform_plan(session, "int3-g32", "yaqa")
        round_missing(plan, session)
        units = [unit for unit in plan.packed if "layers.1" in unit.name]
        paths = [unit_path(codes_folder(plan), unit.name) for unit in units]
        before = [load_tensors(path) for path in paths]
        for path in paths:
            path.unlink()
        round_missing(plan, session)
        for tensors, path in zip(before, paths, strict=True):
            again = load_tensors(path)
            assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
