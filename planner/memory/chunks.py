"""Whether a model can read a prompt in chunks, which bounds the memory of its first pass.

Some models that keep states beside keys and values begin each chunk from an empty state, some cannot be given a cache
at all: a pass in chunks is compared with a whole one. May import: formats.errors, planner.memory.kv_size,
planner.plan, sensitivity.source/vocabulary.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from bitplan.formats.errors import FormatUnavailable
from bitplan.planner.memory.kv_size import kv_facts
from bitplan.planner.plan import Workload
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.vocabulary import vocabulary_size

TOKENS, CHUNK = 24, 10
CANNOT_READ_CHUNKS = "prompts are read whole: in chunks its outputs differ, or it cannot read them"


@torch.no_grad()
def reads_in_chunks(model: Any) -> bool:
    """Whether `generate` gives the same logits for a prompt of TOKENS that it reads CHUNK at a time as for a whole
    one, up to rounding."""
    vocabulary = vocabulary_size(model)
    ids = torch.arange(3, 3 + TOKENS, device=model.device).remainder(vocabulary).unsqueeze(0)

    def logits(**how: Any) -> torch.Tensor:
        once = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
        out: Any = model.generate(
            ids, attention_mask=torch.ones_like(ids), **once, output_logits=True, return_dict_in_generate=True, **how
        )
        return out.logits[0].float()

    whole = logits()
    try:
        chunked = logits(prefill_chunk_size=CHUNK)
    except Exception:  # model code refuses a cache that is not empty, or a chunk, in any type of error
        return False
    # Chunks are summed in another order: half of the type's digits agree where the sums are the same.
    spread, digits = float(whole.std()), torch.finfo(model.dtype).eps ** 0.5
    return bool((whole - chunked).abs().max() <= digits * spread) or not bool(whole.isfinite().all())


def keeps_only_tokens(source: Source, dtype: str) -> bool:
    """Whether the config shows that the model keeps keys and values of its tokens, and nothing else."""
    try:
        facts = kv_facts(sources.transformers_config(source), getattr(torch, dtype))
    except FormatUnavailable:
        return False
    return all(layer.heads and not layer.state_bytes for layer in facts.layers)


def chunked_workload(workload: Workload, source: Source, dtype: str, model: PreTrainedModel | None) -> Workload:
    """The workload, without chunks where the model cannot read them. Without a loaded `model`, those that keep only
    tokens can, and others are loaded for it."""
    if workload.prefill_chunk is None:
        return workload
    if model is None:
        able = keeps_only_tokens(source, dtype) or reads_in_chunks(sources.load_model(source))
    else:
        able = reads_in_chunks(model)
    return workload if able else workload.model_copy(update={"prefill_chunk": None})
