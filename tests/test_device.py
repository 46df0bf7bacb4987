"""A device's memory as a budget: the terms add up, and what does not fit says what would."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconMambaConfig, RecurrentGemmaConfig

from bitplan.formats.errors import BitplanError, UsageError
from bitplan.formats.kernels.dispatch import Machine, named_machine
from bitplan.formats.kv.cache import KVCache
from bitplan.planner.load import load
from bitplan.planner.memory import budget as budgets
from bitplan.planner.memory import device as devices
from bitplan.planner.memory.budget import RESERVE, plan_memory
from bitplan.planner.memory.device import CUDA_CONTEXT, cgroup_free, find_device, free_memory
from bitplan.planner.plan import NATIVE_WORKLOAD, Plan
from bitplan.sensitivity import source as sources
from tests import tiny
from tests.test_cli import LITTLE, run, text  # noqa: F401 (fixtures)

FORMATS_OPTION = ["--formats", "int8,int4-g64,int3-g32"]


@pytest.fixture
def plan(run, checkpoint, text):  # noqa: F811
    def call(*arguments: str) -> tuple[int, str, str]:
        return run("plan", checkpoint("llama", torch.bfloat16), "--text", text, *LITTLE, *FORMATS_OPTION, *arguments)

    return call


def test_terms_add_up_to_the_device_and_are_estimated(plan, checkpoint):
    code, out, err = plan("--gpu", "1MiB", "--context", "100", "--batch", "2", "--trials", "0", "--json")
    assert code == 0, err
    made = Plan.model_validate_json(out)
    budget = made.budget
    assert budget.device == 1 << 20
    assert budget.reserve == int(RESERVE * budget.device)
    assert budget.device == budget.weights + budget.kv_cache + budget.workspace + budget.reserve
    assert made.bytes <= budget.weights
    assert budget.kv_cache == 2 * 2 * 2 * 2 * 16 * 100 * 2  # layers, K and V, batch, heads, size, tokens, bytes
    needs = plan_memory(made, sources.find(checkpoint("llama", torch.bfloat16)), Machine("cpu"))
    assert needs.kv_cache == budget.kv_cache and needs.workspace <= budget.workspace
    assert "left for weights" in err


def test_a_gpu_named_by_its_size_keeps_room_for_its_context():
    found = find_device("24GiB", "auto")
    assert (found.memory, found.context, found.on.kind) == (24 << 30, CUDA_CONTEXT, "cuda")
    assert find_device("24GiB", "cpu").context == 0


def test_the_kv_caches_format_is_planned_measured_and_used(run, plan, text, tmp_path):  # noqa: F811
    file = tmp_path / "plan.json"
    code, out, err = plan("--bpw", "8", "--kv-dtype", "int4", "--trials", "1", "-o", str(file), "--json")
    assert code == 0, err
    made = Plan.model_validate_json(out)
    assert made.workload.kv_format == "int4" and made.kv_cache_loss.kl > 0
    assert made.measured.kl > made.kv_cache_loss.kl / 2  # both together lose at least much of what the cache alone does
    code, out, _ = run("apply", file, "--text", text, *LITTLE, "--json")
    assert code == 0
    assert json.loads(out)["kl"] == pytest.approx(made.measured.kl, rel=1e-5)
    assert "KV cache: int4; alone it costs KL" in run("show", file)[1]


def test_a_planned_model_generates_as_it_was_budgeted_and_still_does_when_saved(plan, checkpoint, tmp_path):
    asked = ("--gpu", "2MiB", "--context", "64", "--prefill-chunk", "16", "--kv-dtype", "int8", "--rounding", "nearest")
    made = Plan.model_validate_json(plan(*asked, "--trials", "0", "--json")[1])
    model = load(made, checkpoint("llama", torch.bfloat16), device="cpu")
    model.save_pretrained(tmp_path / "saved")
    ids = torch.arange(40)[None]
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert loaded.generation_config.prefill_chunk_size == 16
        out = loaded.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, KVCache) and out.past_key_values.kv_format == "int8"


CANNOT = {
    "falcon-mamba": FalconMambaConfig(**tiny.COMMON, state_size=8, bos_token_id=0, eos_token_id=0, pad_token_id=0),
    "recurrent": RecurrentGemmaConfig(
        **tiny.COMMON | {"num_hidden_layers": 3, "intermediate_size": 96, "lru_width": 64, "attention_window_size": 16},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_no_chunk_is_set_where_a_model_cannot_read_one(name, run, text, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(tiny.CONFIGS, name, CANNOT[name])
    model = tiny.saved(name, tmp_path / name)
    asked = ("--gpu", "4MiB", "--context", "64", "--prefill-chunk", "16", "--trials", "0", "--rounding", "nearest")
    code, out, err = run("plan", model, "--text", text, *LITTLE, *asked, "--json")
    assert code == 0, err
    assert "prompts are read whole" in err
    made = Plan.model_validate_json(out)
    assert made.workload.prefill_chunk is None
    loaded = load(made, model, device="cpu")
    loaded.generate(torch.arange(40)[None], max_new_tokens=2, do_sample=False)


class TestBadInput:
    def test_a_budget_said_twice(self, plan):
        code, _, err = plan("--gpu", "1MiB", "--bpw", "4")
        assert code == 2 and "given: --bpw, --gpu" in err

    def test_no_gpu_to_ask(self, plan):
        code, _, err = plan("--gpu", "auto")
        assert code == 2 and "give its memory" in err

    def test_context_beyond_the_models(self, plan):
        code, _, err = plan("--gpu", "1MiB", "--context", "200")
        assert code == 2 and "at most 128 tokens" in err

    @pytest.mark.parametrize("option", ["--context", "--batch", "--prefill-chunk"])
    def test_numbers_below_one(self, plan, option):
        code, _, err = plan("--gpu", "1MiB", option, "0")
        assert code == 2 and f"{option} 0: it must be 1 or more" in err

    def test_an_unknown_kv_format(self, plan):
        code, _, err = plan("--bpw", "4", "--kv-dtype", "int5")
        assert code == 2 and "there are native, fp8, int8" in err

    def test_what_would_fit(self, plan):
        code, out, err = plan("--gpu", "700KiB", "--context", "128", "--batch", "4", "--trials", "0")
        assert (code, out) == (3, "")
        assert "is the biggest term; what would fit: --context" in err
        context = int(err.split("--context ")[1].split(",")[0])
        assert 1 < context < 128
        assert plan("--gpu", "700KiB", "--context", str(context), "--batch", "4", "--trials", "0")[0] == 0

    def test_machines(self):
        assert named_machine("cuda:8.0") == Machine("cuda", (8, 0))
        for name in ("tpu", "cuda:99"):
            with pytest.raises(UsageError):
                named_machine(name)


def test_a_full_device_is_refused_before_loading(plan, checkpoint, monkeypatch):
    _, out, _ = plan("--gpu", "2MiB", "--context", "128", "--batch", "2", "--trials", "0", "--json")
    made = Plan.model_validate_json(out)
    monkeypatch.setattr(budgets, "free_memory", lambda device: made.bytes + 250_000)
    with pytest.raises(BitplanError, match=r"cpu has .* free and the plan needs .* more: .* --context \d+"):
        load(made, checkpoint("llama", torch.bfloat16), device="cpu")
    monkeypatch.setattr(budgets, "free_memory", lambda device: made.bytes - 1)
    with pytest.raises(BitplanError, match=r"make a plan for a smaller budget$"):
        load(made.model_copy(update={"workload": NATIVE_WORKLOAD}), checkpoint("llama", torch.bfloat16))


MB = 1 << 20
LIMITS = {
    "v2": ("0::/user/app\n", "{path}", "memory.max", "memory.current", "inactive_file"),
    "v1": (
        "3:cpu,cpuacct:/user/app\n2:memory:/user/app\n",
        "memory/{path}",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


@pytest.fixture
def group(tmp_path, monkeypatch):
    """group(version, path, limit) writes one control group, of which 100 MiB are used, 30 by file pages."""

    def write(version: str, path: str, limit: str) -> None:
        lines, place, most, used, pages = LIMITS[version]
        (tmp_path / "membership").write_text(lines, encoding="utf-8")
        folder = tmp_path / place.format(path=path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / most).write_text(f"{limit}\n", encoding="utf-8")
        (folder / used).write_text(f"{100 * MB}\n", encoding="utf-8")
        (folder / "memory.stat").write_text(f"anon {70 * MB}\n{pages} {30 * MB}\n", encoding="utf-8")

    def found() -> list[int]:
        return sorted(cgroup_free(tmp_path, tmp_path / "membership"))

    monkeypatch.setattr(devices, "cgroup_free", found)
    write.found = found
    return write


class TestControlGroups:
    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_the_limits_of_a_group_and_of_those_above_it(self, group, version):
        group(version, "user/app", str(300 * MB))
        group(version, "user", str(250 * MB))
        group(version, "elsewhere", str(110 * MB))
        assert group.found() == [180 * MB, 230 * MB]
        assert free_memory("cpu") == 180 * MB

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_in_a_container_the_mounted_root_has_the_limit(self, group, version):
        group(version, ".", str(120 * MB))  # the path of membership, the host's, is not there
        assert free_memory("cpu") == 50 * MB

    def test_more_used_than_allowed_leaves_nothing(self, group):
        group("v2", "user/app", str(10 * MB))
        assert free_memory("cpu") == 0

    def test_without_limits_it_is_the_systems(self, group, monkeypatch):
        monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 7 * MB}))
        assert free_memory("cpu") == 7 * MB  # no groups at all
        group("v2", "user/app", "max")
        assert group.found() == []
        group("v1", "user/app", str(2**63 - 4096))
        assert free_memory("cpu") == 7 * MB


def test_show_tells_the_kernels_and_why(run, plan, tmp_path):  # noqa: F811
    file = tmp_path / "plan.json"
    assert plan("--bpw", "5", "--trials", "0", "-o", str(file))[0] == 0
    code, out, _ = run("show", file, "--device", "cpu", "--json")
    rows = json.loads(out)["kernels"]
    assert code == 0 and sum(row["count"] for row in rows) == 16
    assert all(row["kernel"] and row["why"] for row in rows)
    assert "cuda:8.0" in run("show", file, "--device", "cuda:8.0")[1]
    assert run("show", file, "--device", "tpu")[0] == 2
