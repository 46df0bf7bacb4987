"""A --tensor-type-file for llama.cpp's llama-quantize: a line `^name$=type` for each tensor.

The first line whose pattern matches a tensor's name applies. The file cannot contain comments, and is only read if the
type on the command line is a quantized one, which tensors without a line get. May import: formats, sensitivity,
planner.plan, planner.export.target; gguf, when names are needed.
"""

import re
from collections.abc import Callable
from functools import cached_property
from math import prod

from bitplan.formats.errors import FormatUnavailable, UsageError
from bitplan.formats.table import DTYPES, FORMATS
from bitplan.planner.export.target import Target
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.sensitivity.config import LAYERS
from bitplan.sensitivity.profile import UnquantizedEntry

SIZES = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q6_k": (256, 210),
    "q5_k": (256, 176),
    "q5_1": (32, 24),
    "q4_k": (256, 144),
    "q4_1": (32, 20),
    "iq4_nl": (32, 18),
    "q3_k": (256, 110),
    "q2_k": (256, 84),
    "tq1_0": (256, 54),
}
"""Type → weights per block, bytes per block. `python -m benchmarks.exports` checks them by gguf.GGML_QUANT_SIZES."""

TYPES = {8: ("q8_0",), 6: ("q6_k",), 5: ("q5_k", "q5_1"), 4: ("q4_k", "q4_1"), 3: ("q3_k",), 2: ("q2_k",)}
"""Bits → candidate types; the first whose block size divides the columns is used."""
OTHERS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "nf4": "iq4_nl"}
LIKE = {"q8_0": "int8-g32", "q6_k": "int6-g32", "q5_k": "int5-g32", "q5_1": "int5-g32", "q4_k": "int4-g32"}
LIKE |= {"q4_1": "int4-g32-z16", "q3_k": "int3-g32", "q2_k": "int2-g32"}
"""Type → the format here with the same bits and the nearest group size."""

KINDS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
"""Fields of a config that have an entry for each layer."""

LEFT = ("position_embd", "token_types", "ffn_gate_inp", "attn_rel_b")
"""Parts of the names of weights that llama-quantize does not touch; llama.cpp's converter makes them f32."""

ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "gptbigcode": "starcoder",
    "cohere": "commandr",
    "gemma3text": "gemma3",
    "llama4text": "llama4",
    "qwen35text": "qwen35",
    "qwen35moetext": "qwen35moe",
    "deepseekv2": "deepseek2",
    "deepseekv3": "deepseek2",
    "granitemoehybrid": "granitehybrid",
    "hunyuanv1dense": "hunyuandense",
    "hunyuanv1moe": "hunyuanmoe",
    "olmo3": "olmo2",
}
"""model_type in transformers → llama.cpp's name, if they differ by more than punctuation."""

SPELLINGS = (
    ("model.language_model.", "model."),  # a VLM's text model
    ("block_sparse_moe.experts.", "mlp.experts."),
    ("mixer.experts.", "mlp.experts."),
    ("shared_mlp.input_linear", "mlp.shared_expert.gate_up_proj"),  # Granite's, which holds both
    ("model.", "backbone."),  # Nemotron-H's checkpoints
)
"""Parts of names in transformers → as the gguf package has them."""


