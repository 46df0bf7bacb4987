"""The command line's options. Imports nothing slow. May import: bitplan (its version) only."""

import argparse
from pathlib import Path
from typing import Any

from bitplan import __version__

EPILOG = "Run `bitplan COMMAND --help` for a command's options. The cache ($BITPLAN_CACHE) may be deleted at any time."


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitplan",
        description="Mixed-precision quantization of language models within a memory budget.",
        epilog=EPILOG,
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
        "audit", "Predict the loss of each unit in each format, in nats per token.", _model, _text, _candidates, _device
    )
    _audited(audit)
    _sheets(audit, "figures and sortable tables", "a line for each unit and format")
    audit.add_argument("--all", action="store_true", help="print every unit in every format, nothing folded")
    _output(audit, "profile.json")

    plan = command("plan", "Make a plan for a memory budget.", _model, _text, _candidates, _device)
    _planned(plan)
    _limited(plan)

    apply = command("apply", "Quantize a model by a plan; save it, evaluate it, generate text.", _device)
    apply.add_argument("plan", type=Path, help="plan file")
    apply.add_argument("--model", help="folder or hub id (default: the plan's model)")
    _text(apply)
    _finish(apply)
    apply.add_argument("--save", type=Path, metavar="DIR", help="write the quantized checkpoint to this folder")
    apply.add_argument(
        "--layout",
        choices=("bitplan", "gptq"),
        default="bitplan",
        help="layout of the saved checkpoint: bitplan's own, or GPTQ's if it supports all formats of the plan",
    )
    _limited(apply)
    apply.add_argument("--prompt", metavar="TEXT", help="generate a continuation of this text")
    apply.add_argument("--force", action="store_true", help="overwrite existing files")
    apply.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")

    compare = command(
        "compare", "Evaluate formats and plans side by side on held-out text.", _model, _text, _candidates, _device
    )
    _compared(compare)

    recommend = command("recommend", "Recommend a format for a purpose, with measurements.", _model, _text, _device)
    recommend.add_argument(
        "--for", dest="purpose", required=True, metavar="PURPOSE", help="training, inference, cost or fit"
    )
    device = recommend.add_argument_group("options of --for fit, as for `plan`")
    device.add_argument("--gpu", metavar="SIZE", help="memory of the GPU, such as 24GiB, or auto for its free memory")
    _use(device)
    device.add_argument("--reserve", metavar="SIZE", help="memory of the device to leave unused (default: 2%% of it)")

    show = command("show", "Print a plan; with --device, also the kernels that run it.")
    show.add_argument("plan", type=Path, help="plan file")
    show.add_argument("--device", metavar="NAME", help="cpu, cuda, or cuda:8.0 for a GPU of that compute capability")

    explain = command("explain", "Explain a plan: each unit's alternatives, the price of a byte, and what pins it.")
    _explained(explain)

    frontier = command("frontier", "Predict the least loss for every size, and measure it at some.", _text, _device)
    _frontier(frontier)

    export = command("export", "Export a plan to another tool.", _device)
    _exported(export)

    demo = command("demo", "Audit, plan and compare the embedded model.")
    demo.add_argument("--trials", type=int, default=10, help="plans to evaluate during the search (default: 10)")
    _output(demo, "plan.json")

    command("formats", "List the formats.")

    _timed(command("speed", "Time a decoded token in each weight's shape and format.", _model, _device))

    cache = command("cache", "List the entries of the cache, or delete those that an option below selects.")
    _cached(cache)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a causal language model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")


def _text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "text (default: --sample; with --max-memory, the sources of Python's standard library)"
    )
    group.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="files, split into calibration, search and held-out text"
    )
    group.add_argument("--dataset", metavar="NAME[:CONFIG]", help="column 'text' of a hub dataset's train split")
    group.add_argument(
        "--sample", action="store_true", help="text that the model itself writes, or an error where it cannot"
    )
    group.add_argument("--heldout", type=Path, nargs="+", metavar="FILE", help="separate files of held-out text")
    group.add_argument(
        "--tokens",
        type=int,
        default=32768,
        help="calibration tokens (default: 32768); search text has a quarter, held-out text half of that",
    )
    group.add_argument(
        "--block", type=int, default=512, help="tokens per block (default: 512, or the model's maximum if less)"
    )


