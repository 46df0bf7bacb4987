"""Blocks that are like others: what a model of 80 equal blocks needs beside its weights, three of them show.

May import: sensitivity.chain.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bitplan.sensitivity.chain import find_blocks

NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes in which a block's modules know its place."""
PLAIN = (bool, int, str, tuple, type(None))
"""Types of attributes that may choose what a module does. A float makes no shape."""


def find_repeats(model: PreTrainedModel) -> dict[int, int]:
    """Blocks that need not run → one that does and is like them, by number. Of each kind the first and the last two
    run: the first shows what a block returns, and at the end of the model most of the cache is there."""
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # configs of models that have no such cache fail in many ways
        return {}
    blocks = [model.get_submodule(path) for path in find_blocks(model)]
    if len(layers) != len(blocks):
        return {}
    kinds: dict[Hashable, list[int]] = defaultdict(list)
    for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        kinds[_kind(block), type(layer), _plain(layer)].append(i)
    return {i: members[-1] for members in kinds.values() for i in members[1:-2]}


def _kind(block: nn.Module) -> Hashable:
    return tuple(
        (
            path,
            type(module),
            _plain(module),
            repr(getattr(module, "slots", None)),
            tuple((name, t.shape, t.dtype) for name, t in module._parameters.items() if t is not None),
        )
        for path, module in block.named_modules()
    )


def _plain(thing: Any) -> str:
    return repr({k: v for k, v in vars(thing).items() if isinstance(v, PLAIN) and k not in NUMBERS})


@contextmanager
def skipped(model: PreTrainedModel, repeats: Mapping[int, int]) -> Iterator[None]:
    """While inside, the blocks in `repeats` hand their input on. Raises RuntimeError, when the model runs, where its
    blocks return more than hidden states."""
    blocks = [model.get_submodule(path) for path in find_blocks(model)] if repeats else []
    returned: dict[int, type] = {}

    def note(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            if not isinstance(out, Tensor) and not (isinstance(out, tuple) and len(out) == 1):
                raise RuntimeError(f"{type(module).__name__} returns more than hidden states")
            returned[number] = type(out)

        return hook

    def passing(like: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if returned[like] is tuple else hidden

        return forward

    firsts = {like: min(i for i, other in repeats.items() if other == like) for like in set(repeats.values())}
    handles = []
    for like, after in firsts.items():  # the kind's first block is before those that are skipped
        first = next(i for i in range(after) if _kind(blocks[i]) == _kind(blocks[after]))
        handles.append(blocks[first].register_forward_hook(note(like)))
    for number, like in repeats.items():
        blocks[number].__dict__["forward"] = passing(like)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for number in repeats:
            del blocks[number].__dict__["forward"]
