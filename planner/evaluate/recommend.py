"""Which format for which purpose: the field's rule, checked against the rows that `compare` has measured.

The rules: BF16 for training, INT8 for inference, INT4 by AWQ where cost counts, mixed precision for sensitive layers, 1
bit as research. Where measured rows contradict a rule, the answer follows the rows and says so. What fits a device is
computed by planner.memory.fit. May import: formats, sensitivity, planner.assemble, planner.evaluate.compare.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import expm1, hypot
from typing import Any

import torch
from torch import nn

from bitplan.formats.errors import FormatUnavailable
from bitplan.formats.table import FORMATS
from bitplan.planner.assemble import is_float, uniform_plan
from bitplan.planner.evaluate.compare import ComparisonRow, recalled
from bitplan.sensitivity.loss import Evaluation
from bitplan.sensitivity.session import SEED, Session, open_session, pick_device
from bitplan.sensitivity.source import Source
from bitplan.sensitivity.texts.text import Texts
from bitplan.sensitivity.weight_cache import workspace

PURPOSES = {
    "training": (
        "bf16",
        "BF16 over FP16: it has float32's range, where FP16 overflows above 65,504 and loses gradients below 6e-8, so"
        " that it needs loss scaling",
    ),
    "inference": ("int8", "INT8 is the default for inference: half of BF16's bytes for a very small loss"),
    "cost": (
        "int4-g128/awq",
        "INT4 is little more than a quarter of BF16's bytes for a small loss, and the field's rule is AWQ over GPTQ;"
        " below 2 bits is research stage",
    ),
    "fit": ("mixed", "sensitive layers keep more bits than the others; below 2 bits is research stage"),
}
"""The field's answer, and why."""
EVIDENCE = {
    "training": ("bf16", "fp16"),
    "inference": ("bf16", "int8", "fp8", "int4-g128/gptq"),
    "cost": ("int8", "int4-g128/awq", "int4-g128/gptq", "nf4"),
    "fit": ("int8", "int4-g128/gptq", "int3-g64/gptq", "int2-g64/gptq", "binary-g64"),
}
"""Formats, some with a rounding, whose rows are evidence for or against the answer."""
SMALL, LARGE = 0.01, 0.05
"""Nats per token above full precision: below the first a loss is very small (1 % of perplexity), above the second it is
no longer small."""
SURE = 1.96
"""Standard errors above which a difference counts as real."""


@dataclass(frozen=True)
class Activation:
    """The largest output, in magnitude, of any module on some text."""

    module: str
    largest: float

    @property
    def of_fp16(self) -> float:
        """As a fraction of FP16's largest value."""
        return self.largest / torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Advice:
    purpose: str
    format: str
    """The answer: a format, with its rounding where that is part of it."""
    why: str
    """The field's rule."""
    notes: tuple[str, ...]
    """How this model's own figures compare with the rule, one sentence each."""
    rows: tuple[ComparisonRow, ...]
    """Rows that `compare` has measured on this text."""
    missing: tuple[str, ...]
    """Rows that it has not measured."""
    activation: Activation | None = None

    def as_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "purpose": self.purpose,
            "format": self.format,
            "why": self.why,
            "notes": list(self.notes),
            "not_measured": list(self.missing),
        }
        if self.activation:
            facts |= {"largest_activation": self.activation.largest, "largest_activation_at": self.activation.module}
        return {**facts, "rows": [line.as_dict() for line in self.rows]}

    def to_measure(self, model: str, options: str) -> list[str]:
        """The commands that measure what is missing."""
        formats: dict[str, list[str]] = defaultdict(list)
        for requested in self.missing:
            format, _, rounding = requested.partition("/")
            own = rounding in ("", FORMATS[format].default_rounding)
            formats["" if own else f" --rounding {rounding}"].append(format)
        return [f"bitplan compare {model} --formats {','.join(names)}{how}{options}" for how, names in formats.items()]


def recommend(source: Source, purpose: str, texts: Texts | None, device: str = "auto") -> Advice:
    """The answer for one of PURPOSES. Without `texts`, no rows are used. The model is loaded if the cache holds rows
    of it on this text, and for training, whose answer reports its activations. Raises ModelUnreadable, UsageError."""
    session = None
    if texts is not None and (purpose == "training" or has_rows(source, texts, device)):
        session = open_session(source, texts, device=device)
    found: dict[str, ComparisonRow] = {}
    for scheme in EVIDENCE[purpose]:
        line = _recalled(session, scheme, device) if session else None
        if line is not None:
            found[scheme] = line
    activation = largest_activation(session) if session and purpose == "training" else None
    format, why = PURPOSES[purpose]
    other, notes = verdict(purpose, found)
    notes = ([_range(activation)] if activation else []) + notes
    missing = tuple(scheme for scheme in EVIDENCE[purpose] if scheme not in found)
    return Advice(purpose, other or format, why, tuple(notes), tuple(found.values()), missing, activation)


def has_rows(source: Source, texts: Texts, device: str) -> bool:
    """The cache holds rows that `compare` has measured of this model on this text."""
    folder = workspace(
        source.weights_sha256, source.config_sha256, texts.calibration.fingerprint, SEED, pick_device(device)
    )
    return any((folder / "compared").glob("*.json"))


def _recalled(session: Session, scheme: str, device: str) -> ComparisonRow | None:
    format, _, rounding = scheme.partition("/")
    if is_float(format):
        return recalled(session, format, format, device)
    try:
        plan = uniform_plan(session, format, rounding or None)
    except FormatUnavailable:
        return None
    return recalled(session, plan.budget.requested, plan, device)


# How the rows compare with the rule

Verdict = tuple[str | None, list[str]]


