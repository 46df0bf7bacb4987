"""What each command does with its arguments. May import: everything.

A function a command, called as the command is; planner.cli parses, prints errors and sets the exit code.
"""

import json
import sys
from argparse import Namespace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import planner.audit
import planner.compare
import planner.demo
import planner.export
import planner.recommend
from formats.errors import FormatUnavailable, PlanMismatch, UsageError
from formats.kernels import named_machine
from formats.rounding import refuse_misfit
from formats.table import FORMATS, MENU
from planner.budget import budget_bytes, human, refuse_unclear
from planner.card import refuse_folder, save
from planner.choose import Finish, make_plan, menu_of, quick_plan, refinished, refuse_infeasible
from planner.device import find_device
from planner.export import NEED_MODEL, TARGETS, export_text, write_export
from planner.gptq_layout import refuse_unsayable, save_gptq
from planner.materialize import check_plan_fits, find_for, make_codes, materialize, resident_bytes
from planner.plan import Budget, Plan
from planner.pretrained import refuse_missing
from planner.recommend import PURPOSES
from planner.report import csv_text, html_text
from planner.room import CONTEXT, asked_cache, device_budget
from planner.session import load_reference, open_session, read_texts, recall_texts
from planner.show import (
    advice_text,
    compare_cells,
    compare_text,
    kernel_rows,
    kernels_text,
    plan_text,
    profile_text,
    table,
)
from planner.uniform import COMPARED, parse_formats
from sensitivity import source as sources
from sensitivity.loss import Reference
from sensitivity.profile import Profile, read, write
from sensitivity.source import Source
from sensitivity.store import refuse_overwrite, write_text
from sensitivity.task import Task, read_task
from sensitivity.text import Texts


def _put(arguments: Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, allow_nan=False) if arguments.json else text)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _read_texts(arguments: Namespace, source: Source) -> Texts:
    if arguments.block < 8:
        raise UsageError(f"--block {arguments.block}: it must be at least 8 tokens")
    if arguments.text and arguments.dataset:
        raise UsageError("give --text or --dataset, not both")
    texts = read_texts(
        source,
        files=arguments.text,
        dataset=arguments.dataset,
        heldout=arguments.heldout,
        tokens=arguments.tokens,
        length=arguments.block,
    )
    parts = {name: getattr(texts, name).ids.shape for name in ("calibration", "search", "heldout")}
    sizes = ", ".join(f"{name} {count} × {length} tokens" for name, (count, length) in parts.items())
    _say(f"text: {texts.source}: {sizes}")
    found, length = texts.calibration.ids.numel(), texts.calibration.ids.shape[1]
    if found < arguments.tokens // length * length:
        _say(f"the text gives {found:,} calibration tokens, fewer than the {arguments.tokens:,} asked for")
    return texts


def audit(arguments: Namespace) -> None:
    refuse_overwrite(arguments.output, arguments.force)
    menu = _menu_formats(arguments)
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    session = open_session(source, _read_texts(arguments, source), tuple(arguments.keep), arguments.device)
    profile = planner.audit.audit(session, menu, arguments.rounding, arguments.measure)
    profile = profile.model_copy(update={"kv_cache": planner.audit.audit_cache(session)})
    if arguments.output:
        write(arguments.output, profile)
        _say(f"profile written to {arguments.output}")
    nll = profile.full_precision_nll
    rows = [{**row.model_dump(), "delta_nll": row.delta_nll, "full_precision_nll": nll} for row in profile.rows]
    _put(arguments, rows, profile_text(profile))


def _menu_formats(arguments: Namespace) -> tuple[str, ...]:
    menu = parse_formats(arguments.formats, MENU)
    refuse_misfit(arguments.rounding, [FORMATS[name] for name in menu])
    for name in menu:
        if reason := FORMATS[name].unavailable():
            raise FormatUnavailable(f"{name} cannot run here: {reason}")
    return menu


