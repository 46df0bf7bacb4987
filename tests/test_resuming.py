"""Rounding that is interrupted, or that meets NaN: what was finished stays, and the rest is the same afterwards."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitplan.formats.errors import RoundingFailed
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.codes import codes_folder, missing_codes
from bitplan.planner.quantize import sequential as sequence
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.quantize.segment import Segment
from bitplan.planner.quantize.sequential import Sequence
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.texts.read import read_texts
from tests.test_sequence import cache, planned, reopened  # noqa: F401


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestResuming:
    @pytest.fixture(params=["awq", "tuned"])
    def rounding(self, request):
        return request.param

    def made(self, session: Session, rounding: str) -> dict[str, bytes]:
        plan = uniform_plan(session, "int3-g32", rounding)
        round_missing(plan, session)
        return files(codes_folder(plan))

    def test_interrupted_before_any_block_it_goes_on(self, rounding, session_of, cache, monkeypatch):  # noqa: F811
        session = reopened(session_of("llama"))
        expected = self.made(session, rounding)
        plan = uniform_plan(session, "int3-g32", rounding)
        rounds, began = Segment.round, []
        for cut in (1, 3):
            shutil.rmtree(cache)
            began.clear()

            def interrupted(self, units, cut=cut):
                began.append(self.index)
                if len(began) == cut + 1:
                    raise KeyboardInterrupt
                return rounds(self, units)

            monkeypatch.setattr(Segment, "round", interrupted)
            with pytest.raises(KeyboardInterrupt):
                round_missing(plan, session)
            finished = files(codes_folder(plan))
            assert finished.items() <= expected.items()
            assert len(began) == cut + 1
            monkeypatch.setattr(Segment, "round", lambda self, units: began.append(self.index) or rounds(self, units))
            round_missing(plan, session)
            assert began == [*range(cut), cut, *range(cut, 4)]  # each but the one that was cut, once
            assert files(codes_folder(plan)) == expected

    def test_interrupted_between_two_files_it_makes_the_same(self, rounding, session_of, cache, monkeypatch):  # noqa: F811
        session = reopened(session_of("llama"))
        expected = self.made(session, rounding)
        plan = uniform_plan(session, "int3-g32", rounding)
        shutil.rmtree(cache)
        saved, calls = sequence.save_tensors, []

        def interrupted(path, tensors):
            calls.append(path)
            if len(calls) == 6:
                raise KeyboardInterrupt
            saved(path, tensors)

        monkeypatch.setattr(sequence, "save_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            round_missing(plan, session)
        assert 1 < len(files(codes_folder(plan))) < len(expected)
        monkeypatch.setattr(sequence, "save_tensors", saved)
        round_missing(plan, session)
        assert files(codes_folder(plan)) == expected

    def test_what_is_finished_is_not_made_again(self, session_of, monkeypatch):
        session = session_of("gpt2")
        plan = uniform_plan(session, "int3-g32", "gptq")
        round_missing(plan, session)
        monkeypatch.setattr(Sequence, "run", lambda self: pytest.fail("rounded again"))
        round_missing(plan, session)

    @pytest.mark.parametrize(("name", "rounding"), [("llama-tied", "tuned"), ("gemma2", "awq"), ("mixtral", "gptq")])
    def test_another_cache_and_a_model_left_on_the_disk_give_the_same_bytes(
        self, name, rounding, session_of, tmp_path, monkeypatch
    ):
        """`plan` holds the model in float32, `apply` as the checkpoint has it: the codes are the same."""
        session = session_of(name, torch.bfloat16)
        made = []
        for whole in (True, False):
            monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / str(whole)))
            made.append(self.made(reopened(session, whole), rounding))
        assert made[0] == made[1] and made[0]

    def test_plans_of_other_roundings_share_no_codes(self, session_of):
        session = session_of("llama")
        plans = [uniform_plan(session, "int4-g64", rounding) for rounding in ("nearest", "gptq", "awq", "tuned")]
        plans += [plan.model_copy(update={"distilled": True}) for plan in plans]
        assert len({codes_folder(plan) for plan in plans}) == len(plans)
        assert [plan.needs_text for plan in plans] == [False] + [True] * 7
        floats = uniform_plan(session, "fp32")
        assert not floats.needs_text and floats.rounding == "none"
        assert not floats.model_copy(update={"distilled": True}).needs_text


class TestNan:
    @pytest.fixture
    def broken(self, checkpoint, tmp_path) -> Session:
        """One NaN in the last block."""
        folder = tmp_path / "model"
        shutil.copytree(checkpoint("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        source = sources.find(folder)
        return open_session(source, read_texts(source, tokens=1024, length=64), device="cpu", whole=False)

    def test_is_said_before_any_rounding_where_statistics_are_needed(self, broken):
        with pytest.raises(RoundingFailed, match=r"model\.layers\.1\.mlp\.up_proj.* holds? NaN"):
            round_missing(uniform_plan(broken, "int4-g64", "gptq"), broken)

    def test_is_said_with_block_and_unit_and_what_came_before_is_kept(self, broken):
        plan = planned(broken, {"model.embed_tokens": "int8/nearest", "*": "int4-g64/gptq"})
        with pytest.raises(RoundingFailed, match=r"model\.layers\.1.*up_proj.* holds? NaN"):
            round_missing(plan, broken)
        left = {unit.name for unit in missing_codes(plan)}
        assert {unit.name for unit in plan.units} - left == {
            unit.name for unit in plan.units if "layers.0." in unit.name or "embed" in unit.name
        }

    def test_in_hidden_states_is_said(self, session_of, monkeypatch):
        session = session_of("llama")
        plan = uniform_plan(session, "int4-g64", "gptq")
        put = Segment.put

        def spoiled(self, unit, tensors):
            put(self, unit, tensors)
            if unit.name == "model.layers.0.mlp.down_proj":
                self.now[unit.parameter][0, 0] = float("inf")

        monkeypatch.setattr(Segment, "put", spoiled)
        with pytest.raises(RoundingFailed, match=r"model\.layers\.0: its output holds NaN or infinity"):
            round_missing(plan, session)
