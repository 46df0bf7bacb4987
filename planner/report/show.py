"""Tables for people.

May import: formats, planner.plan, planner.report.tables.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch

from bitplan.formats.kernels.dispatch import Kernel, Machine, choose
from bitplan.formats.sizes import format_bytes
from bitplan.formats.table import FORMATS
from bitplan.planner.plan import NATIVE_WORKLOAD, Plan, PlanLatency, PlannedUnit, TaskFacts, TaskMeasured
from bitplan.planner.report.tables import NUMBER, folded, table, with_error, with_interval


def plan_text(plan: Plan) -> str:
    """What `bitplan show` prints."""
    model, of_weights = plan.provenance.model, " for weights" if plan.budget.device else ""
    lines = [
        f"{model.id}: {model.parameters:,} parameters in {model.dtype}, weights {model.weights_sha256[:12]}",
        f"budget {plan.budget.requested} = {plan.budget.weights:,} bytes{of_weights};"
        f" plan {plan.bytes:,} bytes ({format_bytes(plan.bytes)}), {plan.bits_per_weight:.3f} bits per weight",
        "",
        table(
            ("unit", "layers", "format", "bytes"),
            [(name, at, choice, f"{size:,}") for name, at, choice, size in folded(plan)],
            left=3,
        ),
    ]
    kept: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for entry in plan.unquantized:
        kept[NUMBER.sub("*", entry.name), entry.dtype, entry.reason].append(entry.bytes)
    if kept:
        rows = [
            (name, f"×{len(sizes)}" if len(sizes) > 1 else "", dtype, f"{sum(sizes):,}", reason)
            for (name, dtype, reason), sizes in kept.items()
        ]
        lines += ["", table(("unquantized", "", "type", "bytes", "because"), rows, left=3)]
    padded = sorted({f"{NUMBER.sub('*', u.name)}: {text}" for u in plan.units if (text := _padding(u))})
    if padded:
        lines += ["", "padded:", *(f"  {line}" for line in padded)]
    lines += ["", *_figures(plan)]
    return "\n".join(lines)


def _padding(unit: PlannedUnit) -> str | None:
    return None if unit.is_native else FORMATS[unit.format].padding(unit.columns)


def _figures(plan: Plan) -> list[str]:
    lines = [f"rounding: {plan.rounding}"]
    for each in plan.overrides:
        lines.append(f"override {each}: {len(each.units)} unit{'s' * (len(each.units) != 1)}")
    if plan.workload != NATIVE_WORKLOAD:
        lines.append(_workload_text(plan))
    if plan.research:
        lines.append(f"research stage: {', '.join(plan.research)}")
    if plan.latency:
        lines.append(_latency_text(plan.latency))
    if plan.predicted:
        lines.append(
            f"predicted {plan.predicted.nll:.4f} nats per token above full precision; no allocation has less than"
            f" {plan.predicted.bound:.4f} by the profile"
        )
    if plan.search:
        s = plan.search
        of = f"loss on {s.task.search_items} items of {s.task.name}" if s.task else "KL on the search text"
        first = "not finite" if s.first_loss is None else f"{s.first_loss:.5f}"
        lines.append(f"search: {s.trials} trials, {of} {first} → {s.loss:.5f}")
        rows = [(f"  {f.name}", f"{f.bytes:,}", with_error(f"{f.loss:.5f}", f.loss_se)) for f in s.finalists]
        lines += [table(("  finished as plans are", "bytes", "loss there"), rows)] if rows else []
    if plan.measured:
        m = plan.measured
        lines.append(
            f"measured on {m.tokens:,} held-out tokens: perplexity {m.ppl:.3f},"
            f" {with_error(f'{m.delta_nll:+.4f}', m.delta_nll_se, 4)} nats, KL {with_error(f'{m.kl:.5f}', m.kl_se)}"
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
    score = with_interval(accuracy, m.quantized, m.difference, m.low, m.high)
    return (
        f"measured on {m.items} held-out items of {task.name}: {'accuracy' if accuracy else 'nats per token'} {score},"
        f" loss {m.loss:.5f} ± {m.loss_se:.5f}; in brackets the difference from full precision, 95 % interval"
    )


def _latency_text(latency: PlanLatency) -> str:
    measured = "not measured" if latency.measured is None else f"{1e3 * latency.measured:.3f} ms measured as loaded"
    return (
        f"latency: {latency.requested}; {1e3 * latency.predicted:.3f} ms per decoded token predicted, {measured},"
        f" on {latency.device}"
    )


def _workload_text(plan: Plan) -> str:
    workload, loss = plan.workload, plan.kv_cache_loss
    text = f"KV cache: {workload.kv_format}"
    if workload.context:
        text += f", budgeted for {workload.context:,} tokens × {workload.batch}"
        text += f", prompts read {workload.prefill_chunk} tokens at a time"
    return f"{text}; alone it costs KL {with_error(f'{loss.kl:.5f}', loss.kl_se)}" if loss else text


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
