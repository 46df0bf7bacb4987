"""A quantized model in GPTQ's checkpoint layout, which gptqmodel and auto-gptq read, and at 4 and 8 bits without zero
points vLLM and SGLang.

A Linear of `inputs` × `outputs` with codes of b bits in groups of inputs is stored as four tensors:

    qweight  int32 [inputs * b / 32, outputs]   the codes; each column is one little-endian bit stream
    qzeros   int32 [groups, outputs * b / 32]   the zero points minus one; each row is such a stream
    scales   fp16  [groups, outputs]
    g_idx    int32 [inputs]                     the group of each input

and weight[input, output] = (code - (stored zero + 1)) * scale. May import: formats, sensitivity, planner.plan,
planner.report.model_card, planner.export.names/target.
"""

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitplan.formats.base import Tensors
from bitplan.formats.double_quant import nbytes_added
from bitplan.formats.errors import FormatUnavailable
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.modules import Packed, is_experts
from bitplan.formats.packed import pack, unpack
from bitplan.formats.table import DEFAULT_FORMATS, FORMATS
from bitplan.planner.export.names import read_beside, refuse_renamed
from bitplan.planner.export.target import KINDS
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.planner.report.model_card import Layout, write_papers, written_beside
from bitplan.sensitivity.source import Source

BITS = (2, 3, 4, 8)
RUN = 32
"""Inputs and outputs must be multiples of this: only then do 3-bit codes fill whole words."""

WITHOUT = "bitplan's own layout takes it (`bitplan apply PLAN --save DIR`)"

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules that servers fuse, by the fused module's name, under which its settings are looked up."""

ZEROS_DO_NOT_WRAP = "gptqmodel:0.9.0"
"""gptqmodel refuses an asymmetric checkpoint of this layout unless its quantizer is this version or later, the first
whose zero points can be read back. Those written here can: see `to_gptq`."""

LAYOUT = Layout(
    "planned, in GPTQ's layout",
    """Mixed precision by bitplan, written in the checkpoint layout of GPTQ: read it with gptqmodel. vLLM (from 0.22 on)
and SGLang support this layout only at 4 or 8 bits without zero points. Modules with other bits or group sizes, or left
in floats, are listed under `dynamic` in config.json. transformers' own GPTQ reader and auto-gptq ignore `dynamic`: they
read the folder correctly only if it is absent. This layout takes more bytes than the plan: it adds g_idx, zero points
for symmetric formats, and fp16 scales where the plan's scales are codes.

```python
from gptqmodel import GPTQModel
model = GPTQModel.load("path/to/this/folder")
```""",
    ("gptq",),
)


def is_supported(format: object) -> bool:
    """Whether the layout supports a format."""
    return (
        isinstance(format, IntegerFormat) and format.bits in BITS and format.zero_point in ("asymmetric", "symmetric")
    )


def settings(unit: PlannedUnit) -> tuple[int, int]:
    """Bits and group size of a packed unit; the group size is -1 if a row is one group."""
    format = FORMATS[unit.format]
    assert isinstance(format, IntegerFormat)
    return format.code_bits, format.group if 0 < format.group < unit.columns else -1


def refuse_unsupported(plan: Plan) -> None:
    """Raise FormatUnavailable if the layout does not support some of a plan's units. Needs no model."""
    if experts := [unit.name for unit in plan.units if unit.kind == "experts"]:
        raise joined_experts(experts)
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    packed = [unit for unit in plan.units if not unit.is_native]
    for unit in packed:
        if reason := unsupported(unit):
            reasons[reason].append(unit.name)
    if reasons:
        found = "; ".join(f"{_names(names)}, {what}" for (what, _), names in reasons.items())
        keep = [name for (_, change), names in reasons.items() if not change for name in names]
        changes = [change for _, change in reasons if change]
        changes += [" ".join(f"--keep {name}" for name in keep)] if len(keep) <= 4 else ["--keep for each of these"]
        raise FormatUnavailable(
            f"GPTQ's layout does not support {found}: "
            f"plan again with {' and '.join(dict.fromkeys(filter(None, changes)))}"
        )
    if not packed:
        raise FormatUnavailable(f"GPTQ's layout is for integer formats, and no unit has one that it takes: {WITHOUT}")


def joined_experts(names: list[str]) -> FormatUnavailable:
    return FormatUnavailable(
        f"GPTQ's layout stores each expert separately, and {_names(names)} hold many in one: {WITHOUT}"
    )


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unsupported(unit: PlannedUnit) -> tuple[str, str] | None:
    """The reason why a unit is not supported, and the options for a supported plan ("": --keep for the unit), or
    None."""
    if unit.kind not in ("linear", "conv1d"):
        return KINDS[unit.kind], ""
    if not re.search(r"\.\d+\.", unit.name):
        return "outside the model's blocks", ""
    format = FORMATS[unit.format]
    if not is_supported(format):
        return (
            f"in {unit.format}",
            f"--formats {','.join(name for name in DEFAULT_FORMATS if is_supported(FORMATS[name]))}",
        )
    if unit.rows % RUN or unit.columns % RUN:
        return f"of {unit.rows} × {unit.columns} weights, not multiples of {RUN}", ""
    _, group = settings(unit)
    if unit.columns % max(group, 1):
        return f"whose {unit.columns} columns are not a multiple of {group}", "formats of smaller groups (…-g32)"
    return None


