"""Text files, a dataset or the standard library's sources → three disjoint sets of token blocks.

Calibration text rounds and gathers statistics, search text chooses, held-out text is reported. Healing text is the
calibration text and what follows it.
May import: formats.errors, sensitivity.reading/store, the modules beside it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bitplan.formats.errors import TextTooShort, UsageError, first_line
from bitplan.sensitivity.reading import read_text
from bitplan.sensitivity.store import cache_folder, load_tensors, save_tensors, sha256
from bitplan.sensitivity.texts import stdlib
from bitplan.sensitivity.texts.overlap import Passage, refuse_shared

TOKENS = 32_768
"""Calibration tokens unless asked otherwise; search text takes a quarter as many, held-out text half."""
BLOCK = 512
HEALING = 409_600
"""The most tokens of healing text."""
SHARES = {"calibration": 0.5, "search": 0.2, "heldout": 0.3}
MINIMUM = {"calibration": 4, "search": 2, "heldout": 2}
"""Fewest blocks of each part."""
DEFAULT_SOURCE = "the sources of Python's standard library"


@dataclass(frozen=True)
class Blocks:
    """Token ids, int64 [blocks, length]: the loss is over length - 1 predictions a block."""

    ids: Tensor

    @property
    def fingerprint(self) -> str:
        return sha256(str(tuple(self.ids.shape)), self.ids.numpy().tobytes())

    @property
    def predictions(self) -> int:
        return self.ids.shape[0] * (self.ids.shape[1] - 1)


def remember(blocks: Blocks) -> None:
    """Keep blocks in the cache, so that a file that names their fingerprint can be used without their text."""
    path = cache_folder() / "text" / f"{blocks.fingerprint}.safetensors"
    if not path.exists():
        save_tensors(path, {"ids": blocks.ids})


def recall(fingerprint: str) -> Blocks | None:
    tensors = load_tensors(cache_folder() / "text" / f"{fingerprint}.safetensors")
    return Blocks(tensors["ids"]) if tensors else None


@dataclass(frozen=True)
class Texts:
    calibration: Blocks
    search: Blocks
    heldout: Blocks
    healing: Blocks
    source: str
    """Where the text came from, in words."""
    tokens: int
    """Calibration tokens, as requested."""


def read_dataset(name: str, characters: int) -> str:
    """Up to `characters` of the text column of a dataset's train split; NAME or NAME:CONFIG. Raises UsageError."""
    import datasets

    path, _, config = name.partition(":")
    parts: list[str] = []
    size = 0
    try:
        rows = datasets.load_dataset(path, config or None, split="train", streaming=True)  # reads no further than asked
        for row in rows:
            if "text" not in row:
                raise UsageError(f"dataset {name} has no column 'text', only {', '.join(row)}")
            parts.append(row["text"] or "")
            size += len(parts[-1])
            if size >= characters:
                break
    except UsageError:
        raise
    except Exception as error:  # datasets raises many unrelated types for one outcome
        raise UsageError(f"cannot load dataset {name}: {first_line(error)}") from None
    return "\n".join(parts)


def counts(tokens: int, length: int) -> dict[str, int]:
    """Blocks of each text for so many calibration tokens. Raises UsageError for too few."""
    if tokens < MINIMUM["calibration"] * length:
        raise UsageError(
            f"{tokens} calibration tokens are fewer than {MINIMUM['calibration']} blocks of {length}: raise --tokens to"
            f" {MINIMUM['calibration'] * length}, or lower --block"
        )
    sizes = {"calibration": tokens, "search": tokens // 4, "heldout": tokens // 2}
    return {name: max(1, size // length) for name, size in sizes.items()}


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    *,
    files: list[Path] | None = None,
    dataset: str | None = None,
    heldout: list[Path] | None = None,
    tokens: int = TOKENS,
    length: int = BLOCK,
) -> Texts:
    """Read, tokenize, split. Each document gives its first half to calibration, a fifth to search, the rest is held
    out (or left unused, where `heldout` files are given). Without any text: the standard library's sources, whose
    held-out modules are fixed. Raises TextTooShort, UsageError (also where held-out text stands in the
    other text too)."""
    wanted = counts(tokens, length)
    parts: dict[str, list[list[int]]] = {name: [] for name in SHARES}
    if files or dataset:
        documents = [read_text(path) for path in files] if files else [read_dataset(str(dataset), tokens * 20)]
        source = ", ".join(path.name for path in files) if files else str(dataset)
    else:
        documents, source = [stdlib.calibration_text(tokens * 10)], DEFAULT_SOURCE
    if heldout:
        fixed = [read_text(path) for path in heldout]
        names = [str(path) for path in files] if files else [source]
        refuse_shared(
            [Passage(name, document, i) for i, (name, document) in enumerate(zip(names, documents, strict=True))],
            [Passage(str(path), document, -1) for path, document in zip(heldout, fixed, strict=True)],
        )
    elif files:
        fixed = []
        ends = [round(len(document) * (1 - SHARES["heldout"])) for document in documents]
        named = list(zip(map(str, files), documents, ends, strict=True))
        refuse_shared(
            [Passage(name, document[:end], i) for i, (name, document, end) in enumerate(named)],
            [Passage(name, document[end:], i) for i, (name, document, end) in enumerate(named)],
        )
    else:
        fixed = [] if dataset else stdlib.held_out_documents()
    for document in documents:
        ids = _encode(tokenizer, document)
        start, passed = 0, 0.0
        for name, share in SHARES.items():
            passed += share
            stop = round(passed * len(ids))
            parts[name].append(ids[start:stop])
            start = stop
    if fixed:
        parts["heldout"] = [_encode(tokenizer, document) for document in fixed]
    first = first_token(tokenizer)
    made = {}
    for name, streams in parts.items():
        every = _blocks(streams, length, first)
        blocks = every[: wanted[name]]
        if len(blocks) < min(MINIMUM[name], wanted[name]):
            have = sum(map(len, streams))
            raise TextTooShort(
                f"text too short: {name} text has {have} tokens in blocks of {length}, and {MINIMUM[name] * length} are"
                f" needed: give more text, or a smaller --block"
            )
        made[name] = Blocks(torch.tensor(blocks))
        if name == "calibration":
            made["healing"] = Blocks(torch.tensor(every[: max(HEALING // length, len(blocks))]))
    return Texts(**made, source=source, tokens=tokens)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer starts every text with, which models trained so need at the start of a block."""
    start = tokenizer("a")["input_ids"][:1]
    return start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []


def _blocks(streams: list[list[int]], length: int, first: list[int]) -> list[list[int]]:
    """Whole blocks of each stream, taken from the streams in turn so that a cut leaves none out."""
    step = length - len(first)
    cut = [[first + s[i : i + step] for i in range(0, len(s) - step + 1, step)] for s in streams]
    return [blocks[i] for i in range(max(map(len, cut), default=0)) for blocks in cut if i < len(blocks)]
