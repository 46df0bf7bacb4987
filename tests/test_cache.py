"""The cache: nothing comes out of it that belongs to another model, config or option."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitplan.formats.errors import BitplanError, ModelUnreadable, PlanMismatch
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.hf.quantizer import PlanConfig
from bitplan.planner.load import check_plan_fits
from bitplan.sensitivity import fingerprint
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.fingerprint import sampled_fingerprint
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.store import States, load_tensors, save_tensors, sha256
from bitplan.sensitivity.texts.read import read_texts
from bitplan.sensitivity.weight_cache import mark_workspace, workspace
from tests.test_cli import LITTLE, run, text  # noqa: F401 (fixtures)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


def change(folder, name: str, rows: slice) -> None:
    """Zero some rows of a tensor in a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name][rows] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")


class TestFingerprint:
    @pytest.mark.parametrize(
        ("name", "rows"),
        [("model.embed_tokens.weight", slice(40, 100)), ("model.layers.1.mlp.down_proj.weight", slice(20, 24))],
    )
    def test_no_byte_is_left_out(self, name, rows, model):
        """Rows between the samples by which models were known before."""
        before = sources.find(model)
        once, sampled = before.weights_sha256, sampled_fingerprint(before.files)
        change(model, name, rows)
        after = sources.find(model)
        assert after.weights_sha256 != once
        assert sampled_fingerprint(after.files) == sampled

    def test_it_costs_once_until_the_file_changes(self, model, own_cache, monkeypatch):
        monkeypatch.setattr(fingerprint, "SETTLED", 0.0)
        hashed, files = fingerprint._hashed, []
        monkeypatch.setattr(fingerprint, "_hashed", lambda path: files.append(path) or hashed(path))
        once = sources.find(model).weights_sha256
        assert sources.find(model).weights_sha256 == once and len(files) == 1
        os.utime(model / "model.safetensors", (1, 1))
        assert sources.find(model).weights_sha256 == once and len(files) == 2
        # Other bytes, with the size and the time of before.
        change(model, "lm_head.weight", slice(3, 4))
        os.utime(model / "model.safetensors", (1, 1))
        assert sources.find(model).weights_sha256 != once and len(files) == 3

    def test_a_file_that_has_just_changed_is_not_remembered(self, model, own_cache):
        (model / "model.safetensors").touch()
        assert sources.find(model).weights_sha256
        assert not (own_cache / "fingerprints").exists()

    def test_config_and_code(self, model):
        def found(trusted: bool) -> str:
            return sources.find(model, trust_remote_code=trusted).config_sha256

        plain = found(False)
        change_config(model, transformers_version="0", _name_or_path="elsewhere")
        assert found(False) == plain
        change_config(model, auto_map={"AutoModelForCausalLM": "own.Model"})
        (model / "own.py").write_text("a = 1", encoding="utf-8")
        without, first = found(False), found(True)
        (model / "own.py").write_text("a = 2", encoding="utf-8")
        assert len({plain, without, first, found(True)}) == 4 and found(False) == without

    def test_code_of_another_repository(self, model, tmp_path):
        """auto_map can name one, as folder or on the hub."""
        (tmp_path / "other").mkdir()
        code = tmp_path / "other" / "own.py"
        code.write_text("a = 1", encoding="utf-8")
        change_config(model, auto_map={"AutoModelForCausalLM": f"{tmp_path / 'other'}--own.Model"})
        first = sources.find(model, trust_remote_code=True).config_sha256
        code.write_text("a = 2", encoding="utf-8")
        assert sources.find(model, trust_remote_code=True).config_sha256 != first
        change_config(model, auto_map={"AutoModelForCausalLM": "not/here--own.Model"})
        with pytest.raises(ModelUnreadable, match="'not/here', which cannot be fetched"):
            sources.find(model, trust_remote_code=True)


