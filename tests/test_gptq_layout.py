"""GPTQ's layout, read back by a plain reading of its own: bit by bit, in Python's integers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig

from bitplan.formats.base import as_bits
from bitplan.formats.errors import BitplanError, FormatUnavailable
from bitplan.formats.integers import Grid, IntegerFormat
from bitplan.formats.modules import Packed
from bitplan.formats.table import FORMATS
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.export.gptq_layout import config_for, quantization_config, refuse_unsupported, save_gptq, to_gptq
from bitplan.planner.load import load_planned
from bitplan.planner.plan import Plan
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.texts.read import read_texts

HEADS = {"llama": ("model.embed_tokens", "lm_head"), "llama-tied": ("model.embed_tokens",)}
HEADS |= {"gpt2": ("transformer.wte", "transformer.wpe"), "opt": ("model.decoder.embed_*",)}
SPREAD = ("int4-g32", "int3-g32", "int2-g32", "int8")


def opened(checkpoint, name: str, dtype: torch.dtype, keep: tuple[str, ...]) -> Session:
    source = sources.find(checkpoint(name, dtype))
    return open_session(source, read_texts(source, tokens=1024, length=64), keep, "cpu")


def spread_plan(session: Session, formats=SPREAD) -> Plan:
    """Groups take the formats in turn; `native` leaves a group as it is."""
    plan = uniform_plan(session, "int4-g32", "nearest")
    groups = list(dict.fromkeys(unit.group for unit in plan.units))
    units = []
    for unit, own in zip(plan.units, session.graph.units, strict=True):
        name = formats[groups.index(unit.group) % len(formats)]
        name = own.native if name == "native" else name
        units.append(unit.model_copy(update={"format": name, "bytes": own.nbytes(name)}))
    total = sum(unit.bytes for unit in units) + sum(entry.bytes for entry in plan.unquantized)
    return Plan.model_validate(plan.model_dump() | {"units": [u.model_dump() for u in units], "bytes": total})


def stream(words: list[int], bits: int) -> list[int]:
    """The codes of one little-endian bit stream of 32-bit words."""
    whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [whole >> (bits * k) & ((1 << bits) - 1) for k in range(32 * len(words) // bits)]


def decoded(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """The float32 weight [outputs, inputs] that the four tensors stand for."""
    codes = torch.tensor([stream(column, bits) for column in tensors["qweight"].T.tolist()])
    stored = torch.tensor([stream(row, bits) for row in tensors["qzeros"].tolist()])
    assert int(stored.max()) < (1 << bits) - 1, "a reader that wraps and one that does not would differ"
    group = tensors["g_idx"].long()
    return (codes - (stored + 1)[group].T) * tensors["scales"].float()[group].T


def read_back(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return load_file(folder / "model.safetensors"), config["quantization_config"]


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    zero_point=st.sampled_from(["asymmetric", "symmetric"]),
    group=st.sampled_from([0, 32, 64]),
    rows=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_code_scale_and_zero_is_read_back(bits, zero_point, group, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    format, shape = IntegerFormat("", bits, group, zero_point), (32 * rows, 128)
    groups = format.groups(shape[1])
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    symmetric = zero_point == "symmetric"
    zero = torch.randint(0, 1 << bits, (shape[0], groups), generator=generator) if not symmetric else None
    scale = torch.randn(shape[0], groups, generator=generator).abs().half()
    tensors = format.store(codes, Grid(scale.float(), torch.zeros(()) if zero is None else zero))
    assert torch.equal(tensors["_scale"], as_bits(scale))
    written = to_gptq(tensors, format, shape[1])
    assert written["qweight"].shape == (shape[1] * bits // 32, shape[0])
    assert written["qzeros"].shape == (groups, shape[0] * bits // 32)
    assert torch.equal(decoded(written, bits), format.dequantize(tensors, shape[1], torch.float32))


def test_the_layout_by_hand():
    """Four bits, two groups: the words that auto-gptq's own packing of these numbers gives, worked out by hand."""
    format = IntegerFormat("", 4, group=32)
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    codes[0, :8] = torch.arange(8)  # output 0, inputs 0 to 7: the first word of column 0
    codes[1, 32] = 15
    zero = torch.full((32, 2), 8)
    zero[3, 1] = 1
    written = to_gptq(format.store(codes, Grid(torch.ones(32, 2), zero)), format, 64)
    assert written["qweight"][0, 0] == 0x76543210
    assert written["qweight"][4, 1] == 15
    assert written["qzeros"][0].tolist() == [0x77777777] * 4
    assert written["qzeros"][1].tolist() == [0x77770777] + [0x77777777] * 3
    assert written["g_idx"].tolist() == [0] * 32 + [1] * 32


