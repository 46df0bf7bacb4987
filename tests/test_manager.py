import pytest
import torch

from bitplan import QuantizationManager
from bitplan.formats.errors import FormatUnavailable, UnknownFormat, UsageError
from bitplan.planner.load import resident_bytes


@pytest.fixture
def manager(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"number {i} and {i * i}" for i in range(1500)), encoding="utf-8")
    return QuantizationManager(checkpoint("llama-tied"), text=[text], device="cpu")


def test_one_model_in_every_precision(manager):
    with pytest.raises(UsageError, match="no model is loaded"):
        manager.memory_info()
    sizes = {}
    for format in ("fp32", "bf16", "int8", "int4-g64"):
        model = manager.load(format)
        info = manager.memory_info()
        assert info["resident_bytes"] == resident_bytes(model)
        sizes[format] = info["times_smaller_than_fp32"]
    assert sizes["fp32"] == 1 and sizes["bf16"] == 2
    assert 3 < sizes["int8"] < 4 < sizes["int4-g64"] < 8

    model = manager.load_mixed_precision("60KiB", trials=2)
    assert manager.plan is not None
    assert manager.memory_info()["resident_bytes"] == manager.plan.bytes <= 60 * 1024


def test_a_rounding_changes_the_codes_and_not_the_bytes(manager):
    sizes, weights = set(), []
    for rounding in ("nearest", "awq"):
        model = manager.load("int4-g128", rounding=rounding)
        assert {unit.rounding for unit in manager.plan.packed} == {rounding}
        sizes.add(manager.memory_info()["resident_bytes"])
        weights.append(model.get_submodule("model.layers.0.mlp.down_proj").dequantized())
    assert len(sizes) == 1 and not torch.equal(*weights)


def test_what_cannot_be_loaded_is_told_and_leaves_what_is_loaded(manager, monkeypatch):
    model = manager.load("nf4")
    monkeypatch.setattr(QuantizationManager, "_open", lambda self: pytest.fail("the model was read"))
    with pytest.raises(UnknownFormat, match="unknown format 'int4-g63': did you mean int4-g64"):
        manager.load("int4-g63")
    with pytest.raises(UsageError, match="unknown rounding 'magic': there are nearest, gptq"):
        manager.load("int4", rounding="magic")
    for format in ("nf4", "bf16", "fp8"):
        with pytest.raises(UsageError, match=f"{format} cannot be rounded by 'awq', only by nearest"):
            manager.load(format, rounding="awq")
    with pytest.raises(UsageError, match="bf16 has no scales to distill"):
        manager.load("bf16", heal=True)
    monkeypatch.setattr("bitplan.formats.floats.Float8Format.unavailable", lambda self: "no device here has fp8")
    with pytest.raises(FormatUnavailable, match="fp8 cannot run here: no device here has fp8"):
        manager.load("fp8")
    assert manager.memory_info()["format"] == "nf4"
    assert manager.memory_info()["resident_bytes"] == resident_bytes(model)


def test_nothing_is_loaded_yet(manager):
    for call in (manager.memory_info, lambda: manager.benchmark_accuracy("task.jsonl")):
        with pytest.raises(UsageError, match=r"no model is loaded: call load\(\)"):
            call()
