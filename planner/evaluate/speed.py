"""The speed table: the seconds that one decoded token spends in a weight of each shape in each format, on one device.

1. A weight's own module is packed as a loaded plan has it, 64 of its rows repeated for weights, and called with one
   token. As many copies take turns as weights of the model lie between two calls, or as no cache holds; the median
   counts.
2. The full-precision model decodes: a step's seconds, and how often a token runs each unit, which is less than once for
   experts in a list.
3. A plan's step is predicted as full precision's, less its units' seconds, plus those in the plan's formats.

May import: formats, sensitivity, search.latency, planner.evaluate.throughput, bitplan for its version.
"""

import copy
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import FailFast, Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

import bitplan
from bitplan.formats.base import Format
from bitplan.formats.errors import PlanMismatch, UsageError
from bitplan.formats.modules import canonical, is_transposed, pack_parameter
from bitplan.formats.table import DTYPES, FORMATS
from bitplan.planner.evaluate.throughput import STEPS, run
from bitplan.search.latency import Latency
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.graph import Unit, build_graph, listed_expert
from bitplan.sensitivity.profile import Name, Seconds, Sha256, Size, Strict, Text, UnitEntry, refuse_newer, unit_entry
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.session import SEED, pick_device
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.vocabulary import vocabulary_size

RUNS = 3
"""Sequences that are decoded to time a step: what else a machine does can slow one of them down as a whole."""
PROMPT = 256
"""Tokens that the cache holds when a step is timed, or fewer where the model takes no more."""
ROWS = 64
"""Rows that are rounded to make a weight's codes; they are repeated."""
CACHES = 1 << 28
"""More bytes than any cache holds."""
ROUNDS, ROUND_SECONDS = 5, 0.2
"""Rounds over the copies that are timed: at least so many, and for so long with the first, which compiles kernels."""
Shape = tuple[str, int, int, int, str]
"""Kind, experts, rows, columns and the checkpoint's type."""


class SpeedRow(Strict):
    """One decoded token in one weight of a shape. Packed experts are dequantized for each step, and that is what is
    counted; their products are the same in all formats, and part of the rest."""

    kind: Literal["linear", "conv1d", "embedding", "experts", "tied"]
    experts: Size
    rows: Size
    columns: Size
    dtype: Text
    format: Text
    seconds: Seconds


