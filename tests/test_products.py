"""Half of each product, mirrored, is the whole."""

import pytest
import torch
from torch.testing import assert_close

from bitplan.sensitivity.products import add_products, mirror


@pytest.mark.parametrize("columns", [1, 96, 128, 300, 1100])
def test_sums_of_halves_are_the_whole_sum(columns):
    torch.manual_seed(0)
    total, parts = torch.zeros(2, columns, columns), torch.randn(3, 2, 40, columns)
    for part in parts:
        for expert in range(2):
            add_products(total[expert], part[expert])
    mirror(total)
    whole = parts.transpose(0, 1).flatten(1, 2)
    assert_close(total, whole.mT @ whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(total, total.mT)
