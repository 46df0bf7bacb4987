"""The page of a study: its trials, which corrections mattered, and the plan that came of it.

May import: optuna, planner.plan, planner.report, search.
"""

import math
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from bitplan.formats.sizes import format_bytes
from bitplan.planner.plan import Plan
from bitplan.planner.report.figures.study import history, importances, pareto_front
from bitplan.planner.report.page.facts import model_name, number, provenance
from bitplan.planner.report.page.plan import measured_tables
from bitplan.planner.report.page.render import Page, PageFigure, PageTable
from bitplan.search.worker import ENDED, loss_of

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "dropped", TrialState.FAIL: "failed"}


def study_page(study: optuna.Study, plan: Plan) -> Page:
    """Of the study that a plan is from, whose trials may be several workers'."""
    trials = study.get_trials(deepcopy=False)
    unquantized = sum(each.bytes for each in plan.unquantized)
    facts = plan.provenance
    lead = (
        f"The study {study.study_name!r}: {len(trials)} trials for {plan.budget.requested}"
        f" ({plan.budget.weights:,} bytes)."
    )
    return Page(
        title=model_name(facts.model.id),
        lead=lead,
        findings=_findings(trials, plan),
        figures=_figures(trials, unquantized),
        tables=[_trials(trials, unquantized), *_finalists(plan), *measured_tables(plan)],
        provenance=provenance(facts),
    )


def _findings(trials: list[FrozenTrial], plan: Plan) -> list[str]:
    ended = [trial for trial in trials if trial.state in ENDED]
    dropped = sum(trial.state == TrialState.PRUNED for trial in trials)
    workers = len({trial.user_attrs.get("worker") for trial in ended})
    said = [
        f"{len(ended)} trials ended, run by {workers} {'process' if workers == 1 else 'processes'}; {dropped} were"
        " dropped early, worse than the best on the same blocks of text."
    ]
    if plan.search:
        found = plan.search
        first = f", the knapsack's own plan {found.first_loss:.5f}" if found.first_loss is not None else ""
        said.append(f"The best trial lost {found.loss:.5f} nats{first}.")
    shipped = "the search's plan" if plan.shipped == "search" else "the best uniform plan"
    said.append(f"What ships is {shipped}, of {plan.bytes:,} bytes ({format_bytes(plan.bytes)}).")
    return said


def _figures(trials: list[FrozenTrial], unquantized: int) -> list[PageFigure]:
    """By Optuna's plots, of the trials that have a finite loss on all blocks of text."""
    one = optuna.create_study()
    two = optuna.create_study(directions=["minimize", "minimize"])
    finite = 0
    for trial in trials:  # all of them, so that they keep their numbers
        parts: dict[str, Any] = {"params": trial.params, "distributions": trial.distributions}
        if trial.state == TrialState.COMPLETE and math.isfinite(loss_of(trial)):
            finite += 1
            nbytes = trial.user_attrs["bytes of groups"] + unquantized
            one.add_trial(optuna.create_trial(value=loss_of(trial), **parts))
            two.add_trial(optuna.create_trial(values=[nbytes, loss_of(trial)], **parts))
        else:
            for study in (one, two):
                study.add_trial(optuna.create_trial(state=TrialState.FAIL, **parts))
    caption = "Trials on all blocks of the search text, and the best so far; what is between was dropped or failed."
    figures = [PageFigure("Losses of the trials", history(one), caption)]
    if finite > 2:
        caption = (
            "PED-ANOVA: how far the parameters of the tenth of the trials that lost least differ from those of all."
            " Corrections of single groups are no parameters of the study."
        )
        figures.append(PageFigure("Importance of the corrections", importances(one), caption))
    caption = "Trials that no other beats in both bytes and loss stand out; all of them are within the budget."
    return [*figures, PageFigure("Loss against bytes", pareto_front(two), caption)]


def _trials(trials: list[FrozenTrial], unquantized: int) -> PageTable:
    rows = []
    for trial in trials:
        told = trial.user_attrs
        size = f"{told['bytes of groups'] + unquantized:,}" if "bytes of groups" in told else "–"
        state = STATES.get(trial.state, "unfinished") + (f", again {told['run again']}" if "run again" in told else "")
        loss = number(loss_of(trial)) if trial.state in ENDED else "–"
        blocks = str(len(trial.intermediate_values))
        rows.append((told.get("plan", "–"), state, told.get("formats", "–"), str(trial.number), size, loss, blocks))
    head = ("plan", "state", "formats and their groups", "trial", "bytes", "loss, nats", "blocks of text run")
    note = "The loss of a dropped trial is estimated from the blocks of text that were run."
    return PageTable("Trials", head, rows, left=3, note=note, name="trials")


def _finalists(plan: Plan) -> list[PageTable]:
    if not plan.search or not plan.search.finalists:
        return []
    rows = [
        (each.name, f"{each.bytes:,}", f"{each.loss:.5f}", "–" if each.loss_se is None else f"{each.loss_se:.5f}")
        for each in plan.search.finalists
    ]
    note = "Finished by the plan's own rounding, and evaluated on the search text."
    return [PageTable("Finalists", ("plan", "bytes", "loss, nats", "± standard error"), rows, note=note)]
