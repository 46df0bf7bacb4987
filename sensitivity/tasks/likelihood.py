"""log p of many short sequences, with what they have in common run once.

May import: formats.kv, sensitivity.loss/progress/vocabulary, sensitivity.tasks.task, transformers' caches.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bitplan.sensitivity.loss import log_probabilities, refuse_foreign_tokens, taken
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.tasks.task import TokenRow
from bitplan.sensitivity.vocabulary import vocabulary_size

ROWS = 32
AT_ONCE = 1 << 26
"""Log-probabilities in memory at a time, in numbers: 256 MiB."""


@torch.no_grad()
def log_likelihoods(model: Any, rows: list[TokenRow], kv_format: str = "native", name: str = "task") -> list[float]:
    """Σ log p of each row's scored tokens, in nats. Raises FormatUnavailable, UnknownFormat for the KV format.

    A row that comes twice runs once. So does what several rows begin with before their scored tokens, where the model
    keeps it in a cache that is transformers' own; others run whole. Shorter rows are filled up on the right, where a
    causal model's earlier tokens do not see it.
    """
    for row in rows:
        refuse_foreign_tokens(model, torch.tensor(row.ids))
    families: dict[tuple[int, ...], list[TokenRow]] = {}
    for row in dict.fromkeys(rows):
        families.setdefault(row.context, []).append(row)
    shares = kv_format == "native" and _keeps_plainly(model)
    shared: list[TokenRow] = []
    alone: list[TokenRow] = []
    for context, family in families.items():
        (shared if shares and len(family) > 1 and len(context) > 1 else alone).extend(family)
    shared.sort(key=lambda row: -len(row.context))  # stable: families stay together
    alone.sort(key=lambda row: -len(row.ids))
    limit = AT_ONCE // vocabulary_size(model)
    found: dict[TokenRow, float] = {}
    with progress(total=len(shared) + len(alone), desc=name, unit="row") as bar:
        for batch in _batches(shared, limit, same_length=True):
            found |= zip(batch, _after_context(model, batch), strict=True)
            bar.update(len(batch))
        for batch in _batches(alone, limit, same_length=False):
            ids = _filled([row.ids for row in batch])
            found |= zip(batch, _sums(log_probabilities(model, ids, kv_format), ids, batch, 0), strict=True)
            bar.update(len(batch))
    return [found[row] for row in rows]


def _keeps_plainly(model: Any) -> bool:
    """Whether a model's cache is transformers' own of keys and values, which can be handed on to several rows."""
    kept = getattr(model(input_ids=_filled([(0,)]).to(_device(model)), use_cache=True), "past_key_values", None)
    return type(kept) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in kept.layers
    )


def _batches(rows: list[TokenRow], limit: int, same_length: bool) -> Iterator[list[TokenRow]]:
    """At most ROWS rows and `limit` tokens; `same_length`: of contexts of one length, so that none is padded."""
    batch: list[TokenRow] = []
    for row in rows:
        longest = max(len(other.ids) for other in [*batch, row])
        full = len(batch) == ROWS or (len(batch) + 1) * longest > limit
        if batch and (full or (same_length and len(row.context) != len(batch[0].context))):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _after_context(model: Any, batch: list[TokenRow]) -> list[float]:
    places = {context: i for i, context in enumerate(dict.fromkeys(row.context for row in batch))}
    device, begun = _device(model), len(batch[0].context) - 1
    contexts = torch.tensor([context[:-1] for context in places], device=device)
    cache = model(input_ids=contexts, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([places[row.context] for row in batch], device=device))
    ids = _filled([row.ids[begun:] for row in batch])
    logits = model(input_ids=ids.to(device), past_key_values=cache, use_cache=True).logits
    return _sums(logits[:, :-1].float().log_softmax(-1), ids, batch, begun)


def _sums(log_p: Tensor, ids: Tensor, batch: list[TokenRow], begun: int) -> list[float]:
    """Σ log p of the scored tokens; `ids` lack each row's first `begun` tokens."""
    nats = taken(log_p, ids).double().cpu()
    ends = [len(row.ids) - begun - 1 for row in batch]
    return [-float(of[end - row.scored : end].sum()) for of, row, end in zip(nats, batch, ends, strict=True)]


def _filled(rows: list[tuple[int, ...]]) -> Tensor:
    """int64 [rows, the longest], with zeros after shorter rows."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
