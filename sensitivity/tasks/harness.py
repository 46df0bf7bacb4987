"""Tasks of lm-evaluation-harness by name: its questions, prompts and few-shot examples, scored by us.

What has choices and one right answer is read: output_type multiple_choice, without scoring of its own. Tasks that let
a model write and filter what it wrote (generate_until) are refused, since their scores depend on each task's filters.
May import: formats.errors, sensitivity.tasks.question; lm_eval where it is installed.
"""

import difflib
from itertools import groupby
from pathlib import Path
from typing import Any

from bitplan.formats.errors import UsageError, first_line
from bitplan.sensitivity.tasks.question import Question

FEWSHOT_SEED = 1234
"""What `lm_eval run` seeds the choice of few-shot examples with."""
SHOWN = 5


def harness_questions(name: str, limit: int | None = None, include_path: str | Path | None = None) -> list[Question]:
    """A task's questions, the first `limit` or all, as the harness puts them without a chat template; names are also
    looked up in `include_path`, a folder of YAML files. The numbers are its acc (values) and acc_bytes (per_byte),
    but for choices that a token shared with the prompt, where `sensitivity.tasks.task.encode` says what differs.

    Raises UsageError: lm_eval is not installed, does not know the name, cannot have the data, or scores otherwise.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError(
            f"{name} is no file here, and lm-evaluation-harness, which may know a task of that name, is not installed:"
            f" pip install 'bitplan[lm-eval]'"
        ) from None
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=SHOWN, cutoff=0.4)
        hint = f": did you mean {', '.join(near)}?" if near else "; `lm-eval ls tasks` lists what it knows"
        raise UsageError(f"{name} is no file here, and lm-evaluation-harness knows no task of that name{hint}")
    if name not in manager.all_subtasks:
        raise UsageError(f"{name} names several tasks of lm-evaluation-harness: give one, from `lm-eval ls tasks`")
    try:
        task: Any = manager.load(name)["tasks"][name]
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    except Exception as error:  # the harness and datasets raise many unrelated types for one outcome
        raise UsageError(f"lm-evaluation-harness cannot load {name}: {first_line(error)}") from error
    if task.OUTPUT_TYPE != "multiple_choice":
        raise UsageError(f"{name} is a task of the kind {task.OUTPUT_TYPE}: only multiple_choice is scored here")
    if callable(task.config.process_results) or task.multiple_target or getattr(task, "MULTIMODAL", False):
        raise UsageError(f"{name} scores its choices in a way of its own, or has images or sound: not scored here")
    try:
        task.build_all_requests(limit=limit)
    except Exception as error:  # as many, where a task's own templates do not go with its data
        raise UsageError(f"lm-evaluation-harness cannot put the questions of {name}: {first_line(error)}") from error
    return [
        _question(task, f"{name}:{number}", list(instances))
        for number, (_, instances) in enumerate(groupby(task.instances, key=lambda instance: instance.doc_id), 1)
    ]


def _question(task: Any, where: str, instances: list[Any]) -> Question:
    doc = instances[0].doc
    choices = task.doc_to_choice(doc)
    answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    answer = choices.index(answer) if isinstance(answer, str) and answer in choices else answer
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UsageError(f"{where}: the answer {answer!r} is not among the {len(choices)} choices")
    # With acc_mutual_info, requests without a prompt come after those of the choices.
    pairs = [(str(instance.args[0]), str(instance.args[1])) for instance in instances[: len(choices)]]
    return Question(where, "choice", tuple(pairs), answer)