def test_a_zero_point_of_zero_is_written_mirrored():
    format = IntegerFormat("", 3, group=32)
    weight = torch.rand(32, 64)  # nothing below zero: every zero point is 0
    tensors = format.quantize(weight)
    written = to_gptq(tensors, format, 64)
    assert (written["scales"] < 0).all()
    assert torch.equal(decoded(written, 3), format.dequantize(tensors, 64, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(HEADS))
def test_a_saved_folder_holds_the_models_weights(name, dtype, checkpoint, tmp_path):
    session = opened(checkpoint, name, dtype, HEADS[name])
    plan = spread_plan(session)
    model = load_planned(plan, session.source, "cpu")
    size = save_gptq(model, plan, session.source, tmp_path / "out", force=False)
    found, config = read_back(tmp_path / "out")
    assert size == sum(tensor.nbytes for tensor in found.values())
    for unit in plan.units:
        module = model.get_submodule(unit.name)
        assert isinstance(module, Packed)
        own = {part: found.pop(f"{unit.name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        rule = config.get("dynamic", {}).get(f"+:^{unit.name.replace('.', chr(92) + '.')}$", config)
        bits, group = rule["bits"], rule["group_size"]
        assert (own["g_idx"] == torch.arange(unit.columns) // (unit.columns if group == -1 else group)).all()
        weight = module.slots["weight"].format.dequantize(module.tensors(), unit.columns, torch.float32)
        assert torch.equal(decoded(own, bits), weight)
    # What is left are the kept tensors: each once, as they were.
    original = load_file(session.source.folder / "model.safetensors")
    assert {entry.name for entry in plan.unquantized} == set(found)
    for tensor_name, tensor in found.items():
        source_name = tensor_name if tensor_name in original else tensor_name.partition(".")[2]
        assert tensor.dtype == dtype and torch.equal(tensor, original[source_name])
    # auto-gptq would ignore the rules: without this file it fails.
    assert "dynamic" in config and not (tmp_path / "out" / "quantize_config.json").exists()


def test_one_setting_needs_no_rules_and_several_have_one_each(checkpoint):
    session = opened(checkpoint, "llama-tied", torch.float32, HEADS["llama-tied"])
    one = uniform_plan(session, "int4-g32", "nearest")
    config = quantization_config(load_planned(one, session.source, "cpu"), one)
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, False)
    assert "dynamic" not in config
    assert config["meta"]["quantizer"][0].startswith("bitplan:")
    symmetric = uniform_plan(session, "int8")
    config = quantization_config(load_planned(symmetric, session.source, "cpu"), symmetric)
    assert (config["bits"], config["group_size"], config["sym"]) == (8, -1, True)
    mixed = spread_plan(session, ("int4-g32", "int4-g64", "native", "int8"))
    config = quantization_config(load_planned(mixed, session.source, "cpu"), mixed)
    assert config["sym"] is False
    by_format = {unit.name: unit.format for unit in mixed.units}
    said = {rule.partition(":")[2].strip("^$").replace("\\", ""): value for rule, value in config["dynamic"].items()}
    for unit, format in by_format.items():
        settings = (FORMATS[format].bits, getattr(FORMATS[format], "group", 0) or -1)
        if format == "int4-g64" and "down" not in unit:
            settings = (4, -1)  # 64 columns are one group of 64
        rule = "-:" if format == "fp32" else "+:"
        if (config["bits"], config["group_size"]) == settings:
            assert unit not in said
        else:
            assert f"{rule}^{unit.replace('.', chr(92) + '.')}$" in config["dynamic"]
            assert said[unit] == ({} if format == "fp32" else {"bits": settings[0], "group_size": settings[1]})
    # Servers ask for joined modules by the joined name.
    assert all(said.get(unit.replace("q_proj", "qkv_proj")) == said.get(unit) for unit in by_format if "q_proj" in unit)
    assert "lm_head" not in said


def test_the_folder_is_a_checkpoint_with_papers(checkpoint, tmp_path):
    session = opened(checkpoint, "llama-tied", torch.float32, HEADS["llama-tied"])
    plan = uniform_plan(session, "int4-g32", "nearest")
    model = load_planned(plan, session.source, "cpu")
    save_gptq(model, plan, session.source, tmp_path / "out", force=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == json.loads(
        (tmp_path / "out" / "quantize_config.json").read_text(encoding="utf-8")
    )
    # auto-gptq fills a head that it does not find with zeros.
    found, _ = read_back(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "out").iterdir())
    assert Plan.model_validate_json((tmp_path / "out" / "plan.json").read_text(encoding="utf-8")) == plan
    assert {"README.md", "tokenizer.json", "generation_config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not list(tmp_path.glob(".out*"))
    save_gptq(model, plan, session.source, tmp_path / "out", force=True)


def test_older_readers_find_the_rotation(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    config = config_for(sources.find(folder), {})
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert config["torch_dtype"] == content["dtype"]
    before = AutoConfig.from_pretrained(folder).rope_parameters
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    after = AutoConfig.from_pretrained(folder).rope_parameters
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("name", "keep", "format", "words"),
    [
        (
            "llama",
            (),
            "int4-g32",
            r"model.embed_tokens, an embedding; lm_head, outside the model's blocks: .*--keep",
        ),
        ("llama-tied", (), "int4-g32", "an embedding and the head: plan again with --keep model.embed_tokens"),
        ("llama", HEADS["llama"], "int5-g64", "q_proj.* and 11 more, in int5-g64: plan again with --formats int8,int4"),
        ("llama", HEADS["llama"], "nf4", "in nf4: plan again with --formats int8"),
        ("llama", HEADS["llama"], "fp8", "in fp8"),
        ("llama", HEADS["llama"], "binary-g64", "in binary-g64"),
        ("llama", HEADS["llama"], "bf16", "in bf16"),
        ("llama", HEADS["llama"], "int8-bnb", "in int8-bnb"),
        ("llama", HEADS["llama"], "int4-g64", r"down_proj.*96 columns are not a multiple of 64.*smaller groups"),
        ("llama", HEADS["llama"], "fp32", "no unit has one that it takes"),
        ("mixtral", HEADS["llama"], "int4-g32", r"experts.* hold many in one: bitplan's own layout"),
        ("qwen3", ("model.embed_tokens",), "int6-g32", "in int6-g32"),
    ],
)
def test_what_the_layout_cannot_say_is_refused_by_name(name, keep, format, words, checkpoint, tmp_path):
    session = opened(checkpoint, name, torch.float32, keep)
    plan = uniform_plan(session, format, "nearest" if format not in ("fp32",) else None)
    with pytest.raises(FormatUnavailable, match=words) as caught:
        refuse_unsupported(plan)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    with pytest.raises(FormatUnavailable):
        save_gptq(session.model, plan, session.source, tmp_path / "out", force=False)
    assert not list(tmp_path.iterdir())


def test_rows_that_fill_no_words_are_refused(checkpoint):
    session = opened(checkpoint, "qwen2-moe", torch.float32, (*HEADS["llama"], "*.experts.*"))
    with pytest.raises(FormatUnavailable, match=r"shared_expert.*48.*not multiples of 32.*--keep") as caught:
        refuse_unsupported(uniform_plan(session, "int4-g32", "nearest"))
    assert len(str(caught.value)) < 600


def test_kept_experts_are_refused_too(checkpoint, tmp_path):
    session = opened(checkpoint, "mixtral", torch.float32, (*HEADS["llama"], "*.experts.*"))
    plan = uniform_plan(session, "int4-g32", "nearest")
    refuse_unsupported(plan)  # the plan alone does not tell what a kept tensor is
    with pytest.raises(FormatUnavailable, match="bitplan's own layout takes it"):
        save_gptq(load_planned(plan, session.source, "cpu"), plan, session.source, tmp_path / "out", force=False)


def test_a_folder_that_cannot_be_written_leaves_nothing(checkpoint, tmp_path):
    session = opened(checkpoint, "llama-tied", torch.float32, HEADS["llama-tied"])
    plan = uniform_plan(session, "int4-g32", "nearest")
    model = load_planned(plan, session.source, "cpu")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BitplanError, match="cannot write"):
        save_gptq(model, plan, session.source, tmp_path / "file" / "out", force=False)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "other").write_text("", encoding="utf-8")
    with pytest.raises(BitplanError, match="cannot write"):
        save_gptq(model, plan, session.source, tmp_path / "taken", force=False)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken"}
