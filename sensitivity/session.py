"""A full-precision model opened for work, and the texts it works with.

May import: formats, sensitivity, bitplan for its version.
"""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import bitplan
from bitplan.formats.errors import ModelUnreadable, UsageError
from bitplan.formats.sizes import format_bytes
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.chain import Chain, find_blocks
from bitplan.sensitivity.curvature import gather
from bitplan.sensitivity.forward import predictions
from bitplan.sensitivity.graph import ON_REQUEST, Graph, Unit, build_graph
from bitplan.sensitivity.loss import Reference
from bitplan.sensitivity.moments import moments
from bitplan.sensitivity.pages import give_back_freed, page_out_after
from bitplan.sensitivity.profile import ModelFacts, Provenance, TextFacts, TextPart
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.statistics import StatisticsStore
from bitplan.sensitivity.store import IN_MEMORY
from bitplan.sensitivity.swapper import WeightSwapper
from bitplan.sensitivity.texts import text as texts
from bitplan.sensitivity.texts.text import Blocks, Texts
from bitplan.sensitivity.vocabulary import vocabulary_size
from bitplan.sensitivity.weight_cache import MOMENT_BYTES, WeightCache, mark_workspace, workspace

SEED = 0
PROGRAM = 700 << 20
"""Bytes that Python, torch and transformers take by themselves, about."""
COPIES = 7
"""Of what lies outside of the blocks, in float32, while a plan is made: for trials and for the finished plan, in full
precision and rounded, and what rounding takes beside them (by the peak of a plan of SmolLM2-135M)."""
PART = 16
"""Hidden states in memory, and the second moments gathered at once, take this part of a memory limit each."""
BRIEF = 4096
"""Tokens of the search text on which an audit measures: on all of it, a sample takes as long as the pass."""
PARTS = ("calibration", "search", "heldout", "healing")


