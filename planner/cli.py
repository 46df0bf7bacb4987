"""The command `bitplan`: data on stdout, progress and errors on stderr.

Exit codes: 0 success, 1 failure, 2 usage error, 3 infeasible budget. Nothing slow is imported before a command runs.
May import: formats.errors; planner.commands once the arguments are read.
"""

import logging
import os
import sys
import traceback
import warnings
from errno import EDQUOT, ENOSPC
from importlib import import_module
from io import TextIOWrapper

from bitplan.formats.errors import BitplanError, printable
from bitplan.planner.commands.arguments import build_parser

FULL = (ENOSPC, EDQUOT)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    _write_utf8()
    arguments = build_parser().parse_args(argv)
    _quiet_libraries()
    try:
        import_module(f"bitplan.planner.commands.{arguments.command}").run(arguments)
        sys.stdout.flush()  # here, where a full disk is a sentence
        return 0
    except BitplanError as error:
        _say(error, f"bitplan: {error}")
        return error.exit_code
    except KeyboardInterrupt as error:
        _say(error, "\nbitplan: interrupted; run the same command again to resume")
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except Exception as error:  # one line; the traceback is shown on request
        if os.environ.get("BITPLAN_DEBUG"):
            raise
        _say(error, f"bitplan: {printable(_unexpected(error))}")
        if isinstance(error, OSError) and error.errno in FULL:
            _drop_stdout()
        return 1


def _say(error: BaseException, text: str) -> None:
    """Print a sentence below the progress bars of what failed, which end with the frames that hold them."""
    reason: BaseException | None = error
    while reason is not None:
        traceback.clear_frames(reason.__traceback__)
        reason = reason.__context__
    print(text, file=sys.stderr)


def _drop_stdout() -> None:
    """What could not be written is not tried again at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: Exception) -> str:
    from bitplan.formats.errors import first_line
    from bitplan.sensitivity.store import cache_folder

    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return "out of memory: give a smaller --block, fewer --formats, or --device cpu"
    if isinstance(error, OSError) and error.filename is not None:
        inside = str(cache_folder()) in str(error.filename)
        hint = ": it is in the cache; set BITPLAN_CACHE to a folder that can be written" if inside else ""
        return f"{error.filename}: {error.strerror}{hint}"
    if isinstance(error, OSError) and error.errno in FULL:  # files' writers name their paths
        return f"cannot write the output: {error.strerror}"
    name, reason = type(error).__name__, first_line(error)
    return f"{name if reason == name else f'{name}: {reason}'} (set BITPLAN_DEBUG=1 for the whole trace)"


def _write_utf8() -> None:
    """Files and pipes get UTF-8 on every system; a terminal keeps its encoding, and shows ? for what that lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="optuna")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