class TestPlansOfOtherModels:
    def test_an_older_plan_is_known_by_its_samples(self, session_of, checkpoint, model):
        plan = uniform_plan(session_of("llama"), "int8")
        source = sources.find(model)
        raw = sha256((model / "config.json").read_bytes())
        old = plan.provenance.model.model_copy(
            update={"weights_sha256": sampled_fingerprint(source.files), "config_sha256": raw}
        )
        assert check_plan_fits(plan.for_model(old), source) == plan
        change(model, "lm_head.weight", slice(0, 4))
        with pytest.raises(PlanMismatch, match="the weights differ"):
            check_plan_fits(plan.for_model(old), sources.find(model))

    def test_another_config_is_another_model(self, session_of, model):
        plan = uniform_plan(session_of("llama"), "int8")
        assert check_plan_fits(plan, sources.find(model)) == plan
        change_config(model, rms_norm_eps=1e-3)
        with pytest.raises(PlanMismatch, match=r"another config\.json"):
            check_plan_fits(plan, sources.find(model))
        with pytest.raises(PlanMismatch, match=r"another config\.json"):
            AutoModelForCausalLM.from_pretrained(model, quantization_config=PlanConfig(plan))


@pytest.mark.parametrize(
    "changed", [{"rms_norm_eps": 0.1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}]
)
def test_compare_gives_this_models_figures(changed, run, model, text, own_cache, monkeypatch, tmp_path):  # noqa: F811
    def perplexity() -> float:
        code, out, err = run("compare", model, "--text", text, *LITTLE, "--formats", "fp32", "--json")
        assert code == 0, err
        return json.loads(out)["rows"][0]["ppl"]

    before = perplexity()
    change_config(model, **changed)
    found = perplexity()
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "empty"))
    assert found == perplexity() != before


@pytest.mark.parametrize("keep", ["*.gate_proj", "*.q_proj"])
def test_keeping_units_after_an_audit_of_all(keep, checkpoint, own_cache, monkeypatch, tmp_path):
    """Units that read one input share its second moments while they are gathered."""
    source = sources.find(checkpoint("llama"))
    texts = read_texts(source, tokens=1024, length=64)

    def scores(*kept: str) -> dict:
        profile = audit(open_session(source, texts, kept, "cpu"), ("int4-g64", "int2-g64"))
        return {(row.unit, row.format, row.rounding): row.predicted_nll for row in profile.rows}

    scores()
    found = scores(keep)
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "empty"))
    assert found == scores(keep)
    assert all(loss > 0 for (_, format, _), loss in found.items() if format == "int2-g64")


class TestDisk:
    def test_a_full_cache_is_a_sentence(self, own_cache, monkeypatch, tmp_path):
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
        with pytest.raises(BitplanError, match=r"10 B free, 64 B are needed; `bitplan cache`"):
            save_tensors(own_cache / "a.safetensors", {"a": torch.ones(16)})
        assert not list(own_cache.iterdir())

    def test_a_write_that_fails_leaves_nothing(self, own_cache, monkeypatch):
        def failing(tensors, path, metadata):
            path.write_bytes(b"a part")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("bitplan.sensitivity.store.save_file", failing)
        with pytest.raises(BitplanError, match="No space left on device"):
            save_tensors(own_cache / "a.safetensors", {"a": torch.ones(16)})
        assert not list(own_cache.iterdir())

    @pytest.mark.parametrize("told", [True, False], ids=["disk_usage", "write"])
    def test_a_full_temporary_folder_is_a_sentence(self, told, tmp_path, monkeypatch):
        """On a real file system of 1 MiB, where the process ended with a bus error."""
        place = tmp_path / "small"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            monkeypatch.setattr("tempfile.tempdir", str(place))
            States((10, 10, 10))[9] = torch.ones(10, 10)
            if not told:
                monkeypatch.setattr("bitplan.sensitivity.store.refuse_full_disk", lambda *a: None)
            with pytest.raises(BitplanError, match="set TMPDIR and BITPLAN_CACHE to folders on a larger disk"):
                States((2, 1 << 9, 1 << 10))[1] = torch.ones(1 << 9, 1 << 10)
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)