def _use(group: Any) -> None:
    group.add_argument(
        "--context", type=int, metavar="N", help="maximal tokens of a sequence (default: 4096 with --gpu)"
    )
    group.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once (default: 1)")
    group.add_argument(
        "--kv-dtype",
        default="native",
        metavar="NAME",
        help="format of the KV cache: native, fp8, int8, k8v4, int4 (default: native)",
    )
    group.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="C", help="prompt tokens per forward pass (default: 512)"
    )


def _candidates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--formats", metavar="A,B,…", help="candidate formats; `bitplan formats` lists them all")
    _finish(parser)
    if parser.prog.endswith((" audit", " plan")):
        parser.add_argument(
            "--keep", action="append", default=[], metavar="GLOB", help="leave matching units unquantized; repeatable"
        )
    if parser.prog.endswith(" plan"):
        same = "give these units this format"
        for option, help in (("--set", same), ("--at-least", f"{same}, or one of at least as many bytes")):
            parser.add_argument(option, action="append", default=[], metavar="GLOB=FORMAT", help=help)


def _finish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounding",
        metavar="NAME",
        help="rounding of integer formats: nearest, gptq, awq, yaqa or tuned (default: gptq, and nearest for int8)",
    )
    if not parser.prog.endswith(" audit"):
        parser.add_argument(
            "--heal",
            action=argparse.BooleanOptionalAction,
            help="after rounding, distill from the full-precision model into scales and unquantized vectors",
        )


def _audited(audit: argparse.ArgumentParser) -> None:
    audit.add_argument(
        "--tier",
        choices=("curvature", "measured", "weights"),
        default="curvature",
        help="curvature: losses predicted from one pass over the text (default); measured: also the loss with each unit"
        " alone quantized (slow); weights: the weights' relative errors, without a pass (rough)",
    )
    _limited(audit)
    audit.add_argument(
        "--per-expert",
        action="store_true",
        help="experts of a block may take different formats, where each is a module of its own",
    )
    audit.add_argument(
        "--around", metavar="WHAT", help="with --tier measured: all other units in this format, or as in this plan file"
    )
    audit.add_argument(
        "--check",
        type=int,
        default=24,
        metavar="N",
        help="with --tier curvature: units to measure, to check and rescale what is predicted (default: 24; 0: none)",
    )


def _limited(group: Any) -> None:
    group.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory of this process, such as 2GiB: weights are read a block at a time",
    )


def _planned(plan: argparse.ArgumentParser) -> None:
    budget = plan.add_argument_group(
        "memory budget for all of the model's tensors, or a loss; exactly one of the first six, of which the first"
        " three may be repeated for several plans"
    )
    more: dict[str, Any] = {"action": "append"}
    budget.add_argument("--budget", metavar="SIZE", **more, help="size, such as 3MiB, 6GB or 1234567B")
    budget.add_argument("--bpw", type=float, metavar="BITS", **more, help="bits per weight, over all parameters")
    budget.add_argument("--fraction", type=float, metavar="PART", **more, help="fraction of the bf16 size")
    budget.add_argument(
        "--gpu",
        metavar="SIZE",
        help="memory of the GPU, such as 24GiB, or auto for its free memory; KV cache and workspace are subtracted",
    )
    budget.add_argument(
        "--max-loss", type=float, metavar="NATS", help="fewest bytes whose KL is at most this, in nats per token"
    )
    budget.add_argument(
        "--max-ppl-increase", metavar="PERCENT", help="fewest bytes whose perplexity is at most 1%% higher, or 0.5%%"
    )
    _use(budget)
    budget.add_argument("--reserve", metavar="SIZE", help="memory of the device to leave unused (default: 2%% of it)")
    latency = plan.add_argument_group("a second limit beside the memory budget")
    latency.add_argument(
        "--max-latency", metavar="TIME", help="a decoded token takes at most this, such as 30ms; needs --speed"
    )
    latency.add_argument("--speed", type=Path, metavar="FILE", help="speed table of this device, by `bitplan speed`")
    plan.add_argument(
        "--profile", type=Path, metavar="FILE", help="profile written by `bitplan audit`; by default, audit first"
    )
    plan.add_argument(
        "--effort",
        choices=("quick", "standard", "thorough"),
        default="standard",
        help="10, 30 or 100 trials, of which the best 1, 3 or 6 are finished and compared (default: standard)",
    )
    plan.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="plans to evaluate on the search text (default: by --effort); 0: use predictions only, and measure nothing"
        " where there is a budget",
    )
    plan.add_argument("--time", metavar="TIME", help="end the trials so that the plan is made within 30m, or 2h")
    plan.add_argument(
        "--storage",
        metavar="PLACE",
        help="trials that several processes share by the same command line: a journal file, sqlite:///FILE or"
        " postgresql://…",
    )
    plan.add_argument("--study", metavar="NAME", help="name of the study there (default: by model and budget)")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write the trials' page; needs bitplan[report]")
    _task(plan)
    _output(plan, "plan.json")


