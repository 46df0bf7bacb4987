import json
import os

import pytest
import torch

from bitplan.sensitivity.texts.samples import SAMPLED, first_tokens, written
from bitplan.sensitivity.texts.text import DEFAULT_SOURCE
from tests import tiny
from tests.test_cli import run  # noqa: F401

LITTLE = ("--tokens", "512", "--block", "32", "--device", "cpu", "--formats", "int8,int4-g32")


def test_tokens_are_drawn_from_the_models_softmax():
    model = tiny.build("llama")
    model.generation_config.top_k, model.generation_config.temperature = 3, 0.1  # not what is asked for
    first = torch.full((3000,), 5)
    state = torch.random.get_rng_state()
    ids = written(model, first, 2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ids.shape == (3000, 2) and bool((ids[:, 0] == 5).all())
    chances = model(input_ids=torch.tensor([[5]])).logits[0, -1].softmax(-1)
    # Pearson's statistic has a mean of 255 and a standard deviation of 22.6.
    counts = torch.bincount(ids[:, 1], minlength=len(chances))
    statistic = float(((counts - 3000 * chances).square() / (3000 * chances)).sum())
    assert abs(statistic - (len(chances) - 1)) < 5 * (2 * len(chances)) ** 0.5


def test_text_goes_on_past_the_end_of_text_token():
    model = tiny.build("llama")
    model.generation_config.eos_token_id = list(range(256))
    ids = written(model, torch.arange(40), 24, seed=1)
    assert ids.shape == (40, 24) and torch.equal(ids, written(model, torch.arange(40), 24, seed=1))


def test_blocks_begin_as_the_tokenizer_begins_texts():
    assert first_tokens([7], 256, 4, seed=0).tolist() == [7, 7, 7, 7]
    drawn = first_tokens([], 256, 2000, seed=0)
    assert 0 <= int(drawn.min()) < 5 and 250 < int(drawn.max()) < 256


def test_a_plan_on_sampled_text_is_applied_where_no_cache_has_it(run, tmp_path, checkpoint, monkeypatch):  # noqa: F811
    plan = tmp_path / "plan.json"
    code, _, err = run("plan", checkpoint("llama-tied"), "--sample", *LITTLE, "--bpw", "6", "--trials", "1", "-o", plan)
    assert code == 0 and SAMPLED in err, err
    made = json.loads(plan.read_text(encoding="utf-8"))
    texts = made["provenance"]["text"]
    assert texts["source"] == SAMPLED and len({texts[part]["sha256"] for part in ("calibration", "heldout")}) == 2
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "empty"))
    code, out, err = run("apply", plan, "--sample", *LITTLE[:-2], "--json")
    assert code == 0, err
    assert json.loads(out)["kl"] == pytest.approx(made["measured"]["kl"], rel=1e-4)


def cannot(*_):
    raise RuntimeError("probabilities hold nan")


def test_by_default_the_model_writes_and_where_it_cannot_pythons_sources_are_read(run, checkpoint, monkeypatch):  # noqa: F811
    model = checkpoint("llama")
    code, _, err = run("audit", model, *LITTLE, "--check", "0")
    assert code == 0 and f"text: {SAMPLED}" in err
    monkeypatch.setattr("bitplan.sensitivity.texts.read.written", cannot)
    assert run("audit", model, *LITTLE, "--check", "0")[0] == 0  # it is in the cache
    monkeypatch.setenv("BITPLAN_CACHE", os.environ["BITPLAN_CACHE"] + "-empty")
    code, _, err = run("audit", model, *LITTLE, "--check", "0")
    assert code == 0 and f"cannot write text itself: probabilities hold nan; {DEFAULT_SOURCE} are used" in err
    code, out, err = run("audit", model, *LITTLE, "--sample")
    assert (code, out) == (1, "") and "cannot write text itself" in err
    code, _, err = run("audit", model, *LITTLE, "--check", "0", "--max-memory", "2GiB")
    assert code == 0 and f"text: {DEFAULT_SOURCE}" in err and "cannot" not in err


def test_a_budget_that_is_too_small_is_refused_before_the_model_writes(run, checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setattr("bitplan.sensitivity.texts.read.written", lambda *_: pytest.fail("it wrote"))
    code, _, err = run("plan", checkpoint("llama"), *LITTLE, "--bpw", "1")
    assert code == 3 and "the least that the formats" in err


@pytest.mark.parametrize("command", ["audit", "compare"])
def test_one_source_of_text(command, run, checkpoint, tmp_path):  # noqa: F811
    code, _, err = run(command, checkpoint("llama-tied"), "--sample", "--text", tmp_path / "a.txt")
    assert code == 2 and "give one of --text, --dataset and --sample" in err


def test_a_model_larger_than_memory_writes_no_text(run, checkpoint):  # noqa: F811
    code, _, err = run("audit", checkpoint("llama-tied"), "--sample", "--max-memory", "2GiB")
    assert code == 2 and "--sample runs the whole model" in err
