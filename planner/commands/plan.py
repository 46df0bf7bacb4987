"""`bitplan plan`. May import: everything."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitplan.formats.errors import FormatUnavailable, UsageError
from bitplan.formats.table import FORMATS
from bitplan.planner.assemble import Finish, quick_plan
from bitplan.planner.commands.common import (
    candidate_formats,
    emit,
    has_texts,
    log,
    memory_of,
    seconds_in,
    tasks_of,
    texts_of,
)
from bitplan.planner.commands.goals import budgets_of, latency_of, limit_of, outputs_of, place_of
from bitplan.planner.evaluate.trials import EFFORTS, Effort
from bitplan.planner.memory.budget import CONTEXT, DeviceBudget, device_budget, requested_workload
from bitplan.planner.memory.chunks import CANNOT_READ_CHUNKS, chunked_workload
from bitplan.planner.memory.device import Device, find_device
from bitplan.planner.plan import Budget, Plan, Workload
from bitplan.planner.report.memory import device_budget_text, kv_cache_text
from bitplan.planner.report.page.render import refuse_without_report, render
from bitplan.planner.report.show import plan_text
from bitplan.planner.select import LossLimit, Selection
from bitplan.search.overrides import Override, followers, parse_overrides
from bitplan.search.problem import Problem, problem_of, refuse_infeasible
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.audit import audit, sizes
from bitplan.sensitivity.graph import ON_REQUEST
from bitplan.sensitivity.profile import Profile, read, write
from bitplan.sensitivity.profile_cache import remember
from bitplan.sensitivity.session import Session, open_session, refuse_memory
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.store import refuse_overwrite, write_text
from bitplan.sensitivity.tasks.task import Task
from bitplan.sensitivity.texts.read import read_texts, recall_texts
from bitplan.sensitivity.texts.text import Texts


def run(arguments: Namespace) -> None:
    effort = _effort(arguments)
    limit, place = limit_of(arguments), place_of(arguments, effort.trials)
    files = _files(arguments, effort)  # raises for invalid values, before any work
    overrides = parse_overrides(arguments.keep, arguments.set, arguments.at_least)
    found = find_device(arguments.gpu, arguments.device) if arguments.gpu else None
    formats = candidate_formats(arguments)
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    latency = latency_of(arguments, source)
    memory = memory_of(arguments)
    task = _task(arguments, source)
    workload = requested_workload(
        source,
        arguments.kv_dtype,
        CONTEXT if found and arguments.context is None else arguments.context,
        arguments.batch,
        arguments.prefill_chunk,
        exactly=arguments.context is not None,
    )

    def bound(profile: Profile, formats: tuple[str, ...] | None) -> Problem:
        problem = problem_of(profile, formats, overrides)
        return latency.bind(problem) if latency else problem

    def goals_of(problem: Problem) -> Sequence[Budget | LossLimit]:
        return [limit] if limit else _budgets(arguments, problem, source, workload, found)

    offered = formats if arguments.formats or not arguments.profile else None
    if arguments.profile:
        profile, session = _check_profile(arguments, source, formats if arguments.formats else ()), None
        workload = _readable(workload, source, profile.provenance.model.dtype, None)
        goals = goals_of(bound(profile, offered))
        if effort.trials or limit:
            texts = _profile_texts(arguments, profile, source)
            session = open_session(source, texts, _kept(profile), arguments.device, memory=memory)
            _refuse_memory(session, goals)
    else:
        # A budget that is too small is refused before the model writes text.
        shape = None if has_texts(arguments, source) else open_session(source, read_texts(source), whole=False)
        session = shape or open_session(source, texts_of(arguments, source), device=arguments.device, memory=memory)
        audited = tuple(dict.fromkeys((*formats, *_named(overrides, session))))
        workload = _readable(workload, source, session.provenance.model.dtype, None if shape else session.model)
        goals = goals_of(bound(sizes(session, audited, arguments.rounding), formats))
        if effort.trials or limit:
            _refuse_memory(session, goals)
        if shape:
            session = open_session(source, texts_of(arguments, source), device=arguments.device)
        profile = audit(session, audited, arguments.rounding)
    remember(profile)  # for `bitplan explain`
    problem = bound(profile, offered)
    _report_followers(profile, overrides)
    finish = Finish(arguments.rounding, bool(arguments.heal))
    selection = None
    if session is not None and (effort.trials or limit):
        parts: dict[str, Any] = {"device": arguments.device, "workload": workload, "task": task, "place": place}
        selection = Selection(problem, session, finish, effort, **parts)
    elif latency:
        log("--trials 0 runs no model: the plan's latency is predicted, not measured")
    plans: list[Plan] = []
    for goal, (output, page) in zip(goals, files, strict=True):
        plans.append(selection.made(goal) if selection else _quick(problem, finish, workload, goal))
        _write(plans[-1], output, page, selection)
    data = [made.model_dump(mode="json") for made in plans]
    emit(arguments, data if len(data) > 1 else data[0], "\n\n".join(plan_text(made) for made in plans))


def _budgets(
    arguments: Namespace, problem: Problem, source: Source, workload: Workload, device: Device | None
) -> list[Budget]:
    """Raises BudgetInfeasible where no allocation is within one."""

    def report(terms: DeviceBudget) -> None:
        log(device_budget_text(terms))
        log(kv_cache_text(source, problem.profile.provenance.model.dtype))

    if device is not None:
        budgets = [device_budget(device, arguments.reserve, source, problem, workload, report)]
    else:
        budgets = budgets_of(arguments, problem.profile.provenance.model.parameters)
    for budget in budgets:
        refuse_infeasible(problem, budget.weights, budget.requested)
    return budgets


def _task(arguments: Namespace, source: Source) -> Task | None:
    """Raises UsageError, for too few items too."""
    task = next(iter(tasks_of(arguments, source)), None)
    if task:
        task.halves()
    return task


def _refuse_memory(session: Session, goals: Sequence[Budget | LossLimit]) -> None:
    """Raises UsageError where the memory limit does not hold the largest plan, which is loaded to be measured."""
    if session.memory is not None:
        largest = max((goal.weights for goal in goals if isinstance(goal, Budget)), default=0)
        refuse_memory(session.model, session.memory, session.texts.search.ids.shape[1], largest)


def _report_followers(profile: Profile, overrides: Sequence[Override]) -> None:
    for override in overrides:
        if follow := followers(profile, override):
            more = f" and {len(follow) - 3} more" if len(follow) > 3 else ""
            log(f"{override} also holds for {', '.join(follow[:3])}{more}, which share a group with what it names")


def _files(arguments: Namespace, effort: Effort) -> list[tuple[Path | None, Path | None]]:
    """For each plan the file that it is written to, and that of its trials' page. Raises UsageError, BitplanError."""
    if arguments.html and not effort.trials:
        raise UsageError("--html shows the trials, and --trials 0 runs none: `bitplan explain --html` shows a plan")
    refuse_without_report(arguments.html)
    asked = budgets_of(arguments, 1)
    files = list(zip(outputs_of(arguments.output, asked), outputs_of(arguments.html, asked), strict=True))
    for path in (path for pair in files for path in pair):
        refuse_overwrite(path, arguments.force)
    return files


