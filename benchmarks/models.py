"""The models of a benchmark, each with a text to calibrate on and one to be evaluated on: the embedded one, and others.

May import: planner.demo.
"""

import argparse
from pathlib import Path

from bitplan.planner.demo import CALIBRATION, HELDOUT, MODEL


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--also", nargs=3, action="append", default=[], metavar=("MODEL", "TEXT", "HELDOUT"))
    parser.add_argument("--only-also", action="store_true", help="without the embedded model")


def chosen(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Model, text and held-out text of each that the options name."""
    embedded = [] if arguments.only_also else [(str(MODEL), str(CALIBRATION), str(HELDOUT))]
    return [*embedded, *map(tuple, arguments.also)]


def label(model: str) -> str:
    return "embedded" if Path(model) == MODEL else Path(model).name
