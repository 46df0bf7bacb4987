"""Llamas of random weights, packed without rounding anything: for memory and speed, never for quality.

`python -m benchmarks.shapes` prints what each plan below takes on each shape. May import: formats,
benchmarks.peers.pace, transformers.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from benchmarks.peers.pace import DEVIATION, empty_model, fill, normal_, weight_bytes
from bitplan.formats.base import Format, Tensors, as_bits
from bitplan.formats.floats import FP8, Float8Format, FloatFormat
from bitplan.formats.modules import Packed, pack_parameter
from bitplan.formats.packed import TRITS
from bitplan.formats.table import format_named

LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False, rope_theta=5e5,
)  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
"""Half a billion weights: at 2 bits still more than a CPU's caches hold."""
TINY = LlamaConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
"""Only to try a benchmark itself."""
SHAPES = {"8b": LLAMA_8B, "small": SMALL, "tiny": TINY}

Formats = Mapping[str, str] | Callable[[str], str | None]
"""The format of a unit by its name; None, or a name that is missing: as the model has it."""


def mixed_4_5(unit: str, depth: float | None) -> str:
    """A plan of some 4.5 bits, with what plans tend to give more to: the first layer, and down_proj near both ends."""
    if depth is not None and "down_proj" in unit and not 1 / 6 < depth < 5 / 6:
        return "int6-g64"
    return "int8" if depth == 0 and unit.endswith(("q_proj", "k_proj", "v_proj")) else "int4-g64"


def mixed_3(unit: str, depth: float | None) -> str:
    """A plan of some 3 bits; q/k/v and gate/up take one format each, as planned ones do."""
    if depth is None:
        return "int2-g64" if "embed" in unit else "int4-g64"
    if "down_proj" in unit and not 1 / 6 < depth < 5 / 6:
        return "int4-g64"
    return "int2-g64" if unit.endswith(("gate_proj", "up_proj")) and 0 < depth < 1 else "int3-g64"


MIXED = {"mixed-4.5": mixed_4_5, "mixed-3": mixed_3}


def formats_of(name: str, config: LlamaConfig) -> Formats:
    """A uniform plan of the format `name`, or one of MIXED: the format of a unit of this shape."""
    if name not in MIXED:
        return lambda unit: name
    last = config.num_hidden_layers - 1

    def of(unit: str) -> str:
        layer = next((int(part) for part in unit.split(".") if part.isdigit()), None)
        return MIXED[name](unit, None if layer is None else layer / last)

    return of


def random_tensors(format: Format, rows: int, columns: int, device: str = "cpu") -> Tensors:
    """Stored tensors of random codes and zero points; one scale for all, so that weights deviate by DEVIATION."""
    if isinstance(format, FloatFormat):
        return format.quantize(normal_(torch.empty(rows, columns, device=device)))
    made = _with_scale(format, _codes(format, min(rows, 64), columns, device), 1.0)
    deviation = float(format.dequantize(made, columns, torch.float32).std())
    return _with_scale(format, _codes(format, rows, columns, device), DEVIATION / deviation)


def _with_scale(format: Format, tensors: Tensors, scale: float) -> Tensors:
    for suffix, dtype in format.floats.items():
        value = scale if suffix == "_scale" else (1 << int(format.bits)) / 2
        tensors[suffix] = as_bits(torch.full_like(tensors[suffix], value, dtype=dtype))
    return tensors


def _codes(format: Format, rows: int, columns: int, device: str) -> Tensors:
    """What the specs say, all bits random, but that each code is one that rounding can give."""
    made = {}
    for suffix, (shape, dtype) in format.specs(rows, columns).items():
        if dtype != torch.int32 or suffix in format.floats:
            made[suffix] = torch.zeros(shape, dtype=dtype, device=device)
        elif getattr(format, "ternary", False):
            made[suffix] = torch.randint(3**TRITS, shape, device=device).int()
        else:
            made[suffix] = torch.randint(-(2**31), 2**31, shape, dtype=dtype, device=device)
    if isinstance(format, Float8Format):
        codes = made[""].view(torch.uint8)
        codes[codes.view(FP8).isnan()] = 0
    return made


def units(model: nn.Module) -> dict[str, nn.Module]:
    """What a plan packs: all Linear and Embedding. Of a tied pair, the embedding."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    head = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    return {n: m for n, m in found.items() if m is not head}


def random_model(
    config: LlamaConfig, device: str = "cpu", dtype: torch.dtype = torch.float32, formats: Formats | None = None
) -> PreTrainedModel:
    """A Llama in eval mode: units packed as `formats` says, the rest in `dtype`. Nothing is rounded, so it never takes
    more than it ends with."""
    torch.manual_seed(0)
    of = formats if callable(formats) else (formats or {}).get
    model = empty_model(config, dtype)
    for name, module in units(model).items():
        if chosen := of(name):
            pack_parameter(module, "weight", format_named(chosen))
            slot = module.slots["weight"]
            for suffix, tensor in random_tensors(slot.format, slot.rows, slot.columns, device).items():
                module.register_parameter("weight" + suffix, nn.Parameter(tensor, requires_grad=False))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if config.tie_word_embeddings and isinstance(embedding, Packed):
        pack_parameter(head, "weight", embedding.slots["weight"].format)
        for name, parameter in embedding._parameters.items():
            head.register_parameter(name, parameter)
    return fill(model, device)


def main() -> None:
    for shape, config in SHAPES.items():
        for name in ("int4-g64", "int3-g64", *MIXED):
            model = empty_model(config, torch.bfloat16)
            count = model.num_parameters()
            for unit, module in units(model).items():
                pack_parameter(module, "weight", format_named(formats_of(name, config)(unit)))
            size, _ = weight_bytes(model)
            print(f"{shape}: {count:,} weights, {name}: {size:,} bytes, {8 * size / count:.3f} bits per weight")


if __name__ == "__main__":
    main()
