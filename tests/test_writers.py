"""Files and folders that replace others: whole or not at all, also through symbolic links; errors without a message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from bitplan.formats.errors import BitplanError, FormatUnavailable, ModelUnreadable, UsageError, first_line
from bitplan.planner import cli
from bitplan.planner.export import gptqmodel
from bitplan.planner.memory import kv_size
from bitplan.planner.report.model_card import refuse_folder, written_beside
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.store import States, append_row, refuse_overwrite, write_row, write_text


def model_folder(path, content):
    path.mkdir(parents=True)
    (path / "config.json").write_text(content, encoding="utf-8")
    return path


def save(folder, content, force=True):
    refuse_folder(folder, force)
    with written_beside(folder, force) as part:
        (part / "config.json").write_text(content, encoding="utf-8")


@pytest.mark.parametrize("before", ["nothing", "empty", "model"])
@pytest.mark.parametrize("linked", [False, True], ids=["folder", "link"])
def test_a_saved_folder_replaces_what_its_name_means(tmp_path, before, linked):
    target = tmp_path / "elsewhere" / "models" / "target"
    if before != "nothing":
        target.mkdir(parents=True)
    if before == "model":
        (target / "config.json").write_text("old", encoding="utf-8")
        (target / "stale").write_text("old", encoding="utf-8")
    folder = target
    if linked:
        folder = tmp_path / "link"
        folder.symlink_to(target, target_is_directory=True)
    save(folder, "new")
    assert {file.name: file.read_text(encoding="utf-8") for file in target.iterdir()} == {"config.json": "new"}
    assert folder.is_symlink() == linked
    assert os.listdir(target.parent) == ["target"]  # nothing left beside


@pytest.mark.parametrize("linked", [False, True], ids=["folder", "link"])
def test_the_old_folder_is_whole_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, linked):
    target = model_folder(tmp_path / "models" / "target", "old")
    folder = target
    if linked:
        folder = tmp_path / "link"
        folder.symlink_to(target, target_is_directory=True)
    rename, calls = os.rename, []

    def second_fails(source, to):
        calls.append(to)
        if len(calls) == 2:
            raise OSError("no reason")
        rename(source, to)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(BitplanError, match=r"cannot write .*: no reason$"):
        save(folder, "new")
    assert (folder / "config.json").read_text(encoding="utf-8") == "old"
    assert os.listdir(target.parent) == ["target"]


def test_a_file_or_a_full_folder_without_force_is_not_replaced(tmp_path):
    full, file = model_folder(tmp_path / "full", "old"), tmp_path / "file"
    file.write_text("old", encoding="utf-8")
    for path, force in ((full, False), (file, True)):
        with pytest.raises(UsageError):
            save(path, "new", force)
        with pytest.raises(BitplanError, match="cannot write"), written_beside(path, force) as part:
            (part / "config.json").write_text("new", encoding="utf-8")
    assert (full / "config.json").read_text(encoding="utf-8") == file.read_text(encoding="utf-8") == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_text_file_replaces_the_target_of_a_link(tmp_path, exists):
    target, link = tmp_path / "files" / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    if exists:
        target.parent.mkdir()
        target.write_text("old", encoding="utf-8")
    refuse_overwrite(link, force=True)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text(encoding="utf-8") == "new"
    assert os.listdir(target.parent) == ["target.json"]


def test_a_text_file_that_cannot_be_renamed_leaves_nothing(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(BitplanError, match=r"cannot write .*folder: \w"):
        write_text(tmp_path / "folder", "new")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(("text", "line"), [("", "OSError"), (" \n ", "OSError"), ("\none\ntwo", "one")])
def test_the_first_line_of_an_error(text, line):
    assert first_line(OSError(text)) == line


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left on device")])
def test_a_full_disk_names_the_path_and_leaves_nothing(tmp_path, error):
    """tokenizers raises a bare Exception, and what writes to an open file has no name in its OSError."""
    words = r"cannot write .*saved: No space left on device$"
    with pytest.raises(BitplanError, match=words), written_beside(tmp_path / "saved", False) as part:
        (part / "config.json").write_text("half", encoding="utf-8")
        raise error
    assert not os.listdir(tmp_path)


def test_other_errors_are_not_taken_for_the_disk(tmp_path):
    with pytest.raises(KeyError), written_beside(tmp_path / "saved", False):
        raise KeyError("a mistake")


@pytest.mark.parametrize("place", ["file", "cache/file"])
def test_a_journal_and_states_that_cannot_be_written(tmp_path, monkeypatch, place):
    """A path under a file, since what is read-only to others is not to root."""
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    under = tmp_path / place
    under.parent.mkdir(exist_ok=True)
    under.write_bytes(b"")
    hint = "; set BITPLAN_CACHE" if "cache" in place else "$"
    for write in (
        lambda: append_row(under / "x", 1),
        lambda: States((1, 1), under / "x"),
        lambda: write_row(under / "x", 1),
    ):
        with pytest.raises(BitplanError, match=f"cannot write {under / 'x'}: .*{hint}"):
            write()


def test_the_sentence_comes_after_the_progress_bars(monkeypatch, capsys):
    def run(arguments):
        for _ in progress(range(3), desc="work", file=sys.stderr, disable=False):
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                raise BitplanError("cannot write x: No space left on device") from error

    monkeypatch.setattr("bitplan.planner.commands.formats.run", run)
    assert cli.main(["formats"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert "work" in lines[0] and lines[-1] == "bitplan: cannot write x: No space left on device"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bitplan.planner.cli", "formats"],
            stdout=full, stderr=subprocess.PIPE, text=True, encoding="utf-8", check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "bitplan: cannot write the output: No space left on device\n")


def test_an_error_without_a_message_is_named_by_its_type(monkeypatch):
    class Loads:
        @staticmethod
        def fails(*_, **__):
            raise ValueError

        from_pretrained = from_config = fails

    monkeypatch.setattr(gptqmodel.sources, "transformers_config", lambda source: None)
    monkeypatch.setattr(gptqmodel, "AutoModelForCausalLM", Loads)
    monkeypatch.setattr(kv_size, "AutoModelForCausalLM", Loads)
    with pytest.raises(ModelUnreadable, match=r"cannot build tiny as a causal LM: ValueError$"):
        gptqmodel.skeleton(Source("tiny", Path("tiny"), None, "", ""))
    with pytest.raises(FormatUnavailable, match=r"the cache of llama cannot be sized from its config: ValueError$"):
        kv_size._after_one_token(LlamaConfig(), torch.float32)
    assert cli._unexpected(ValueError()) == "ValueError (set BITPLAN_DEBUG=1 for the whole trace)"
