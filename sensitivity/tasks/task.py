"""A task: questions as token sequences that a model is scored on.

Prompt and answer are joined as they stand: a space between them belongs to one of them. No chat template is applied.
May import: formats.errors, sensitivity.store, sensitivity.texts, the modules beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerBase

from bitplan.formats.errors import UsageError
from bitplan.sensitivity.store import sha256
from bitplan.sensitivity.tasks.harness import harness_questions
from bitplan.sensitivity.tasks.question import Kind, Question, read_questions
from bitplan.sensitivity.texts.text import _encode, first_token

SLACK = 4
"""Tokens that an exact answer may take beyond its own, for the line's end."""
FEWEST = 20
"""Items that a task must have to be searched with: half of them choose, half are reported."""


@dataclass(frozen=True)
class TokenRow:
    """Token ids of one sequence, of which the last `scored` count."""

    ids: tuple[int, ...]
    scored: int

    @property
    def context(self) -> tuple[int, ...]:
        return self.ids[: -self.scored]


@dataclass(frozen=True)
class Item:
    """choice: a row per choice. exact: one row. text: a row per window of the model's length."""

    rows: tuple[TokenRow, ...]
    answer: int = 0
    """The row of the right choice."""
    sizes: tuple[int, ...] = ()
    """UTF-8 bytes of each choice, without white space around it."""
    expected: str = ""
    """exact: what greedy text must be, without white space around it."""
    cut: bool = False
    """The prompt's beginning was left out, so that the rest fits the model's length."""


@dataclass(frozen=True)
class Task:
    name: str
    kind: Kind
    items: tuple[Item, ...]
    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """sha256 over the kind and all tokens and answers: the same words in another tokenizer are another task."""
        return sha256(self.kind, repr(self.items))

    def halves(self) -> tuple["Task", "Task"]:
        """Two tasks without an item in common, by a fixed shuffle: one to choose with, one to report. An item that is
        there twice counts once. Raises UsageError for fewer than FEWEST."""
        items = list(dict.fromkeys(self.items))
        if len(items) < FEWEST:
            raise UsageError(
                f"{self.name} has {len(items)} different items, of which half choose and half are reported: give"
                f" {FEWEST} or more"
            )
        Random(0).shuffle(items)
        middle = len(items) // 2
        return replace(self, items=tuple(items[:middle])), replace(self, items=tuple(items[middle:]))

    @property
    def note(self) -> str | None:
        """What was done to the items that a reader of their figures should know."""
        cut = sum(item.cut for item in self.items)
        return f"{self.name}: {cut} of {len(self.items)} prompts cut from the left to fit the model" if cut else None


def read_task(
    path_or_name: str | Path, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None
) -> Task:
    """A task from a JSON-lines file, or by its name in lm-evaluation-harness; `length` is the most tokens that the
    model takes, `limit` the most items, the first ones. A name that ends in .json or .jsonl, or of a file that is
    there, is a file. Raises UsageError."""
    path = Path(path_or_name)
    if path.is_file() or path.suffix in (".json", ".jsonl"):
        return make_task(path.stem, read_questions(path)[:limit], tokenizer, length)
    return make_task(str(path_or_name), harness_questions(str(path_or_name), limit), tokenizer, length)


def make_task(name: str, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, length: int) -> Task:
    """Tokenize questions of one kind. Raises UsageError for what has no tokens or more than the model takes."""
    items = tuple(encode(question, tokenizer, length) for question in questions)
    return Task(name, questions[0].kind, items, tokenizer)


def encode(question: Question, tokenizer: PreTrainedTokenizerBase, length: int) -> Item:
    """Tokens of a question.

    A prompt and its answer are tokenized together, since a token may span the two. What is scored begins where the
    tokens of prompt + answer, of any choice, leave those of the prompt: so all of every choice is scored, and where
    choices share a prompt, all after the same tokens. (lm-evaluation-harness cuts after as many tokens as the prompt
    alone has, which differs only where a token spans the two.) Every sequence begins with the token that the
    tokenizer begins texts with, if it does; an empty prompt needs that, or an end token in its place. Prompts are cut
    from the left where the longest choice would not fit. Raises UsageError.
    """
    first = first_token(tokenizer)
    if question.kind == "text":
        return Item(tuple(_windows(question, first + _encode(tokenizer, question.candidates[0][1]), length, first)))
    prompts = [_encode(tokenizer, prompt) for prompt, _ in question.candidates]
    whole = [_encode(tokenizer, prompt + answer) for prompt, answer in question.candidates]
    starts = [_agreeing(*pair) for pair in zip(prompts, whole, strict=True)]
    if len({prompt for prompt, _ in question.candidates}) == 1:
        starts = [min(starts)] * len(starts)
    extra = SLACK if question.kind == "exact" else 0
    longest = max(len(ids) - start for ids, start in zip(whole, starts, strict=True)) + extra
    rows, cut = [], False
    for i, (ids, start) in enumerate(zip(whole, starts, strict=True)):
        if start == len(ids):
            raise UsageError(f"{question.where}: choice {i} adds no token to the prompt")
        begin = first or ([] if start else _end_token(question.where, tokenizer))
        room = length - longest - len(begin)
        if room < (0 if begin else 1):
            raise UsageError(
                f"{question.where}: an answer of {longest - extra} tokens leaves no room for a prompt: the model"
                f" takes {length}"
            )
        kept = ids[max(0, start - room) : start]
        cut |= len(kept) < start
        rows.append(TokenRow((*begin, *kept, *ids[start:]), len(ids) - start))
    sizes = tuple(max(1, len(answer.strip().encode())) for _, answer in question.candidates)
    item = Item(tuple(rows), question.answer, sizes, cut=cut)
    if question.kind == "choice":
        return item
    # What a token that spans the two adds of the prompt must be written again, so it is part of what is expected.
    return replace(item, expected=str(tokenizer.decode(list(whole[0][starts[0] :]))).strip())


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _end_token(where: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise UsageError(f"{where}: the prompt is empty, and the tokenizer has no token that begins or ends a text")
    return [token]


def _windows(question: Question, ids: list[int], length: int, first: list[int]) -> Iterator[TokenRow]:
    """Cut a text into windows that score each token but the first once; all but the first window begin with `first`
    and the token before."""
    if len(ids) < 2:
        raise UsageError(f"{question.where}: the text is of one token, so there is nothing to predict")
    yield TokenRow(tuple(ids[:length]), min(length, len(ids)) - 1)
    step = length - len(first) - 1
    for at in range(length, len(ids), step):
        part = ids[at : at + step]
        yield TokenRow((*first, ids[at - 1], *part), len(part))
