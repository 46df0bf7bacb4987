"""One backward pass → second moments → the loss that any change of a weight makes.

For a weight with outputs y = W x and a change dW, half the Fisher's quadratic form gives

    nats per token = 1/2 * sum_o G_oo * (dW A dW^T)_oo,    A = E[x x^T],  G = E[g g^T]

with g the gradient, at y, of the summed loss, and E the mean over tokens; tokens' cross terms are left out, and A
and G are taken as independent (as K-FAC does: Martens & Grosse 2015). A looked-up row v of frequency f_v has
A = f_v and the gradients of the lookup's output. May import: formats, sensitivity.graph/store/text/trace.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitplan.formats.errors import RoundingFailed
from bitplan.formats.rounding import Hessian
from bitplan.sensitivity.graph import Graph, Unit
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.store import load_tensors, locked, save_tensors
from bitplan.sensitivity.texts.text import Blocks
from bitplan.sensitivity.trace import Trace, Use

PASS_BYTES = 8 << 30
"""Second moments gathered at once; what does not fit is gathered in further passes."""


@dataclass(frozen=True)
class Statistics:
    """A unit's second moments, float32. Products have `inputs` [experts, columns, columns] and `gradients`
    [experts, rows]; lookups have `frequencies` [rows] and `lookup_gradients` [columns]; a tied pair has all four."""

    inputs: Tensor | None = None
    gradients: Tensor | None = None
    frequencies: Tensor | None = None
    lookup_gradients: Tensor | None = None

    def loss(self, delta: Tensor) -> float:
        """Predicted nats per token of changing the weight by `delta` [experts * rows, columns]."""
        total = 0.0
        if self.inputs is not None and self.gradients is not None:
            for change, inputs, gradients in zip(
                delta.view(len(self.inputs), -1, delta.shape[-1]), self.inputs, self.gradients, strict=True
            ):
                squares = ((change @ inputs) * change).sum(-1)
                total += float(squares.double() @ gradients.double()) / 2
        if self.frequencies is not None and self.lookup_gradients is not None:
            squares = delta.square() @ self.lookup_gradients
            total += float(squares.double() @ self.frequencies.double()) / 2
        return total

    def hessians(self) -> list[Hessian]:
        """What a rounding minimises over columns, one per expert: A, plus the lookups' share averaged over rows."""
        if self.inputs is None:
            assert self.frequencies is not None and self.lookup_gradients is not None
            return [Hessian(torch.diag(self.frequencies.mean() * self.lookup_gradients))]
        if self.frequencies is None:
            return [Hessian(matrix) for matrix in self.inputs]
        assert self.gradients is not None and self.lookup_gradients is not None
        lookups = torch.diag(self.frequencies.mean() * self.lookup_gradients)
        return [Hessian(self.gradients[0].mean() * self.inputs[0] + lookups)]


class StatisticsStore:
    """Statistics on disk, one file a unit, read to `device`; units that read the same tensor share one A."""

    def __init__(self, folder: Path, graph: Graph, device: str = "cpu"):
        self.folder = folder
        self.units = {unit.name: unit for unit in graph.units}
        self.readers = graph.readers
        self.device = device

    def path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.safetensors"

    def leader(self, unit: Unit) -> Unit:
        """The unit with whose statistics this one's A is stored."""
        return self.units[self.readers.get(unit.name, unit.name)]

    def __contains__(self, unit: Unit) -> bool:
        return self.path(unit).exists() and self.path(self.leader(unit)).exists()

    def __getitem__(self, unit: Unit) -> Statistics:
        tensors = load_tensors(self.path(unit), self.device)
        assert tensors is not None, unit.name
        leader = self.leader(unit)
        if leader != unit:
            shared = load_tensors(self.path(leader), self.device)
            assert shared is not None, leader.name
            tensors["inputs"] = shared["inputs"]
        return Statistics(**tensors)

    def write(self, unit: Unit, tensors: dict[str, Tensor]) -> None:
        save_tensors(self.path(unit), tensors)


def gather(
    model: PreTrainedModel, units: Sequence[Unit], blocks: Blocks, store: StatisticsStore, seed: int = 0
) -> None:
    """Fill `store` for those of the units that it lacks, one process at a time. Labels are drawn from the model's own
    predictions (the true Fisher, which is the curvature of KL), with `seed`. Raises RoundingFailed where a statistic
    is not finite."""
    with locked(store.folder):
        _gather(model, units, blocks, store, seed)


