"""A model folder or hub id, its fingerprint, and its loading in full precision.

May import: formats.errors, sensitivity.store.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bitplan.formats.errors import BitplanError, ModelUnreadable, first_line
from bitplan.sensitivity.store import sha256

SAMPLE = 4096
"""Bytes hashed at the start and in the middle of every tensor."""
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
UNWANTED = ["original/*", "consolidated*"]
"""The same weights, as others lay them out."""


@dataclass(frozen=True)
class Source:
    model: str
    """As the user named it."""
    folder: Path
    revision: str | None
    """The hub's commit, None for a folder."""
    weights_sha256: str
    config_sha256: str
    trust_remote_code: bool = False

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())


def find(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find a model's files, in a folder or on the hub. Raises ModelUnreadable."""
    folder, commit = Path(model), None
    if not folder.is_dir():
        folder = download(str(model), revision)
        commit = folder.name
    files = weight_files(folder)
    if not (folder / "config.json").exists():
        raise ModelUnreadable(f"{model} has no config.json: name the folder of a Hugging Face model or a hub id")
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError:
        raise ModelUnreadable(f"{model}: config.json is no valid JSON: fetch or save it again") from None
    if not files:
        raise ModelUnreadable(
            f"{model} has no *.safetensors weights: save it again with save_pretrained (pickled weights are not read)"
        )
    if absent := [path.name for path in files if not path.exists()]:
        raise ModelUnreadable(f"{model} lacks {', '.join(absent)}, which its index names: fetch it again")
    return Source(
        str(model),
        folder,
        commit,
        weights_fingerprint(files),
        sha256((folder / "config.json").read_bytes()),
        trust_remote_code,
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: a repository may hold the weights once more for other tools."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.exists():
        return [whole]
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError):
        return sorted(folder.glob("*.safetensors"))
    return sorted(folder / shard for shard in shards)


def download(model: str, revision: str | None = None, wanted: Sequence[str] = WANTED) -> Path:
    """The folder of a hub model's files. Raises ModelUnreadable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(wanted), ignore_patterns=UNWANTED))
    except HFValidationError:
        raise ModelUnreadable(f"{model} is neither a folder here nor a hub id") from None
    except Exception as error:  # the hub's client raises many unrelated types for one outcome: it is not to be had
        reason = first_line(error)
        raise ModelUnreadable(f"{model} is no folder here and could not be had from the hub: {reason}") from None


def weights_fingerprint(files: list[Path]) -> str:
    """sha256 over every tensor's name, dtype, shape and two samples of its bytes, however the files are sharded."""
    parts: dict[str, bytes] = {}
    for path in files:
        with open(path, "rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            except (struct.error, ValueError, MemoryError, OverflowError):
                raise ModelUnreadable(f"{path} is not a whole safetensors file: fetch or save it again") from None
            header.pop("__metadata__", None)
            expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if path.stat().st_size != expected:
                raise ModelUnreadable(
                    f"{path} is cut short: {path.stat().st_size:,} of {expected:,} bytes; fetch it again"
                )
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                samples = b""
                for at in (start, (start + stop) // 2):
                    file.seek(8 + length + at)
                    samples += file.read(min(SAMPLE, stop - at))
                parts[name] = f"{name} {entry['dtype']} {entry['shape']} ".encode() + samples
    return sha256(*(parts[name] for name in sorted(parts)))


def refuse_quantized(source: Source) -> None:
    """Raises ModelUnreadable where the checkpoint is quantized already."""
    config = source.config.get("quantization_config")
    if config:
        method = config.get("quant_method", "an unnamed method")
        raise ModelUnreadable(
            f"{source.model} is quantized already ({method}): name the full-precision model it came from"
        )


def load_model(source: Source, device: str = "cpu", **kwargs: Any) -> PreTrainedModel:
    """The model in eval mode, without gradients for its parameters, in the checkpoint's own type unless `kwargs` say
    otherwise. Raises ModelUnreadable."""
    kwargs.setdefault("dtype", "auto")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            trust_remote_code=source.trust_remote_code,
            device_map=None if device == "cpu" else device,
            output_loading_info=True,
            **kwargs,
        )
    except (BitplanError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise ModelUnreadable(f"transformers cannot load {source.model} as a causal LM: {reason}") from error
    model, info = loaded
    if absent := sorted(info["missing_keys"]):  # transformers has filled them with random values
        raise ModelUnreadable(
            f"{source.model} lacks {len(absent)} tensors that {type(model).__name__} needs, {absent[0]} first: name a"
            f" whole checkpoint of a causal LM"
        )
    return model.eval().requires_grad_(False)


def block_length(source: Source, asked: int) -> int:
    """`asked`, or the longest sequence the model takes where that is less."""
    config = source.config
    config = config.get("text_config") or config
    limits = [
        config[key]
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        if config.get(key)
    ]
    return min([asked, *limits])


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Raises ModelUnreadable where the folder has no tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
        found = tokenizer("a text to read", add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers fail in as many types as there are tokenizers
        reason = first_line(error)
        raise ModelUnreadable(f"{source.model} has no tokenizer that transformers can load: {reason}") from error
    if set(found) <= set(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer files
        raise ModelUnreadable(f"{source.model} has no tokenizer: add its files to the folder")
    return tokenizer
