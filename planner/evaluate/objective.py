"""The objective that a search minimises, KL or a task's loss, and the figures reported for a plan.

May import: sensitivity, planner.plan.
"""

from collections.abc import Callable, Iterator

from torch import Tensor
from transformers import PreTrainedModel

from bitplan.planner.plan import Measured, TaskFacts, TaskMeasured
from bitplan.sensitivity.loss import (
    Evaluation,
    finite,
    log_probabilities,
    refuse_not_finite,
    standard_error,
)
from bitplan.sensitivity.session import Session
from bitplan.sensitivity.tasks.paired import paired
from bitplan.sensitivity.tasks.score import Scores, likelihoods, losses, score
from bitplan.sensitivity.tasks.task import Task


class Objective:
    """Evaluates models against the session's full-precision model: by KL on the search and held-out texts, and with a
    task, on one half of its items for the search and on the other half for the report.

    Raises UsageError for a task with too few items.
    """

    def __init__(self, session: Session, task: Task | None = None):
        self._task = task
        self._halves = task.halves() if task else None
        self._search = session.search_reference
        self._heldout = session.reference(session.texts.heldout)
        self._bases = tuple(score(session.model, half) for half in self._halves) if self._halves else None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data that `loss` is measured on."""
        return self._halves[0].fingerprint if self._halves else self._search.blocks.fingerprint

    @property
    def task(self) -> TaskFacts | None:
        """As the plan file has it."""
        if self._task is None or self._halves is None:
            return None
        search, heldout = (len(half.items) for half in self._halves)
        name, kind, sha256 = self._task.name, self._task.kind, self._task.fingerprint
        return TaskFacts(name=name, kind=kind, sha256=sha256, search_items=search, heldout_items=heldout)

    @property
    def count(self) -> int:
        """The number of blocks that a model is evaluated on."""
        return 1 if self._halves else len(self._search.blocks.ids)

    def evaluate(self, model: PreTrainedModel) -> Evaluation:
        """On the search text."""
        return self._search.evaluate(model)

    def kl(self, model: PreTrainedModel) -> float:
        """Nats per token on the search text."""
        return self.evaluate(model).kl

    def loss(self, model: PreTrainedModel) -> float:
        """The search's objective: the task's mean loss per item on its search half, or `kl` without a task."""
        if self._halves is None or self._bases is None:
            return self.kl(model)
        task = self._halves[0]
        return float(losses(task, self._bases[0].likelihoods, likelihoods(model, task)).mean())

    def blocks(self, model: PreTrainedModel) -> Iterator[float]:
        """The objective block by block of the search text, one after the other; their mean is `loss`. A task's loss is
        a single block."""
        if self._halves is not None:
            yield self.loss(model)
            return
        ids = self._search.blocks.ids
        yield from self.kl_blocks(lambda block: log_probabilities(model, ids[block : block + 1]))

    def kl_blocks(self, log_probabilities_of: Callable[[int], Tensor]) -> Iterator[float]:
        """KL block by block of the search text, nats per token, of what gives log-probabilities float32 [1, length - 1,
        vocabulary] for a block's number."""
        for block in range(len(self._search.blocks.ids)):
            yield float(self._search.kl(block, log_probabilities_of(block)))

    def heldout(self, model: PreTrainedModel, kv_format: str = "native") -> Measured:
        """The reported figures: on the held-out text, and on the task's other half. Raises OutputsNotFinite."""
        found = measured(refuse_not_finite(self._heldout.evaluate(model, kv_format), model))
        if self._halves is None or self._bases is None:
            return found
        task, base = self._halves[1], self._bases[1]
        on_task = _beside(task, base, score(model, task, kv_format))
        return found.model_copy(update={"task": on_task})


def measured(evaluation: Evaluation) -> Measured:
    """As the plan file has it."""
    facts = {name: getattr(evaluation, name) for name in Measured.model_fields if name != "task"}
    errors = {name: finite(value) for name, value in facts.items() if name.endswith("_se")}
    return Measured(**facts | errors)


def _beside(task: Task, base: Scores, other: Scores) -> TaskMeasured:
    found = paired(base.values, other.values)
    lost = losses(task, base.likelihoods, other.likelihoods)
    return TaskMeasured(
        items=found.pairs,
        baseline=found.mean_base,
        quantized=found.mean_other,
        difference=found.difference,
        low=found.low,
        high=found.high,
        loss=float(lost.mean()),
        loss_se=standard_error(lost),
    )
