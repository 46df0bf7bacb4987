"""Paired loss against the full-precision model, on identical tokens.

Both nats above full precision and KL are means per predicted token; standard errors are over blocks, whose tokens
are not independent. May import: formats.errors/kv, sensitivity.progress/store/texts.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from bitplan.formats.errors import OutputsNotFinite, UsageError
from bitplan.formats.kv.cache import new_cache
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.store import IN_MEMORY, States
from bitplan.sensitivity.texts.text import Blocks

AT_ONCE = 64
"""Tokens whose KL is computed at once."""
SHOWN = 5
"""Seconds after which an evaluation shows its progress."""


@dataclass(frozen=True)
class Evaluation:
    """A model beside the full-precision model, nats per token. `kl` is KL(full precision || model)."""

    tokens: int
    nll: float
    delta_nll: float
    delta_nll_se: float
    kl: float
    kl_se: float

    @property
    def ppl(self) -> float:
        return exp(min(self.nll, 700.0))


def refuse_foreign_tokens(model: Any, ids: Tensor) -> None:
    """Raises UsageError where a token of ids (int64, any shape) is beyond the model's embedding."""
    rows = getattr(getattr(model.get_input_embeddings(), "weight", None), "shape", (sys.maxsize,))[0]
    if ids.numel() and (highest := int(ids.max())) >= rows:
        raise UsageError(
            f"the text holds token {highest}, and the model's embedding has {rows} rows: its tokenizer is of another"
            f" model"
        )


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor, kv_format: str = "native") -> Tensor:
    """log p of every next token: float32 [blocks, length - 1, vocabulary] for ids int64 [blocks, length]; keys and
    values go through a KV cache of another format, where one is named."""
    refuse_foreign_tokens(model, ids)
    cached = {}
    if kv_format != "native":
        cached["past_key_values"] = new_cache(model, kv_format, *ids.shape)
    logits = model(input_ids=ids.to(next(model.parameters()).device), use_cache=bool(cached), **cached).logits
    return logits[:, :-1].float().log_softmax(-1)


def taken(log_p: Tensor, ids: Tensor) -> Tensor:
    """Nats of the tokens that came: float32 [blocks, length - 1]."""
    return -log_p.gather(-1, ids[:, 1:, None].to(log_p.device)).squeeze(-1)


def standard_error(block_means: Tensor) -> float:
    """Of the mean of the blocks' means, float [blocks]; infinite for one block, which says nothing of others."""
    return float(block_means.std() / len(block_means) ** 0.5) if len(block_means) > 1 else float("inf")


def finite(error: float) -> float | None:
    """A standard error as files have it: None where one block gives none."""
    return error if isfinite(error) else None


def refuse_not_finite(evaluation: Evaluation, model: Any) -> Evaluation:
    """The evaluation. Raises OutputsNotFinite where it holds NaN or infinity, as of a model that overflows."""
    if isfinite(evaluation.nll) and isfinite(evaluation.kl):
        return evaluation
    dtype = str(model.dtype).removeprefix("torch.")
    hint = "name a checkpoint in bfloat16 or float32" if dtype == "float16" else "give its units more bits"
    raise OutputsNotFinite(f"the outputs of {type(model).__name__} are not finite in {dtype}: {hint}")


@dataclass(frozen=True)
class _Asked:
    """Log-probabilities that are computed at each use."""

    of_block: Callable[[int], Tensor]

    def __getitem__(self, block: int) -> Tensor:
        return self.of_block(block)[0]


def _evaluating(blocks: int) -> Iterable[int]:
    return progress(range(blocks), desc="evaluating", unit="block", delay=SHOWN, leave=False)


class Reference:
    """The full-precision model's log-probabilities on some blocks, kept so that others can be compared with them."""

    def __init__(
        self,
        model: nn.Module | None,
        blocks: Blocks,
        of_block: Callable[[int], Tensor] | None = None,
        kept: bool = True,
    ):
        """`of_block`: gives log-probabilities by a block's number, where the model cannot run whole; they then lie in
        a file, read a block at a time, or if not `kept`, are asked for again."""
        self.blocks = blocks
        count, length = blocks.ids.shape
        run = of_block or (lambda i: log_probabilities(model, blocks.ids[i : i + 1]))
        first = run(0).cpu()
        shape = (count, length - 1, first.shape[-1])
        memory = IN_MEMORY if of_block is None else 0
        self.log_p: States | _Asked = States(shape, memory=memory) if kept else _Asked(run)
        nll = []
        for i in _evaluating(count):
            log_p = run(i).cpu() if i else first
            if not isinstance(self.log_p, _Asked):
                self.log_p[i] = log_p[0]
            nll.append(taken(log_p, blocks.ids[i : i + 1])[0])
        self.nll = torch.stack(nll)
        """Full-precision nats of each token: float32 [blocks, length - 1]."""

    def evaluate(self, model: nn.Module, kv_format: str = "native") -> Evaluation:
        """A model, with its KV cache in a format where one is named."""
        return self.compare(lambda i: log_probabilities(model, self.blocks.ids[i : i + 1], kv_format))

    def kl(self, block: int, log_q: Tensor) -> Tensor:
        """KL(full precision || q) of a block by its number, nats per token: a scalar."""
        log_p = self.log_p[block].to(log_q.device)
        # Some tokens at a time: each of the products below is as large as the log-probabilities.
        parts = zip(log_p.split(AT_ONCE), log_q[0].split(AT_ONCE), strict=True)
        return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in parts]).mean()

    def compare(self, log_probabilities_of: Callable[[int], Tensor]) -> Evaluation:
        """What gives log-probabilities float32 [1, length - 1, vocabulary] for a block's number."""
        nll, kl = [], []
        for i in _evaluating(len(self.blocks.ids)):
            ids = self.blocks.ids[i : i + 1]
            log_q = log_probabilities_of(i)
            nll.append(taken(log_q, ids).cpu()[0])
            kl.append(self.kl(i, log_q).cpu())
        nll_tokens, kl_blocks = torch.stack(nll), torch.stack(kl)
        delta = (nll_tokens - self.nll).mean(-1)
        return Evaluation(
            tokens=self.blocks.predictions,
            nll=float(nll_tokens.mean()),
            delta_nll=float(delta.mean()),
            delta_nll_se=standard_error(delta),
            kl=float(kl_blocks.mean()),
            kl_se=standard_error(kl_blocks),
        )
