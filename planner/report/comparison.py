"""What `bitplan compare` and `bitplan recommend` print. May import: planner.evaluate, planner.report.tables."""

from collections.abc import Callable, Sequence

from bitplan.planner.evaluate.compare import ComparisonRow, TaskResult
from bitplan.planner.evaluate.recommend import Advice
from bitplan.planner.report.tables import table, with_error, with_interval

COLUMNS: dict[str, Callable[[ComparisonRow], str]] = {
    "bytes": lambda line: f"{line.resident_bytes:,}",
    "bits/weight": lambda line: f"{line.bits_per_weight:.3f}",
    "× smaller than fp32": lambda line: f"{line.times_smaller_than_fp32:.2f}",
    "than bf16": lambda line: f"{line.times_smaller_than_bf16:.2f}",
    "perplexity": lambda line: f"{line.evaluation.ppl:.3f}",  # type: ignore[union-attr]
    "KL": lambda line: f"{line.evaluation.kl:.5f}",  # type: ignore[union-attr]
    "± se": lambda line: with_error("", line.evaluation.kl_se).removeprefix(" ± ") or "–",  # type: ignore[union-attr]
    "prefill tok/s": lambda line: f"{line.throughput.prefill_tokens_per_s:,.0f}",  # type: ignore[union-attr]
    "decode tok/s": lambda line: f"{line.throughput.decode_tokens_per_s:,.1f}",  # type: ignore[union-attr]
    "peak bytes": lambda line: f"{line.peak_bytes:,}",
    "load s": lambda line: f"{line.load_seconds:.1f}",
}


def compare_cells(lines: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a comparison's table; a task has a column of its own."""
    tasks = list(dict.fromkeys(found.task for line in lines for found in line.tasks))
    head = ["", *COLUMNS, *tasks]
    rows = []
    for line in lines:
        if line.evaluation is None:
            rows.append([line.name, *["–"] * (len(head) - 1)])
            continue
        of = {found.task: found for found in line.tasks}
        figures = [_task_cell(of[task]) if task in of else "–" for task in tasks]
        rows.append([line.name, *(cell(line) for cell in COLUMNS.values()), *figures])
    return head, rows


def _task_cell(found: TaskResult) -> str:
    """The figure, and its difference from full precision with its interval."""
    r = found.result
    return with_interval(found.measure == "accuracy", r.mean_other, r.difference, r.low, r.high)


def compare_text(lines: Sequence[ComparisonRow]) -> str:
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
    lines.append(f"what a format loses depends on the task: bitplan compare {model} --task FILE.jsonl")
    return "\n".join(lines)
