"""A checkpoint larger than memory: the pages of its file that are not needed now are given back.

transformers maps safetensors on a CPU: a weight takes memory from when it is first read. May import: torch only.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable
from contextlib import suppress

from torch import Tensor, nn

MADV_PAGEOUT = 21
"""Linux 5.4 and later: reclaim these pages. Those of a file are read again when they are needed, so nothing is lost."""


M_MMAP_THRESHOLD, LARGE = -3, 1 << 23


def give_back_freed() -> None:
    """From now on, memory of more than 8 MiB goes back to the system as soon as it is freed; glibc keeps some of it
    otherwise, up to hundreds of mebibytes. (From 1 MiB on, an audit takes a fifth longer, since the system clears
    such memory each time.) Elsewhere than on Linux, do nothing."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def page_out(tensors: Iterable[Tensor]) -> None:
    """Give the memory of tensors back that lie in a mapped file; elsewhere than on Linux, do nothing."""
    _advise(_pages(tensors))


def page_out_after(modules: Iterable[nn.Module]) -> None:
    """From now on, each module's weights are given back as soon as it has run."""
    for module in modules:
        pages = _pages(module.parameters())  # now: a trace would take this for a use of the weights
        module.register_forward_hook(lambda *_, pages=pages: _advise(pages))


def _pages(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """First address and bytes of the whole pages that tensors on the CPU fill."""
    found = []
    for tensor in tensors:
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            if (size := storage.data_ptr() + storage.nbytes() - first) > 0:
                found.append((first, size))
    return found


def _advise(pages: Iterable[tuple[int, int]]) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for first, size in pages:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_PAGEOUT)
