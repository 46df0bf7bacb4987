"""A checkpoint folder in the layouts of compressed-tensors, which vLLM and transformers read.

A weight [rows, columns] with codes of b bits in groups of columns is stored, pack-quantized, as

    weight_packed      int32 [rows, columns * b / 32]   each row a little-endian bit stream, as in bitplan's packing
    weight_zero_point  int32 [rows * b / 32, groups]    each column such a stream; absent if symmetric
    weight_scale       fp16  [rows, groups]
    weight_shape       int64 [2]

and, float-quantized, `weight` e4m3 [rows, columns] and weight_scale fp16 [rows, 1].
May import: formats, sensitivity, planner.plan, planner.report.model_card, planner.export.gptq_layout/names/target.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from bitplan.formats.base import Tensors
from bitplan.formats.floats import FP8, Float8Format
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.modules import Packed
from bitplan.formats.packed import pack, unpack, words_per_row
from bitplan.formats.table import FORMATS
from bitplan.planner.export.gptq_layout import FUSED, added_scales
from bitplan.planner.export.names import read_beside
from bitplan.planner.export.target import KINDS, Exported, Target, group_size, integer, uneven
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.planner.report.model_card import Layout, write_papers, written_beside

LAYOUT = Layout(
    "planned, in compressed-tensors' layouts",
    """Mixed precision by bitplan: serve it with vLLM, or load it with transformers once compressed-tensors is installed
(which then unpacks the whole model: memory is saved by servers only). Scales are fp16; a reader that runs in bfloat16
rounds them to it, and one that runs in float16 (`--dtype float16`) does not. Zero points are read in transformers with
compressed-tensors 0.17; 0.18 to 0.20 fail on them.

```python
from transformers import AutoModelForCausalLM  # pip install compressed-tensors
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```""",
    ("compressed-tensors",),
)

PACKED, FLOATS = "pack-quantized", "float-quantized"


class CompressedTensors(Target):
    """Symmetric and asymmetric integer formats, and fp8, for Linears."""

    name = "compressed-tensors"
    readers = "vLLM, transformers"
    holds_codes = True

    def unsupported(self, unit: PlannedUnit) -> str | None:
        if unit.is_native:
            return None
        if unit.kind != "linear":  # vLLM reads every quantized embedding as symmetric
            return KINDS.get(unit.kind, "a Conv1D, whose weight is transposed")
        if integer(unit) is None and not isinstance(FORMATS[unit.format], Float8Format):
            return f"in {unit.format}"
        return uneven(unit)

    def word(self, unit: PlannedUnit) -> str:
        if unit.is_native:
            return "ignored"
        weights = scheme(unit)["weights"]
        group = f", group_size {weights['group_size']}" if "group_size" in weights else ", a scale per row"
        return f"{weights['type']} {weights['num_bits']} bits{group}"

    def nbytes(self, unit: PlannedUnit) -> int:
        """Codes and scales as in bitplan; zero points are packed by columns, and the shape is stored too."""
        format = integer(unit)
        if format is None:  # fp8, without bitplan's padding to whole words
            return unit.bytes if unit.is_native else unit.rows * (unit.columns + 2)
        groups = format.groups(unit.columns)
        zeros = words_per_row(unit.rows, format.code_bits) * groups if format.zero_point == "asymmetric" else 0
        return 4 * (unit.rows * words_per_row(unit.columns, format.code_bits) + zeros) + 2 * unit.rows * groups + 16

    def text(self, plan: Plan) -> str:
        return json.dumps(config(plan), indent=2) + "\n"

    def notes(self, plan: Plan) -> list[str]:
        found = {FORMATS[unit.format].bits for unit in plan.packed}
        notes = ["scales are fp16: a server that runs in bfloat16 rounds them, `--dtype float16` keeps them"]
        notes += added_scales(plan.packed)
        if odd := sorted(f"{bits:.0f}" for bits in found - {4, 8}):
            notes.append(
                f"{', '.join(odd)} bits need a vLLM with Humming's kernels and a GPU that these run on; SGLang has none"
            )
        if any(getattr(FORMATS[unit.format], "zero_point", "") == "asymmetric" for unit in plan.packed):
            notes.append(
                "transformers reads zero points (2, 4, 8 bits) with compressed-tensors 0.17, not with 0.18 to 0.20"
            )
        return notes


def scheme(unit: PlannedUnit) -> dict[str, Any]:
    """A packed unit's config group, without its `targets`."""
    format = integer(unit)
    if format is None:
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    else:
        weights = {"num_bits": format.code_bits, "type": "int", "symmetric": format.zero_point == "symmetric"}
        group = group_size(unit)
        weights |= {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
    return {"weights": weights | {"dynamic": False}, "format": PACKED if format else FLOATS}


def with_fused(entries: dict[str, str]) -> dict[str, str]:
    """`entries` (module name → config), with an entry for each fused module whose members have the same one.

    vLLM looks up the members of a fused module; SGLang (for many models, such as Llama) looks up the fused module
    itself, and fails if it has no entry. transformers has no such module, and warns about it.
    """
    added = {}
    for fused, members in FUSED.items():
        for parent in [name.removesuffix(members[0]) for name in entries if name.endswith(f".{members[0]}")]:
            if len({entries.get(parent + member) for member in members}) == 1:
                added[parent + fused] = entries[parent + members[0]]
    return entries | added


def config(plan: Plan) -> dict[str, Any]:
    """The quantization_config. Modules are listed by exact names, since classes or patterns could match others."""
    targets: dict[str, list[str]] = defaultdict(list)
    for name, key in with_fused({unit.name: json.dumps(scheme(unit)) for unit in plan.packed}).items():
        targets[key].append(name)
    groups = {f"group_{i}": {"targets": names, **json.loads(key)} for i, (key, names) in enumerate(targets.items())}
    formats = {group["format"] for group in groups.values()}
    native = [unit for unit in plan.units if unit.is_native]
    ignored = [name for unit in native for name in (unit.name, *unit.tied)]
    ignored += [entry.name.removesuffix(".weight") for entry in plan.unquantized if len(entry.shape) == 2]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(with_fused(dict.fromkeys(ignored, ""))),
    }


