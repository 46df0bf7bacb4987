"""A task as what the search makes least: half of its items choose, the other half is reported."""

import json

import pytest
import torch

from bitplan.formats.errors import UsageError
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.load import load_planned
from bitplan.planner.plan import Plan
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import read
from bitplan.sensitivity.tasks.paired import paired
from bitplan.sensitivity.tasks.score import losses, score
from bitplan.sensitivity.tasks.task import FEWEST, read_task
from tests import tiny
from tests.test_cli import FORMATS_OPTION, LITTLE, run, text  # noqa: F401 (fixtures)

CHOICE = [{"prompt": f"the {i} cats sat on", "choices": [f" {i * 7} mats", " it"], "answer": i % 2} for i in range(40)]
EXACT = [{"prompt": f"{i} and ", "answer": str(i)} for i in range(24)]
PROSE = [{"text": f"the {i} cats sat on {i * 7} mats."} for i in range(24)]


def written(folder, lines):
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def task_of(checkpoint, folder, lines):
    tokenizer = sources.load_tokenizer(sources.find(checkpoint("llama")))
    return read_task(written(folder, lines), tokenizer, 128)


def test_halves_have_no_item_in_common(checkpoint, tmp_path):
    task = task_of(checkpoint, tmp_path, [*CHOICE, *CHOICE[:9]])
    one, other = task.halves()
    assert {*one.items} | {*other.items} == {*task.items} and not {*one.items} & {*other.items}
    assert len(one.items) == len(other.items) == 20
    assert task.halves() == (one, other) and list(one.items) != list(task.items[:20])
    with pytest.raises(UsageError, match="mine has 19 different items"):
        task_of(checkpoint, tmp_path, CHOICE[: FEWEST - 1] * 2).halves()


@pytest.mark.parametrize("lines", [CHOICE, EXACT, PROSE], ids=["choice", "exact", "text"])
def test_the_loss_is_nats_above_full_precision(session_of, checkpoint, tmp_path, lines):
    session, task = session_of("llama"), task_of(checkpoint, tmp_path, lines)
    evaluate = Objective(session, task)
    same = evaluate.heldout(session.model)
    assert evaluate.loss(session.model) == same.loss == same.task.loss == same.task.difference == 0
    assert same.kl == pytest.approx(0, abs=1e-9)

    other, one = tiny.build("llama"), task.halves()[0]
    other.lm_head.weight.mul_(1.1)
    expected = []
    for item in one.items:
        found = [
            [
                sum(float(model(torch.tensor([row.ids])).logits[0, i - 1].log_softmax(-1)[row.ids[i]]) for i in places)
                for row in item.rows
                for places in [range(len(row.ids) - row.scored, len(row.ids))]
            ]
            for model in (session.model, other)
        ]
        if "choices" in lines[0]:
            p, q = (torch.tensor(of, dtype=torch.float64).softmax(0) for of in found)
            expected.append(float((p * (p / q).log()).sum()))
        else:
            tokens = sum(row.scored for row in item.rows) if "text" in lines[0] else 1
            expected.append((sum(found[0]) - sum(found[1])) / tokens)
    assert evaluate.loss(other) == pytest.approx(sum(expected) / len(expected), rel=1e-3, abs=1e-6)


def test_a_plan_for_a_task(run, checkpoint, text, tmp_path):  # noqa: F811
    """The plan file's figures are those of the loaded model on the half that chose nothing."""
    folder, file = checkpoint("llama"), tmp_path / "plan.json"
    command = ("plan", folder, "--text", text, *LITTLE, *FORMATS_OPTION, "--bpw", "5", "--trials", "3", "-o", file)
    code, out, err = run(*command, "--task", written(tmp_path, CHOICE))
    assert code == 0, err
    assert "measured on 20 held-out items of mine: accuracy" in out and "loss on 20 items of mine" in out
    plan = read(file, Plan)
    assert plan.search and plan.search.task and plan.measured and plan.measured.task and plan.uniform
    assert plan.search.first_loss is not None and plan.search.loss <= plan.search.first_loss
    task = task_of(checkpoint, tmp_path, CHOICE)
    assert plan.search.task.sha256 == task.fingerprint

    source = sources.find(folder)
    base = score(sources.load_model(source, "cpu", dtype=torch.float32), task.halves()[1])
    found = score(load_planned(plan, source, "cpu"), task.halves()[1])
    of = paired(base.values, found.values)
    told = plan.measured.task
    assert (told.items, told.baseline, told.quantized, told.low, told.high) == (
        20, of.mean_base, of.mean_other, of.low, of.high,
    )  # fmt: skip
    lost = losses(task, base.likelihoods, found.likelihoods)
    torch.testing.assert_close(told.loss, float(lost.mean()), atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(told.loss_se, float(lost.std() / 20**0.5), atol=1e-7, rtol=1e-4)
    assert plan.uniform.measured and plan.uniform.measured.task
    assert plan.measured.loss == told.loss <= plan.uniform.measured.task.loss


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--trials", "0"), "--trials 0 evaluates none"), (("--limit", "19"), "has 19 different items")],
)
def test_what_cannot_be_searched_with(run, checkpoint, text, tmp_path, more, message):  # noqa: F811
    command = ("plan", checkpoint("llama"), "--text", text, *LITTLE, *FORMATS_OPTION, "--bpw", "5")
    code, _, err = run(*command, "--task", written(tmp_path, CHOICE), *more)
    assert code == 2 and message in err
