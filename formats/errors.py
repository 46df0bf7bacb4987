"""The exceptions that bitplan raises for failures a user can correct. Imported everywhere; imports nothing.

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
└── RoundingFailed        NaN weights, or a Hessian that is singular at any damping
"""


class BitplanError(Exception):
    """Base class. The message is one sentence: what was requested, what is possible, what to change."""

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
    """The first line of another library's error message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
