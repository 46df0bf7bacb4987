"""Exchanges units' weights in a full-precision model, and restores them.

May import: formats, sensitivity.graph/pages.
"""

from torch import Tensor, nn

from bitplan.formats.modules import canonical, is_transposed
from bitplan.sensitivity.graph import Unit
from bitplan.sensitivity.pages import page_out


class WeightSwapper:
    """A full-precision model whose units' weights can be exchanged and put back."""

    def __init__(self, model: nn.Module, units: tuple[Unit, ...], paged: bool = False):
        self.model = model
        self.paged = paged
        """A weight's pages are given back once it is copied."""
        self.units = {unit.name: unit for unit in units}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = {unit.name: parameters[unit.parameter] for unit in units}
        self._originals = {name: parameter.data for name, parameter in self._parameters.items()}
        self._transposed = {u.name: is_transposed(model.get_submodule(u.parameter.rpartition(".")[0])) for u in units}

    def weight(self, unit: Unit) -> Tensor:
        """The original weight, float32 [experts * rows, columns]."""
        weight = canonical(self._originals[unit.name], self._transposed[unit.name]).float()
        if self.paged and weight.data_ptr() != self._originals[unit.name].data_ptr():
            page_out([self._originals[unit.name]])
        return weight

    def exchange(self, unit: Unit, weight: Tensor) -> None:
        """Put a float weight [experts * rows, columns] in the place of the unit's."""
        self._parameters[unit.name].data = self.shaped(unit, weight).to(self._originals[unit.name])

    def shaped(self, unit: Unit, weight: Tensor) -> Tensor:
        """A weight [experts * rows, columns] in the shape of the unit's parameter."""
        whole = self._originals[unit.name].ndim == 3
        weight = weight.unflatten(0, (unit.experts, unit.rows)) if whole else weight
        return weight.transpose(-1, -2).contiguous() if self._transposed[unit.name] else weight

    def restore(self, unit: Unit) -> None:
        self._parameters[unit.name].data = self._originals[unit.name]
