"""What a person decides about units, against the search: --keep, --set, --at-least."""

import itertools

import pytest
import torch

from bitplan.planner.plan import Plan
from bitplan.sensitivity.profile import Profile, read
from tests.test_cli import FORMATS_OPTION, LITTLE, run, text  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def profile_of(checkpoint, tmp_path_factory):
    """A profile of a model with q/k/v and gate/up groups, by the nearest codes."""
    from bitplan.planner.cli import main

    path = tmp_path_factory.mktemp("overrides") / "profile.json"
    model = checkpoint("llama-tied", torch.bfloat16)
    asked = ["audit", str(model), *LITTLE, "--rounding", "nearest", *FORMATS_OPTION, "-o", str(path)]
    assert main(asked) == 0
    return model, path


@pytest.fixture
def planned(run, profile_of, tmp_path):  # noqa: F811
    """planned(words…) → the plan at 5 bits per weight by the profile alone, or (exit code, stderr)."""
    counter = itertools.count()

    def call(*words: str, bpw: float = 5):
        model, profile = profile_of
        output = tmp_path / f"{next(counter)}.json"
        asked = ("plan", model, "--profile", profile, "--trials", "0", "--bpw", bpw, "-o", output)
        code, _, err = run(*asked, *words)
        return (read(output, Plan), err) if code == 0 else (code, err)

    return call


def formats(plan: Plan) -> dict[str, str]:
    return {unit.name: unit.format for unit in plan.units}


def test_overrides_bind_units_and_their_groups_and_are_in_the_plan(planned):
    free, _ = planned(bpw=9)
    made, err = planned(
        "--keep", "*.1.mlp.down_proj", "--set", "*.0.self_attn.k_proj=int8", "--at-least", "embed*=int4"
    )
    assert made == 2 and "embed*" in err  # the exact name is model.embed_tokens
    words = ("--keep", "*.1.mlp.down_proj", "--set", "*.0.self_attn.k_proj=int8", "--at-least", "lm_head=int8")
    made, err = planned(*words, bpw=9)
    found = formats(made)
    assert found["model.layers.1.mlp.down_proj"] == "bf16"
    assert {found[f"model.layers.0.self_attn.{p}_proj"] for p in "qkv"} == {"int8"}
    assert "--set '*.0.self_attn.k_proj=int8' also holds for" in err and "layers.0.self_attn.q_proj" in err
    assert found["model.embed_tokens"] in ("int8", "bf16")  # tied: the head's name is its name too
    assert [(o.option, o.glob, o.format, o.units) for o in made.overrides] == [
        ("keep", "*.1.mlp.down_proj", None, ("model.layers.1.mlp.down_proj",)),
        ("set", "*.0.self_attn.k_proj", "int8", ("model.layers.0.self_attn.k_proj",)),
        ("at-least", "lm_head", "int8", ("model.embed_tokens",)),
    ]
    assert made.bytes <= made.budget.weights and made.predicted.nll >= free.predicted.nll
    assert made.uniform is None or made.uniform.bytes <= made.budget.weights


def test_a_uniform_plan_beside_overrides_has_them_too(planned):
    made, _ = planned("--keep", "*.1.mlp.down_proj", bpw=7)
    kept = next(unit.bytes for unit in made.units if unit.format == "bf16")
    assert made.uniform is not None and made.uniform.bytes > kept
    assert made.uniform.predicted_nll >= made.predicted.nll * (1 - 1e-6)


def test_an_override_may_name_a_format_that_the_others_do_not_get(planned):
    made, _ = planned("--formats", "int4-g64,int3-g32", "--set", "*.down_proj=int8")
    down = {name: format for name, format in formats(made).items() if name.endswith("down_proj")}
    assert set(down.values()) == {"int8"}
    assert "int8" not in {format for name, format in formats(made).items() if name not in down}


def test_overrides_that_cannot_be_met(planned):
    code, err = planned("--set", "*.nothing=int8")
    assert code == 2 and "--set '*.nothing=int8' matches no unit; the first names are model.embed_tokens" in err
    code, err = planned("--set", "*q_proj")
    assert code == 2 and "write GLOB=FORMAT" in err
    code, err = planned("--set", "*q_proj=int9")
    assert code == 2 and "unknown format 'int9'" in err
    code, err = planned("--set", "*q_proj=fp8")
    assert code == 2 and "leave no format for" in err and "the profile has" in err
    code, err = planned("--set", "*q_proj=int8", "--set", "*k_proj=int3-g32")
    assert code == 2 and "--set '*q_proj=int8' and --set '*k_proj=int3-g32' leave no format" in err


def test_overrides_that_the_budget_cannot_hold(planned, profile_of):
    code, err = planned("--keep", "*mlp*", "--set", "*o_proj=int4-g64")
    assert code == 3
    profile = read(profile_of[1], Profile)
    mlp = {unit.name for unit in profile.units if "mlp" in unit.name}
    least = {name: min(row.bytes for row in profile.rows if row.unit == name) for name in mlp}
    extra = sum(row.bytes for row in profile.rows if row.unit in mlp and row.format == "bf16") - sum(least.values())
    assert f"--keep '*mlp*' takes {extra:,} bytes more than without it, --set" in err
    assert "drop one, or raise the budget to at least --budget" in err
    size = err.rsplit("--budget ", 1)[1].strip()
    parameters = profile.provenance.model.parameters
    made, _ = planned("--keep", "*mlp*", "--set", "*o_proj=int4-g64", bpw=int(size[:-1]) * 8 / parameters + 1e-9)
    assert made.bytes == int(size[:-1])


def test_the_search_keeps_to_them_without_a_profile(run, checkpoint, text, tmp_path):  # noqa: F811
    plan = tmp_path / "plan.json"
    asked = ("plan", checkpoint("llama"), "--text", text, *LITTLE, "--formats", "int4-g64,int3-g32", "--bpw", "8")
    code, _, err = run(*asked, "--trials", "2", "--set", "lm_head=int8", "-o", plan)
    assert code == 0, err
    made = read(plan, Plan)
    assert formats(made)["lm_head"] == "int8" and made.measured is not None and made.overrides
    assert "int8" not in {format for name, format in formats(made).items() if name != "lm_head"}
