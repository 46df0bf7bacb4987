"""Where a unit stands in its model: the layer, and what kind of unit it is there.

May import: planner.report.tables.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from bitplan.planner.report.tables import NUMBER


@dataclass(frozen=True)
class Place:
    kind: str
    """What units of all layers have in common: self_attn.q_proj, mlp.experts.*.w1; without a layer, the last word."""
    layer: int | None


def places(names: Iterable[str]) -> dict[str, Place]:
    """Name → place. The first number in a name is the layer. Where a model has several stacks of layers, a kind says
    which: encoder.block.*.attn."""
    split = {name: NUMBER.search(name) for name in names}
    stacks = {found.string[: found.start()] for found in split.values() if found}
    made = {}
    for name, found in split.items():
        if found is None:
            made[name] = Place(name.rpartition(".")[2], None)
            continue
        stack = f"{name[: found.start()]}*." if len(stacks) > 1 else ""
        made[name] = Place(stack + NUMBER.sub("*", name[found.end() + 1 :]), int(found.group()))
    return made