def verdict(purpose: str, found: dict[str, ComparisonRow]) -> Verdict:
    """From measured rows, by their names in EVIDENCE: the answer if it is not the rule's, and sentences."""
    return {"training": _training, "inference": _inference, "cost": _cost, "fit": _fit}[purpose](found)


def _evaluation(line: ComparisonRow) -> Evaluation:
    assert line.evaluation is not None  # only rows with figures are kept
    return line.evaluation


def _surely_less(one: ComparisonRow, other: ComparisonRow) -> bool:
    """The KL of `one` is less by more than noise."""
    a, b = _evaluation(one), _evaluation(other)
    return a.kl + SURE * hypot(a.kl_se, b.kl_se) < b.kl


def _beside(one: ComparisonRow, other: ComparisonRow) -> str:
    return f"KL {_evaluation(one).kl:.5f} against {_evaluation(other).kl:.5f} nats per token"


def _perplexity(line: ComparisonRow) -> str:
    return f"{100 * expm1(_evaluation(line).delta_nll):+.2f} % perplexity"


def _training(found: dict[str, ComparisonRow]) -> Verdict:
    if {"bf16", "fp16"} <= found.keys() and _surely_less(found["fp16"], found["bf16"]):
        difference = _beside(found["fp16"], found["bf16"])
        return None, [
            f"for inference, FP16 is closer to full precision than BF16 on this model ({difference}), since it has"
            f" three more bits of mantissa; for training the rule stands, since gradients need BF16's range"
        ]
    return None, []


def _range(activation: Activation) -> str:
    end = "FP16 overflows" if activation.of_fp16 >= 1 else "FP16 can represent it, but gradients may exceed its range"
    return (
        f"the largest activation on the held-out text is {activation.largest:,.1f}, the output of {activation.module}:"
        f" {activation.of_fp16:.2%} of FP16's limit; {end}"
    )


def _inference(found: dict[str, ComparisonRow]) -> Verdict:
    answer, notes = None, []
    if int8 := found.get("int8"):
        loss = _evaluation(int8)
        if loss.delta_nll - SURE * loss.delta_nll_se > SMALL:
            answer = "bf16"
            notes.append(f"against the rule, INT8's loss on this model is not very small: {_perplexity(int8)}")
        else:
            notes.append(f"the rule holds on this model: INT8 costs {_perplexity(int8)}, KL {loss.kl:.5f}")
    if {"int8", "fp8"} <= found.keys() and _surely_less(found["fp8"], found["int8"]):
        notes.append(f"against the rule, FP8 loses less than INT8 here: {_beside(found['fp8'], found['int8'])}")
    if int4 := found.get("int4-g128/gptq"):
        loss = _evaluation(int4)
        if loss.delta_nll + SURE * loss.delta_nll_se < SMALL:
            notes.append(f"fewer bits than the rule's suffice here: int4-g128 costs only {_perplexity(int4)}")
    slower = _slower(found.get("int8"), found.get("bf16"))
    return answer, notes + slower


def _slower(one: ComparisonRow | None, other: ComparisonRow | None) -> list[str]:
    if not (one and other and one.throughput and other.throughput):
        return []
    speeds = one.throughput.decode_tokens_per_s, other.throughput.decode_tokens_per_s
    if speeds[0] >= speeds[1]:
        return []
    return [
        f"fewer bytes are not faster here: {one.name} decodes {speeds[0]:,.1f} tokens per second, {other.name}"
        f" {speeds[1]:,.1f}"
    ]


def _cost(found: dict[str, ComparisonRow]) -> Verdict:
    answer, notes = None, []
    awq, gptq, nf4 = (found.get(name) for name in ("int4-g128/awq", "int4-g128/gptq", "nf4"))
    best = awq
    if awq and gptq:
        if _surely_less(gptq, awq):
            answer, best = "int4-g128/gptq", gptq
            notes.append(f"against the rule, GPTQ loses less than AWQ on this model: {_beside(gptq, awq)}")
        elif _surely_less(awq, gptq):
            notes.append(f"the rule holds on this model: AWQ loses less than GPTQ, {_beside(awq, gptq)}")
        else:
            notes.append(f"no significant difference between AWQ and GPTQ on this model: {_beside(awq, gptq)}")
    else:
        notes.append(
            "whether AWQ is better than GPTQ on this model has not been measured; on the three small models of this"
            " project's benchmarks GPTQ lost less"
        )
    best = best or gptq
    if best and nf4 and _surely_less(nf4, best):
        notes.append(
            f"against the rule, NF4 loses less than {best.name} here ({_beside(nf4, best)}), with"
            f" {nf4.resident_bytes:,} bytes against {best.resident_bytes:,}"
        )
    if best and _evaluation(best).delta_nll - SURE * _evaluation(best).delta_nll_se > LARGE:
        notes.append(
            f"against the rule, the loss of INT4 is not small on this model: {_perplexity(best)}; a mixed plan of as"
            f" many bytes keeps sensitive layers at more bits"
        )
    return answer, notes


def _fit(found: dict[str, ComparisonRow]) -> Verdict:
    binary = found.get("binary-g64")
    return None, [f"1 bit on this model: {_perplexity(binary)}, research stage"] if binary else []


@torch.no_grad()
def largest_activation(session: Session) -> Activation:
    """Over all modules' outputs on the held-out text, in full precision."""
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                found[name] = max(found.get(name, 0.0), float(value.abs().max()))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in session.model.named_modules() if name]
    try:
        for ids in session.texts.heldout.ids.split(1):
            session.model(input_ids=ids.to(session.model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    module = max(found, key=lambda name: found[name])
    return Activation(module, found[module])
