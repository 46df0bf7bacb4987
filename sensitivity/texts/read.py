"""Texts read, written by the model, or recalled, tokenized for a model.

May import: formats.errors, sensitivity.profile/session/source/store/vocabulary/weight_cache, the modules beside it.
"""

import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bitplan.formats.errors import PlanMismatch, TextNotWritten, first_line, printable
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import TextFacts
from bitplan.sensitivity.session import PARTS, SEED, load_reference, pick_device
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.store import cache_folder, load_tensors, locked, save_tensors, sha256
from bitplan.sensitivity.texts import text as texts
from bitplan.sensitivity.texts.samples import SAMPLED, first_tokens, written
from bitplan.sensitivity.texts.text import Blocks, Texts
from bitplan.sensitivity.vocabulary import vocabulary_size
from bitplan.sensitivity.weight_cache import computed_on


def read_texts(
    source: Source,
    *,
    files: list[Path] | None = None,
    dataset: str | None = None,
    heldout: list[Path] | None = None,
    sampled: bool = False,
    tokens: int = texts.TOKENS,
    length: int = texts.BLOCK,
    device: str = "auto",
) -> Texts:
    """The three texts, tokenized for a model. `sampled`: what the model itself writes on `device`, but for `heldout`.
    Raises TextTooShort, TextNotWritten, UsageError, ModelUnreadable."""
    tokenizer = sources.load_tokenizer(source)
    length = sources.block_length(source, length)
    if sampled:
        return _sampled(source, tokenizer, tokens, length, device, heldout)
    return texts.prepare(tokenizer, files=files, dataset=dataset, heldout=heldout, tokens=tokens, length=length)


def default_texts(source: Source, **options: Any) -> Texts:
    """`read_texts` of what the model itself writes; where it cannot, of the sources of Python's standard library, and a
    line says so."""
    try:
        return read_texts(source, **options, sampled=True)
    except TextNotWritten as error:
        print(printable(f"{error}; {texts.DEFAULT_SOURCE} are used"), file=sys.stderr)
        return read_texts(source, **options)


def has_written(source: Source, tokens: int, length: int, device: str) -> bool:
    """Whether the cache holds the text that a model writes, for `read_texts`' arguments of these names."""
    length = sources.block_length(source, length)
    return _written(source, sum(texts.counts(tokens, length).values()), length, pick_device(device)).exists()


def _written(source: Source, blocks: int, length: int, device: str) -> Path:
    facts = (source.weights_sha256, source.config_sha256, version("transformers"), computed_on(device))
    return cache_folder() / "text" / f"sampled-{sha256(*facts, str(blocks), str(length), str(SEED))[:24]}.safetensors"


def _sampled(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    length: int,
    device: str,
    heldout: list[Path] | None,
) -> Texts:
    """Blocks that the model writes, made once and kept in the cache."""
    sources.refuse_quantized(source)
    wanted, device = texts.counts(tokens, length), pick_device(device)
    total = sum(wanted.values())
    path = _written(source, total, length, device)
    with locked(path):
        kept = load_tensors(path)
        if kept is None:
            model = load_reference(source, device)
            vocabulary = min(len(tokenizer), vocabulary_size(model))
            first = first_tokens(texts.first_token(tokenizer), vocabulary, total, SEED)
            try:
                kept = {"ids": written(model, first, length, SEED)}
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # model code refuses to generate in any type
                raise TextNotWritten(f"{source.model} cannot write text itself: {first_line(error)}") from error
            save_tensors(path, kept)
    parts = dict(zip(wanted, (Blocks(ids) for ids in kept["ids"].split(list(wanted.values()))), strict=True))
    if heldout:
        parts["heldout"] = texts.prepare(tokenizer, heldout=heldout, tokens=tokens, length=length).heldout
    return Texts(**parts, healing=parts["calibration"], source=SAMPLED, tokens=tokens)


def recall_texts(
    facts: TextFacts,
    source: Source,
    files: list[Path] | None = None,
    heldout: list[Path] | None = None,
    needed: tuple[str, ...] = PARTS,
    device: str = "auto",
) -> Texts | None:
    """The very texts that a plan or profile names: from the cache, or read again from `files` and `heldout`, from the
    standard library or from the model. Only the parts `needed` are sure to be those. None where there is nothing to
    read them from.

    Raises PlanMismatch where what there is to read is other text.
    """
    parts = {name: texts.recall(facts.part(name).sha256) for name in PARTS}
    if all(parts.values()):
        return Texts(**parts, source=facts.source, tokens=facts.tokens)  # type: ignore[arg-type]
    places = [None] if facts.source in (texts.DEFAULT_SOURCE, SAMPLED) else []
    for place in [files, *places] if files else places:
        again = read_texts(
            source,
            files=place,
            heldout=heldout,
            sampled=place is None and facts.source == SAMPLED,
            tokens=facts.tokens,
            length=facts.calibration.length,
            device=device,
        )
        if facts.healing is None:
            again = replace(again, healing=again.calibration)
        if all(getattr(again, name).fingerprint == facts.part(name).sha256 for name in needed):
            return again
    if not files and not places:
        return None
    own = "what the model writes here" if facts.source == SAMPLED else "this Python's standard library"
    given = ", ".join(file.name for file in files) if files else own
    more = " and its --heldout" if "heldout" in needed else ""
    raise PlanMismatch(
        f"{given} is not the text that was used ({facts.source}; fingerprint {facts.calibration.sha256[:12]}): give"
        f" that text{more}, or start again with this one"
    )
