"""The command as typed, on tiny models: data on stdout, exit codes, and bad input in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from optuna.storages.journal import JournalFileOpenLock
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from bitplan.formats.kv.cache import KV_FORMATS
from bitplan.planner.cli import main
from bitplan.planner.plan import Plan
from bitplan.sensitivity.profile import Profile, read

LITTLE = ["--tokens", "1024", "--block", "64", "--device", "cpu"]
FORMATS_OPTION = ["--formats", "int8,int4-g64,int3-g32,int2-g64"]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"the {i} cats sat on {i * 7} mats." for i in range(800)), encoding="utf-8")
    return file


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def free(lock: JournalFileOpenLock) -> bool:
    """No lock of ours has the name of Optuna's, which would wait 30 seconds for it."""
    assert not Path(lock._lock_file).exists()
    return True


def test_audit_plan_apply_and_plain_transformers(run, checkpoint, text, tmp_path, monkeypatch):
    acquire = JournalFileOpenLock.acquire
    monkeypatch.setattr(JournalFileOpenLock, "acquire", lambda lock: free(lock) and acquire(lock))
    model = checkpoint("llama-tied", torch.bfloat16)
    profile, plan, saved = tmp_path / "profile.json", tmp_path / "plan.json", tmp_path / "saved"
    code, out, _ = run("audit", model, "--text", text, *LITTLE, *FORMATS_OPTION, "-o", profile, "--json")
    assert code == 0
    rows = json.loads(out)
    assert set(rows[0]) >= {"unit", "format", "rounding", "bytes", "delta_nll"}
    assert len(rows) == 15 * 5
    assert read(profile, Profile).provenance.text.source == "text.txt"

    code, out, _ = run(
        "plan", model, "--bpw", "4.6", "--profile", profile, "--trials", "4", *LITTLE, "-o", plan, "--json"
    )
    assert code == 0
    made = Plan.model_validate_json(out)
    assert made == read(plan, Plan)
    assert made.bytes <= made.budget.weights == int(4.6 * made.provenance.model.parameters / 8)
    assert made.measured is not None and made.uniform is not None and made.uniform.measured is not None
    assert made.measured.kl <= made.uniform.measured.kl

    code, out, _ = run("apply", plan, "--text", text, *LITTLE, "--save", saved, "--prompt", "the cat", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["resident_bytes"] == data["planned_bytes"] == made.bytes
    assert data["kl"] == pytest.approx(made.measured.kl, rel=1e-6)
    assert data["text"].startswith("the cat")
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == made.bytes  # noqa: SIM118
    assert {"config.json", "tokenizer.json", "plan.json", "README.md"} <= {path.name for path in saved.iterdir()}
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert sum(p.nbytes for p in again.parameters()) == made.bytes

    code, out, _ = run("show", plan)
    assert code == 0
    assert "model.layers.*.mlp.down_proj" in out
    code, out, err = run("apply", plan, "--save", saved)
    assert (code, out) == (2, "")
    assert "exists: give --force" in err
    assert run("apply", plan, "--save", saved, "--force", "--device", "cpu")[0] == 0


def test_a_profile_is_planned_from_its_own_text_on_another_machine(run, checkpoint, text, tmp_path, monkeypatch):
    """With another cache: the same text gives the same plan, other text is refused."""
    model, profile, first, second = checkpoint("llama-tied"), *(tmp_path / name for name in ("p", "a.json", "b.json"))
    heldout, other = tmp_path / "heldout.txt", tmp_path / "other.txt"
    heldout.write_text("entirely other words here, " * 300, encoding="utf-8")
    other.write_text("not the text of the profile " * 900, encoding="utf-8")
    texts = ("--text", text, "--heldout", heldout)
    assert run("audit", model, *texts, *LITTLE, *FORMATS_OPTION, "-o", profile)[0] == 0
    plan = ("plan", model, "--profile", profile, "--bpw", "4.6", "--trials", "3", "--device", "cpu")
    assert run(*plan, "-o", first)[0] == 0
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    code, _, err = run(*plan, "-o", second)
    assert code == 2 and "is not in the cache: give it with --text" in err
    for wrong in (("--text", other, "--heldout", heldout), ("--text", text)):
        code, _, err = run(*plan, *wrong, "-o", second)
        assert code == 1 and "is not the text that was used" in err
    assert run(*plan, *texts, "-o", second)[0] == 0
    assert read(first, Plan) == read(second, Plan)


def test_another_budget_runs_no_model(run, checkpoint, tmp_path, monkeypatch):
    model, profile = checkpoint("gpt2"), tmp_path / "profile.json"
    assert run("audit", model, *LITTLE, *FORMATS_OPTION, "-o", profile)[0] == 0
    monkeypatch.setattr("bitplan.sensitivity.source.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    code, out, _ = run("plan", model, "--fraction", "0.4", "--profile", profile, "--trials", "0", "--json")
    assert code == 0
    made = json.loads(out)
    assert made["measured"] is None
    assert made["bytes"] <= made["budget"]["weights"] == int(0.4 * 2 * made["provenance"]["model"]["parameters"])


def test_an_interrupted_measurement_goes_on(run, checkpoint, tmp_path, monkeypatch):
    from bitplan.sensitivity.loss import Reference

    compared = Reference.compare
    model = checkpoint("opt")
    arguments = ("audit", model, *LITTLE, "--formats", "int3-g64", "--tier", "measured", "--json")
    calls = 0

    def interrupted(self, log_probabilities_of):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return compared(self, log_probabilities_of)

    monkeypatch.setattr(Reference, "compare", interrupted)
    code, out, err = run(*arguments)
    assert (code, out) == (130, "")
    assert "run the same command again" in err
    code, out, _ = run(*arguments)
    assert code == 0
    measured = [row for row in json.loads(out) if row["measured_nll"] is not None]
    assert len(measured) == 14
    assert calls == 6 + 14 - 5 + len(KV_FORMATS) - 1


@pytest.fixture
def quick(monkeypatch):
    """Learning and healing in a few steps."""
    for name, value in (
        ("segment.STEPS", 3),
        ("distillation.STEPS", 4),
        ("distillation.LOOK", 2),
        ("distillation.TOKENS", 256),
    ):
        monkeypatch.setattr(f"bitplan.planner.quantize.{name}", value)


def test_apply_makes_the_codes_in_another_way(run, checkpoint, text, tmp_path, quick):
    model, plan = checkpoint("llama-tied", torch.bfloat16), tmp_path / "plan.json"
    made = ("plan", model, "--text", text, *LITTLE, "--formats", "int3-g32,int2-g32", "--bpw", "3.5", "--trials", "0")
    assert run(*made, "-o", plan)[0] == 0
    assert read(plan, Plan).rounding == "gptq"
    kl, ways = (
        {},
        ((), ("--rounding", "tuned"), ("--rounding", "nearest"), ("--heal",), ("--rounding", "awq", "--heal")),
    )
    for way in ways:
        code, out, _ = run(
            "apply", plan, *way, "--text", text, *LITTLE, "--save", tmp_path / "_".join(("s", *way)), "--json"
        )
        assert code == 0
        data = json.loads(out)
        assert data["resident_bytes"] == data["planned_bytes"] == read(plan, Plan).bytes
        kl[data["rounding"]] = data["kl"]
    assert list(kl) == ["gptq", "tuned", "nearest", "gptq, distilled", "awq, distilled"]
    assert kl["nearest"] > kl["gptq"] and len(set(kl.values())) > 3
    saved = read(tmp_path / "s_--rounding_awq_--heal" / "plan.json", Plan)
    assert (saved.rounding, saved.measured) == ("awq, distilled", None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "s_--rounding_awq_--heal")
    assert sum(p.nbytes for p in again.parameters()) == saved.bytes
    assert read(plan, Plan).rounding == "gptq"  # the file that was read is as it was


def test_a_plan_is_made_with_a_rounding_and_healing(run, checkpoint, text, tmp_path, quick):
    """From a profile that another rounding scored; `apply` then finds the codes that the plan was measured with."""
    model, profile = checkpoint("llama", torch.bfloat16), tmp_path / "profile.json"
    assert run("audit", model, "--text", text, *LITTLE, "--formats", "int4-g32,int3-g32", "-o", profile)[0] == 0
    start = ("plan", model, "--profile", profile, "--bpw", "4.6", "--device", "cpu")
    for rounding, heal in (("tuned", ()), ("awq", ("--heal",))):
        plan = tmp_path / f"{rounding}.json"
        code, _, err = run(*start, "--trials", "2", "--rounding", rounding, *heal, "-o", plan)
        assert code == 0, err
        made = read(plan, Plan)
        assert made.rounding == rounding + (", distilled" if heal else "") and made.distilled == bool(heal)
        assert made.uniform is not None and made.uniform.rounding == rounding
        code, out, _ = run("apply", plan, "--text", text, *LITTLE, "--json")
        assert code == 0
        assert json.loads(out)["kl"] == pytest.approx(made.measured.kl, rel=1e-6)
        code, out, _ = run("apply", plan, "--no-heal", "--device", "cpu", "--json")
        assert json.loads(out)["rounding"] == rounding
    assert json.loads(run(*start, "--trials", "0", "--heal", "--json")[1])["distilled"] is True


def test_a_rounding_that_loses_more_than_the_one_that_scored_is_no_fault_of_the_model(run, checkpoint, tmp_path):
    model, profile = checkpoint("llama", torch.bfloat16), tmp_path / "profile.json"
    assert run("audit", model, *LITTLE, "--formats", "int3-g32,int2-g32", "-o", profile)[0] == 0
    start = ("plan", model, "--profile", profile, "--bpw", "3", "--device", "cpu", "--trials", "1")
    code, _, err = run(*start, "--rounding", "nearest", "-o", tmp_path / "plan.json")
    assert code == 0, err


def test_compare_with_a_rounding_and_healing(run, checkpoint, quick):
    some = ("compare", checkpoint("llama"), *LITTLE, "--formats", "bf16,nf4,int3-g32", "--json")
    code, out, _ = run(*some, "--rounding", "awq", "--heal")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert rows.keys() == {"bf16", "nf4", "uniform int3-g32/awq, distilled"}
    assert "nf4 cannot be rounded by 'awq', only by nearest" in rows["nf4"]["note"]
    assert rows["uniform int3-g32/awq, distilled"]["kl"] > 0


def test_compare(run, checkpoint, tmp_path):
    model, plan = checkpoint("llama", torch.bfloat16), tmp_path / "p.json"
    assert run("plan", model, "--bpw", "6", *LITTLE, *FORMATS_OPTION, "--trials", "2", "-o", plan)[0] == 0
    code, out, _ = run("compare", model, *LITTLE, "--formats", "fp32,bf16,int8,int4", "--plan", plan, "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["fp32", "bf16", "uniform int8", "uniform int4-g64/gptq", "p.json"]
    assert rows["fp32"]["kl"] < 1e-9
    assert rows["fp32"]["times_smaller_than_fp32"] == 1
    assert rows["bf16"]["times_smaller_than_fp32"] == 2
    assert rows["p.json"]["resident_bytes"] == read(plan, Plan).bytes
    assert rows["uniform int8"]["kl"] < rows["uniform int4-g64/gptq"]["kl"]


def test_a_format_that_cannot_run_is_a_row_that_says_so(run, checkpoint, monkeypatch):
    monkeypatch.setattr(
        "bitplan.formats.bnb.missing", lambda: "bitsandbytes is not installed: pip install bitsandbytes"
    )
    code, out, _ = run("compare", checkpoint("gpt2"), *LITTLE, "--formats", "nf4,int8", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert "pip install bitsandbytes" in rows[0]["note"]
    assert rows[1]["kl"] > 0


def test_formats_lists_every_row(run):
    code, out, _ = run("formats", "--json")
    assert code == 0
    rows = {row["format"]: row for row in json.loads(out)}
    assert {"fp32", "bf16", "fp16", "fp8", "int8", "int8-bnb", "nf4", "int4-g64", "binary-g64"} <= set(rows)
    assert rows["int4-g128"]["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 128)


class TestBadInput:
    """(code, what stderr must say); stdout stays empty and nothing is written."""

    @pytest.fixture
    def refused(self, run, tmp_path):
        def check(code: int, said: str, *arguments: object) -> None:
            before = sorted(tmp_path.rglob("*"))
            found, out, err = run(*arguments)
            assert (found, out) == (code, "")
            assert said in err
            assert "Traceback" not in err
            assert sorted(tmp_path.rglob("*")) == before

        return check

    def test_budget_under_the_floor(self, refused, checkpoint, tmp_path):
        model, output = checkpoint("llama"), tmp_path / "plan.json"
        start = ("plan", model, *LITTLE, *FORMATS_OPTION, "-o", output)
        refused(3, "raise the budget to at least --budget", *start, "--budget", "20KiB")
        refused(3, "unquantized tensors", *start, "--bpw", "1.5")
        refused(3, "the overrides need at least", *start, "--bpw", "3", "--keep", "*mlp*")

    def test_budget_words(self, refused, checkpoint):
        refused(2, "could mean bits or bytes", "plan", checkpoint("llama"), "--budget", "3gb")
        refused(2, "has no unit of bytes", "plan", checkpoint("llama"), "--budget", "3")
        refused(2, "give the budget once", "plan", checkpoint("llama"))
        refused(2, "give the budget once", "plan", checkpoint("llama"), "--bpw", "4", "--fraction", "0.3")
        refused(2, "above zero", "plan", checkpoint("llama"), "--bpw", "nan")
        refused(2, "raise --tokens to 256", "audit", checkpoint("llama"), "--tokens", "10", "--block", "64")

    def test_formats_and_globs(self, refused, checkpoint):
        refused(2, "did you mean int4-g64", "audit", checkpoint("llama"), "--formats", "int4-g63")
        refused(2, "names none", "audit", checkpoint("llama"), "--formats", ",")
        refused(2, "unknown rounding 'magic'", "audit", checkpoint("llama"), "--rounding", "magic")
        refused(2, "matches no unit", "audit", checkpoint("llama"), *LITTLE, "--keep", "*.nothing")

    def test_roundings_and_layouts(self, refused, run, checkpoint, tmp_path):
        model, plan = checkpoint("llama"), tmp_path / "plan.json"
        wanted = ("--formats", "nf4,fp8", "--rounding", "tuned")
        refused(2, "nf4, fp8 cannot be rounded by 'tuned', only by nearest", "plan", model, "--bpw", "9", *wanted)
        refused(2, "nf4, fp8 cannot be rounded by 'tuned', only by nearest", "audit", model, *wanted)
        refused(2, "there are nearest, gptq, awq, yaqa, tuned", "plan", model, "--bpw", "4", "--rounding", "magic")
        refused(2, "unrecognized arguments: --heal", "audit", model, "--heal")
        floats = ("--formats", "nf4", "--trials", "0")
        assert run("plan", model, *LITTLE, *floats, "--bpw", "6", "-o", plan)[0] == 0
        refused(2, "unknown rounding 'magic'", "apply", plan, "--rounding", "magic")
        refused(2, "cannot be rounded by 'awq', only by nearest", "apply", plan, "--rounding", "awq")
        refused(2, "invalid choice: 'onnx'", "apply", plan, "--layout", "onnx")
        refused(
            2, "--layout gptq is the layout of a saved checkpoint: give --save DIR", "apply", plan, "--layout", "gptq"
        )
        refused(1, "nf4", "apply", plan, "--layout", "gptq", "--save", tmp_path / "saved")

    @pytest.mark.parametrize(
        "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")]
    )
    def test_out_of_memory(self, refused, checkpoint, monkeypatch, error):
        def raising(*_, **__):
            raise error

        monkeypatch.setattr("bitplan.sensitivity.source.load_model", raising)
        refused(1, "out of memory: give a smaller --block, fewer --formats", "audit", checkpoint("llama"), *LITTLE)

    def test_models(self, refused, tmp_path, checkpoint):
        empty = tmp_path / "empty"
        empty.mkdir()
        refused(1, "has no config.json", "audit", empty)
        (empty / "config.json").write_text("{}", encoding="utf-8")
        refused(1, "has no *.safetensors weights", "audit", empty)
        (empty / "model.safetensors").write_bytes(b"not tensors at all")
        refused(1, "not a whole safetensors file", "audit", empty)
        whole = (checkpoint("llama") / "model.safetensors").read_bytes()
        (empty / "model.safetensors").write_bytes(whole[:-100])
        refused(1, "is cut short", "audit", empty)
        (empty / "model.safetensors").write_bytes(whole)
        (empty / "config.json").write_text("{", encoding="utf-8")
        refused(1, "config.json is no valid JSON", "audit", empty)
        (empty / "config.json").write_text(
            (checkpoint("llama") / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
        )
        refused(1, "has no tokenizer", "audit", empty)
        refused(1, "neither a folder here nor a hub id", "audit", tmp_path / "no" / "such" / "folder")
        refused(1, "is no folder here and could not be had from the hub", "audit", "some/model")

    def test_weights(self, refused, checkpoint, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "model"
        shutil.copytree(checkpoint("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        down = tensors["model.layers.1.mlp.down_proj.weight"]
        down[3, 5] = float("nan")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        refused(1, "model.layers.1.mlp.down_proj.weight holds NaN", "audit", folder, *LITTLE)
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        refused(1, "lacks 1 tensors that LlamaForCausalLM needs, model.norm.weight first", "audit", folder, *LITTLE)

    def test_texts(self, refused, checkpoint, tmp_path):
        binary, short = tmp_path / "binary", tmp_path / "short"
        binary.write_bytes(bytes(range(256)))
        short.write_text("too short", encoding="utf-8")
        refused(2, "cannot read", "audit", checkpoint("llama"), "--text", tmp_path / "none")
        refused(2, "is not UTF-8 text", "audit", checkpoint("llama"), "--text", binary)
        refused(1, "text too short", "audit", checkpoint("llama"), *LITTLE, "--text", short)

    def test_plan_files(self, refused, run, checkpoint, tmp_path):
        plan, other = tmp_path / "plan.json", tmp_path / "other.json"
        assert (
            run("plan", checkpoint("llama"), *LITTLE, *FORMATS_OPTION, "--bpw", "6", "--trials", "1", "-o", plan)[0]
            == 0
        )
        refused(1, "the plan was made for", "apply", plan, "--model", checkpoint("gpt2"))
        refused(2, "exists: give --force", "plan", checkpoint("llama"), "--bpw", "6", "-o", plan)
        refused(2, "exists: give --force", "audit", checkpoint("llama"), "-o", plan)
        other.write_text(plan.read_text(encoding="utf-8")[:500], encoding="utf-8")
        refused(1, "is no valid plan file", "show", other)
        refused(1, "is no valid plan file", "apply", other)
        refused(1, "cannot read", "show", tmp_path / "none.json")
        refused(2, "is not here: there are", "apply", plan, "--device", "cuda:99")
        refused(2, "unknown device", "apply", plan, "--device", "tpu")

    def test_a_folder_of_something_else_is_never_replaced(self, refused, run, checkpoint, tmp_path):
        plan, folder = tmp_path / "plan.json", tmp_path / "precious"
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work", encoding="utf-8")
        assert (
            run("plan", checkpoint("llama"), *LITTLE, *FORMATS_OPTION, "--bpw", "6", "--trials", "1", "-o", plan)[0]
            == 0
        )
        refused(2, "holds something else than a model", "apply", plan, "--save", folder, "--force")

    def test_quantized_already(self, refused, run, checkpoint, tmp_path):
        plan, saved = tmp_path / "plan.json", tmp_path / "saved"
        assert (
            run("plan", checkpoint("llama"), *LITTLE, *FORMATS_OPTION, "--bpw", "6", "--trials", "1", "-o", plan)[0]
            == 0
        )
        assert run("apply", plan, "--save", saved, "--device", "cpu")[0] == 0
        refused(1, "is quantized already (bitplan)", "audit", saved)

    def test_unknown_command(self, run):
        code, out, err = run("frobnicate")
        assert (code, out) == (2, "")
        assert "invalid choice" in err
