"""The field's rules beside what was measured, and what fits a device without a look at a weight."""

import json
import re
import shlex
import shutil

import pytest
import torch

from bitplan.planner.evaluate.compare import ComparisonRow
from bitplan.planner.evaluate.recommend import verdict
from bitplan.planner.evaluate.throughput import Throughput
from bitplan.sensitivity.loss import Evaluation
from tests.test_cli import LITTLE, run, text  # noqa: F401 (fixtures)


def row(name: str, kl: float, delta: float = 0.0, speed: float = 100.0, size: int = 1000) -> ComparisonRow:
    evaluation = Evaluation(tokens=1000, nll=3.0, delta_nll=delta, delta_nll_se=0.0005, kl=kl, kl_se=kl / 50)
    return ComparisonRow(name, resident_bytes=size, evaluation=evaluation, throughput=Throughput(1000.0, speed, 100))


class TestVerdict:
    def test_gptq_better_than_awq_is_said_against_the_rule(self):
        awq, gptq = row("uniform int4-g128/awq", 0.05), row("uniform int4-g128/gptq", 0.04)
        answer, notes = verdict("cost", {"int4-g128/awq": awq, "int4-g128/gptq": gptq})
        assert answer == "int4-g128/gptq"
        assert notes == ["against the rule, GPTQ loses less than AWQ on this model: KL 0.04000 against 0.05000"
                         " nats per token"]  # fmt: skip
        answer, notes = verdict("cost", {"int4-g128/awq": gptq, "int4-g128/gptq": awq})
        assert answer is None and "the rule holds" in notes[0]
        answer, notes = verdict("cost", {"int4-g128/awq": awq, "int4-g128/gptq": awq})
        assert answer is None and "no significant difference" in notes[0]
        assert "has not been measured" in verdict("cost", {"int4-g128/gptq": gptq})[1][0]

    def test_an_int4_that_loses_much_and_a_better_nf4(self):
        found = {"int4-g128/gptq": row("uniform int4-g128/gptq", 0.2, 0.2), "nf4": row("uniform nf4", 0.1, size=1100)}
        told = "\n".join(verdict("cost", found)[1])
        assert "the loss of INT4 is not small on this model: +22.14 % perplexity" in told
        assert "NF4 loses less than uniform int4-g128/gptq here" in told and "1,100 bytes against 1,000" in told

    def test_int8_holds_or_does_not(self):
        answer, notes = verdict("inference", {"int8": row("int8", 0.001, 0.001)})
        assert answer is None and "the rule holds on this model: INT8 costs +0.10 % perplexity" in notes[0]
        answer, notes = verdict("inference", {"int8": row("int8", 0.1, 0.1)})
        assert answer == "bf16" and notes[0].startswith("against the rule, INT8's loss on this model is not very small")

    def test_other_formats_than_int8(self):
        found = {"bf16": row("bf16", 1e-6), "int8": row("int8", 0.001, speed=80), "fp8": row("fp8", 0.0005)}
        notes = "\n".join(verdict("inference", found | {"int4-g128/gptq": row("int4", 0.002)})[1])
        assert "FP8 loses less than INT8 here" in notes
        assert "int4-g128 costs only +0.00 % perplexity" in notes
        assert "fewer bytes are not faster here: int8 decodes 80.0 tokens per second, bf16 100.0" in notes

    def test_fp16_nearer_than_bf16_is_no_reason_to_train_in_it(self):
        answer, notes = verdict("training", {"bf16": row("bf16", 0.001), "fp16": row("fp16", 0.0001)})
        assert answer is None and "for training the rule stands" in notes[0]

    @pytest.mark.parametrize("purpose", ["training", "inference", "fit"])
    def test_nothing_measured_says_nothing(self, purpose):
        assert verdict(purpose, {}) == (None, [])


def test_advice_shows_what_was_measured_and_what_was_not(run, checkpoint, text):  # noqa: F811
    model = checkpoint("gpt2")
    asked = ("recommend", model, "--text", text, *LITTLE, "--for")
    code, out, _ = run(*asked, "training", "--json")
    found = json.loads(out)
    assert code == 0 and found["format"] == "bf16" and found["largest_activation"] > 0
    assert "of FP16's limit" in found["notes"][0]
    assert found["not_measured"] == ["bf16", "fp16"]
    code, out, _ = run(*asked, "cost")
    assert code == 0 and "int4-g128/awq. INT4" in out
    measure = [line for line in out.splitlines() if line.startswith("  bitplan compare")]
    assert len(measure) == 2 and "--formats int4-g128 --rounding awq --text" in measure[1]
    assert run(*shlex.split(measure[0].replace("int8,int4-g128,nf4", "bf16,int8"))[1:])[0] == 0
    found = json.loads(run(*asked, "inference", "--json")[1])
    assert [row["name"] for row in found["rows"]] == ["bf16", "uniform int8"]
    found = json.loads(run(*asked, "fit", "--gpu", "8GiB", "--json")[1])
    assert [row["name"] for row in found["rows"]] == ["uniform int8"]


