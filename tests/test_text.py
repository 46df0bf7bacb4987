import pytest
import torch

from bitplan.formats.errors import TextTooShort, UsageError
from bitplan.sensitivity.texts import stdlib
from bitplan.sensitivity.texts.text import prepare, recall, remember
from tests import tiny


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(4000)))
    return path


def test_three_parts_share_no_position(file):
    texts = prepare(tiny.tokenizer(), files=[file], tokens=4096, length=64)
    whole = tiny.tokenizer()(file.read_text(), add_special_tokens=False)["input_ids"]
    spans = {}
    for name in ("calibration", "search", "heldout"):
        ids = getattr(texts, name).ids
        joined = ids.flatten().tolist()
        start = next(i for i in range(len(whole)) if whole[i : i + len(joined)] == joined)
        spans[name] = (start, start + len(joined))
    assert spans["calibration"][1] <= spans["search"][0] < spans["search"][1] <= spans["heldout"][0]


def test_each_file_gives_to_each_part(tmp_path):
    for letter in "ab":
        (tmp_path / letter).write_text(letter * 3000)
    texts = prepare(tiny.tokenizer(), files=[tmp_path / "a", tmp_path / "b"], tokens=512, length=32)
    for part in (texts.calibration, texts.search, texts.heldout):
        assert len({int(block[0]) for block in part.ids}) == 2


def test_a_heldout_file_changes_the_other_parts_by_nothing(file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else " * 500)
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
    short.write_text("too little")
    binary.write_bytes(b"\xff\xfe\x00\x80")
    zero.write_text("a\0b")
    with pytest.raises(TextTooShort, match="calibration text has 5 tokens in blocks of 64, and 256 are needed"):
        prepare(tiny.tokenizer(), files=[short], tokens=1024, length=64)
    with pytest.raises(UsageError, match="not UTF-8 text"):
        prepare(tiny.tokenizer(), files=[binary])
    with pytest.raises(UsageError, match="zero bytes"):
        prepare(tiny.tokenizer(), files=[zero])
    with pytest.raises(UsageError, match="No such file"):
        prepare(tiny.tokenizer(), files=[tmp_path / "none"])
