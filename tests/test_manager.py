import pytest

from formats.errors import UsageError
from planner import QuantizationManager
from planner.materialize import resident_bytes


def test_one_model_in_every_precision(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"number {i} and {i * i}" for i in range(8000)))
    manager = QuantizationManager(checkpoint("llama-tied"), text=[text], device="cpu")
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
