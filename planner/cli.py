"""The command `bitplan`: data on stdout, progress and trouble on stderr.

Exit codes: 0 done, 1 a known failure, 2 usage, 3 budget infeasible. Nothing heavy is imported before a command runs.
May import: everything, inside the commands.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from formats.errors import BitplanError, UsageError
from planner import __version__

EPILOG = "Run `bitplan COMMAND --help` for a command's options. The cache ($BITPLAN_CACHE) may be deleted at any time."


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitplan", description="Mixed-precision plans for language models on your own GPU.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"bitplan {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *groups: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        for group in groups:
            group(made)
        made.add_argument("--json", action="store_true", help="print JSON on stdout")
        return made

    audit = command(
        "audit", "Score what each format costs each unit, in nats per token.", _model, _text, _menu, _device
    )
    audit.add_argument("--measure", action="store_true", help="also run the model with each unit exchanged alone")
    _output(audit, "profile.json")

    plan = command("plan", "Make a plan for a memory budget.", _model, _text, _menu, _device)
    budget = plan.add_argument_group("budget, said once; all of the model's bytes count")
    budget.add_argument("--budget", metavar="SIZE", help="3MiB, 6GB, 1234567B")
    budget.add_argument("--bpw", type=float, metavar="BITS", help="bits per weight, over all parameters")
    budget.add_argument("--fraction", type=float, metavar="PART", help="part of the bf16 size")
    plan.add_argument(
        "--profile", type=Path, metavar="FILE", help="a profile from `bitplan audit`; without, audit first"
    )
    plan.add_argument(
        "--trials",
        type=int,
        default=30,
        help="whole plans to judge by real KL (30); 0: by the profile alone, unmeasured",
    )
    _output(plan, "plan.json")

    apply = command("apply", "Load a planned model; save it, judge it, let it write.", _device)
    apply.add_argument("plan", type=Path, help="a plan file")
    apply.add_argument("--model", help="folder or hub id; by default the one that the plan names")
    _text(apply)
    apply.add_argument("--save", type=Path, metavar="DIR", help="write the planned checkpoint to this folder")
    apply.add_argument("--prompt", metavar="TEXT", help="continue this text")
    apply.add_argument("--force", action="store_true", help="replace what exists")
    apply.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the model's repository brings"
    )

    compare = command(
        "compare", "Judge formats and plans side by side on held-out text.", _model, _text, _menu, _device
    )
    compare.add_argument("--plan", type=Path, nargs="+", default=[], metavar="FILE", help="plans of the same model")

    show = command("show", "Print a plan, layers folded.")
    show.add_argument("plan", type=Path, help="a plan file")

    demo = command("demo", "Audit, plan and compare the embedded model.")
    demo.add_argument("--trials", type=int, default=30, help="whole plans to judge (30)")
    _output(demo, "plan.json")

    command("formats", "List the formats.")
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a causal LM")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the model's repository brings"
    )


def _text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text; without any, the sources of Python's standard library")
    group.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="split into calibration, search and held-out text"
    )
    group.add_argument("--dataset", metavar="NAME[:CONFIG]", help="the train split of a dataset, its column 'text'")
    group.add_argument("--heldout", type=Path, nargs="+", metavar="FILE", help="held-out text of its own")
    group.add_argument(
        "--tokens", type=int, default=32768, help="calibration tokens (32768); search a quarter, held-out half"
    )
    group.add_argument("--block", type=int, default=512, help="tokens per block (512, or what the model takes)")


def _menu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", metavar="A,B,…", help="formats to choose from; `bitplan formats` lists them")
    parser.add_argument("--rounding", metavar="NAME", help="nearest or gptq; by default each format's own")
    if parser.prog.endswith((" audit", " plan")):
        parser.add_argument("--keep", action="append", default=[], metavar="GLOB", help="leave these units as they are")


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (cuda where there is one)")


def _output(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"write {name} here")
    parser.add_argument("--force", action="store_true", help="replace what exists")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    _quiet_libraries()
    try:
        RUN[arguments.command](arguments)
        return 0
    except BitplanError as error:
        print(f"bitplan: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nbitplan: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # never a bare traceback: told in a line, and whole on request
        if os.environ.get("BITPLAN_DEBUG"):
            raise
        print(f"bitplan: {_unforeseen(error)}", file=sys.stderr)
        return 1


def _unforeseen(error: Exception) -> str:
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return "out of memory: give a smaller --block, fewer --formats, or --device cpu"
    reason = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {reason} (set BITPLAN_DEBUG=1 for the whole trace)"


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _put(arguments: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, allow_nan=False) if arguments.json else text)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _read_texts(arguments: argparse.Namespace, source: Any) -> Any:
    from planner.session import read_texts

    if arguments.tokens < 1 or arguments.block < 8:
        raise UsageError("--tokens must be above 0, and --block at least 8")
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
    return texts


def _audit(arguments: argparse.Namespace) -> None:
    from planner.audit import audit
    from planner.session import open_session
    from planner.show import profile_text
    from planner.uniform import parse_formats
    from sensitivity import source as sources
    from sensitivity.profile import write
    from sensitivity.store import refuse_overwrite

    refuse_overwrite(arguments.output, arguments.force)
    menu = _menu_formats(arguments, parse_formats)
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    session = open_session(source, _read_texts(arguments, source), tuple(arguments.keep), arguments.device)
    profile = audit(session, menu, arguments.rounding, arguments.measure)
    if arguments.output:
        write(arguments.output, profile)
        _say(f"profile written to {arguments.output}")
    nll = profile.full_precision_nll
    rows = [{**row.model_dump(), "delta_nll": row.delta_nll, "full_precision_nll": nll} for row in profile.rows]
    _put(arguments, rows, profile_text(profile))


def _menu_formats(arguments: argparse.Namespace, parse: Any) -> tuple[str, ...]:
    from formats.errors import FormatUnavailable
    from formats.rounding import rounding_named
    from formats.table import FORMATS, MENU

    if arguments.rounding:
        rounding_named(arguments.rounding)
    menu: tuple[str, ...] = parse(arguments.formats, MENU)
    for name in menu:
        if reason := FORMATS[name].unavailable():
            raise FormatUnavailable(f"{name} cannot run here: {reason}")
    return menu


def _plan(arguments: argparse.Namespace) -> None:
    from planner.audit import audit
    from planner.budget import budget_bytes
    from planner.choose import make_plan, menu_of, quick_plan, refuse_infeasible
    from planner.plan import Budget
    from planner.session import open_session
    from planner.show import plan_text
    from planner.uniform import parse_formats
    from sensitivity import source as sources
    from sensitivity.profile import Profile, read, write
    from sensitivity.store import refuse_overwrite

    refuse_overwrite(arguments.output, arguments.force)
    if arguments.trials < 0:
        raise UsageError(f"--trials {arguments.trials}: it must be 0 or more")
    budget_bytes(arguments.budget, arguments.bpw, arguments.fraction, 1)  # its words, before any work
    formats = _menu_formats(arguments, parse_formats)
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    if arguments.profile:
        if arguments.keep or arguments.rounding:
            raise UsageError("--keep and --rounding are settled by the profile: give them to `bitplan audit`")
        profile, session = read(arguments.profile, Profile), None
        _check_profile(profile, source, formats if arguments.formats else ())
        if arguments.trials:
            session = open_session(source, _profile_texts(arguments, profile, source), _kept(profile), arguments.device)
    else:
        session = open_session(source, _read_texts(arguments, source), tuple(arguments.keep), arguments.device)
        profile = audit(session, formats, arguments.rounding)
    menu = menu_of(profile, formats if arguments.formats else None)
    parameters = profile.provenance.model.parameters
    size, asked = budget_bytes(arguments.budget, arguments.bpw, arguments.fraction, parameters)
    budget = Budget(asked=asked, bytes=size)
    refuse_infeasible(menu, size, asked)
    if arguments.trials and session is not None:
        plan = make_plan(menu, budget, session, trials=arguments.trials, device=arguments.device)
    else:
        plan = quick_plan(menu, budget)
    if arguments.output:
        write(arguments.output, plan)
        _say(f"plan written to {arguments.output}")
    _put(arguments, plan.model_dump(mode="json"), plan_text(plan))


def _check_profile(profile: Any, source: Any, formats: tuple[str, ...]) -> None:
    from formats.errors import PlanMismatch

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


def _kept(profile: Any) -> tuple[str, ...]:
    return tuple(k.name.removesuffix(".weight") for k in profile.kept if k.reason == "kept on request")


def _profile_texts(arguments: argparse.Namespace, profile: Any, source: Any) -> Any:
    from planner.session import recall_texts

    texts = recall_texts(profile.provenance.text, source, arguments.text)
    if texts is None:
        raise UsageError(
            f"the profile's text ({profile.provenance.text.source}) is not in the cache: give it with --text,"
            f" or plan by the profile alone with --trials 0"
        )
    return texts


def _apply(arguments: argparse.Namespace) -> None:
    from planner.budget import human
    from planner.card import refuse_folder, save
    from planner.materialize import find_for, make_codes, materialize, resident_bytes
    from planner.plan import Plan
    from planner.pretrained import missing_codes
    from sensitivity import source as sources
    from sensitivity.loss import Reference
    from sensitivity.profile import read

    refuse_folder(arguments.save, arguments.force)
    plan = read(arguments.plan, Plan)
    source = find_for(plan, arguments.model, arguments.trust_remote_code)
    make_codes(plan, source, arguments.text)
    if units := missing_codes(plan):
        from formats.errors import CodesMissing

        raise CodesMissing(
            f"{len(units)} units are rounded with {units[0].rounding}, which needs the plan's calibration text"
            f" ({plan.provenance.text.source}): run `bitplan apply {arguments.plan} --text FILE …` with it"
        )
    reference = None
    if arguments.text or arguments.dataset or arguments.heldout:
        texts = _read_texts(arguments, source)
        full = sources.load_model(source, "cpu").float()
        reference = Reference(full, texts.heldout)
        del full
    model = materialize(plan, source, arguments.device)
    size = resident_bytes(model)
    data: dict[str, Any] = {
        "resident_bytes": size,
        "planned_bytes": plan.bytes,
        "bits_per_weight": size * 8 / plan.provenance.model.parameters,
        "device": str(model.device),
    }
    text = [
        f"resident {size:,} bytes ({human(size)}), planned {plan.bytes:,};"
        f" {data['bits_per_weight']:.3f} bits per weight"
    ]
    if reference is not None:
        judgement = reference.judge(model)
        data |= {"nll": judgement.nll, "ppl": judgement.ppl, "kl": judgement.kl, "kl_se": judgement.kl_se}
        data |= {"delta_nll": judgement.delta_nll, "delta_nll_se": judgement.delta_nll_se, "tokens": judgement.tokens}
        text.append(
            f"{judgement.tokens:,} held-out tokens: perplexity {judgement.ppl:.3f},"
            f" KL {judgement.kl:.5f} ± {judgement.kl_se:.5f}"
        )
    if arguments.save:
        save(model, plan, source, arguments.save, arguments.force)
        data["saved"] = str(arguments.save)
        text.append(f"saved to {arguments.save}")
    if arguments.prompt is not None:
        data["text"] = _continue(model, sources.load_tokenizer(source), arguments.prompt)
        text.append(data["text"])
    _put(arguments, data, "\n".join(text))


def _continue(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise UsageError("--prompt holds no token: give some text")
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _compare(arguments: argparse.Namespace) -> None:
    from planner.compare import compare
    from planner.materialize import check_plan_fits
    from planner.plan import Plan
    from planner.session import open_session
    from planner.show import compare_text
    from planner.uniform import COMPARED, parse_formats
    from sensitivity import source as sources
    from sensitivity.profile import read

    formats = parse_formats(arguments.formats, COMPARED)
    plans = {path.name: read(path, Plan) for path in arguments.plan}
    source = sources.find(arguments.model, trust_remote_code=arguments.trust_remote_code)
    for plan in plans.values():
        check_plan_fits(plan, source)
    session = open_session(source, _read_texts(arguments, source), device=arguments.device)
    lines = []
    for line in compare(session, formats, plans, arguments.rounding, arguments.device):
        lines.append(line)
        _say(f"{line.name}: {'measured' if line.judgement else line.note}")
    _put(arguments, {"rows": [line.as_dict() for line in lines]}, compare_text(lines))


def _show(arguments: argparse.Namespace) -> None:
    from planner.plan import Plan
    from planner.show import plan_text
    from sensitivity.profile import read

    plan = read(arguments.plan, Plan)
    _put(arguments, plan.model_dump(mode="json"), plan_text(plan))


def _demo(arguments: argparse.Namespace) -> None:
    from planner.demo import run
    from planner.show import compare_text
    from sensitivity.profile import write
    from sensitivity.store import refuse_overwrite

    refuse_overwrite(arguments.output, arguments.force)
    plan, lines = run(arguments.trials, _say)
    if arguments.output:
        write(arguments.output, plan)
        _say(f"plan written to {arguments.output}: bitplan show {arguments.output}")
    _put(
        arguments,
        {"rows": [line.as_dict() for line in lines], "plan": plan.model_dump(mode="json")},
        compare_text(lines),
    )


def _formats(arguments: argparse.Namespace) -> None:
    from formats.table import FORMATS, MENU
    from planner.show import table

    rows: list[dict[str, Any]] = []
    for name, row in FORMATS.items():
        size = row.nbytes(4096, 4096)
        facts = {
            "format": name,
            "bits": row.bits,
            "bits_per_weight": size * 8 / 4096**2,
            "rounding": row.default_rounding,
        }
        rows.append({**facts, "planned_by_default": name in MENU, "unavailable": row.unavailable()})
    text = [
        (
            r["format"],
            f"{r['bits_per_weight']:.4f}",
            r["rounding"],
            "yes" if r["planned_by_default"] else "",
            r["unavailable"] or "",
        )
        for r in rows
    ]
    head = ("format", "bits per weight of 4096 × 4096", "rounding", "planned by default", "")
    _put(arguments, rows, table(head, text))


RUN = {
    "audit": _audit,
    "plan": _plan,
    "apply": _apply,
    "compare": _compare,
    "show": _show,
    "demo": _demo,
    "formats": _formats,
}

if __name__ == "__main__":
    sys.exit(main())
