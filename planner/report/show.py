"""Tables for people.

May import: formats, planner.plan/budget/compare/recommend, sensitivity.profile.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch

from bitplan.formats.kernels.dispatch import Kernel, Machine, choose
from bitplan.formats.sizes import format_bytes
from bitplan.formats.table import FORMATS
from bitplan.planner.evaluate.compare import Line, TaskLine
from bitplan.planner.evaluate.recommend import Advice
from bitplan.planner.plan import KVCache, Plan, PlannedUnit, TaskFacts, TaskMeasured
from bitplan.sensitivity.profile import Profile

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns aligned with spaces: the first `left` to the left, the others to the right."""
    lines = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def folded(plan: Plan) -> list[tuple[str, str, str, int]]:
    """Units with layer numbers starred: name, which layers, format and rounding, bytes."""
    groups: dict[str, dict[str, list[PlannedUnit]]] = defaultdict(lambda: defaultdict(list))
    for unit in plan.units:
        choice = unit.format if unit.rounding == "nearest" else f"{unit.format}/{unit.rounding}"
        groups[NUMBER.sub("*", unit.name)][choice].append(unit)
    return [
        (name, layers([unit.name for unit in units]), choice, sum(unit.bytes for unit in units))
        for name, choices in groups.items()
        for choice, units in choices.items()
    ]


