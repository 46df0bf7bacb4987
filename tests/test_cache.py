"""The cache: nothing comes out of it that belongs to another model, config or option."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitplan.formats.errors import PlanMismatch
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.hf.quantizer import PlanConfig
from bitplan.planner.load import check_plan_fits
from bitplan.sensitivity import fingerprint
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit
from bitplan.sensitivity.curvature import StatisticsStore, gather
from bitplan.sensitivity.fingerprint import sampled_fingerprint
from bitplan.sensitivity.graph import build_graph
from bitplan.sensitivity.session import open_session, read_texts
from bitplan.sensitivity.store import sha256
from bitplan.sensitivity.texts.text import Blocks
from tests import tiny
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
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


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
        (model / "own.py").write_text("a = 1")
        without, first = found(False), found(True)
        (model / "own.py").write_text("a = 2")
        assert len({plain, without, first, found(True)}) == 4 and found(False) == without


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
    """Units that read one input share its second moments, which are stored with the first of them."""
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


def test_statistics_of_a_few_units_bring_what_they_share(tmp_path):
    model = tiny.build("llama")
    graph = build_graph(model)
    unit = next(unit for unit in graph.units if unit.name in graph.readers)
    texts = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    store = StatisticsStore(tmp_path, graph)
    gather(model, [unit], Blocks(texts), store)
    assert unit in store and store[unit].inputs is not None
