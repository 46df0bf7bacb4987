"""A packed model called from several threads gives what it gives in one."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from bitplan.formats.base import TILE
from bitplan.formats.kernels.dispatch import Machine, as_if_on, linear
from bitplan.formats.modules import canonical, is_transposed, pack_parameter
from bitplan.formats.table import format_named
from bitplan.sensitivity.graph import find_units
from tests import tiny

THREADS = 3


@pytest.fixture(autouse=True)
def eager_switches():
    """Threads take turns often enough that what they share shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def packed(name: str) -> nn.Module:
    """A tiny model with every unit in int8."""
    model = tiny.build(name)
    format = format_named("int8")
    for unit in find_units(model)[0]:
        path, _, parameter = unit.parameter.rpartition(".")
        module = model.get_submodule(path)
        tensors = format.quantize(canonical(getattr(module, parameter), is_transposed(module)))
        pack_parameter(module, parameter, format)
        for suffix, tensor in tensors.items():
            module.get_parameter(parameter + suffix).data = tensor
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gemma"])  # gemma's embedding scales what it looks up
@torch.no_grad()
def test_three_threads_get_what_one_gets(name):
    model = packed(name) if name != "gemma" else packed(name).model.embed_tokens
    texts = [torch.arange(20).add(7 * i)[None] for i in range(THREADS)]

    def output(ids: torch.Tensor) -> torch.Tensor:
        out = model(ids)
        return out if isinstance(out, torch.Tensor) else out.logits

    expected = [output(ids) for ids in texts]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(output, texts * 20))
    assert all(torch.equal(out, expected[i % THREADS]) for i, out in enumerate(found))


def test_a_thread_assumes_its_own_machine():
    format, x = format_named("int8"), torch.zeros(1, 64, device="meta")
    machines = [Machine("cpu"), Machine("cuda", (9, 0))]

    def kernels(i: int) -> bool:
        on = machines[i % 2]
        with as_if_on(on):
            linear(format, x, format.zeros(4, 64, torch.device("meta")), 64, None)
            tile = TILE["meta"]
            return tile == TILE["meta"] == TILE.get(on.kind, TILE["meta"])

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(kernels, range(200)))
