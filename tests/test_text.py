import json

import pytest
import torch

from bitplan.formats.errors import TextTooShort, UsageError
from bitplan.sensitivity.texts import stdlib
from bitplan.sensitivity.texts.text import prepare, read_dataset, recall, remember
from tests import tiny


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(4000)), encoding="utf-8")
    return path


def test_three_parts_share_no_position(file):
    texts = prepare(tiny.tokenizer(), files=[file], tokens=4096, length=64)
    whole = tiny.tokenizer()(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    spans = {}
    for name in ("calibration", "search", "heldout"):
        ids = getattr(texts, name).ids
        joined = ids.flatten().tolist()
        start = next(i for i in range(len(whole)) if whole[i : i + len(joined)] == joined)
        spans[name] = (start, start + len(joined))
    assert spans["calibration"][1] <= spans["search"][0] < spans["search"][1] <= spans["heldout"][0]


def test_healing_text_is_the_calibration_text_and_what_follows_it(file, monkeypatch):
    monkeypatch.setattr("bitplan.sensitivity.texts.text.HEALING", 2048)
    whole = tiny.tokenizer()(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    for tokens, blocks in ((1024, 32), (4096, 64)):
        texts = prepare(tiny.tokenizer(), files=[file], tokens=tokens, length=64)
        assert texts.healing.ids.flatten().tolist() == whole[: blocks * 64] and blocks * 64 < len(whole) // 2
        assert torch.equal(texts.healing.ids[: tokens // 64], texts.calibration.ids)


def test_each_file_gives_to_each_part(tmp_path):
    for letter in "ab":
        (tmp_path / letter).write_text(letter * 3000, encoding="utf-8")
    texts = prepare(tiny.tokenizer(), files=[tmp_path / "a", tmp_path / "b"], tokens=512, length=32)
    for part in (texts.calibration, texts.search, texts.heldout):
        assert len({int(block[0]) for block in part.ids}) == 2


def test_a_heldout_file_changes_the_other_parts_by_nothing(file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else " * 500, encoding="utf-8")
    alone = prepare(tiny.tokenizer(), files=[file], tokens=2048, length=64)
    beside = prepare(tiny.tokenizer(), files=[file], heldout=[other], tokens=2048, length=64)
    assert torch.equal(alone.calibration.ids, beside.calibration.ids)
    assert torch.equal(alone.search.ids, beside.search.ids)
    assert not torch.equal(alone.heldout.ids, beside.heldout.ids)


def test_without_text_the_standard_library_with_whole_modules_held_out():
    documents = stdlib.training_documents()
    held_out = "".join(stdlib.held_out_documents())
    assert "class ArgumentParser" in held_out
    assert not any("class ArgumentParser" in document for document in documents)
    texts = prepare(tiny.tokenizer(), tokens=1024, length=64)
    assert tuple(texts.calibration.ids.shape) == (16, 64)


def test_a_tokenizer_that_begins_texts_begins_blocks(file):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    texts = prepare(tokenizer, files=[file], tokens=1024, length=64)
    assert (texts.calibration.ids[:, 0] == tokenizer.bos_token_id).all()
    assert (texts.calibration.ids[:, 1:] != tokenizer.bos_token_id).all()


def test_blocks_are_remembered_by_fingerprint(file):
    blocks = prepare(tiny.tokenizer(), files=[file], tokens=1024, length=64).search
    remember(blocks)
    again = recall(blocks.fingerprint)
    assert again is not None
    assert torch.equal(again.ids, blocks.ids)
    assert recall("0" * 64) is None


def test_bad_text(tmp_path):
    short, binary, zero = tmp_path / "short", tmp_path / "binary", tmp_path / "zero"
    short.write_text("too little", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00\x80")
    zero.write_text("a\0b", encoding="utf-8")
    with pytest.raises(TextTooShort, match="calibration text has 5 tokens in blocks of 64, and 256 are needed"):
        prepare(tiny.tokenizer(), files=[short], tokens=1024, length=64)
    with pytest.raises(UsageError, match="not UTF-8 text"):
        prepare(tiny.tokenizer(), files=[binary])
    with pytest.raises(UsageError, match="zero bytes"):
        prepare(tiny.tokenizer(), files=[zero])
    with pytest.raises(UsageError, match="No such file"):
        prepare(tiny.tokenizer(), files=[tmp_path / "none"])


WORDS = [f"w{i}" for i in range(4000)]


@pytest.mark.parametrize(
    "heldout",
    [
        WORDS,  # a copy
        ["new", *WORDS[1000:1200], "words"],  # a file with a part of the other
        ["before", *WORDS, "after"],  # a file that contains the other
        "\r\n".join(WORDS[3000:]).split(" "),  # other line breaks
    ],
)
def test_heldout_text_that_stands_in_the_other_text_is_refused(file, tmp_path, heldout):
    other, unlike = tmp_path / "other.txt", tmp_path / "unlike.txt"
    other.write_text(" ".join(heldout), encoding="utf-8")
    unlike.write_text("something else " * 500, encoding="utf-8")
    with pytest.raises(UsageError, match=r"other\.txt and .*text\.txt share text"):
        prepare(tiny.tokenizer(), files=[file], heldout=[unlike, other], tokens=512, length=64)


def test_one_file_as_both_is_refused_by_any_path(file, tmp_path):
    (tmp_path / "link.txt").symlink_to(file)
    for path in (file, tmp_path / "link.txt"):
        with pytest.raises(UsageError, match="held-out text must be text that calibrates and chooses nothing"):
            prepare(tiny.tokenizer(), files=[file], heldout=[path], tokens=512, length=64)
    short = tmp_path / "short.txt"
    short.write_text("shorter than a window, and still the same", encoding="utf-8")
    with pytest.raises(UsageError, match=r"short\.txt is in both"):
        prepare(tiny.tokenizer(), files=[short], heldout=[short], tokens=64, length=8)


def test_files_of_one_text_share_nothing_across_its_parts(file, tmp_path):
    header, more = "a licence that many files begin with " * 6, tmp_path / "more.txt"
    more.write_text(header + " ".join(f"v{i}" for i in range(4000)), encoding="utf-8")
    file.write_text(header + file.read_text(encoding="utf-8"), encoding="utf-8")
    prepare(tiny.tokenizer(), files=[file, more], tokens=512, length=64)
    more.write_text(" ".join(f"v{i}" for i in range(9000)) + file.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    with pytest.raises(UsageError, match=r"more\.txt and .*text\.txt share text"):
        prepare(tiny.tokenizer(), files=[file, more], tokens=512, length=64)


def test_pythons_own_text_is_not_held_out_from_itself(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(stdlib.calibration_text(4096)[1000:3000], encoding="utf-8")
    with pytest.raises(UsageError, match="share text"):
        prepare(tiny.tokenizer(), heldout=[path], tokens=1024, length=64)


class TestDataset:
    def test_it_is_read_no_further_than_asked(self, tmp_path):
        rows = [json.dumps({"id": i, "text": f"row {i} " * 10}) for i in range(500)]
        (tmp_path / "train-1.jsonl").write_text("\n".join(rows), encoding="utf-8")
        (tmp_path / "train-2.jsonl").write_text("never to be parsed", encoding="utf-8")
        assert read_dataset(str(tmp_path), 100) == "row 0 " * 10 + "\n" + "row 1 " * 10

    def test_bad_datasets(self, tmp_path):
        (tmp_path / "train.jsonl").write_text(json.dumps({"content": "x", "id": 1}), encoding="utf-8")
        with pytest.raises(UsageError, match="has no column 'text', only content, id"):
            read_dataset(str(tmp_path), 100)
        (tmp_path / "train.jsonl").write_text("no JSON", encoding="utf-8")
        with pytest.raises(UsageError, match="cannot load dataset"):
            read_dataset(str(tmp_path), 100)
