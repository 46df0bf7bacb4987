"""What is kept of a unit's second moments: vectors of its rows and columns, from which any format is scored.

May import: formats.errors/rounding, sensitivity.graph/store.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from bitplan.formats.errors import CodesMissing
from bitplan.formats.rounding import Hessian
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.store import is_whole, load_tensors, save_tensors


@dataclass(frozen=True)
class Statistics:
    """A unit's statistics on the calibration text, float32. A = E[x xᵀ] over inputs x, G = E[g gᵀ] over gradients g of
    the summed loss at the unit's output. Products have `inputs`, `pivots`, `gradients` and `routed`; lookups have
    `frequencies` and `lookup_gradients`; an embedding tied to a head has all of them, and `lookup_pivots`."""

    inputs: Tensor | None = None
    """A's diagonal: [experts, columns]."""
    pivots: Tensor | None = None
    """What a squared error costs that GPTQ makes at a column's turn and spreads over the later ones (see `pivots`):
    [experts, columns]."""
    gradients: Tensor | None = None
    """G's diagonal: [experts, rows]."""
    routed: Tensor | None = None
    """Tokens that reached each expert: [experts]."""
    frequencies: Tensor | None = None
    """How often a token looks up each row: [rows]."""
    lookup_gradients: Tensor | None = None
    """The diagonal of the lookups' G: [columns]."""
    lookup_pivots: Tensor | None = None
    """As `pivots`, of the lookups' part of a tied weight: [columns]."""
    moment: Tensor | None = None
    """A whole, of the few units on which GPTQ is run to compare it with its estimate: [experts, columns, columns]."""

    def hessians(self, moment: Tensor | None = None) -> list[Hessian]:
        """What GPTQ minimises over columns, one per expert: A (`moment` [experts, columns, columns]), plus the
        lookups' share averaged over rows."""
        if self.frequencies is None:
            assert moment is not None
            return [Hessian(matrix) for matrix in moment]
        assert self.lookup_gradients is not None
        lookups = torch.diag(self.frequencies.mean() * self.lookup_gradients)
        if moment is None:
            return [Hessian(lookups)]
        assert self.gradients is not None
        return [Hessian(self.gradients[0].mean() * moment[0] + lookups)]


def pivots(hessian: Hessian, form: Tensor | None = None) -> Tensor:
    """d [columns] such that errors e_j, made by GPTQ with `hessian` at each column's turn, cost Σ_j e_j² d_j by the
    quadratic form `form` [columns, columns], by default H itself.

    With H⁻¹ = Uᵀ U, the change of a weight row that GPTQ makes is Σ_j (e_j / U_jj) U_j: errors of different columns
    are nearly independent, so that d_j = (U form Uᵀ)_jj / U_jj², which is 1 / U_jj² for form = H.
    """
    upper, added = hessian.damped
    if form is None:  # U (A + added) Uᵀ is the identity
        costs = 1 - upper.square() @ added.float()
    else:
        ordered = form[hessian.order][:, hessian.order].to(upper)
        costs = ((upper @ ordered) * upper).sum(-1)
    costs /= upper.diagonal().square()
    return costs.clamp(min=0)[hessian.order.argsort()]


class StatisticsStore:
    """Statistics on disk, one file a unit that holds all that scoring the unit needs; read to `device`."""

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder = folder
        self.device = device

    def path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.safetensors"

    def __contains__(self, unit: Unit) -> bool:
        return is_whole(self.path(unit))

    def __getitem__(self, unit: Unit) -> Statistics:
        tensors = load_tensors(self.path(unit), self.device)
        if tensors is None:
            raise CodesMissing(f"{unit.name}: its statistics have gone from the cache: run the same command again")
        return Statistics(**tensors)

    def write(self, unit: Unit, statistics: Statistics) -> None:
        tensors = {field.name: getattr(statistics, field.name) for field in fields(statistics)}
        save_tensors(self.path(unit), {name: tensor.cpu() for name, tensor in tensors.items() if tensor is not None})
