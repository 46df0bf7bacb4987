"""Files that a stranger sends: each ends in one sentence of a screenful at most, and none is waited for."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bitplan.formats.errors import SCREENFUL, BitplanError, FileInvalid, ModelUnreadable, UsageError
from bitplan.planner.cli import main
from bitplan.planner.plan import Plan
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import Profile, read
from bitplan.sensitivity.reading import MOST_KEYS, read_text
from bitplan.sensitivity.tasks.question import MOST_CHOICES, read_questions
from tests import tiny

DATA = Path(__file__).parent.parent / "data"
PLAN = (DATA / "plan-schema-3.json").read_bytes()
ESCAPE = "\x1b[31mred\x1b]0;title\x07"


def sentence(error: type[BitplanError], call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    text = str(caught.value)
    assert len(text) <= SCREENFUL + 1 and text.isprintable(), text[:200]
    return text


def irregular(kind: str, path: Path) -> Path:
    """Something at `path` that is no regular file, or one that is far too large (and takes no disk)."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    return path


KINDS = ("pipe", "device", "folder", "loop", "huge")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "error", "reader"),
    [
        ("plan.json", FileInvalid, lambda path: read(path, Plan)),
        ("profile.json", FileInvalid, lambda path: read(path, Profile)),
        ("text.txt", UsageError, read_text),
        ("task.jsonl", UsageError, read_questions),
    ],
)
def test_what_is_no_ordinary_file_is_refused(tmp_path, kind, name, error, reader):
    assert name in sentence(error, reader, irregular(kind, tmp_path / name))


ORDINARY = {(kind, name) for kind in ("folder", "loop") for name in ("tokenizer.json", "generation_config.json")} | {
    ("loop", "model.safetensors.index.json")
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "generation_config.json"],
)
def test_a_models_files_are_ordinary(folder, kind, name):
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    if (kind, name) in ORDINARY:
        pytest.skip("as if it were not there")
    irregular(kind, folder / name)
    assert name in sentence(ModelUnreadable, sources.find, folder)