def to_gptq(tensors: Tensors, format: IntegerFormat, columns: int) -> Tensors:
    """Convert a unit's packed tensors to the layout's four.

    Readers disagree about a zero point of 0, which is stored as -1: in some it wraps within its bits, in some it
    borrows from its neighbour, in some it is read as 2^b. Such a group is therefore written mirrored, as
    code' = top - code, zero' = top, scale' = -scale, which gives exactly the same values.
    """
    tensors = format.with_fp16_scales(tensors, columns)
    bits, top = format.code_bits, format.top
    codes, scale = unpack(tensors[""], columns, bits), tensors["_scale"].view(torch.float16)
    if format.zero_point == "asymmetric":
        zero = unpack(tensors["_zero"], scale.numel(), bits).view(scale.shape)
    else:
        zero = torch.full_like(scale, top // 2 + 1, dtype=torch.uint8)
    step = columns // scale.shape[1]
    mirrored = zero == 0
    codes = torch.where(mirrored.repeat_interleave(step, 1), top - codes, codes)
    return {
        "qweight": pack(codes, bits).T.contiguous(),
        "qzeros": pack(torch.where(mirrored, top - 1, zero - 1).to(torch.uint8).T.contiguous(), bits),
        "scales": torch.where(mirrored, -scale, scale).T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // step,
    }


def added_scales(units: Iterable[PlannedUnit]) -> list[str]:
    """A note on the bytes that scales which are codes in the plan take more as fp16, if there are any."""
    added: dict[str, int] = defaultdict(int)
    for unit in units:
        added[unit.format] += nbytes_added(FORMATS[unit.format], unit.experts * unit.rows, unit.columns)
    return [
        f"the scales of {name} are written as fp16 ones, the same values, which adds {size:,} bytes"
        for name, size in added.items()
        if size
    ]


def gptq_tensors(model: PreTrainedModel, plan: Plan, tied_twice: bool) -> Tensors:
    """All tensors of a quantized model in this layout, on the CPU: unquantized ones by their own names, a tied one by
    its first name, or with `tied_twice` by all of its names."""
    found: dict[str, Tensor] = model.state_dict(keep_vars=True)
    ties = model.all_tied_weights_keys
    again = [name for name, tensor in found.items() if tensor is found.get(ties.get(name, ""))]
    written = {name: tensor for name, tensor in found.items() if name not in again}
    if tied_twice:
        written |= {name: found[name].clone() for name in again}
    for unit in plan.units:
        if unit.is_native:
            continue
        module, format = model.get_submodule(unit.name), FORMATS[unit.format]
        assert isinstance(module, Packed) and isinstance(format, IntegerFormat)
        own = module.tensors()
        for suffix in own:
            del written[unit.parameter + suffix]
        for name, tensor in to_gptq(own, format, unit.columns).items():
            written[f"{unit.name}.{name}"] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in written.items()}


def quantization_config(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """The quantization_config: the most common bits and group size, and a rule for each module that differs."""
    packed = {unit.name: settings(unit) for unit in plan.units if not unit.is_native}
    (bits, group), _ = Counter(packed.values()).most_common(1)[0]
    rules: dict[str, tuple[int, int] | None] = {n: own for n, own in packed.items() if own != (bits, group)}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name not in packed and module is not head:
            rules[name] = None
    for fused, members in FUSED.items():
        for parent in [name.removesuffix(members[0]) for name in rules if name.endswith(f".{members[0]}")]:
            agreed = {rules.get(parent + member, (bits, group)) for member in members}
            if len(agreed) == 1:
                rules[parent + fused] = agreed.pop()
    dynamic = {}
    for name, own in rules.items():
        exactly = f"^{re.escape(name)}$"
        dynamic[f"-:{exactly}" if own is None else f"+:{exactly}"] = (
            {} if own is None else {"bits": own[0], "group_size": own[1]}
        )
    # One flag for all modules: with False, stored zero points are read, which is right for symmetric ones too.
    sym = all(getattr(FORMATS[unit.format], "zero_point", "symmetric") == "symmetric" for unit in plan.units)
    written_by = [f"bitplan:{plan.provenance.versions['bitplan']}", *([] if sym else [ZEROS_DO_NOT_WRAP])]
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": False,
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": written_by},
    }


def config_for(source: Source, quantization: dict[str, Any]) -> dict[str, Any]:
    """The model's config with the quantization_config, and with older field names that auto-gptq reads."""
    config = source.config
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        others = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
        config.setdefault("rope_scaling", {"type": rope["rope_type"], **others})
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    return config | {"quantization_config": quantization}


def save_gptq(model: PreTrainedModel, plan: Plan, source: Source, folder: Path, force: bool) -> int:
    """Write a quantized model as a checkpoint folder in GPTQ's layout. Returns the bytes of its tensors.

    The folder is written under a temporary name and renamed at the end. Raises FormatUnavailable if the layout does not
    support a unit, BitplanError if the folder cannot be written.
    """
    refuse_unsupported(plan)
    if experts := [name for name, module in model.named_modules() if is_experts(module)]:
        raise joined_experts(experts)
    refuse_renamed(plan, source, "GPTQ's layout")
    quantization = quantization_config(model, plan)
    # auto-gptq only supports one setting for all modules, ignores rules (unquantized modules would load as noise), and
    # reads its settings from quantize_config.json. That file, and a copy of a tied head (which it would otherwise read
    # as zeros), are written only if it can read everything else.
    for_auto_gptq = "dynamic" not in quantization
    tensors = gptq_tensors(model, plan, tied_twice=for_auto_gptq) | read_beside(plan, source)
    with written_beside(folder, force) as part:
        save_file(tensors, part / "model.safetensors", {"format": "pt"})
        _write_json(part / "config.json", config_for(source, quantization))
        if for_auto_gptq:
            _write_json(part / "quantize_config.json", quantization)
        for file in (source.folder / "generation_config.json", *source.folder.glob("*.py")):
            if file.exists():
                shutil.copy(file, part)
        write_papers(part, plan, source, LAYOUT)
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