def plan(arguments: Namespace) -> None:
    refuse_overwrite(arguments.output, arguments.force)
    if arguments.trials < 0:
        raise UsageError(f"--trials {arguments.trials}: it must be 0 or more")

    refuse_unclear({f"--{name}": getattr(arguments, name) for name in ("budget", "bpw", "fraction", "gpu")})
    found = find_device(arguments.gpu, arguments.device) if arguments.gpu else None
    if found is None:
        budget_bytes(arguments.budget, arguments.bpw, arguments.fraction, 1)  # its words, before any work
    formats = _menu_formats(arguments)
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    kv_cache = asked_cache(
        source,
        arguments.kv_dtype,
        CONTEXT if found and arguments.context is None else arguments.context,
        arguments.batch,
        arguments.prefill_chunk,
        exactly=arguments.context is not None,
    )

    def budget_of(profile: Profile, formats: tuple[str, ...] | None) -> Budget:
        menu = menu_of(profile, formats)
        if found is not None:
            return device_budget(found, arguments.reserve, source, menu, kv_cache, _say)
        size, asked = budget_bytes(
            arguments.budget, arguments.bpw, arguments.fraction, profile.provenance.model.parameters
        )
        budget = Budget(asked=asked, weights=size)
        refuse_infeasible(menu, budget)
        return budget

    if arguments.profile:
        if arguments.keep:
            raise UsageError("--keep is settled by the profile: give it to `bitplan audit`")
        profile, session = read(arguments.profile, Profile), None
        _check_profile(profile, source, formats if arguments.formats else ())
        budget = budget_of(profile, formats if arguments.formats else None)
        if arguments.trials:
            session = open_session(source, _profile_texts(arguments, profile, source), _kept(profile), arguments.device)
    else:
        session = open_session(source, _read_texts(arguments, source), tuple(arguments.keep), arguments.device)
        budget = budget_of(planner.audit.sizes(session, formats, arguments.rounding), None)
        profile = planner.audit.audit(session, formats, arguments.rounding)
    menu = menu_of(profile, formats if arguments.formats else None)
    finish = Finish(arguments.rounding, bool(arguments.heal))
    if arguments.trials and session is not None:
        made = make_plan(
            menu, budget, session, finish, trials=arguments.trials, device=arguments.device, kv_cache=kv_cache
        )
    else:
        made = quick_plan(menu, budget, finish, kv_cache)
    if arguments.output:
        write(arguments.output, made)
        _say(f"plan written to {arguments.output}")
    _put(arguments, made.model_dump(mode="json"), plan_text(made))


def _check_profile(profile: Profile, source: Source, formats: tuple[str, ...]) -> None:
    facts = profile.provenance.model
    if facts.weights_sha256 != source.weights_sha256:
        raise PlanMismatch(
            f"the profile was made for {facts.id} (fingerprint {facts.weights_sha256[:12]}), not for {source.model}"
            f" ({source.weights_sha256[:12]}): audit this model"
        )
    unknown = [name for name in formats if name not in {row.format for row in profile.rows}]
    if unknown:
        raise UsageError(
            f"the profile has no rows for {', '.join(unknown)}: audit with --formats first (the cache helps)"
        )


def _kept(profile: Profile) -> tuple[str, ...]:
    return tuple(k.name.removesuffix(".weight") for k in profile.kept if k.reason == "kept on request")


def _profile_texts(arguments: Namespace, profile: Profile, source: Source) -> Texts:
    texts = recall_texts(profile.provenance.text, source, arguments.text, arguments.heldout)
    if texts is None:
        raise UsageError(
            f"the profile's text ({profile.provenance.text.source}) is not in the cache: give it with --text,"
            f" or plan by the profile alone with --trials 0"
        )
    return texts


def apply(arguments: Namespace) -> None:
    refuse_folder(arguments.save, arguments.force)
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UsageError("--prompt is empty: give some text to go on from")
    plan = refinished(read(arguments.plan, Plan), arguments.rounding, arguments.heal)
    if arguments.layout == "gptq":
        if arguments.save is None:
            raise UsageError("--layout gptq says how to write a checkpoint: give --save DIR")
        refuse_unsayable(plan)
    source = find_for(plan, arguments.model, arguments.trust_remote_code)
    make_codes(plan, source, arguments.text, arguments.device)
    refuse_missing(plan)
    reference = None
    if arguments.text or arguments.dataset or arguments.heldout:
        texts = _read_texts(arguments, source)
        reference = Reference(load_reference(source, arguments.device), texts.heldout)
    model = materialize(plan, source, arguments.device)
    size = resident_bytes(model)
    data: dict[str, Any] = {
        "resident_bytes": size,
        "planned_bytes": plan.bytes,
        "bits_per_weight": size * 8 / plan.provenance.model.parameters,
        "device": str(model.device),
        "rounding": plan.rounding,
    }
    text = [
        f"resident {size:,} bytes ({human(size)}), planned {plan.bytes:,};"
        f" {data['bits_per_weight']:.3f} bits per weight; rounding: {plan.rounding}"
    ]
    if plan.research:
        data["research"] = plan.research
        text.append(f"research stage: {', '.join(plan.research)}")
    if reference is not None:
        judgement = reference.judge(model, plan.kv_cache.format)
        data |= {"nll": judgement.nll, "ppl": judgement.ppl, "kl": judgement.kl, "kl_se": judgement.kl_se}
        data |= {"delta_nll": judgement.delta_nll, "delta_nll_se": judgement.delta_nll_se, "tokens": judgement.tokens}
        text.append(
            f"{judgement.tokens:,} held-out tokens: perplexity {judgement.ppl:.3f},"
            f" KL {judgement.kl:.5f} ± {judgement.kl_se:.5f}"
        )
    if arguments.save:
        data["saved"] = str(arguments.save)
        if arguments.layout == "gptq":
            data["saved_bytes"] = save_gptq(model, plan, source, arguments.save, arguments.force)
            text.append(f"saved to {arguments.save} in GPTQ's layout, {data['saved_bytes']:,} bytes")
        else:
            save(model, plan, source, arguments.save, arguments.force)
            text.append(f"saved to {arguments.save}")
    if arguments.prompt is not None:
        data["text"] = _continue(model, sources.load_tokenizer(source), arguments.prompt)
        text.append(data["text"])
    _put(arguments, data, "\n".join(text))


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise UsageError("--prompt holds no token: give some text")
    out = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def compare(arguments: Namespace) -> None:
    for path in (arguments.html, arguments.csv):
        refuse_overwrite(path, arguments.force)
    formats = parse_formats(arguments.formats, COMPARED)
    plans = {path.name: read(path, Plan) for path in arguments.plan}
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    for name, plan in plans.items():
        check_plan_fits(plan, source)
        try:
            make_codes(plan, source, arguments.text, arguments.device)
        except PlanMismatch as error:  # its row will say that the codes are missing
            _say(f"{name}: {error}")
    tasks = _tasks(arguments, source)
    session = open_session(source, _read_texts(arguments, source), device=arguments.device)
    lines = []
    for line in planner.compare.compare(
        session, formats, plans, arguments.rounding, bool(arguments.heal), arguments.device, tasks
    ):
        lines.append(line)
        _say(f"{line.name}: {'measured' if line.judgement else line.note}")
    if arguments.html:
        write_text(arguments.html, html_text(lines, *compare_cells(lines), f"{source.model}: formats and plans"))
    if arguments.csv:
        write_text(arguments.csv, csv_text(lines))
    _put(arguments, {"rows": [line.as_dict() for line in lines]}, compare_text(lines))


