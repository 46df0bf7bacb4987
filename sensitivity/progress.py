"""The progress bar of all long work: on stderr, with what is left. May import: tqdm."""

import os
import sys
from functools import partial

from tqdm import tqdm

progress = partial(
    tqdm,
    file=sys.stderr,
    dynamic_ncols=True,
    mininterval=0.1 if sys.stderr.isatty() else 10,
    disable=os.environ.get("RANK", "0") != "0",  # of several processes, torchrun's first one speaks for all
)
"""`for x in progress(xs, desc=…, unit=…)`; where stderr is no terminal, a line every ten seconds at most."""
