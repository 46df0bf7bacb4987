"""Loading of one model in any format, with its memory and accuracy. May import: formats, sensitivity, search, planner
without its commands."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitplan.formats.errors import FormatUnavailable, UsageError
from bitplan.formats.rounding import refuse_misfit
from bitplan.formats.table import DEFAULT_FORMATS, format_named
from bitplan.planner.assemble import Finish, is_float, uniform_plan
from bitplan.planner.evaluate.compare import load_float
from bitplan.planner.evaluate.trials import Effort
from bitplan.planner.load import load_planned, resident_bytes
from bitplan.planner.memory.budget import budget_bytes
from bitplan.planner.plan import Budget, Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.select import Selection
from bitplan.search.problem import problem_of
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.session import Session, load_reference, open_session
from bitplan.sensitivity.tasks.paired import paired
from bitplan.sensitivity.tasks.score import Scores, score
from bitplan.sensitivity.tasks.task import Task, read_task
from bitplan.sensitivity.texts.read import default_texts, read_texts


class QuantizationManager:
    """Loads one model in a format, or in mixed precision within a budget, and measures it.

    `model` is a folder or hub id; `text` are files for calibration, search and evaluation, by default what the
    model writes itself. Raises ModelUnreadable if the model cannot be found.
    """

    def __init__(self, model: str | Path, text: list[str | Path] | None = None, device: str = "auto"):
        self.source = sources.find(model)
        self.files = [Path(file) for file in text] if text else None
        self.device = device
        self.plan: Plan | None = None
        self._loaded: tuple[str, PreTrainedModel] | None = None
        self._baselines: dict[str, Scores] = {}
        """Full precision's scores, by the task's fingerprint."""

    def _open(self) -> Session:
        self._loaded = None
        read = read_texts if self.files else default_texts
        texts = read(self.source, files=self.files, device=self.device)
        return open_session(self.source, texts, device=self.device)

    def load(self, format: str, rounding: str | None = None, heal: bool = False) -> PreTrainedModel:
        """Load the model in one format. fp32, bf16 and fp16 apply to all tensors, other formats only to units.

        `rounding` and `heal` (distillation) are as on the command line. Raises UnknownFormat, FormatUnavailable,
        UsageError.
        """
        row = format_named(format)
        refuse_misfit(rounding, [row])
        if reason := row.unavailable():
            raise FormatUnavailable(f"{row.name} cannot run here: {reason}")
        if is_float(row.name):
            if heal:
                raise UsageError(f"{row.name} has no scales to distill: load it without heal=True")
            self._loaded, self.plan = None, None
            self._loaded = (row.name, load_float(self.source, row.name, self.device))
        else:
            session = self._open()
            plan = uniform_plan(session, row.name, rounding, heal)
            round_missing(plan, session)
            session.give_up_model()
            self.plan, self._loaded = plan, (row.name, load_planned(plan, self.source, self.device))
        return self._loaded[1]

    def load_mixed_precision(
        self,
        budget: str | int,
        trials: int = 30,
        rounding: str | None = None,
        heal: bool = False,
        task: str | Path | None = None,
        limit: int | None = None,
    ) -> PreTrainedModel:
        """Make a plan for `budget` (bytes, or a size such as "5GiB") and load the model by it; see `plan`.
        With a task, the search minimises its loss on one half of its first `limit` items; the other half is reported.

        Raises BudgetInfeasible, UsageError.
        """
        objective = self._task(task, limit) if task else None
        if trials < 1:
            raise UsageError(f"trials={trials}: it must be 1 or more, since plans are evaluated")
        size, requested = budget_bytes(f"{budget}B" if isinstance(budget, int) else budget, None, None, 0)
        session = self._open()
        problem = problem_of(audit(session, DEFAULT_FORMATS))
        selection = Selection(
            problem, session, Finish(rounding, heal), Effort.of(trials), device=self.device, task=objective
        )
        self.plan = selection.made(Budget(requested=requested, weights=size))
        session.give_up_model()
        self._loaded = ("mixed", load_planned(self.plan, self.source, self.device))
        return self._loaded[1]

    def _task(self, task: str | Path, limit: int | None) -> Task:
        length = sources.block_length(self.source, 1 << 20)
        return read_task(task, sources.load_tokenizer(self.source), length, limit)

    def memory_info(self) -> dict[str, Any]:
        """Bytes of the loaded model's tensors, and its number of parameters. Raises UsageError if none is loaded."""
        if self._loaded is None:
            raise UsageError("no model is loaded: call load() or load_mixed_precision() first")
        format, model = self._loaded
        size = resident_bytes(model)
        parameters = self.plan.provenance.model.parameters if self.plan else model.num_parameters()
        return {
            "format": format,
            "total_parameters": parameters,
            "resident_bytes": size,
            "bits_per_weight": size * 8 / parameters,
            "times_smaller_than_fp32": 4 * parameters / size,
        }

    def benchmark_accuracy(self, task: str | Path, limit: int | None = None) -> dict[str, Any]:
        """Evaluate the loaded model and full precision on the same items of a task (a .jsonl file, or the name of a
        task of lm-evaluation-harness): both figures, and their difference with a 95 % interval. Full precision is
        loaded once per task.

        Raises UsageError if no model is loaded or the task cannot be read.
        """
        if self._loaded is None:
            raise UsageError("no model is loaded: call load() or load_mixed_precision() first")
        read = self._task(task, limit)
        if read.fingerprint not in self._baselines:
            self._baselines[read.fingerprint] = score(load_reference(self.source, self.device), read)
        format, model = self._loaded
        kv_format = self.plan.workload.kv_format if self.plan else "native"
        found = paired(self._baselines[read.fingerprint].values, score(model, read, kv_format).values)
        return {
            "format": format,
            "task": read.name,
            "baseline": found.mean_base,
            "quantized": found.mean_other,
            "difference": found.difference,
            "interval": (found.low, found.high),
            "items": found.pairs,
        }