def test_what_a_gpu_has_computed_is_not_taken_for_a_cpus():
    made = {device: workspace("w", "c", "t", 0, device) for device in ("cpu", "cuda", "cuda:1", "NVIDIA H200")}
    assert made["cpu"] != made["cuda"] == made["cuda:1"] == made["NVIDIA H200"]


def test_one_process_at_a_time_makes_an_entry(tmp_path):
    """Each of three processes reads a number, waits, and writes it back one higher."""
    code = (
        "import sys, time; from pathlib import Path; from bitplan.sensitivity.store import locked\n"
        "path = Path(sys.argv[1])\n"
        "with locked(path):\n"
        "    n = int(path.read_text()) if path.exists() else 0; time.sleep(0.3); path.write_text(str(n + 1))"
    )
    path = tmp_path / "folder" / "entry"
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert path.read_text(encoding="utf-8") == "3"


class TestCommand:
    @pytest.fixture
    def filled(self, own_cache, tmp_path):
        """A cache of two models, one of them used long ago, beside a file that is not ours."""
        for key, name, age in (("a" * 24, "some/old", 40 * 86400), ("b" * 24, "other/new", 0)):
            mark_workspace(own_cache / key, name)
            for place in ("statistics/u", "codes/u/int4", f"plans/{'c' * 24}/units/u"):
                path = own_cache / key / f"{place}.safetensors"
                save_tensors(path, {"a": torch.ones(16)})
                os.utime(path, (time.time() - age,) * 2)
        save_tensors(own_cache / "text" / "t.safetensors", {"ids": torch.ones(4)})
        (own_cache / "thesis").mkdir()
        (own_cache / "thesis" / "chapter").write_text("years of work", encoding="utf-8")
        return own_cache

    def rows(self, run, *arguments) -> dict:  # noqa: F811
        code, out, err = run("cache", *arguments, "--json")
        assert code == 0, err
        return {(row["model"], row["kind"]): row["bytes"] for row in json.loads(out)["rows"]}

    def test_it_lists(self, run, filled):  # noqa: F811
        size = (filled / ("a" * 24) / "statistics" / "u.safetensors").stat().st_size
        found = self.rows(run)
        mine = {(name, kind): size for name in ("some/old", "other/new") for kind in ("statistics", "codes", "plans")}
        assert found == mine | {(None, "text"): (filled / "text" / "t.safetensors").stat().st_size}
        assert "some/old" in run("cache")[1]

    @pytest.mark.parametrize("arguments", [("--older-than", "30d"), ("--model", "some/old"), ("--model", "old")])
    def test_it_prunes(self, arguments, run, filled):  # noqa: F811
        assert {model for model, _ in self.rows(run, *arguments)} == {"some/old"}
        assert {model for model, _ in self.rows(run)} == {"other/new", None}
        assert not (filled / ("a" * 24)).exists() and (filled / "thesis" / "chapter").exists()

    def test_what_is_read_is_used(self, run, filled):  # noqa: F811
        load_tensors(filled / ("a" * 24) / "codes" / "u" / "int4.safetensors")
        assert ("some/old", "codes") not in self.rows(run, "--older-than", "30d")
        assert ("some/old", "codes") in self.rows(run)

    def test_all(self, run, filled):  # noqa: F811
        assert len(self.rows(run, "--all")) == 7
        assert self.rows(run) == {} and (filled / "thesis" / "chapter").exists()

    @pytest.mark.parametrize("arguments", [("--older-than", "soon"), ("--all", "--model", "x"), ("--model", "none")])
    def test_bad_options(self, arguments, run, filled):  # noqa: F811
        assert run("cache", *arguments)[:2] == (2, "") and len(self.rows(run)) == 7