class Speed(Strict):
    schema_version: Literal[1] = 1
    model: Text
    config_sha256: Sha256
    device: Text
    versions: dict[Text, Text] = Field(min_length=1)
    prompt: Size
    """Tokens that the cache held."""
    step: Seconds
    """Of the full-precision model, for one token."""
    rows: Annotated[tuple[SpeedRow, ...], FailFast()]
    calls: dict[Name, Annotated[float, Field(ge=0, le=1e6)]]
    """Unit → its calls for one token, where that is not one."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        refuse_newer(data, 1)
        return data

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if unknown := [row.format for row in self.rows if row.format not in FORMATS]:
            raise ValueError(f"unknown format {unknown[0][:40]!r}")
        if len(self._seconds) < len(self.rows):
            raise ValueError("a shape is there more than once in one format")
        return self

    @cached_property
    def _seconds(self) -> dict[tuple[Any, ...], float]:
        return {(*shape_of(row), row.format): row.seconds for row in self.rows}

    def seconds(self, unit: UnitEntry, format: str) -> float:
        """Of one decoded token in a unit. Raises UsageError for what was not measured."""
        found = self._seconds.get((*shape_of(unit), format))
        if found is None:
            raise UsageError(
                f"the speed table has no seconds for {unit.name} in {format}: run `bitplan speed` with all --formats of"
                " the plan"
            )
        return found * self.calls.get(unit.name, 1.0)

    def latency(self, requested: str, limit: float, units: Sequence[UnitEntry]) -> Latency:
        """A limit on the step of a model with these units. Raises UsageError."""
        native = sum(self.seconds(unit, DTYPES[unit.dtype]) for unit in units)
        return Latency(requested, limit, self.device, max(0.0, self.step - native), limit)


def shape_of(entry: UnitEntry | SpeedRow) -> Shape:
    return entry.kind, entry.experts, entry.rows, entry.columns, entry.dtype


def refuse_other(speed: Speed, source: Source, device: str) -> None:
    """Raises PlanMismatch for a table of another model or another device."""
    again = f"run `bitplan speed {source.model}` here"
    if speed.config_sha256 != source.config_sha256:
        raise PlanMismatch(
            f"the speed table is of {speed.model}, whose config is another than that of {source.model}: {again}"
        )
    if speed.device != (here := device_text(device)):
        raise PlanMismatch(f"the speed table was measured on {speed.device}, and this is {here}: {again}")


def device_text(device: str) -> str:
    """The GPU, or the processor and the threads that products run on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads != 1)}"


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def decode_seconds(model: PreTrainedModel, length: int, kv_format: str = "native") -> float:
    """Of one decoded token after a prompt of `length` tokens drawn at random: the median step, of RUNS the median."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary_size(model), (length + STEPS + 1,), generator=generator)
    return median(1 / run(model, ids, kv_format).decode_tokens_per_s for _ in range(RUNS))


def prompt_length(source: Source) -> int:
    return sources.block_length(source, PROMPT + STEPS + 1) - STEPS - 1


def measure(source: Source, formats: Sequence[str], device: str = "auto") -> Speed:
    """The speed table of a model's shapes in `formats` and in the checkpoint's own types. Raises ModelUnreadable."""
    sources.refuse_quantized(source)
    device = pick_device(device)
    model = sources.load_model(source, device)
    units = build_graph(model).units
    length = prompt_length(source)
    step = decode_seconds(model, length)
    shapes: dict[tuple[Any, ...], Unit] = {}
    for unit in units:
        shapes.setdefault(shape_of(unit_entry(unit)), unit)
    total = sum(unit.weights for unit in units)
    jobs = [(unit, name) for unit in shapes.values() for name in dict.fromkeys((unit.native, *formats))]
    rows = [
        SpeedRow.model_validate(
            {name: value for name, value in dict(unit_entry(unit)).items() if name in SpeedRow.model_fields}
            | {"format": format, "seconds": _of_unit(model, unit, format, total)}
        )
        for unit, format in progress(jobs, desc="speed", unit="weight")
    ]
    return Speed(
        model=source.model,
        config_sha256=source.config_sha256,
        device=device_text(device),
        versions={"bitplan": bitplan.__version__, **{name: version(name) for name in ("torch", "transformers")}},
        prompt=length,
        step=step,
        rows=tuple(rows),
        calls=_calls(model, units),
    )


@torch.inference_mode()
def _of_unit(model: PreTrainedModel, unit: Unit, format: str, total: int) -> float:
    """Seconds of one token in a unit, called once. `total`: the weights of the model."""
    path, _, name = unit.parameter.rpartition(".")
    native = format == unit.native
    if unit.kind == "experts" and native:
        return 0.0
    weight = model.get_submodule(path).get_parameter(name).detach()
    tensors = (
        {"": weight} if native else _codes(FORMATS[format], canonical(weight, is_transposed(model.get_submodule(path))))
    )
    count = max(1, min(total // unit.weights, CACHES // sum(t.nbytes for t in tensors.values())))
    copies = [tensors, *({suffix: t.clone() for suffix, t in tensors.items()} for _ in range(count - 1))]
    seconds = 0.0
    for place in (path, *unit.tied):
        module = model.get_submodule(place)
        twins = [_twin(module, name, None if native else FORMATS[format], each) for each in copies]
        if unit.kind == "experts":
            seconds += _timed([partial(twin.dequantized, name) for twin in twins], weight.device)
            continue
        if isinstance(module, nn.Embedding):
            x = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        else:
            x = torch.randn(1, 1, unit.columns, device=weight.device).to(weight.dtype)
        seconds += _timed([partial(twin, x) for twin in twins], weight.device)
    return seconds


def _codes(format: Format, weight: Tensor) -> dict[str, Tensor]:
    """Tensors as `specs` describes them, of the first rows repeated."""
    some = format.quantize(weight[:ROWS].float())
    made = {}
    for suffix, (shape, _) in format.specs(*weight.shape).items():
        size, flat = torch.Size(shape).numel(), some[suffix].flatten()
        made[suffix] = flat.repeat(-(-size // flat.numel()))[:size].view(shape)
    return made


def _twin(module: nn.Module, name: str, format: Format | None, tensors: dict[str, Tensor]) -> Any:
    """The module with other tensors for one parameter, packed where there is a format."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    if format is not None:
        pack_parameter(twin, name, format, placeholder=True)
    for suffix, tensor in tensors.items():
        twin._parameters[name + suffix] = nn.Parameter(tensor, requires_grad=False)
    return twin


def _timed(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Seconds of a call, the median. On a CPU each is timed alone: what else runs there interrupts few of them. On a
    GPU a call returns before its kernel has run, and all are timed together."""
    parts = [calls] if device.type == "cuda" else [[call] for call in calls]

    def once(part: Sequence[Callable[[], object]]) -> float:
        began = perf_counter()
        for call in part:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (perf_counter() - began) / len(part)

    ended = perf_counter() + ROUND_SECONDS
    for part in parts:  # compiles kernels
        once(part)
    timed = [once(part) for _ in range(ROUNDS) for part in parts]
    while perf_counter() < ended:
        timed += [once(part) for part in parts]
    return median(timed)


@torch.no_grad()
def _calls(model: PreTrainedModel, units: Sequence[Unit]) -> dict[str, float]:
    """Unit → its module's calls for one token, where that is not one; the mean over the experts of a list, which
    depends on the text only for each."""
    counted: Counter[str] = Counter()
    handles = []
    for unit in units:
        module = model.get_submodule(unit.parameter.rpartition(".")[0])
        handles.append(module.register_forward_hook(lambda *_, name=unit.name: counted.update([name])))
    generator = torch.Generator().manual_seed(SEED)
    for token in torch.randint(vocabulary_size(model), (STEPS, 1, 1), generator=generator):
        model(input_ids=token.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for unit in units:
        found = listed_expert(unit.name)
        alike[(found[0], found[2]) if found else (unit.name, "")].append(unit.name)
    means = {name: sum(counted[n] for n in names) / len(names) / STEPS for names in alike.values() for name in names}
    return {name: calls for name, calls in means.items() if calls != 1}