def test_a_pipe_is_text_where_it_is_asked_for():
    read_end, write_end = os.pipe()
    os.write(write_end, b"some text")
    os.close(write_end)
    for _ in range(2):  # also where a command reads it again
        assert read_text(Path(f"/dev/fd/{read_end}")) == "some text"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.saved("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A model's folder, its weights by a link."""
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            os.link(path, tmp_path / path.name)
        else:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# Plans and profiles

GARBLED: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\xff",
    "utf-16": PLAN.decode().encode("utf-16"),
    "cut": PLAN[: len(PLAN) // 2],
    "twice": PLAN + PLAN,
    "zero byte": PLAN + b"\0",
    "nested lists": b"[" * 1_000_000,
    "nested objects": b'{"a":' * 500_000,
    "nested unit": b'{"units": ' + b"[" * 500_000,
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "nan": b'{"bytes": NaN}',
    "infinity": b'{"bytes": -Infinity}',
    "1e999": b'{"bytes": 1e999}',
    "long integer": b'{"bytes": ' + b"9" * 1_000_000 + b"}",
    "65 bits": b'{"bytes": 36893488147419103232}',
    "wrong numbers": b'{"schema_version": 4, "units": [' + b"1," * 2_000_000 + b"1]}",
    "too many values": b'{"schema_version": 4, "units": [' + b"[]," * 5_000_000 + b"1]}",
    "wrong objects": b'{"schema_version": 4, "units": [' + b'{"a":1},' * 300_000 + b"1]}",
    "many keys": ("{" + ",".join(f'"k{i}":1' for i in range(300_000)) + "}").encode(),
    "long key": b'{"' + b"k" * 5_000_000 + b'": 1}',
    "key twice": b'{"bytes": 1, "bytes": 2}',
    "escapes": json.dumps({ESCAPE: ESCAPE}).encode(),
    "half a letter": b'{"\\ud800": 1}',
    "future": b'{"schema_version": 99}',
    "past": b'{"schema_version": 1}',
}


@pytest.mark.parametrize("kind", [Plan, Profile])
@pytest.mark.parametrize("content", GARBLED.values(), ids=GARBLED)
def test_a_garbled_file_is_refused(tmp_path, kind, content):
    (tmp_path / "file.json").write_bytes(content)
    assert "file.json" in sentence(FileInvalid, read, tmp_path / "file.json", kind)


VALUES: dict[str, Any] = {
    "null": None,
    "text": "x",
    "long": "x" * 1_000_000,
    "escapes": ESCAPE,
    "negative": -1,
    "zero": 0,
    "65 bits": 1 << 65,
    "1e308": 1e308,
    "true": True,
    "list": [1, 2],
    "object": {"a": 1},
    "empty": [],
}
FIELDS = {
    "bytes": (),
    "units": (),
    "unquantized": ("empty",),
    "schema_version": (),
    "units.0.name": ("text",),
    "units.0.parameter": (),
    "units.0.dtype": (),
    "units.0.rows": (),
    "units.0.experts": (),
    "units.0.format": (),
    "units.0.rounding": (),
    "units.0.group": ("text",),
    "units.0.tied": ("empty",),
    "unquantized.0.shape": (),
    "unquantized.0.dtype": (),
    "unquantized.0.bytes": (),
    "provenance.model.dtype": (),
    "provenance.model.weights_sha256": (),
    "provenance.model.parameters": (),
    "provenance.versions": (),
    "predicted.nll": ("negative", "zero", "true"),
}
"""Fields of a plan, and which of the values they may have."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> str:
    """A plan as it is written today."""
    return read(DATA / "plan-schema-3.json", Plan).model_dump_json()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", VALUES)
def test_a_wrong_value_is_refused_with_its_field(plan, tmp_path, field, value):
    content = json.loads(plan)
    *way, last = field.split(".")
    place = content
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    if value in FIELDS[field] or place[last] is None or (value == "null" and field == "predicted.nll"):
        return
    if place[last] == VALUES[value]:
        return
    place[last] = VALUES[value]
    (tmp_path / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    assert "plan.json" in sentence(FileInvalid, read, tmp_path / "plan.json", Plan)


def test_escapes_of_a_plan_never_reach_the_terminal_raw(plan, tmp_path, capsys):
    content = json.loads(plan)
    content["provenance"]["model"]["id"] = ESCAPE + "x" * 10_000
    content["provenance"]["text"]["source"] = ESCAPE
    content["provenance"]["device"] = ESCAPE
    for entry in content["unquantized"]:
        entry["reason"] = ESCAPE
    (tmp_path / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    for arguments in (["show"], ["apply"], ["explain"], ["export", "--to", "gguf", "-o", str(tmp_path / "out")]):
        main([arguments[0], str(tmp_path / "plan.json"), *arguments[1:]])
        out, err = capsys.readouterr()
        for line in (out + err).splitlines():
            assert "\x1b" not in line and "\x07" not in line and len(line) <= SCREENFUL + 10


# Models

CONFIGS: dict[str, Any] = {
    "nested": '{"a":' * 200_000,
    "nan": '{"model_type": "llama", "rms_norm_eps": NaN}',
    "list": [],
    "null": None,
    "model type": {"model_type": 7},
    "architectures": {"architectures": "LlamaForCausalLM"},
    "quantization": {"quantization_config": "gptq"},
    "text config": {"text_config": [1]},
    **{
        f"{name} = {value!r}": {name: value}
        for name in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")
        for value in (-1, 1 << 40, 1 << 65, 1.5, "7", True, [1, "7"], {"a": 1})
    },
    "no layers": {"num_hidden_layers": 0},
    "many layers": {"num_hidden_layers": 1_000_000},
    "more layers than tensors": {"num_hidden_layers": 5_000},
    "wider than the weights": {"hidden_size": 1 << 20},
    "vocabulary beyond the weights": {"vocab_size": 1 << 23},
    "experts beyond the weights": {"num_local_experts": 1 << 22},
    "length": {"max_position_embeddings": "long"},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_an_implausible_config_is_refused_before_anything_is_built(folder, change):
    path = folder / "config.json"
    whole = json.loads(path.read_text(encoding="utf-8")) | change if isinstance(change, dict) else change
    path.write_text(change if isinstance(change, str) else json.dumps(whole), encoding="utf-8")
    assert "config.json" in sentence(ModelUnreadable, sources.find, folder)


def header(entries: Any, data: int = 16) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def tensor(start: Any = 0, stop: Any = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "three bytes": b"abc",
    "length beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
    "huge length": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "no JSON": header(b"{{"),
    "a list": header([]),
    "a number": header(7),
    "nested": header(b"[" * 200_000),
    "no offsets": header({"a": {"dtype": "F32", "shape": [4]}}),
    "no dtype": header({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "no shape": header({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "an entry that is a list": header({"a": [0, 16]}),
    "an entry that is null": header({"a": None}),
    "overlap": header({"a": tensor(), "b": tensor(8, 16, [2])}),
    "same place": header({"a": tensor(), "b": tensor()}),
    "gap": header({"a": tensor(0, 8, [2]), "b": tensor(12, 16, [1])}),
    "late start": header({"a": tensor(4, 16, [3])}),
    "beyond the file": header({"a": tensor(0, 1 << 30, [1 << 28])}),
    "before the file": header({"a": tensor(-16, 0)}),
    "backwards": header({"a": tensor(16, 0)}),
    "three offsets": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}),
    "text offsets": header({"a": tensor("0", "16")}),
    "float offsets": header({"a": tensor(0.0, 16.0)}),
    "another shape": header({"a": tensor(shape=[5])}),
    "negative shape": header({"a": tensor(shape=[-2, -2])}),
    "text shape": header({"a": tensor(shape="4")}),
    "long shape": header({"a": tensor(shape=[4, *[1] * 100_000])}),
    "huge shape": header({"a": tensor(shape=[1 << 62, 1 << 62])}),
    "65 bits": header({"a": tensor(shape=[1 << 65])}),
    "number for dtype": header({"a": tensor(dtype=7)}),
    "more data": header({"a": tensor()}, data=32),
    "unknown dtype": header({"a": tensor(dtype="F3")}),
    "metadata": header({"__metadata__": {"a": 1}, "a": tensor()}),
    "metadata list": header({"__metadata__": ["a"], "a": tensor()}),
    "half a letter": header(b'{"\\ud800": ' + json.dumps(tensor()).encode() + b"}"),
    "escapes": header({ESCAPE: tensor(shape=[5])}),
    "long name": header({"x" * 100_000: tensor(shape=[5])}),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_broken_safetensors_file_is_refused(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in sentence(ModelUnreadable, sources.find, folder)


INDEXES: dict[str, Any] = {
    "list": [],
    "null": None,
    "no map": {"metadata": {}},
    "map is a list": {"weight_map": ["model-1.safetensors"]},
    "map is null": {"weight_map": None},
    "names null": {"weight_map": {"a": None}},
    "names a number": {"weight_map": {"a": 7}},
    "names another folder": {"weight_map": {"a": "../model-1.safetensors"}},
    "names a path": {"weight_map": {"a": "/etc/passwd"}},
    "names nothing": {"weight_map": {"a": "absent.safetensors"}},
    "escapes": {"weight_map": {"a": f"{ESCAPE}/x"}},
    "cut": "{",
}


@pytest.mark.parametrize("content", INDEXES.values(), ids=INDEXES)
def test_a_broken_index_is_refused(folder, content):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert "index" in sentence(ModelUnreadable, sources.find, folder)


# Tasks and texts

ITEM = {"prompt": "one", "choices": ["two", "three"], "answer": 0}
TASKS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n\n \n",
    "zero byte": b"\0",
    "not utf-8": b'{"text": "\xff"}',
    "nested": b"[" * 1_000_000,
    "nested answer": json.dumps(ITEM)[:-2].encode() + b"[" * 900 + b"]" * 900 + b"}",
    "nan": b'{"prompt": "a", "choices": ["b", "c"], "answer": NaN}',
    "list": b"[]",
    "number": b"7",
    "many choices": json.dumps(ITEM | {"choices": [f"c{i}" for i in range(100_000)]}).encode(),
    "one too many": json.dumps(ITEM | {"choices": [f"c{i}" for i in range(MOST_CHOICES + 1)]}).encode(),
    "equal choices": json.dumps(ITEM | {"choices": ["a"] * MOST_CHOICES}).encode(),
    "answer beyond": json.dumps(ITEM | {"answer": 2}).encode(),
    "negative answer": json.dumps(ITEM | {"answer": -1}).encode(),
    "answer true": json.dumps(ITEM | {"answer": True}).encode(),
    "huge answer": b'{"prompt": "a", "choices": ["b", "c"], "answer": ' + b"9" * 100_000 + b"}",
    "long answer": json.dumps(ITEM | {"answer": "x" * 5_000_000}).encode(),
    "escapes": json.dumps(ITEM | {"answer": ESCAPE}).encode(),
    "raw escapes": f'{{"prompt": {ESCAPE}'.encode(),
    "half a letter": b'{"prompt": "\\ud800", "answer": "a"}',
    "choices of numbers": json.dumps(ITEM | {"choices": [1, 2]}).encode(),
    "choices text": json.dumps(ITEM | {"choices": "ab"}).encode(),
    "empty choice": json.dumps(ITEM | {"choices": ["a", " "]}).encode(),
    "text null": b'{"text": null}',
    "two kinds": json.dumps(ITEM).encode() + b'\n{"text": "a"}',
}


@pytest.mark.parametrize("content", TASKS.values(), ids=TASKS)
def test_a_broken_task_is_refused(tmp_path, content):
    (tmp_path / "task.jsonl").write_bytes(content)
    assert "task.jsonl" in sentence(UsageError, read_questions, tmp_path / "task.jsonl")


def test_limits_are_no_less_than_what_is_in_use():
    """A unit, a config and an item of today are far below the limits that refuse them."""
    assert max(len(entry) for entry in json.loads(PLAN)["units"]) < MOST_KEYS / 10


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (1, ["show", "FILE"]),
        (1, ["explain", "FILE"]),
        (1, ["apply", "FILE"]),
        (1, ["export", "FILE", "--to", "gguf", "-o", "OUT"]),
        (2, ["audit", "MODEL", "--text", "FILE"]),
        (2, ["plan", "MODEL", "--bpw", "4", "--heldout", "FILE", "--text", "FILE"]),
        (2, ["plan", "MODEL", "--bpw", "4", "--task", "FILE"]),
        (1, ["plan", "MODEL", "--bpw", "4", "--profile", "FILE"]),
        (1, ["compare", "MODEL", "--plan", "FILE"]),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else str(value),
)
def test_commands_answer_a_pipe_at_once(code, arguments, model, tmp_path, capsys):
    places = {"FILE": tmp_path / "pipe.json", "MODEL": model, "OUT": tmp_path / "out"}
    os.mkfifo(places["FILE"])
    assert main([str(places.get(argument, argument)) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert not out and "regular file" in err and "Error" not in err


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 0},
        {"head_dim": 0},
        {"pad_token_id": 10**6},
        {"rope_parameters": None, "rope_theta": "x"},
        {"rms_norm_eps": "x"},
        {"dtype": 7},
        {"hidden_act": [1]},
    ],
    ids=str,
)
def test_a_config_that_transformers_cannot_use_is_one_sentence(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")

    def load():
        source = sources.find(folder)
        sources.load_tokenizer(source)
        sources.load_model(source)

    assert "as a causal LM: " in sentence(ModelUnreadable, load)


def test_weights_that_are_no_weights(folder):
    """What the reader accepts, and transformers must refuse without a traceback."""
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.zeros(4)}, folder / "model.safetensors")
    source = sources.find(folder)
    sentence(ModelUnreadable, sources.load_model, source)
