"""The command line's options. Imports nothing heavy. May import: bitplan alone."""

import argparse
from pathlib import Path
from typing import Any

from bitplan import __version__

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
        "audit", "Score what each format costs each unit, in nats per token.", _model, _text, _candidates, _device
    )
    audit.add_argument("--measure", action="store_true", help="also run the model with each unit exchanged alone")
    _sheets(audit, "figures and sortable tables", "a line for each unit and format")
    audit.add_argument("--all", action="store_true", help="print every unit in every format, nothing folded")
    _output(audit, "profile.json")

    plan = command("plan", "Make a plan for a memory budget.", _model, _text, _candidates, _device)
    _planned(plan)

    apply = command("apply", "Load a planned model; save it, judge it, let it write.", _device)
    apply.add_argument("plan", type=Path, help="a plan file")
    apply.add_argument("--model", help="folder or hub id; by default the one that the plan names")
    _text(apply)
    _finish(apply)
    apply.add_argument("--save", type=Path, metavar="DIR", help="write the planned checkpoint to this folder")
    apply.add_argument(
        "--layout",
        choices=("bitplan", "gptq"),
        default="bitplan",
        help="of the saved checkpoint: bitplan's, or GPTQ's for a plan of its formats and kept floats",
    )
    apply.add_argument("--prompt", metavar="TEXT", help="continue this text")
    apply.add_argument("--force", action="store_true", help="replace what exists")
    apply.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the model's repository brings"
    )

    compare = command(
        "compare", "Judge formats and plans side by side on held-out text.", _model, _text, _candidates, _device
    )
    _compared(compare)

    recommend = command("recommend", "Which format for which purpose, with what was measured.", _model, _text, _device)
    recommend.add_argument(
        "--for", dest="purpose", required=True, metavar="PURPOSE", help="training, inference, cost or fit"
    )
    device = recommend.add_argument_group("for fit, as `plan` takes them")
    device.add_argument("--gpu", metavar="SIZE", help="24GiB, or auto: what is free")
    _use(device)
    device.add_argument("--reserve", metavar="SIZE", help="leave so much of the device alone (2%% of it)")

    show = command("show", "Print a plan, layers folded; with --device, what runs it there.")
    show.add_argument("plan", type=Path, help="a plan file")
    show.add_argument("--device", metavar="NAME", help="cpu, cuda, or cuda:8.0 for a GPU of that compute capability")

    export = command("export", "Tell a plan to those who serve models.", _device)
    _exported(export)

    demo = command("demo", "Audit, plan and compare the embedded model.")
    demo.add_argument("--trials", type=int, default=20, help="whole plans to judge (20)")
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


def _use(group: Any) -> None:
    group.add_argument("--context", type=int, metavar="N", help="tokens a sequence may have (4096 with --gpu)")
    group.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once (1)")
    group.add_argument(
        "--kv-dtype", default="native", metavar="NAME", help="of the KV cache: native, fp8, int8, k8v4, int4"
    )
    group.add_argument("--prefill-chunk", type=int, default=512, metavar="C", help="prompt tokens read at a time (512)")


def _candidates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", metavar="A,B,…", help="formats to choose from; `bitplan formats` lists them")
    _finish(parser)
    if parser.prog.endswith((" audit", " plan")):
        parser.add_argument("--keep", action="append", default=[], metavar="GLOB", help="leave these units as they are")
    if parser.prog.endswith(" plan"):
        for option, help in (("--set", "give these units this format"), ("--at-least", "or one of no fewer bytes")):
            parser.add_argument(option, action="append", default=[], metavar="GLOB=FORMAT", help=help)


def _finish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounding", metavar="NAME", help="how codes are chosen: nearest, gptq, awq or tuned; by default gptq"
    )
    if not parser.prog.endswith(" audit"):
        parser.add_argument(
            "--heal",
            action=argparse.BooleanOptionalAction,
            help="train scales and kept vectors against the full-precision model once the codes are chosen",
        )


def _planned(plan: argparse.ArgumentParser) -> None:
    budget = plan.add_argument_group("budget, said once; all of the model's bytes count")
    budget.add_argument("--budget", metavar="SIZE", help="3MiB, 6GB, 1234567B")
    budget.add_argument("--bpw", type=float, metavar="BITS", help="bits per weight, over all parameters")
    budget.add_argument("--fraction", type=float, metavar="PART", help="part of the bf16 size")
    budget.add_argument("--gpu", metavar="SIZE", help="24GiB, or auto: what is free; weights get what the rest leaves")
    _use(budget)
    budget.add_argument("--reserve", metavar="SIZE", help="leave so much of the device alone (2%% of it)")
    plan.add_argument(
        "--profile", type=Path, metavar="FILE", help="a profile from `bitplan audit`; without, audit first"
    )
    plan.add_argument(
        "--trials",
        type=int,
        default=30,
        help="whole plans to judge by real KL (30); 0: by the profile alone, unmeasured",
    )
    _task(plan)
    _output(plan, "plan.json")


def _compared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, nargs="+", default=[], metavar="FILE", help="plans of the same model")
    _task(parser, "+", "a .jsonl file, or a task of lm-eval")
    _sheets(parser, "the frontier and a sortable table", "the rows")
    parser.add_argument("--force", action="store_true", help="replace what exists")


def _task(
    parser: argparse.ArgumentParser,
    count: int | str = 1,
    help: str = "search for the least loss on half of a task (a .jsonl file, or a task of lm-eval), report the other",
) -> None:
    parser.add_argument("--task", nargs=count, default=[], metavar="NAME", help=help)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of a task")


def _exported(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, help="a plan file")
    parser.add_argument(
        "--to", required=True, metavar="TARGET", help="compressed-tensors, gptqmodel, torchao, gguf or auto-round"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PATH", help="a file; compressed-tensors: a folder"
    )
    parser.add_argument("--nearest", action="store_true", help="change what the target has no words for, and list it")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="tells what those changes cost")
    parser.add_argument("--model", help="folder or hub id; by default the one that the plan names")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="the plan's text, where codes are to be made"
    )
    parser.add_argument("--force", action="store_true", help="replace what exists")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the model's repository brings"
    )


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (cuda where there is one)")


def _sheets(parser: argparse.ArgumentParser, page: str, rows: str) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help=f"write a page with {page}; needs bitplan[report]")
    parser.add_argument("--csv", type=Path, metavar="FILE", help=f"write {rows} as CSV")


def _output(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"write {name} here")
    parser.add_argument("--force", action="store_true", help="replace what exists")
