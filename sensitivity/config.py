"""A model's config.json, read once it is plausible: before anything is built or allocated by it.

May import: formats.errors, sensitivity.reading.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitplan.formats.errors import ModelUnreadable
from bitplan.sensitivity.reading import read_json

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size")
INNER = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "d_inner")
COUNTS = (
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
)
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
MOST = (
    dict.fromkeys(LAYERS, 10_000) | dict.fromkeys((*WIDTHS, *INNER, *COUNTS), 1 << 24) | dict.fromkeys(LENGTHS, 1 << 40)
)
"""The most that each may be; the largest published models have some hundred layers and widths of 2^17."""
SLACK = 16
"""How many times the checkpoint's weights a single matrix may have by the config: some types pack several weights into
one number, and a few layers may share their weights."""


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json. Raises ModelUnreadable, which names the file and the field."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelUnreadable(f"{folder} has no config.json: name the folder of a Hugging Face model or a hub id")
    config = read_json(path, error=ModelUnreadable)
    if not isinstance(config, dict):
        raise ModelUnreadable(f"{path} is no valid JSON object: fetch or save it again")
    for field, value in _sizes(config):
        name = field.rpartition(".")[2]
        least = 1 if name in (*LAYERS, *WIDTHS, *LENGTHS) else 0
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (type(number) is not int or not least <= number <= MOST[name]):
                raise ModelUnreadable(
                    f"{path}: {field} is {repr(number)[:40]}, and must be a whole number from {least} to {MOST[name]:,}"
                )
    for field, kind in (
        ("model_type", str),
        ("architectures", list),
        ("quantization_config", dict),
        ("auto_map", dict),
    ):
        if config.get(field) is not None and not isinstance(config[field], kind):
            raise ModelUnreadable(f"{path}: {field} must be a {kind.__name__}, not {repr(config[field])[:40]}")
    return config


def _sizes(config: Mapping[str, Any], within: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every size that a config states, and those of its parts (`text_config`, …), by field."""
    for name, value in config.items():
        if name in MOST:
            yield within + name, value
        elif name.endswith("_config") and isinstance(value, dict) and depth < 4 and name != "quantization_config":
            yield from _sizes(value, f"{within}{name}.", depth + 1)


def refuse_implausible(config: Mapping[str, Any], folder: Path, tensors: int, weights: int) -> None:
    """Raises ModelUnreadable where a config describes a model far beyond a checkpoint of so many tensors and weights:
    transformers would allocate what is missing, and fill it with random numbers."""
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise ModelUnreadable(f"{folder / 'config.json'}: text_config must be a dict, not {repr(text)[:40]}")
    has = f"and its weights are {tensors:,} tensors of {weights:,} numbers together"
    for name in LAYERS:
        if isinstance(layers := text.get(name), int) and layers > max(64, 4 * tensors):
            raise ModelUnreadable(f"{folder / 'config.json'}: {name} is {layers:,}, {has}")
    widths = [text[name] for name in WIDTHS[:3] if isinstance(text.get(name), int)]
    for name in (*WIDTHS, *INNER, *COUNTS):
        if isinstance(size := text.get(name), int) and size * max(widths, default=1) > max(1 << 24, SLACK * weights):
            raise ModelUnreadable(f"{folder / 'config.json'}: {name} is {size:,}, {has}")
