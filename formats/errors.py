"""The exceptions that bitplan raises for failures a user can correct. May import: the standard library.

BitplanError              exit code 1
├── UsageError            exit code 2: an invalid argument or option
│   └── UnknownFormat
├── BudgetInfeasible      exit code 3: no allocation fits
├── FormatUnavailable     a format that this machine, model or weight does not support
├── TextTooShort
├── ModelUnreadable       no folder, no weights, no tokenizer
├── PlanMismatch          the plan was made for another model
├── FileInvalid           a plan or profile file that does not parse
├── CodesMissing          the plan's codes follow from calibration text that was not given
├── WriteFailed           a file that cannot be written, a disk that is full
├── OutputsNotFinite      a model that gives NaN or infinity
└── RoundingFailed        NaN weights, or a Hessian that is singular at any damping
"""

import re

SCREENFUL = 2000
"""Characters of a line that is printed; a longer one is cut."""
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, changes its colours or the order of letters, or cannot be encoded."""


class BitplanError(Exception):
    """Base class. The message is one sentence: what was requested, what is possible, what to change."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(BitplanError):
    exit_code = 2


class UnknownFormat(UsageError):
    pass


class BudgetInfeasible(BitplanError):
    exit_code = 3


class FormatUnavailable(BitplanError):
    pass


class TextNotWritten(BitplanError):
    """A model cannot write its own calibration text."""


class TextTooShort(BitplanError):
    pass


class ModelUnreadable(BitplanError):
    pass


class PlanMismatch(BitplanError):
    pass


class FileInvalid(BitplanError):
    pass


class CodesMissing(BitplanError):
    pass


class WriteFailed(BitplanError):
    pass


class OutputsNotFinite(BitplanError):
    pass


class RoundingFailed(BitplanError):
    pass


def first_line(error: Exception) -> str:
    """The first line of another library's error message, with the next where it ends in a colon, or the name of its
    type if the message is empty."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__


def printable(text: str) -> str:
    """Text that may hold what a stranger wrote, as a terminal can show it: control characters are written as escapes,
    and a line longer than a screenful is cut."""
    lines = UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text).split("\n")
    return "\n".join(line if len(line) <= SCREENFUL else f"{line[:SCREENFUL]}…" for line in lines)
