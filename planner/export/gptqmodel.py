"""gptqmodel's quantization config, with a rule in `dynamic` for each module that differs.

May import: formats, sensitivity, planner.plan, planner.export.gptq_layout, planner.export.target.
"""

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bitplan.formats.errors import ModelUnreadable, first_line
from bitplan.formats.modules import is_experts
from bitplan.planner.export.gptq_layout import (
    added_scales,
    joined_experts,
    quantization_config,
    refuse_unsupported,
    settings,
    unsupported,
)
from bitplan.planner.export.target import KINDS, Target, group_size, integer
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.source import Source


class GptqModel(Target):
    """The quantization_config of a checkpoint in GPTQ's layout; `bitplan apply --layout gptq` writes the checkpoint."""

    name = "gptqmodel"
    readers = "gptqmodel"

    def unsupported(self, unit: PlannedUnit) -> str | None:
        if unit.kind == "experts":  # in floats too: the layout has each expert's modules apart
            return KINDS[unit.kind]
        reason = None if unit.is_native else unsupported(unit)
        return reason[0] if reason else None

    def word(self, unit: PlannedUnit) -> str:
        if unit.is_native:
            return "not quantized"
        bits, group = settings(unit)
        return f"{bits} bits, group_size {group}"

    def nbytes(self, unit: PlannedUnit) -> int:
        """Bytes of qweight, qzeros (stored for symmetric formats too), scales and g_idx."""
        format = integer(unit)
        if format is None:
            return unit.bytes
        groups = unit.columns // (group_size(unit) if group_size(unit) > 0 else unit.columns)
        words = (unit.columns + groups) * unit.rows * format.code_bits // 32
        return 4 * words + 2 * groups * unit.rows + 4 * unit.columns

    def text(self, plan: Plan) -> str:
        refuse_unsupported(plan)
        assert self.source is not None
        model = skeleton(self.source)
        if experts := [name for name, module in model.named_modules() if is_experts(module)]:
            raise joined_experts(experts)
        return json.dumps(quantization_config(model, plan), indent=2) + "\n"

    def notes(self, plan: Plan) -> list[str]:
        served = all(is_served(unit) for unit in plan.packed)
        return [
            "these are the settings alone: `bitplan apply PLAN --layout gptq --save DIR` writes them with the weights",
            *added_scales(plan.packed),
            "transformers' own GPTQ reader does not look at `dynamic`: load with gptqmodel",
            "vLLM reads these too"
            if served
            else "vLLM (from 0.22 on) and SGLang take GPTQ's layout only in 4 or 8 bits without zero points, and refuse"
            " this: give them `--to compressed-tensors`",
        ]


def is_served(unit: PlannedUnit) -> bool:
    """Whether servers, which have only Marlin's formats for this layout, take a packed unit."""
    format = integer(unit)
    return format is not None and format.code_bits in (4, 8) and format.zero_point == "symmetric"


def skeleton(source: Source) -> Any:
    """The model's modules, without weights. Raises ModelUnreadable."""
    try:
        config = sources.transformers_config(source)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnreadable(
            f"transformers cannot build {source.model} as a causal LM: {first_line(error)}"
        ) from error