def layers(names: Sequence[str]) -> str:
    """The first number of each name, runs of them joined: 0-3, 7; and how many names, where that is another number."""
    numbers = sorted({int(found.group()) for name in names if (found := NUMBER.search(name))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return told if len(names) == max(1, len(numbers)) else f"{told} (×{len(names)})"


def plan_text(plan: Plan) -> str:
    """What `bitplan show` prints."""
    model, of_weights = plan.provenance.model, " for weights" if plan.budget.device else ""
    lines = [
        f"{model.id}: {model.parameters:,} parameters in {model.dtype}, weights {model.weights_sha256[:12]}",
        f"budget {plan.budget.asked} = {plan.budget.weights:,} bytes{of_weights};"
        f" plan {plan.bytes:,} bytes ({format_bytes(plan.bytes)}), {plan.bits_per_weight:.3f} bits per weight",
        "",
        table(
            ("unit", "layers", "format", "bytes"),
            [(name, at, choice, f"{size:,}") for name, at, choice, size in folded(plan)],
            left=3,
        ),
    ]
    kept: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for entry in plan.kept:
        kept[NUMBER.sub("*", entry.name), entry.dtype, entry.reason].append(entry.bytes)
    if kept:
        rows = [
            (name, f"×{len(sizes)}" if len(sizes) > 1 else "", dtype, f"{sum(sizes):,}", reason)
            for (name, dtype, reason), sizes in kept.items()
        ]
        lines += ["", table(("kept", "", "type", "bytes", "because"), rows, left=3)]
    padded = sorted({f"{NUMBER.sub('*', u.name)}: {text}" for u in plan.units if (text := _padding(u))})
    if padded:
        lines += ["", "padded:", *(f"  {line}" for line in padded)]
    lines += ["", *_figures(plan)]
    return "\n".join(lines)


def _padding(unit: PlannedUnit) -> str | None:
    return None if unit.is_native else FORMATS[unit.format].padding(unit.columns)


def _figures(plan: Plan) -> list[str]:
    lines = [f"rounding: {plan.rounding}"]
    if plan.kv_cache.format != "native" or plan.kv_cache.context:
        lines.append(_kv_text(plan.kv_cache))
    if plan.research:
        lines.append(f"research stage: {', '.join(plan.research)}")
    if plan.predicted:
        lines.append(
            f"predicted {plan.predicted.nll:.4f} nats per token above full precision; no allocation has less than"
            f" {plan.predicted.bound:.4f} by the profile"
        )
    if plan.search:
        s = plan.search
        of = f"loss on {s.task.search_items} items of {s.task.name}" if s.task else "KL on the search text"
        lines.append(f"search: {s.trials} trials, {of} {s.first_loss:.5f} → {s.loss:.5f}")
    if plan.measured:
        m = plan.measured
        lines.append(
            f"measured on {m.tokens:,} held-out tokens: perplexity {m.ppl:.3f},"
            f" {m.delta_nll:+.4f} ± {m.delta_nll_se:.4f} nats, KL {m.kl:.5f} ± {m.kl_se:.5f}"
        )
    if plan.search and plan.search.task and plan.measured and plan.measured.task:
        lines.append(_on_task(plan.search.task, plan.measured.task))
    if plan.uniform and plan.uniform.measured:
        u = plan.uniform
        assert u.measured is not None
        verdict = "the search's plan ships" if plan.shipped == "search" else "so the uniform plan ships"
        lost = f"KL {u.measured.kl:.5f}"
        if u.measured.task:
            lost += f", loss on the task {u.measured.task.loss:.5f} ± {u.measured.task.loss_se:.5f}"
        lines.append(f"best uniform that fits: {u.format}, {u.bytes:,} bytes, {lost}; {verdict}")
    elif plan.uniform:
        lines.append(
            f"best uniform by prediction: {plan.uniform.format}, {plan.uniform.predicted_nll:.4f} nats; not measured"
        )
    return lines


def _on_task(task: TaskFacts, m: TaskMeasured) -> str:
    accuracy = task.kind != "text"
    told = _with_interval(accuracy, m.quantized, m.difference, m.low, m.high)
    return (
        f"measured on {m.items} held-out items of {task.name}: {'accuracy' if accuracy else 'nats per token'} {told},"
        f" loss {m.loss:.5f} ± {m.loss_se:.5f}; in brackets the difference from full precision, 95 % interval"
    )


def _kv_text(kv: KVCache) -> str:
    told = f"KV cache: {kv.format}"
    if kv.context:
        told += f", budgeted for {kv.context:,} tokens × {kv.batch}, prompts read {kv.chunk} tokens at a time"
    return told if kv.kl is None else f"{told}; alone it costs KL {kv.kl:.5f} ± {kv.kl_se:.5f}"


def kernel_rows(plan: Plan, on: Machine) -> list[tuple[str, int, str, str, str]]:
    """What runs each unit on a machine: name with layer numbers starred, how many, format, kernel, why."""
    dtype = getattr(torch, plan.provenance.model.dtype)
    found: dict[tuple[str, str, str, str], int] = defaultdict(int)
    for unit in plan.units:
        kernel = _kernel(unit, dtype, on)
        found[NUMBER.sub("*", unit.name), unit.format, kernel.name, kernel.why] += 1
    return [(name, count, format, kernel, why) for (name, format, kernel, why), count in found.items()]


def _kernel(unit: PlannedUnit, dtype: torch.dtype, on: Machine) -> Kernel:
    if unit.is_native:
        return Kernel("torch", "as the checkpoint has it")
    if unit.kind == "embedding":
        return Kernel("dequantize", "only the rows looked up")
    if unit.kind == "experts":
        return Kernel("dequantize", "its own forward asks for whole weights")
    return choose(FORMATS[unit.format], unit.columns, dtype, on)


def kernels_text(rows: Sequence[tuple[str, int, str, str, str]], device: str) -> str:
    cells = [(name, f"×{count}" if count > 1 else "", *rest) for name, count, *rest in rows]
    return table((f"on {device}", "", "format", "kernel", "because"), cells, left=5)


def profile_text(profile: Profile) -> str:
    """What `bitplan audit` prints: nats per token above full precision, a row a unit, a column a format."""
    formats = list(dict.fromkeys(row.format for row in profile.rows))
    cells = {(row.unit, row.format): f"{row.delta_nll:.5f}" for row in profile.rows}
    kept = f"{len(profile.kept)} tensors kept as they are, {profile.kept_bytes:,} bytes"
    rows = [(unit.name, *(cells.get((unit.name, name), "–") for name in formats)) for unit in profile.units]
    lines = [table(("nats per token above full precision", *formats), rows), kept]
    for row in profile.kv_cache:
        error = "" if row.kl_se is None else f" ± {row.kl_se:.5f}"
        lines.append(f"KV cache in {row.format}: KL {row.kl:.5f}{error}")
    return "\n".join(lines)


COLUMNS: dict[str, Callable[[Line], str]] = {
    "bytes": lambda line: f"{line.resident_bytes:,}",
    "bits/weight": lambda line: f"{line.bits_per_weight:.3f}",
    "× smaller than fp32": lambda line: f"{line.times_smaller_than_fp32:.2f}",
    "than bf16": lambda line: f"{line.times_smaller_than_bf16:.2f}",
    "perplexity": lambda line: f"{line.judgement.ppl:.3f}",  # type: ignore[union-attr]
    "KL": lambda line: f"{line.judgement.kl:.5f}",  # type: ignore[union-attr]
    "± se": lambda line: f"{line.judgement.kl_se:.5f}",  # type: ignore[union-attr]
    "prefill tok/s": lambda line: f"{line.running.prefill_tokens_per_s:,.0f}",  # type: ignore[union-attr]
    "decode tok/s": lambda line: f"{line.running.decode_tokens_per_s:,.1f}",  # type: ignore[union-attr]
    "peak bytes": lambda line: f"{line.peak_bytes:,}",
    "load s": lambda line: f"{line.load_seconds:.1f}",
}


def compare_cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a comparison's table; a task has a column of its own."""
    tasks = list(dict.fromkeys(found.task for line in lines for found in line.tasks))
    head = ["", *COLUMNS, *tasks]
    rows = []
    for line in lines:
        if line.judgement is None:
            rows.append([line.name, *["–"] * (len(head) - 1)])
            continue
        of = {found.task: found for found in line.tasks}
        figures = [_task_cell(of[task]) if task in of else "–" for task in tasks]
        rows.append([line.name, *(cell(line) for cell in COLUMNS.values()), *figures])
    return head, rows


def _task_cell(found: TaskLine) -> str:
    """The figure, and its difference from full precision with its interval."""
    r = found.result
    return _with_interval(found.measure == "accuracy", r.mean_other, r.difference, r.low, r.high)


def _with_interval(accuracy: bool, value: float, difference: float, low: float, high: float) -> str:
    if accuracy:
        return f"{value:.1%} ({100 * difference:+.1f}, {100 * low:+.1f} … {100 * high:+.1f})"
    return f"{value:.4f} ({difference:+.4f}, {low:+.4f} … {high:+.4f})"


def compare_text(lines: Sequence[Line]) -> str:
    """What `bitplan compare` prints."""
    notes = [f"{line.name}: {line.note}" for line in lines if line.note]
    notes += [f"{line.name}: research stage" for line in lines if line.research]
    if any(line.tasks for line in lines):
        notes.append("tasks: the figure, and its difference from full precision on the same items, 95 % interval")
    return "\n".join([table(*compare_cells(lines)), *notes])


def advice_text(advice: Advice, to_measure: Sequence[str], model: str) -> str:
    """What `bitplan recommend` prints; `to_measure` are the commands for what is missing."""
    lines = [f"{advice.purpose}: {advice.format}. {advice.why}.", *advice.notes]
    if advice.rows:
        lines.append(compare_text(advice.rows))
    if advice.missing:
        lines.append(f"not measured on this text: {', '.join(advice.missing)}; to measure:")
        lines += [f"  {command}" for command in to_measure]
    lines.append(f"what a format loses hangs on the task: bitplan compare {model} --task FILE.jsonl")
    return "\n".join(lines)