@dataclass
class Session:
    """A loaded full-precision model with all that is known of it."""

    source: Source
    texts: Texts
    model: PreTrainedModel
    graph: Graph
    swapper: WeightSwapper
    weight_cache: WeightCache
    store: StatisticsStore
    provenance: Provenance
    device: str
    folder: Path
    """Where the cache keeps what is known of this model with this text."""
    whole: bool = True
    """The model is on the device as it runs; otherwise it stays where transformers loads it, on the CPU."""
    memory: int | None = None
    """Bytes that this process may take, where a person set them: weights are then read a block at a time."""

    def chain(self, cut: bool = True) -> Chain:
        """The model cut into segments, which run alone; or as one."""
        return Chain(self.model, self.graph, self.device, paged=self.memory is not None, cut=cut)

    def gather(self, units: Sequence[Unit] | None = None) -> None:
        """Make sure of the statistics of all units, or of these. Raises RoundingFailed."""
        units = self.graph.units if units is None else units
        part = {} if self.memory is None else {"memory": self.in_memory, "moments": self.in_memory}
        leads = {self.graph.reads(unit): unit for unit in self.graph.units}
        moments = sum(4 * unit.experts * unit.columns**2 for unit in leads.values())
        # A model in memory whose moments are small is not cut: that saves running every block a second time.
        chain = partial(self.chain, cut=not self.whole or moments > IN_MEMORY)
        gather(chain, self.graph, units, self.texts.calibration, self.store, SEED, **part)

    @property
    def in_memory(self) -> int:
        """Bytes that hidden states may take in memory, and as many for second moments and for what candidates share:
        more lie in files."""
        return IN_MEMORY if self.memory is None else self.memory // PART

    @cached_property
    def search_reference(self) -> Reference:
        """Full precision on the search text."""
        return self.reference(self.texts.search)

    @cached_property
    def brief(self) -> "Session":
        """The session with BRIEF tokens of the search text."""
        ids = self.texts.search.ids
        return replace(self, texts=replace(self.texts, search=Blocks(ids[: max(1, BRIEF // ids.shape[1])])))

    def reference(self, blocks: Blocks) -> Reference:
        """Full precision on some text."""
        if self.memory is None:
            return Reference(self.model, blocks)
        return Reference(None, blocks, predictions(self.chain(), blocks.ids, self.in_memory))

    @property
    def compared(self) -> Path:
        """Where the cache keeps the finished rows of comparisons."""
        return self.folder / "compared"

    def give_up_model(self) -> None:
        """Free the full-precision model; the session can do nothing with weights from here on."""
        del self.model, self.swapper, self.weight_cache


def pick_device(device: str) -> str:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises UsageError for one that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index == "" or index.isdigit()):
        raise UsageError(f"unknown device {device!r}: cpu, cuda, cuda:N or auto")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device} is not here: there are {torch.cuda.device_count()} CUDA devices")
    return device


def open_session(
    source: Source,
    session_texts: Texts,
    keep: tuple[str, ...] = (),
    device: str = "auto",
    whole: bool = True,
    memory: int | None = None,
    per_expert: bool = False,
) -> Session:
    """Load the model, in float32 on a CPU and in its own type elsewhere; not `whole`: as the checkpoint has it, for
    work that takes one block at a time to the device. `memory`: bytes that this process may take; the model is then not
    whole, and what has been read of its file is given back. `per_expert`: as `build_graph` has it.

    Raises ModelUnreadable, UsageError."""
    sources.refuse_quantized(source)
    device = pick_device(device)
    whole = whole and memory is None
    model = sources.load_model(source, device if whole else "cpu")
    if memory is not None:
        refuse_memory(model, memory, session_texts.search.ids.shape[1])
        page_out_after(model.get_submodule(path) for path in find_blocks(model))
        give_back_freed()
    dtype = str(model.dtype).removeprefix("torch.")
    graph = build_graph(model, keep, per_expert)
    if not graph.units:
        raise ModelUnreadable(f"{source.model} has no weight that can take a format")
    if whole:
        _widen(model, device)
    for part in PARTS:
        blocks = getattr(session_texts, part)
        highest, rows = int(blocks.ids.max()), model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, operator, index]
        if highest >= rows:
            raise ModelUnreadable(
                f"the tokenizer of {source.model} gives token {highest}, its embedding has {rows} rows"
            )
        texts.remember(blocks)
    kept = [tensor.name for tensor in graph.unquantized if tensor.reason == ON_REQUEST]
    folder = workspace(
        source.weights_sha256, source.config_sha256, session_texts.calibration.fingerprint, SEED, device, kept
    )
    mark_workspace(folder, source.model)
    store = StatisticsStore(folder / "statistics", device)
    paged = memory is not None
    swapper = WeightSwapper(model, graph.units, paged)

    def whole_moments(units: list[Unit]) -> Iterator[tuple[Unit, Tensor]]:
        chain, limit = Chain(model, graph, device, paged), IN_MEMORY if memory is None else memory // PART
        yield from moments(chain, graph, units, session_texts.calibration.ids, limit)

    weight_cache = WeightCache(
        folder, swapper.weight, store, whole_moments, MOMENT_BYTES if memory is None else memory // PART
    )
    facts = _describe(source, session_texts, dtype, model.num_parameters(), device)
    return Session(
        source, session_texts, model, graph, swapper, weight_cache, store, facts, device, folder, whole, memory
    )


def refuse_memory(model: PreTrainedModel, memory: int, length: int, plan: int = 0) -> None:
    """Raises UsageError where what lies outside of the blocks, the larger one of the largest block with its largest
    second moment and factors and of `length` tokens' logits, and this program itself take more than `memory` bytes.
    `plan`: bytes of a plan that is made too; what lies outside of the blocks then takes COPIES times its size."""
    blocks = [model.get_submodule(path) for path in find_blocks(model)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    outside = sum(p.numel() for p in model.parameters()) - sum(sizes)
    widest = max((p.shape[-1] for block in blocks for p in block.parameters() if p.ndim > 1), default=0)
    block = 6 * max(sizes, default=0) + 4 * 4 * widest**2
    logits = 4 * 4 * length * vocabulary_size(model)
    need = PROGRAM + (COPIES if plan else 1) * 4 * outside + plan + max(block, logits)
    if need > memory:
        what = f", the plan's {format_bytes(plan)}" if plan else ""
        raise UsageError(
            f"--max-memory {format_bytes(memory)}: this model needs about {format_bytes(need)} (its largest block, what"
            f" lies outside of its blocks, second moments and logits{what}): give that, or leave the limit out"
        )


def load_reference(source: Source, device: str = "auto") -> PreTrainedModel:
    """The full-precision model that others are compared with, as `open_session` has it."""
    device = pick_device(device)
    return _widen(sources.load_model(source, device), device)


def _widen(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """On a CPU, in place, float32: there it costs little time, and halves of it would blur small differences."""
    return model.float() if device == "cpu" else model


def _describe(source: Source, session_texts: Texts, dtype: str, parameters: int, device: str) -> Provenance:
    def part(blocks: Blocks) -> TextPart:
        count, length = blocks.ids.shape
        return TextPart(sha256=blocks.fingerprint, blocks=count, length=length)

    return Provenance(
        model=ModelFacts(
            id=source.model,
            revision=source.revision,
            config_sha256=source.config_sha256,
            weights_sha256=source.weights_sha256,
            dtype=dtype,
            parameters=parameters,
        ),
        text=TextFacts(
            source=session_texts.source,
            tokens=session_texts.tokens,
            calibration=part(session_texts.calibration),
            search=part(session_texts.search),
            heldout=part(session_texts.heldout),
            healing=part(session_texts.healing),
        ),
        seed=SEED,
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        versions={
            "bitplan": bitplan.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "optuna")},
        },
    )
