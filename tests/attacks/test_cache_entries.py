"""Entries of the cache that a disk, a copy or a hand has changed: each is made again, and that is said."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitplan.sensitivity.store import (
    checked_json,
    is_whole,
    load_tensors,
    read_row,
    save_tensors,
    unchecked_json,
    write_row,
)

ROW = {
    "name": "int4",
    "evaluation": {"kl": 0.25, "nll": 3.5},
    "tasks": [],
    "note": None,
    "bounds": [float("inf"), 1e-9],
}


def flipped(at: float) -> Callable[[bytes], bytes]:
    """One bit changed, at a part of the file's length."""

    def change(content: bytes) -> bytes:
        place = min(int(at * len(content)), len(content) - 1)
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return change


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    **{f"bit at {at:.0%}": flipped(at) for at in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)},
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\n{}",
    "zeros": lambda content: bytes(len(content)),
    "garbled": lambda content: content[::-1],
    "text": lambda content: b"[]",
}


def damaged(path: Path, change: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    assert change(content) != content
    path.write_bytes(change(content))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_damaged_tensors_are_made_again(tmp_path, capsys, change):
    path = tmp_path / "codes.safetensors"
    save_tensors(path, {"codes": torch.arange(64, dtype=torch.int32), "scale": torch.rand(3).bfloat16()})
    assert load_tensors(path) is not None and is_whole(path)
    damaged(path, change)
    assert load_tensors(path) is None
    assert not path.exists() and str(path) in capsys.readouterr().err
    assert load_tensors(path) is None and not capsys.readouterr().err


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_damaged_row_is_made_again(tmp_path, capsys, change):
    path = tmp_path / "row.json"
    write_row(path, ROW)
    assert read_row(path) == ROW
    damaged(path, change)
    if (
        row := read_row(path)
    ) is not None:  # a bit of white space between key and value, or of a letter of the checksum
        assert row == ROW
    else:
        assert not path.exists() and str(path) in capsys.readouterr().err


def test_an_entry_of_before_is_made_again(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"codes": torch.zeros(4)}, tmp_path / "old.safetensors")
    (tmp_path / "row.json").write_text('{"name": "int4"}', encoding="utf-8")
    assert load_tensors(tmp_path / "old.safetensors") is None and read_row(tmp_path / "row.json") is None
    assert capsys.readouterr().err.count("made again") == 2


def test_an_entry_that_goes_meanwhile_is_not_there(tmp_path, monkeypatch):
    path = tmp_path / "codes.safetensors"
    save_tensors(path, {"codes": torch.zeros(4)})
    monkeypatch.setattr("bitplan.sensitivity.store.is_whole", lambda path: os.unlink(path) is None)
    assert load_tensors(path) is None


def test_equal_tensors_are_equal_files(tmp_path):
    """Also with their checksums: what is resumed ends with the same bytes."""
    for name in "ab":
        save_tensors(tmp_path / name, {"x": torch.arange(9.0), "y": torch.arange(4)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_line_comes_back_as_it_was():
    assert unchecked_json(checked_json(ROW)) == ROW
    assert unchecked_json(checked_json(ROW).replace("3.5", "3.6")) is None