def to_compressed(tensors: Tensors, unit: PlannedUnit) -> Tensors:
    """Convert a unit's packed tensors to the layout's."""
    format = FORMATS[unit.format]
    if isinstance(format, IntegerFormat):
        tensors = format.with_fp16_scales(tensors, unit.columns)
    scale = tensors["_scale"].view(torch.float16)
    if not isinstance(format, IntegerFormat):
        codes = tensors[""].view(torch.uint8)[:, : unit.columns].contiguous()
        return {"weight": codes.view(FP8), "weight_scale": scale}
    written = {"weight_packed": tensors[""], "weight_scale": scale}
    written["weight_shape"] = torch.tensor([unit.rows, unit.columns])
    if format.zero_point == "asymmetric":
        zero = unpack(tensors["_zero"], scale.numel(), format.code_bits).view(scale.shape)
        written["weight_zero_point"] = pack(zero.T.contiguous(), format.code_bits).T
    return written


def compressed_tensors(model: PreTrainedModel, plan: Plan) -> Tensors:
    """All tensors of a quantized model in these layouts, on the CPU; a tied one once, by its first name."""
    found: dict[str, Tensor] = model.state_dict(keep_vars=True)
    ties = model.all_tied_weights_keys
    written = {name: tensor for name, tensor in found.items() if tensor is not found.get(ties.get(name, ""))}
    for unit in plan.packed:
        module = model.get_submodule(unit.name)
        assert isinstance(module, Packed)
        own = module.tensors()
        for suffix in own:
            del written[unit.parameter + suffix]
        written |= {f"{unit.name}.{name}": tensor for name, tensor in to_compressed(own, unit).items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in written.items()}


def save_compressed(model: PreTrainedModel, exported: Exported, folder: Path, force: bool) -> int:
    """Write an exported, materialised plan as a checkpoint folder; the bytes of its tensors.

    Everything is written beside and renamed at the end. Raises BitplanError where the folder cannot be written.
    """
    source, plan = exported.target.source, exported.plan
    assert source is not None
    tensors = compressed_tensors(model, plan) | read_beside(plan, source)
    content = source.config | {"quantization_config": json.loads(exported.text)}
    with written_beside(folder, force) as part:
        save_file(tensors, part / "model.safetensors", {"format": "pt"})
        (part / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file in (source.folder / "generation_config.json", *source.folder.glob("*.py")):
            if file.exists():
                shutil.copy(file, part)
        write_papers(part, plan, source, LAYOUT)
    return sum(tensor.nbytes for tensor in tensors.values())
