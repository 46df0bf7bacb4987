"""Text that a model writes itself, for models whose users have none at hand.

As LLM-QAT (Liu et al. 2023) does: a first token from all of the vocabulary, then tokens from the model's own
distribution. KL on such text is the KL between the two models' distributions of texts, without any other text's bias.
May import: sensitivity.progress, the modules beside it.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from bitplan.sensitivity.progress import progress

SAMPLED = "text that the model itself wrote"
BATCH = 32
"""Blocks that are written at once."""


@torch.no_grad()
def written(model: PreTrainedModel, first: Tensor, length: int, seed: int) -> Tensor:
    """Token ids, int64 [blocks, length], that begin with `first` [blocks]; the rest is drawn from the model's softmax
    (no cut of it, no temperature), past any end-of-text token. The model's generation_config is replaced, the random
    state stays as it was."""
    # transformers fills what another config leaves out from this one: a temperature, penalties, where to end.
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - 1, pad_token_id=0)
    made = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for part in progress(first.unsqueeze(1).split(BATCH), desc="text by the model", unit=f"{BATCH} blocks"):
            ids = part.to(model.device)
            out = model.generate(ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
            made.append(out.cpu())
    return torch.cat(made)


def first_tokens(start: list[int], vocabulary: int, blocks: int, seed: int) -> Tensor:
    """What blocks begin with: the token that the tokenizer starts every text with, where there is one, else any of the
    vocabulary: int64 [blocks]."""
    if start:
        return torch.full((blocks,), start[0])
    return torch.randint(0, vocabulary, (blocks,), generator=torch.Generator().manual_seed(seed))