class Gguf(Target):
    """Types with the same bits. llama.cpp has its own groups and chooses the codes: only the allocation is exported."""

    name = "gguf"
    readers = "llama-quantize"
    joins = False

    @cached_property
    def name_of(self) -> Callable[[str], str | None]:
        """A function from a tensor's name in the checkpoint to its name in GGUF, without suffix. Raises
        FormatUnavailable, UsageError."""
        try:
            import gguf
        except ImportError:
            raise FormatUnavailable("names of tensors in GGUF need the gguf package: pip install gguf") from None
        if self.source is None:
            raise UsageError("names of tensors in GGUF follow from the model's architecture: give the model")
        config = self.source.config
        kind = re.sub(r"[-_.]", "", str(config.get("model_type")))
        wanted = ARCHITECTURES.get(kind, kind)
        if kind == "nemotronh" and config.get("n_routed_experts"):
            wanted += "moe"
        found = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if re.sub(r"[-_.]", "", name) == wanted]
        if not found:
            raise FormatUnavailable(
                f"the gguf package has no architecture {kind!r}; a newer version may: pip install -U gguf"
            )
        text = config.get("text_config") or config
        layers = [text[key] for key in LAYERS if isinstance(text.get(key), int)]
        kinds = [len(text[key]) for key in KINDS if isinstance(text.get(key), list | str)]
        names = gguf.get_tensor_name_map(found[0], max([*layers, *kinds], default=0))

        def name_of(name: str) -> str | None:
            for spelling in _spellings(name):
                if made := names.get_name(spelling, try_suffixes=(".weight",)):
                    return str(made)
            return None

        return name_of

    def names(self, parameter: str) -> list[str]:
        """A weight's names in GGUF; several for a fused one that llama.cpp's converter splits."""
        parts = [parameter]
        if self.name_of(parameter) is None:
            whole = next((name for name in _spellings(parameter) if "gate_up_proj" in name), parameter)
            parts = [whole.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
            parts = list(dict.fromkeys(parts))
        found = [name.removesuffix(".weight") + ".weight" for part in parts if (name := self.name_of(part))]
        return found if len(found) == len(parts) else []

    def unsupported(self, unit: PlannedUnit) -> str | None:
        names = self.names(unit.parameter)
        if not names:
            return "for which GGUF has no name"
        if unit.is_native:
            return None
        if any(part in name for part in LEFT for name in names):
            return "which llama-quantize leaves as it is"
        if self._type(unit):
            return None
        types = " or ".join(_types(unit))
        return f"whose {unit.columns} columns are not whole blocks of {types}" if types else f"in {unit.format}"

    def _type(self, unit: PlannedUnit) -> str | None:
        if unit.is_native and any(part in name for part in LEFT for name in self.names(unit.parameter)):
            return "f32"
        return next((name for name in _types(unit) if unit.columns % SIZES[name][0] == 0), None)

    def word(self, unit: PlannedUnit) -> str:
        return self._type(unit) or ""

    def nbytes(self, unit: PlannedUnit) -> int:
        block, size = SIZES[self.word(unit)]
        return unit.experts * unit.rows * unit.columns // block * size

    def unquantized_nbytes(self, entry: UnquantizedEntry) -> int:
        """Bytes of an unquantized tensor; llama.cpp's converter stores vectors as f32."""
        return prod(entry.shape) * SIZES[self._unquantized_type(entry)][1]

    def _unquantized_type(self, entry: UnquantizedEntry) -> str:
        left = any(part in name for part in LEFT for name in self.names(entry.name))
        return "f32" if len(entry.shape) < 2 or left else OTHERS.get(DTYPES.get(entry.dtype, ""), "f32")

    def like(self, unit: PlannedUnit) -> str:
        return LIKE.get(self.word(unit), unit.format)

    def text(self, plan: Plan) -> str:
        """The file. Unquantized matrices have lines too, or they would get the type on the command line."""
        types = {unit.parameter: self.word(unit) for unit in plan.units}
        types |= {entry.name: self._unquantized_type(entry) for entry in plan.unquantized if len(entry.shape) > 1}
        lines = {name: type for parameter, type in types.items() for name in self.names(parameter)}
        return "".join(f"^{re.escape(name)}$={type}\n" for name, type in lines.items())

    def notes(self, plan: Plan) -> list[str]:
        dtype = OTHERS.get(DTYPES.get(plan.provenance.model.dtype, ""), "f32")
        lost = [entry.name for entry in plan.unquantized if len(entry.shape) > 1 and not self.names(entry.name)]
        some = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        unnamed = [f"GGUF has no name for {some}, unquantized in the plan: Q8_0 will apply"] if lost else []
        return [
            *unnamed,
            f"convert_hf_to_gguf.py MODEL --outtype {dtype} --outfile IN.gguf, then"
            f" llama-quantize --tensor-type-file FILE IN.gguf OUT.gguf Q8_0",
            "llama.cpp rounds the model itself: the plan's codes are not used, its allocation is",
        ]


def _spellings(name: str) -> list[str]:
    """A tensor's name, and as the gguf package may have it."""
    found = [name]
    for ours, theirs in SPELLINGS:
        found += [each.replace(ours, theirs, 1) for each in found if ours in each]
    return found


def _types(unit: PlannedUnit) -> tuple[str, ...]:
    """GGUF's types for a unit's format, best first."""
    if unit.format in OTHERS:
        return (OTHERS[unit.format],)
    if unit.format.startswith("ternary"):
        return ("tq1_0",)
    format = FORMATS[unit.format]
    return TYPES.get(int(format.bits), ()) if unit.format.startswith("int") else ()
