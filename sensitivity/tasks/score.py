"""A model's marks on a task, item by item, so that two models can be compared on the same items.

May import: formats.kv, sensitivity.progress, sensitivity.tasks.likelihood/task.
"""

from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitplan.formats.kv.cache import new_cache
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.tasks.likelihood import log_likelihoods
from bitplan.sensitivity.tasks.question import Kind
from bitplan.sensitivity.tasks.task import SLACK, Item, Task


@dataclass(frozen=True)
class Scores:
    """One value an item, float64 [items]; a model that gives no numbers is wrong, with infinite nats.

    values: what is reported. choice: 1 where the right choice has the greatest log-likelihood Σ log p(token), else 0
        (lm-evaluation-harness's acc). exact: 1 where greedy text is the answer. text: nats per token.
    per_byte: choice only: the same with each log-likelihood divided by its choice's UTF-8 bytes (acc_bytes, which
        favours no short choices; its acc_norm divides by characters).
    likelihoods: an item's rows together, Σ log p of each row's scored tokens, float64 [rows].
    """

    kind: Kind
    values: Tensor
    likelihoods: list[Tensor]
    per_byte: Tensor | None = None

    @property
    def mean(self) -> float:
        """The task's figure: accuracy from 0 to 1, or nats per token, every item counting the same."""
        return float(self.values.mean())

    @property
    def ppl(self) -> float | None:
        """text: e to the mean nats per token."""
        return exp(min(self.mean, 700.0)) if self.kind == "text" else None


@torch.no_grad()
def score(model: PreTrainedModel, task: Task, kv_format: str = "native") -> Scores:
    """Score a model, wherever it is, on every item; keys and values go through a KV cache of another format, where one
    is named. Raises FormatUnavailable and UnknownFormat for what the cache cannot be."""
    found = likelihoods(model, task, kv_format)
    if task.kind == "text":
        return Scores(task.kind, _nats(task, found), found)
    if task.kind == "exact":
        written = [float(writes(model, task, item, kv_format)) for item in progress(task.items, desc=task.name)]
        return Scores(task.kind, torch.tensor(written, dtype=torch.float64), found)
    pairs = list(zip(task.items, found, strict=True))
    right = [_is_best(of, item.answer) for item, of in pairs]
    per_byte = [_is_best(of / torch.tensor(item.sizes), item.answer) for item, of in pairs]
    return Scores(
        task.kind, torch.tensor(right, dtype=torch.float64), found, torch.tensor(per_byte, dtype=torch.float64)
    )


@torch.no_grad()
def likelihoods(model: PreTrainedModel, task: Task, kv_format: str = "native") -> list[Tensor]:
    """`Scores.likelihoods` alone: nothing is written, so an exact task costs no more than its answers' tokens."""
    rows = [row for item in task.items for row in item.rows]
    found = torch.tensor(log_likelihoods(model, rows, kv_format, task.name), dtype=torch.float64)
    return list(found.split([len(item.rows) for item in task.items]))


def losses(task: Task, base: list[Tensor], other: list[Tensor]) -> Tensor:
    """The smooth loss that a search can follow, from two models' `likelihoods`: nats an item above `base`, 0 for
    itself, float64 [items].

    choice: KL(base || other) between the softmaxes over the choices' log-likelihoods. So an item counts by how near
    its choices are, and one of which the base is sure and wrong, as much as one of which it is sure and right. exact:
    -Σ log p of the answer's tokens, less the base's. text: nats per token, less the base's.
    """
    if task.kind != "choice":
        return (_nats(task, other) - _nats(task, base)).nan_to_num(torch.inf, posinf=torch.inf)
    pairs = [(p.log_softmax(0), q.log_softmax(0)) for p, q in zip(base, other, strict=True)]
    return torch.stack([(p.exp() * (p - q)).sum() for p, q in pairs]).nan_to_num(torch.inf, posinf=torch.inf)


def _nats(task: Task, found: list[Tensor]) -> Tensor:
    """-Σ log p of an item's scored tokens, for text by their number."""
    tokens = [sum(row.scored for row in item.rows) if task.kind == "text" else 1 for item in task.items]
    nats = torch.stack([-of.sum() for of in found]) / torch.tensor(tokens, dtype=torch.float64)
    return nats.nan_to_num(torch.inf, posinf=torch.inf)


def _is_best(likelihoods: Tensor, answer: int) -> float:
    """1 or 0; of equal likelihoods the first is taken, as lm-evaluation-harness does."""
    return float(bool(likelihoods.isfinite().all()) and int(likelihoods.argmax()) == answer)


def writes(model: Any, task: Task, item: Item, kv_format: str = "native") -> bool:
    """Whether greedy text after an item's prompt is its answer, up to the end of the answer's last line. It ends with
    the first token that settles it, or after as many tokens as the answer has and SLACK more."""
    row = item.rows[0]
    prompt, room = list(row.ids[: -row.scored]), row.scored + SLACK
    device, ends = next(model.parameters()).device, _end_tokens(model, task)
    cache = None if kv_format == "native" else new_cache(model, kv_format, 1, len(prompt) + room)
    written: list[int] = []
    step = prompt
    while True:
        out = model(input_ids=torch.tensor([step], device=device), past_key_values=cache, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        logits = out.logits[0, -1]
        if not logits.isfinite().any():
            return False
        written.append(int(logits.argmax()))
        ended = written[-1] in ends or len(written) == room
        text = str(task.tokenizer.decode(written[:-1] if written[-1] in ends else written))
        settled = verdict(text, item.expected, ended)
        if settled is not None:
            return settled
        step = written[-1:] if cache is not None else prompt + written


def verdict(text: str, answer: str, ended: bool) -> bool | None:
    """Whether what was written so far is the answer; None where more of it must be seen."""
    text = text.lstrip()
    if not text.startswith(answer):
        open = answer.startswith(text.rstrip("\ufffd"))  # the bytes of a character may come in several tokens
        return None if open and not ended else False
    line, *more = text[len(answer) :].split("\n", 1)
    if line.strip():
        return False
    return True if more or ended else None


def _end_tokens(model: Any, task: Task) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in (*ends, task.tokenizer.eos_token_id) if token is not None}