def _compared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, nargs="+", default=[], metavar="FILE", help="plans of the same model")
    _task(parser, "+", "tasks: .jsonl files, or names of lm-eval tasks")
    _sheets(parser, "the frontier and a sortable table", "the rows")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def _task(
    parser: argparse.ArgumentParser,
    count: int | str = 1,
    help: str = "minimise the loss on one half of a task (a .jsonl file or an lm-eval task), report the other half",
) -> None:
    parser.add_argument("--task", nargs=count, default=[], metavar="NAME", help=help)
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N items of a task")


def _explained(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, help="plan file")
    parser.add_argument("--unit", metavar="NAME", help="print this unit (or a glob of units) with all its alternatives")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="profile from `bitplan audit` (default: a matching one in the cache)",
    )
    parser.add_argument("--all", action="store_true", help="print every group, not only the closest decisions")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the plan's page; needs bitplan[report]")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def _timed(speed: argparse.ArgumentParser) -> None:
    speed.add_argument("--formats", metavar="A,B,…", help="candidate formats; `bitplan formats` lists them all")
    speed.set_defaults(rounding=None)
    _output(speed, "speed.json")


def _cached(cache: argparse.ArgumentParser) -> None:
    cache.add_argument("--older-than", metavar="AGE", help="delete what has not been used for 30d, or 12h")
    cache.add_argument("--model", metavar="NAME", help="delete what belongs to this model (its id, or the last part)")
    cache.add_argument("--all", action="store_true", help="delete everything")


def _frontier(frontier: argparse.ArgumentParser) -> None:
    frontier.add_argument("source", metavar="PROFILE|MODEL", help="profile of `bitplan audit`, or a model to audit")
    frontier.add_argument("--points", type=int, default=12, metavar="N", help="sizes to print (default: 12)")
    frontier.add_argument(
        "--measure",
        type=int,
        default=0,
        metavar="N",
        help="make the plans of so many of them, the knee's first, and measure these on held-out text; needs MODEL",
    )
    frontier.add_argument("--formats", metavar="A,B,…", help="candidate formats; `bitplan formats` lists them all")
    frontier.add_argument("--rounding", metavar="NAME", help="rounding of a model's integer formats")
    frontier.add_argument("--html", type=Path, metavar="FILE", help="write the audit's page; needs bitplan[report]")
    frontier.add_argument("--force", action="store_true", help="overwrite existing files")
    frontier.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")


def _exported(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, help="plan file")
    parser.add_argument(
        "--to", required=True, metavar="TARGET", help="compressed-tensors, gptqmodel, torchao, gguf or auto-round"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PATH", help="output file (compressed-tensors: folder)"
    )
    parser.add_argument(
        "--nearest", action="store_true", help="change unsupported formats to the nearest supported ones, and list them"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="profile, to predict the loss of those changes")
    parser.add_argument("--model", help="folder or hub id (default: the plan's model)")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="the plan's text, if codes must be computed"
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: cuda if available)")


def _sheets(parser: argparse.ArgumentParser, page: str, rows: str) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help=f"write a page with {page}; needs bitplan[report]")
    parser.add_argument("--csv", type=Path, metavar="FILE", help=f"write {rows} as CSV")


def _output(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"write {name} to this file")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