def _tasks(arguments: Namespace, source: Source) -> list[Task]:
    if not arguments.task:
        return []
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit {arguments.limit}: it must be 1 or more")
    tokenizer, length = sources.load_tokenizer(source), sources.block_length(source, 1 << 20)
    tasks = [read_task(name, tokenizer, length, arguments.limit) for name in arguments.task]
    for task in tasks:
        if task.note:
            _say(task.note)
    return tasks


def recommend(arguments: Namespace) -> None:
    if arguments.purpose not in PURPOSES:
        raise UsageError(f"--for {arguments.purpose!r}: there are {', '.join(PURPOSES)}")
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    session = open_session(source, _read_texts(arguments, source), device=arguments.device)
    advice = planner.recommend.recommend(session, arguments.purpose, arguments.device)
    _put(arguments, advice.as_dict(), advice_text(advice, arguments.model, arguments.gpu))


def show(arguments: Namespace) -> None:
    plan = read(arguments.plan, Plan)
    data, text = plan.model_dump(mode="json"), plan_text(plan)
    if arguments.device:
        rows = kernel_rows(plan, named_machine(arguments.device))
        data["kernels"] = [dict(zip(("unit", "count", "format", "kernel", "why"), row, strict=True)) for row in rows]
        text = f"{text}\n\n{kernels_text(rows, arguments.device)}"
    _put(arguments, data, text)


def export(arguments: Namespace) -> None:
    plan = read(arguments.plan, Plan)
    refuse = refuse_folder if arguments.to in TARGETS and TARGETS[arguments.to].holds_codes else refuse_overwrite
    refuse(arguments.output, arguments.force)
    profile = read(arguments.profile, Profile) if arguments.profile else None
    needs_model = arguments.to in NEED_MODEL
    source = find_for(plan, arguments.model, arguments.trust_remote_code) if needs_model else None
    exported = planner.export.export(plan, arguments.to, nearest=arguments.nearest, profile=profile, source=source)
    write_export(exported, arguments.output, force=arguments.force, text=arguments.text, device=arguments.device)
    _say(f"written to {arguments.output}")
    _put(arguments, exported.as_dict(), export_text(exported))


def demo(arguments: Namespace) -> None:
    refuse_overwrite(arguments.output, arguments.force)
    made, lines = planner.demo.run(arguments.trials, _say)
    if arguments.output:
        write(arguments.output, made)
        _say(f"plan written to {arguments.output}: bitplan show {arguments.output}")
    _put(
        arguments,
        {"rows": [line.as_dict() for line in lines], "plan": made.model_dump(mode="json")},
        compare_text(lines),
    )


def formats(arguments: Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for name, row in FORMATS.items():
        size = row.nbytes(4096, 4096)
        facts = {
            "format": name,
            "bits": row.bits,
            "bits_per_weight": size * 8 / 4096**2,
            "rounding": row.default_rounding,
        }
        rows.append(
            {**facts, "planned_by_default": name in MENU, "research": row.is_research, "unavailable": row.unavailable()}
        )
    text = [
        (
            r["format"],
            f"{r['bits_per_weight']:.4f}",
            r["rounding"],
            "yes" if r["planned_by_default"] else "",
            r["unavailable"] or ("research stage" if r["research"] else ""),
        )
        for r in rows
    ]
    head = ("format", "bits per weight of 4096 × 4096", "rounding", "planned by default", "")
    _put(arguments, rows, table(head, text))
