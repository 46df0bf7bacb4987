"""What a load takes: how much memory at its highest, on which device, and what is left of it when it fails."""

import gc
import threading
from functools import cache

import accelerate
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    conversion_mapping,
    core_model_loading,
)
from transformers.integrations.accelerate import compute_module_sizes
from transformers.quantizers.auto import AutoHfQuantizer

from bitplan.formats import base
from bitplan.formats.errors import CodesMissing, UsageError
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.table import FORMATS
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.hf import quantizer as pretrained
from bitplan.planner.hf.quantizer import PlanConfig
from bitplan.planner.load import load
from bitplan.planner.plan import Plan
from bitplan.planner.quantize.distillation import round_missing
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.read import read_texts
from tests import tiny
from tests.test_pretrained import logits, mixed_plan, on_disk

SIZES = tiny.GQA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
LARGER = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that live at once. Each tensor that is read counts as the copy that it would be on
    another device; on the CPU it is a part of the mapped file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.largest_float = 0
        self.reads = 0
        self.lock = threading.RLock()  # packed tensors are read by several threads
        self.reading: set[int] = set()
        read = core_model_loading._materialize_copy

        def reading(*args, **kwargs):
            self.reading.add(threading.get_ident())
            copy = read(*args, **kwargs).clone()
            self.reading.remove(threading.get_ident())
            with self.lock:
                self.reads += 1
                self.note(copy)
            return copy

        monkeypatch.setattr(core_model_loading, "_materialize_copy", reading)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and threading.get_ident() not in self.reading:
                self.note(tensor)
        return out

    def note(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        with self.lock:
            known = self.storages.get(storage._cdata)
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            # A view of scales' bits as floats, through which a load checks that they are finite, is no tensor of its
            # own: only a storage that is not known yet counts.
            if tensor.is_floating_point() and (known is None or known[0].expired()):
                self.largest_float = max(self.largest_float, tensor.nbytes)
            if sum(size for _, size in self.storages.values()) > self.peak:
                self.peak = max(self.peak, self.live())

    def live(self) -> int:
        with self.lock:
            self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
            return sum(size for _, size in self.storages.values())


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def larger(request, tmp_path_factory):
    """A model whose weights are larger than what is rounded at once, in shards, and its plan."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LARGER[request.param], dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500KB")
    tiny.tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    source = sources.find(folder)
    session = open_session(source, read_texts(source, tokens=1024, length=64), device="cpu")
    return folder, uniform_plan(session, "int4-g64", "nearest")


@pytest.fixture(scope="module")
def planned(session_of):
    """planned(name) → a plan of a tiny model with every format somewhere, made once."""
    return cache(lambda name: mixed_plan(session_of(name)))


@pytest.fixture
def short_runs(monkeypatch):
    monkeypatch.setitem(base.TILE, "cpu", 1 << 13)
    return 16 << 13


def full_bytes(plan: Plan) -> int:
    """Of the largest unit, as the checkpoint has it."""
    return max(unit.experts * unit.rows * unit.columns * getattr(torch, unit.dtype).itemsize for unit in plan.units)


def saved(model, folder, size: str = "100KB"):
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def test_one_weight_at_a_time_is_held_in_full_precision(larger, short_runs, monkeypatch):
    folder, plan = larger
    # Experts are stacked from their parts and then joined: twice their size for a moment, but never on a device.
    most = (2 if any(unit.kind == "experts" for unit in plan.units) else 1) * full_bytes(plan)
    with Meter(monkeypatch) as meter:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PlanConfig(plan))
    assert meter.reads > len(plan.units)
    assert plan.bytes <= meter.live() < 1.05 * plan.bytes
    assert meter.peak < 1.05 * plan.bytes + most + short_runs
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.int32


def test_a_planned_checkpoint_never_holds_a_weight_in_full_precision(larger, monkeypatch, tmp_path):
    folder, plan = larger
    saved(AutoModelForCausalLM.from_pretrained(folder, quantization_config=PlanConfig(plan)), tmp_path, "500KB")
    assert on_disk(tmp_path) == plan.bytes
    gc.collect()
    with Meter(monkeypatch) as meter:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert meter.reads == len(model.state_dict())
    assert meter.largest_float < 8192  # norms and the tables of rotary embeddings
    assert meter.peak < 1.05 * plan.bytes


@pytest.mark.gpu
def test_a_device_holds_the_plan_and_one_weight(larger, monkeypatch):
    monkeypatch.setattr(base, "LARGE_TILE", 1 << 13)
    folder, plan = larger
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=PlanConfig(plan), device_map="cuda")
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.1 * plan.bytes + full_bytes(plan) + (16 << 13)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_in_runs_gives_the_same_codes(name, monkeypatch):
    format = FORMATS[name]
    if reason := format.unavailable():
        pytest.skip(reason)
    monkeypatch.setitem(base.TILE, "cpu", 1)
    torch.manual_seed(0)
    for weight in (torch.randn(107, 130), torch.randn(130, 107).T, torch.randn(70, 40).bfloat16()):
        expected, found = format.quantize(weight.float()), format.quantize_by_rows(weight, "cpu")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[suffix], expected[suffix]) for suffix in expected)
        whole = format.dequantize(expected, weight.shape[1], torch.float32)
        assert torch.equal(format.dequantize_by_rows(expected, weight.shape[1], torch.float32), whole)


def test_shards_of_an_original_are_rounded_as_the_whole(planned, checkpoint, tmp_path):
    plan = planned("mixtral")
    shards = saved(AutoModelForCausalLM.from_pretrained(checkpoint("mixtral")), tmp_path)
    expected = logits(load(plan, checkpoint("mixtral"), device="cpu"))
    assert torch.equal(logits(load(plan, shards, device="cpu")), expected)


class TestDevices:
    @pytest.mark.parametrize("packed", [False, True], ids=["rounding", "packed"])
    @pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral"])
    def test_each_module_has_its_planned_bytes(self, name, packed, planned, checkpoint):
        plan = planned(name)
        quantizer = AutoHfQuantizer.from_config(PlanConfig(plan), pre_quantized=packed)
        config = AutoConfig.from_pretrained(checkpoint(name))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        files = [str(path) for path in checkpoint(name).glob("*.safetensors")]
        # The files are those of the original: as a saved plan's they would be refused, for they hold other tensors.
        quantizer._process_model_before_weight_loading(model, checkpoint_files=None if packed else files)
        expected: dict[str, int] = {}
        for parameter, size in [(u.parameter, u.bytes) for u in plan.units] + [
            (k.name, k.bytes) for k in plan.unquantized
        ]:
            module = parameter.rpartition(".")[0]
            expected[module] = expected.get(module, 0) + size
        _, sizes = compute_module_sizes(model, quantizer)  # also has buffers that no checkpoint holds
        assert {module: round(sizes[module]) for module in expected} == expected

    def test_room_is_left_for_a_weight_while_it_is_rounded(self, planned):
        plan = planned("llama-tied")
        for packed, room in ((True, 0), (False, full_bytes(plan))):
            quantizer = AutoHfQuantizer.from_config(PlanConfig(plan), pre_quantized=packed)
            found = quantizer.adjust_max_memory({0: 10**9, "cpu": 10**9})
            assert found == {0: 10**9 - room, "cpu": 10**9}

    def test_experts_are_put_together_on_the_cpu(self, planned):
        quantizer = AutoHfQuantizer.from_config(PlanConfig(planned("mixtral")), pre_quantized=False)
        made = conversion_mapping.get_model_conversion_mapping(tiny.build("mixtral"), None, quantizer)
        converters = [conversion for conversion in made if hasattr(conversion, "force_cpu")]
        assert converters and all(converter.force_cpu for converter in converters)

    def test_memory_too_small_for_all_sends_the_rest_to_disk(self, planned, checkpoint, tmp_path):
        plan = planned("llama")
        model = load(plan, checkpoint("llama"), device="cpu")
        options = {
            "device_map": "auto",
            "max_memory": {"cpu": int(0.8 * plan.bytes)},
            "offload_folder": tmp_path / "off",
        }
        placed = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "saved"), **options)
        assert set(placed.hf_device_map.values()) == {"cpu", "disk"}
        assert torch.equal(logits(placed), logits(model))
        with pytest.raises(UsageError, match="save_pretrained"):
            AutoModelForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=PlanConfig(plan), **options)

    @pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gemma"])
    def test_a_planned_checkpoint_runs_from_disk(self, name, planned, checkpoint, tmp_path):
        plan = planned(name)
        model = load(plan, checkpoint(name), device="cpu")
        folder = saved(model, tmp_path / "saved")
        blocks = next(path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
        parts = [path for path, module in model.named_modules() if module._parameters or not list(module.children())]
        for disk in (f"{blocks}.1.", ""):
            where = {path: "disk" if path.startswith(disk) else "cpu" for path in parts}
            placed = AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=tmp_path / "off")
            assert not list((tmp_path / "off").iterdir())  # read from where it lies
            assert on_disk(saved(placed, tmp_path / "again")) == plan.bytes
            for _ in range(2):  # the second time, what the first has moved away comes again
                assert torch.equal(logits(placed), logits(model))

    @pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gemma"])
    def test_a_model_rounded_on_load_can_be_offloaded(self, name, planned, checkpoint):
        model = load(planned(name), checkpoint(name), device="cpu")
        expected = logits(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        assert torch.equal(logits(model), expected)


class TestFailure:
    def attempt(self, monkeypatch, error: type[Exception], *args, **kwargs) -> Meter:
        """Load what must fail with `error`; the meter, once the error is forgotten."""
        with Meter(monkeypatch) as meter:
            try:
                AutoModelForCausalLM.from_pretrained(*args, **kwargs)
            except error:
                pass
            else:
                pytest.fail("loaded")
        gc.collect()
        return meter

    def test_out_of_memory_ends_the_load_and_frees_all(self, larger, monkeypatch):
        folder, plan = larger
        calls, quantize = [], IntegerFormat.quantize

        def failing(self, weight):
            calls.append(weight.shape)
            if len(calls) > 2:
                raise torch.OutOfMemoryError("no room")
            return quantize(self, weight)

        monkeypatch.setattr(IntegerFormat, "quantize", failing)
        meter = self.attempt(monkeypatch, torch.OutOfMemoryError, folder, quantization_config=PlanConfig(plan))
        assert len(calls) == 3
        assert meter.peak > 0
        assert meter.live() == 0

    def test_codes_that_go_while_loading_are_missed_by_name(self, session_of, checkpoint, monkeypatch):
        session = session_of("llama")
        plan = uniform_plan(session, "int4-g32")
        round_missing(plan, session)
        monkeypatch.setattr(pretrained, "load_tensors", lambda path: None)
        with pytest.raises(CodesMissing, match="lm_head: its codes have gone"):
            AutoModelForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=PlanConfig(plan))