class TestFit:
    @pytest.fixture
    def fit(self, run, checkpoint, monkeypatch):  # noqa: F811
        """fit(model, gpu, …) → data; no model is loaded and no text is read."""
        monkeypatch.setattr("bitplan.sensitivity.source.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        monkeypatch.setattr(
            "bitplan.planner.commands.common.read_texts", lambda *a, **k: pytest.fail("a text was read")
        )
        monkeypatch.setattr("bitplan.planner.commands.recommend.cache_folder", lambda: checkpoint("llama"))

        def call(model: object, gpu: str, *more: str) -> dict:
            code, out, err = run("recommend", model, "--for", "fit", "--gpu", gpu, *more, "--json")
            assert code == 0, err
            return json.loads(out)

        return call

    def test_terms_and_the_plan_that_uses_what_is_left(self, fit, run, checkpoint, text, monkeypatch):  # noqa: F811
        model, use = checkpoint("llama", torch.bfloat16), ("--context", "100", "--batch", "2", "--device", "cpu")
        use = (*use, "--reserve", "1B")
        # As much as int8 takes here: workspaces differ between processors.
        size = next(row["total"] for row in fit(model, "24GiB", *use)["fits"] if row["format"] == "int8") + 100
        found = fit(model, f"{size}B", *use)
        smallest = "int2-g64,int2-g32-s4"  # by each unit's number of columns
        assert [row["format"] for row in found["fits"]] == ["bf16", "int8", "int4-g128", "int3-g64", smallest]
        for row in found["fits"]:
            assert row["total"] == row["weights"] + row["kv_cache"] + row["workspace"] + row["reserve"]
            assert row["fits"] == (row["total"] <= found["device"]["bytes"] == size)
        assert (found["format"], found["largest_that_fits"]) == ("mixed", "int8")
        assert f"{found['mixed']['bytes']:,} bytes ({found['mixed']['bits_per_weight']:.3f} bits" in found["why"]
        told = run("recommend", model, "--for", "fit", "--gpu", f"{size}B", *use)[1]
        assert f"make it: {found['command']}" in told and re.search(rf"{found['fits'][1]['total']:,} +fits", told)

        monkeypatch.undo()
        monkeypatch.chdir(text.parent)
        arguments = shlex.split(found["command"])[1:]
        code, out, err = run(*arguments, "--text", text, *LITTLE, "--trials", "0", "--json")
        assert code == 0, err
        made = json.loads(out)
        assert made["budget"]["weights"] == found["mixed"]["bytes"] >= made["bytes"]
        code, out, _ = run("compare", model, "--text", text, *LITTLE, "--formats", "bf16,int8", "--json")
        weights = {row["format"]: row["weights"] for row in found["fits"]}
        assert [row["resident_bytes"] for row in json.loads(out)["rows"]] == list(weights.values())[:2]

    def test_what_fits_as_it_is(self, fit, checkpoint):
        found = fit(checkpoint("llama", torch.bfloat16), "24GiB")
        assert (found["format"], found["why"]) == ("bf16", "bf16 fits as it is: no quantization is needed")
        assert found["mixed"] is None and found["command"] is None
        found = fit(checkpoint("llama"), "300KiB", "--device", "cpu", "--context", "8")
        assert [row["format"] for row in found["fits"]][:2] == ["fp32", "bf16"]
        assert found["format"] == "bf16" and "bf16 fits, half of fp32" in found["why"]

    def test_what_would_fit_where_nothing_does(self, fit, checkpoint):
        model, use = checkpoint("llama", torch.bfloat16), ("--device", "cpu", "--batch", "4")
        found = fit(model, "550KiB", *use)
        assert found["format"] == "none" and found["largest_that_fits"] is None
        context = int(found["why"].split("what would fit: --context ")[1].split(",")[0])
        assert fit(model, "550KiB", *use, "--context", str(context))["largest_that_fits"] == "int2-g64,int2-g32-s4"
        assert "what would fit: a device with" in fit(model, "20KiB", *use)["why"]

    def test_a_config_alone_will_do(self, fit, checkpoint, tmp_path):
        model, asked = checkpoint("llama-tied", torch.bfloat16), ("1MiB", "--device", "cpu", "--kv-dtype", "int8")
        shutil.copy(model / "config.json", tmp_path)
        assert fit(tmp_path, *asked)["fits"] == fit(model, *asked)["fits"]

    def test_bad_input(self, run, checkpoint, tmp_path):  # noqa: F811
        asked = ("recommend", checkpoint("llama"), "--for")
        for words, told in (
            (("fit",), "name it by --gpu 24GiB"),
            (("fit", "--gpu", "auto"), "give its memory"),
            (("fit", "--gpu", "24"), "has no unit of bytes"),
            (("fit", "--gpu", "1GiB", "--reserve", "x"), "is not a size"),
            (("fit", "--gpu", "1GiB", "--context", "0"), "--context 0: it must be 1 or more"),
            (("fit", "--gpu", "1GiB", "--kv-dtype", "int5"), "there are native, fp8"),
            (("cost", "--gpu", "1GiB"), "--gpu belongs to --for fit"),
            (("fun",), "there are training, inference, cost, fit"),
        ):
            code, out, err = run(*asked, *words)
            assert (code, out) == (2, "") and told in err
        (tmp_path / "config.json").write_text("{}", encoding="utf-8")
        code, _, err = run("recommend", tmp_path, "--for", "fit", "--gpu", "1GiB")
        assert code == 1 and "transformers cannot load" in err
        (tmp_path / "config.json").write_text("{", encoding="utf-8")
        code, _, err = run("recommend", tmp_path, "--for", "fit", "--gpu", "1GiB")
        assert code == 1 and "config.json is no valid JSON" in err
