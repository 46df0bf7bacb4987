"""What keeps the memory of a load bounded: weights read one at a time, and rounded in runs of rows.

A safetensors file is mapped, so on the CPU a tensor that is only read takes no memory of its own; what is bounded here
is what rounding makes of it, and what lies on another device. May import: formats.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps

from bitplan.formats.base import Tensors
from bitplan.formats.errors import UsageError


class RoundOnLoad(ConversionOps):
    """What transformers puts between a checkpoint's tensors and the model: `make(name, value, model)` for each."""

    def __init__(self, make: Callable[[str, Tensor, Any], Tensors]):
        self.make = make

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> Any:
        values = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return LazyTensors(self.make, values, model)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name that are made when first looked at.

    transformers logs an error inside of `convert`, goes on with the other weights, allocates and initialises in full
    precision those that then are missing, and raises an error of its own. One that arises where it takes the result
    of `convert` ends the load at once, as it was raised; so there is where they are made.
    """

    def __init__(self, *making: Any):
        self._making = making
        self._made: Tensors | None = None

    def _tensors(self) -> Tensors:
        if self._made is None:
            make, values, model = self._making
            self._making = ()  # the values go when what is made of them is there
            self._made = {k: tensor for name in values for k, tensor in make(name, values[name], model).items()}
        return self._made

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors())

    def __len__(self) -> int:
        return len(self._tensors())


def refuse_disk(device_map: Any, rounding: bool) -> None:
    """Raises UsageError for a device map that leaves weights on disk where they would be read in another type."""
    if not isinstance(device_map, dict) or "disk" not in device_map.values():
        return
    if rounding:  # the map's weights are read from the original checkpoint, whatever was made of them
        raise UsageError(
            "a part of the model is to stay on disk, where weights are not rounded: load it with parts on the CPU at"
            " most, save_pretrained(), and load the saved folder with this device_map"
        )
