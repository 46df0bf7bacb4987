"""A causal LM cut into segments that run alone: what comes before the blocks, each block, what comes after.

The originals stay where transformers loaded them (for safetensors on a CPU, in the file's pages); a segment is copied
to the device in float32 while it is at work, so that one block is there at a time.
May import: formats.errors, sensitivity.graph/pages/vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from bitplan.sensitivity.graph import Graph, Unit
from bitplan.sensitivity.pages import page_out
from bitplan.sensitivity.vocabulary import vocabulary_size

LOGIT_BYTES = 32 << 20
"""What the logits of the tokens that go through the last segment at once may take."""
BATCH = 8
"""Token blocks that run through a segment at once."""


class _Reached(Exception):
    """Ends a forward pass that has come to the first block."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the hidden states, for one batch size."""

    args: tuple
    kwargs: dict[str, Any]


def find_blocks(model: nn.Module) -> list[str]:
    """Paths of the decoder's blocks: the members of the module list that holds most of the parameters."""
    lists = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not lists:
        return []
    path = max(lists, key=lambda name: (lists[name], -len(name)))
    return [f"{path}.{i}" for i in range(len(model.get_submodule(path)))]  # type: ignore[arg-type]


class Chain:
    """Segments 0 (before the blocks), 1…n (the blocks), n + 1 (after them). A model whose blocks do not simply hand
    one tensor on, or whose blocks are given more than depends on the text's length, has no blocks here: `why` says so,
    and everything but its lookups is one last segment. So it is on request too: not `cut`."""

    def __init__(self, model: PreTrainedModel, graph: Graph, device: str, paged: bool = False, cut: bool = True):
        self.model, self.device, self.paged = model, device, paged
        self.cut = cut
        self.paths = find_blocks(model) if cut else []
        self.why: str | None = None
        self.tokenwise = False
        """What follows the blocks can run on some of the tokens alone."""
        self._tuple: list[bool] = []
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self.outer = self._outside()
        if self.paths and (why := self._refuse()):
            self.paths, self.why = [], why
            self.outer = self._outside()
        self.units = self._assign(graph)

    def __len__(self) -> int:
        return len(self.paths) + 2

    def name(self, segment: int) -> str:
        if 0 < segment <= len(self.paths):
            return self.paths[segment - 1]
        return "before the blocks" if segment == 0 else "after the blocks"

    def seen(self, segment: int) -> list[Unit]:
        """Units whose uses count in a segment: those that it holds, and a tied embedding also in the last."""
        last = len(self) - 1
        if not self.paths:
            return [unit for units in self.units for unit in units] if segment == last else []
        return [*self.units[segment], *(u for u in self.units[0] if segment == last and u.kind == "tied")]

    def products(self, segment: int) -> list[Unit]:
        """Units whose products are computed in a segment: a tied embedding's in the last."""
        last = len(self) - 1
        return [u for u in self.seen(segment) if u.kind != "embedding" and (u.kind != "tied" or segment == last)]

    def looks_up(self, segment: int) -> bool:
        """Whether a segment is given tokens: the first, or that of a model that is not cut."""
        return segment == 0 or not self.paths

    def pieces(self, segment: int, length: int) -> list[slice]:
        """The tokens of a text block that run through a segment at once: all of them, but for large logits."""
        step = length
        if segment == len(self) - 1 and self.tokenwise:
            step = max(1, LOGIT_BYTES // (4 * vocabulary_size(self.model)))
        return [slice(start, min(start + step, length)) for start in range(0, length, step)]

    def _assign(self, graph: Graph) -> list[list[Unit]]:
        """Units by segment, in the order of the data flow; a lookup belongs to the first."""
        segments: list[list[Unit]] = [[] for _ in range(len(self))]
        met, places = False, {path: i for i, path in enumerate(self.paths)}
        depth = self.paths[0].count(".") + 1 if self.paths else 0
        for unit in graph.units:
            at = places.get(".".join(unit.name.split(".")[:depth]))
            met = met or at is not None
            if at is not None:
                segments[at + 1].append(unit)
            elif unit.kind in ("embedding", "tied") or (self.paths and not met):
                segments[0].append(unit)
            else:
                segments[-1].append(unit)
        return segments

    def _copy(self, module: nn.Module, hollow: list[nn.Module]) -> nn.Module:
        """A float32 copy on the device; parameters of `hollow` modules stay behind, as meta tensors."""
        memo: dict[int, Any] = {}
        for part in hollow:
            for parameter in part.parameters():
                memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        made = copy.deepcopy(module, memo)
        for parameter in made.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self.device, torch.float32)
        for owner in made.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    kind = torch.float32 if buffer.is_floating_point() else buffer.dtype
                    owner._buffers[name] = buffer.to(self.device, kind)
        if self.paged:
            page_out(module.parameters())
        return made.eval().requires_grad_(False)

    def _here(self, module: nn.Module) -> bool:
        """Whether a module is float32 on the device already."""
        tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        return all(t.dtype == torch.float32 and t.device == torch.device(self.device) for t in tensors)

    def _outside(self) -> PreTrainedModel:
        if not self.cut and self._here(self.model):
            return self.model
        made = self._copy(self.model, [self.model.get_submodule(path) for path in self.paths])
        assert isinstance(made, PreTrainedModel)
        return made

    def module(self, segment: int, own: bool = False) -> nn.Module:
        """The segment's module in float32 on the device: a copy, to be dropped when done; `own`: the model's own where
        it is that already, not to be changed."""
        if 0 < segment <= len(self.paths):
            block = self.model.get_submodule(self.paths[segment - 1])
            return block if own and self._here(block) else self._copy(block, [])
        return self.outer

    def local(self, segment: int, parameter: str) -> str:
        """A parameter's name inside `module(segment)`."""
        return parameter.removeprefix(self.paths[segment - 1] + ".") if 0 < segment <= len(self.paths) else parameter

    @contextmanager
    def _bypassed(self, first: Any = None) -> Iterator[list[Call]]:
        """Blocks of `outer` hand their input on (the first: `first(hidden)`), and note what they are called with."""
        calls: list[Call] = []
        blocks = [self.outer.get_submodule(path) for path in self.paths]

        def forward_of(i: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                named = not args
                hidden = kwargs.pop("hidden_states") if named else args[0]
                calls.append(Call(() if named else args[1:], kwargs))
                if i == 0 and first is not None:
                    hidden = first(hidden)
                return (hidden,) if self._tuple[i] else hidden

            return forward

        for i, block in enumerate(blocks):
            block.__dict__["forward"] = forward_of(i)
        try:
            yield calls
        finally:
            for block in blocks:
                del block.__dict__["forward"]

    def run(self, segment: int, module: nn.Module, x: Tensor, ids: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Output of a segment for hidden states x [batch, length, width] and ids int64 [batch, length] (both on the
        device), with `weights` (parameter → tensor) in the place of its own. The first segment gives the first
        block's input, the last gives logits."""
        local = {self.local(segment, name): weight for name, weight in weights.items()}
        if 0 < segment <= len(self.paths):
            call = self._call(ids)[segment - 1]
            out = functional_call(module, local, (x, *call.args), call.kwargs)
            return out[0] if isinstance(out, tuple) else out
        if segment == 0:
            if not self.paths:
                return torch.zeros(len(ids), ids.shape[1], 0, device=self.device)

            def stop(hidden: Tensor) -> Tensor:
                raise _Reached(hidden)

            try:
                with self._bypassed(stop):
                    functional_call(module, local, (), {"input_ids": ids, "use_cache": False})
            except _Reached as reached:
                return reached.hidden
        with self._bypassed(lambda _: x):
            logits: Tensor = functional_call(module, local, (), {"input_ids": ids, "use_cache": False}).logits
        return logits.float()

    def _call(self, ids: Tensor) -> list[Call]:
        shape = tuple(ids.shape)
        if shape not in self._calls:
            with self._bypassed() as calls, torch.no_grad():
                self.outer(input_ids=ids, use_cache=False)
            self._calls[shape] = calls
        return self._calls[shape]

    def _refuse(self) -> str | None:
        """Why the blocks cannot run alone, or None: the chain must compute what the whole model computes."""
        parameters = next(self.model.parameters())
        vocabulary = vocabulary_size(self.model)
        ids = torch.arange(3, 27, device=parameters.device).remainder(vocabulary).view(2, 12)
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def note(_module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])
            self._tuple.append(isinstance(out, tuple))
            outputs.append(out[0] if isinstance(out, tuple) and out else out)

        handles = [
            self.model.get_submodule(path).register_forward_hook(note, with_kwargs=True)  # type: ignore[arg-type]
            for path in self.paths
        ]
        try:
            with torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        except (KeyError, IndexError):
            return "its blocks take no hidden states by that name"
        finally:
            for handle in handles:
                handle.remove()
        handed_on = all(isinstance(each, Tensor) for each in (*inputs, *outputs))
        if len(inputs) != len(self.paths) or not handed_on:
            return "its blocks do not run once each" if handed_on else "its blocks do not return hidden states first"
        if not all(out.isfinite().all() for out in outputs):
            return None  # rounding will name the block
        if any(not torch.equal(out, x) for out, x in zip(outputs, inputs[1:], strict=False)):
            return "its blocks do not hand one tensor on to the next"
        here = ids.to(self.device)
        calls, others = self._call(here), self._fresh(here.flip(1))
        if not _same([(c.args, c.kwargs) for c in calls], [(c.args, c.kwargs) for c in others]):
            return "its blocks are given what depends on the text"
        self.tokenwise = self._is_tokenwise(outputs[-1], here)
        differs = self._differs(inputs, outputs, here)
        return "its blocks compute something else alone than in the whole model" if differs else None

    @torch.no_grad()
    def _is_tokenwise(self, hidden: Tensor, ids: Tensor) -> bool:
        """Whether the last segment gives the same logits for some of the tokens alone."""
        hidden, last = hidden.to(self.device, torch.float32), len(self.paths) + 1
        whole = self.run(last, self.outer, hidden, ids, {})[:, 7:]
        alone = self.run(last, self.outer, hidden[:, 7:], ids[:, 7:], {})
        return torch.allclose(whole, alone, atol=1e-3 * float(whole.abs().max()), rtol=0)

    def _differs(self, inputs: list[Tensor], outputs: list[Tensor], ids: Tensor) -> bool:
        """Whether a block of some class, run alone on the whole model's hidden states, gives something else."""
        for i in {type(self.model.get_submodule(path)): i for i, path in enumerate(self.paths)}.values():
            with torch.no_grad():
                x = inputs[i].to(self.device, torch.float32)
                out = self.run(i + 1, self.module(i + 1, own=True), x, ids, {})
            expected = outputs[i].to(self.device, torch.float32)
            scale = float((expected - x).abs().max())
            if not torch.allclose(out, expected, atol=0.05 * scale, rtol=0):
                return True
        return False

    def _fresh(self, ids: Tensor) -> list[Call]:
        kept, self._calls = self._calls, {}
        try:
            return self._call(ids)
        finally:
            self._calls = kept


def _same(a: Any, b: Any) -> bool:
    """Whether two nests of tuples, lists and dicts hold equal tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)
