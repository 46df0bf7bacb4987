"""Every failure that a user can mend, as one small tree. Leftmost: everything may import this, it imports nothing.

BitplanError              exit code 1
├── UsageError            exit code 2: the words of the request are off
│   └── UnknownFormat
├── BudgetInfeasible      exit code 3: no allocation fits
├── FormatUnavailable     a format that this machine or this weight cannot take
├── TextTooShort
├── ModelUnreadable       no folder, no weights, no tokenizer
├── PlanMismatch          plan and model disagree
├── FileInvalid           a plan or profile file that does not parse
├── CodesMissing          the plan's rounding needs text that has not been seen
└── RoundingFailed        NaN weights, a Hessian that no damping mends
"""


class BitplanError(Exception):
    """A failure told in one sentence: what was asked, what is possible, what to change."""

    exit_code = 1


class UsageError(BitplanError):
    exit_code = 2


class UnknownFormat(UsageError):
    pass


class BudgetInfeasible(BitplanError):
    exit_code = 3


class FormatUnavailable(BitplanError):
    pass


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


class RoundingFailed(BitplanError):
    pass


def first_line(error: Exception) -> str:
    """What another library's error says, for a sentence of ours; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
