"""A model's marks on a task, item by item, so that two models can be compared on the same items.

May import: formats.kv_cache, sensitivity.likelihood/progress/task.
"""

from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from formats.kv_cache import new_cache
from sensitivity.likelihood import log_likelihoods
from sensitivity.progress import progress
from sensitivity.task import SLACK, Item, Kind, Task


@dataclass(frozen=True)
class Scores:
    """One value an item, float64 [items]; a model that gives no numbers is wrong, with infinite nats.

    values: what is reported. choice: 1 where the right choice has the greatest log-likelihood Σ log p(token), else 0
        (lm-evaluation-harness's acc). exact: 1 where greedy text is the answer. text: nats per token.
    per_byte: choice only: the same with each log-likelihood divided by its choice's UTF-8 bytes (acc_bytes, which
        favours no short choices; its acc_norm divides by characters).
    nats: the smooth loss that a search can follow, lower is better. choice: -log of the right choice's softmax over
        the choices' log-likelihoods. exact: -Σ log p of the answer's tokens. text: as `values`.
    """

    kind: Kind
    values: Tensor
    nats: Tensor
    per_byte: Tensor | None = None

    @property
    def mean(self) -> float:
        """The task's figure: accuracy from 0 to 1, or nats per token, every item counting the same."""
        return float(self.values.mean())

    @property
    def ppl(self) -> float | None:
        """text: e to the mean nats per token."""
        return exp(min(self.mean, 700.0)) if self.kind == "text" else None

    @property
    def loss(self) -> float:
        """The search's objective: mean nats an item."""
        return float(self.nats.mean())


@torch.no_grad()
def score(model: PreTrainedModel, task: Task, kv_format: str = "native") -> Scores:
    """Score a model, wherever it is, on every item; keys and values go through a KV cache of another format, where one
    is named. Raises FormatUnavailable and UnknownFormat for what the cache cannot be."""
    rows = [row for item in task.items for row in item.rows]
    likelihoods = iter(log_likelihoods(model, rows, kv_format, task.name))
    values, nats, per_byte = [], [], []
    for item in task.items:
        found = torch.tensor([next(likelihoods) for _ in item.rows], dtype=torch.float64)
        if task.kind == "choice":
            values.append(_is_best(found, item.answer))
            per_byte.append(_is_best(found / torch.tensor(item.sizes), item.answer))
            nats.append(float(-found.log_softmax(0)[item.answer]))
        else:
            nats.append(float(-found.sum()))
    if task.kind == "exact":
        values = [float(writes(model, task, item, kv_format)) for item in progress(task.items, desc=task.name)]
    elif task.kind == "text":
        nats = [total / sum(row.scored for row in item.rows) for total, item in zip(nats, task.items, strict=True)]
        values = nats
    losses = torch.tensor(nats, dtype=torch.float64).nan_to_num(torch.inf)
    return Scores(
        task.kind,
        losses if task.kind == "text" else torch.tensor(values, dtype=torch.float64),
        losses,
        torch.tensor(per_byte, dtype=torch.float64) if task.kind == "choice" else None,
    )


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
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    told = told if isinstance(told, list) else [told]
    return {token for token in (*told, task.tokenizer.eos_token_id) if token is not None}