def _write(plan: Plan, output: Path | None, page: Path | None, selection: Selection | None) -> None:
    if output:
        write(output, plan)
        log(f"plan written to {output}")
    if page and selection:
        from bitplan.planner.report.page.study import study_page  # matplotlib is an extra

        assert selection.study is not None
        write_text(page, render(study_page(selection.study, plan)))
        log(f"page written to {page}")


def _quick(problem: Problem, finish: Finish, workload: Workload, goal: Budget | LossLimit) -> Plan:
    assert isinstance(goal, Budget)  # a loss is measured
    return quick_plan(problem, goal, finish, workload)


def _readable(workload: Workload, source: Source, dtype: str, model: PreTrainedModel | None) -> Workload:
    """The workload as the model can have it; a line says where that is another."""
    able = chunked_workload(workload, source, dtype, model)
    if able != workload:
        log(f"{source.model}: {CANNOT_READ_CHUNKS}")
    return able


def _effort(arguments: Namespace) -> Effort:
    """Raises UsageError."""
    if arguments.trials is not None and arguments.trials < 0:
        raise UsageError(f"--trials {arguments.trials}: it must be 0 or more")
    if arguments.task and arguments.trials == 0:
        raise UsageError("--task evaluates whole plans, and --trials 0 evaluates none: give --trials 1 or more")
    effort = EFFORTS[arguments.effort] if arguments.trials is None else Effort.of(arguments.trials)
    return replace(effort, seconds=seconds_in("--time", arguments.time)) if arguments.time else effort


def _check_profile(arguments: Namespace, source: Source, formats: tuple[str, ...]) -> Profile:
    """The profile of `--profile`, with today's fingerprints where an older bitplan made it. Raises PlanMismatch,
    UsageError."""
    profile = read(arguments.profile, Profile)
    facts = sources.check_model(profile.provenance.model, source, "profile")
    unknown = [name for name in formats if name not in {row.format for row in profile.rows}]
    if unknown:
        raise UsageError(
            f"the profile has no rows for {', '.join(unknown)}: audit with --formats first (the cache helps)"
        )
    return profile.model_copy(update={"provenance": profile.provenance.model_copy(update={"model": facts})})


def _named(overrides: Sequence[Override], session: Session) -> list[str]:
    """The formats that overrides name, beside the checkpoint's own types. Raises FormatUnavailable."""
    own = {unit.native for unit in session.graph.units}
    named = [override.format for override in overrides if override.format and override.format not in own]
    for name in named:
        if reason := FORMATS[name].unavailable():
            raise FormatUnavailable(f"{name} cannot run here: {reason}")
    return named


def _kept(profile: Profile) -> tuple[str, ...]:
    return tuple(k.name.removesuffix(".weight") for k in profile.unquantized if k.reason == ON_REQUEST)


def _profile_texts(arguments: Namespace, profile: Profile, source: Source) -> Texts:
    texts = recall_texts(profile.provenance.text, source, arguments.text, arguments.heldout, device=arguments.device)
    if texts is None:
        raise UsageError(
            f"the profile's text ({profile.provenance.text.source}) is not in the cache: give it with --text,"
            f" or plan by the profile alone with --trials 0"
        )
    return texts