def _gather(model: PreTrainedModel, units: Sequence[Unit], blocks: Blocks, store: StatisticsStore, seed: int) -> None:
    needed = {unit.name for asked in units if asked not in store for unit in (asked, store.leader(asked))}
    missing = [unit for unit in store.units.values() if unit.name in needed and not store.path(unit).exists()]
    passes: list[list[Unit]] = []
    size = PASS_BYTES + 1
    for unit in missing:
        need = 4 * unit.experts * unit.columns**2 if store.readers.get(unit.name, unit.name) == unit.name else 0
        if size + need > PASS_BYTES:
            passes.append([])
            size = 0
        passes[-1].append(unit)
        size += need
    for number, together in enumerate(passes, 1):
        label = "statistics" + (f" {number}/{len(passes)}" if len(passes) > 1 else "")
        for name, tensors in _one_pass(model, together, store, blocks, seed, label).items():
            unit = next(unit for unit in together if unit.name == name)
            for kind, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise RoundingFailed(f"{name}: its {kind} hold NaN or infinity on the calibration text")
            store.write(unit, tensors)


def _culprit(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> str:
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            return f"{name} holds NaN or infinity: fetch or train the model again"
    return "the model's outputs hold NaN or infinity on the calibration text, though its weights do not"


def _report_unreached(units: Sequence[Unit], routed: Mapping[str, Tensor]) -> None:
    missed = {u.name: int((routed[u.name] == 0).sum()) for u in units if u.routed}
    names = [
        f"{u.name} ({missed[u.name]} of {u.experts})" if u.experts > 1 else u.name for u in units if missed.get(u.name)
    ]
    if names:
        print(
            "no calibration token reaches these experts, so their predicted loss is 0 and their inputs count equally"
            f" in rounding; more text (--tokens) may reach them: {', '.join(names)}",
            file=sys.stderr,
        )


def _one_pass(
    model: PreTrainedModel, units: list[Unit], store: StatisticsStore, blocks: Blocks, seed: int, label: str
) -> dict[str, dict[str, Tensor]]:
    device = next(model.parameters()).device
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_parameter = {unit.parameter: unit for unit in units}
    sums: dict[str, dict[str, Tensor]] = {unit.name: {} for unit in units}
    routed = {unit.name: torch.zeros(unit.experts, device=device) for unit in units}

    def total(unit: Unit, kind: str, *shape: int) -> Tensor:
        if kind not in sums[unit.name]:
            sums[unit.name][kind] = torch.zeros(shape, device=device)
        return sums[unit.name][kind]

    def add_squares(sum_of: Tensor, gradient: Tensor) -> None:
        sum_of += gradient.float().square().flatten(0, -2).sum(0)

    def seen(use: Use) -> None:
        unit = by_parameter[use.parameter]
        if use.lookup:
            ones = torch.ones(use.input.numel(), device=device)
            total(unit, "frequencies", unit.rows).index_add_(0, use.input.flatten(), ones)
            squares = total(unit, "lookup_gradients", unit.columns)
        else:
            if store.readers.get(unit.name, unit.name) == unit.name:
                x = use.input.detach().float().flatten(0, -2)
                total(unit, "inputs", unit.experts, unit.columns, unit.columns)[use.expert].addmm_(x.T, x)
            routed[unit.name][use.expert] += use.input.numel() // unit.columns
            squares = total(unit, "gradients", unit.experts, unit.rows)[use.expert]
        use.output.register_hook(partial(add_squares, squares))

    generator = torch.Generator(device=device).manual_seed(seed)
    trace = Trace({unit.parameter: parameters[unit.parameter] for unit in units}, seen)
    # Every lookup must ask for gradients, also where its unit belongs to another pass.
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda m, a, out: out if out.requires_grad else out.requires_grad_())
    try:
        for ids in progress(blocks.ids.split(1), desc=label, unit="block"):
            with torch.enable_grad(), trace:
                logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].flatten(0, 1).float()
                if not logits.isfinite().all():
                    raise RoundingFailed(_culprit(model, parameters))
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            loss.backward()
    finally:
        handle.remove()
    tokens = blocks.ids.numel()
    _report_unreached(units, routed)
    for unit in units:
        if unit.kind != "embedding" and float(routed[unit.name].sum()) == 0:  # as experts of a list may be
            total(unit, "gradients", unit.experts, unit.rows)
            if store.readers.get(unit.name, unit.name) == unit.name:
                total(unit, "inputs", unit.experts, unit.columns, unit.columns)
    for name, tensors in sums.items():
        for kind, tensor in tensors.items():
            if kind == "gradients":
                tensor /= routed[name].clamp(min=1).unsqueeze(-1)
            else:
                tensor /= tokens
        sums[name] = {kind: tensor.cpu() for kind, tensor in tensors.items()}
    return sums
