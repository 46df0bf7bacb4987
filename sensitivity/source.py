"""A model folder or hub id, its fingerprints, and its loading in full precision.

May import: formats.errors/sizes, sensitivity.config/fingerprint/profile/reading/store.
"""

import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from bitplan.formats.errors import BitplanError, ModelUnreadable, PlanMismatch, first_line, printable
from bitplan.formats.sizes import format_bytes
from bitplan.sensitivity.config import read_config, refuse_implausible
from bitplan.sensitivity.fingerprint import config_fingerprint, read_header, sampled_fingerprint, weights_fingerprint
from bitplan.sensitivity.profile import ModelFacts
from bitplan.sensitivity.reading import CONFIG_LIMIT, TEXT_LIMIT, open_regular, read_bytes, read_json
from bitplan.sensitivity.store import sha256

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
    files: tuple[Path, ...]
    """Of its weights."""
    config_sha256: str
    trust_remote_code: bool = False

    @cached_property
    def weights_sha256(self) -> str:
        """Every byte of the weights is read for it, the first time."""
        return weights_fingerprint(self.files)

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)


def find(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find a model's files, in a folder or on the hub. Raises ModelUnreadable."""
    folder, commit = Path(model), None
    if not folder.is_dir():
        folder = download(str(model), revision)
        commit = folder.name
    refuse_irregular(folder)
    files = weight_files(folder)
    if not (folder / "config.json").exists():
        raise ModelUnreadable(f"{model} has no config.json: name the folder of a Hugging Face model or a hub id")
    config = read_config(folder)
    if not files:
        raise ModelUnreadable(
            f"{model} has no *.safetensors weights: save it again with save_pretrained (pickled weights are not read)"
        )
    if absent := [path.name for path in files if not path.exists()]:
        raise ModelUnreadable(f"{model} lacks {', '.join(absent)}, which its index names: fetch it again")
    shapes = [entry["shape"] for path in files for entry in read_header(path)[1].values()]
    refuse_implausible(config, folder, len(shapes), sum(map(prod, shapes)))
    return Source(
        str(model), folder, commit, tuple(files), config_fingerprint(folder, trust_remote_code), trust_remote_code
    )


def of_files(files: Sequence[Path], facts: ModelFacts) -> Source:
    """The model of checkpoint files that transformers loads; its code counts where it did for a plan's `facts`."""
    folder = files[0].parent
    plain = Source(facts.id, folder, None, tuple(files), config_fingerprint(folder))
    if plain.config_sha256 == facts.config_sha256 or "auto_map" not in plain.config:
        return plain
    trusted = replace(plain, config_sha256=config_fingerprint(folder, True), trust_remote_code=True)
    return trusted if trusted.config_sha256 == facts.config_sha256 else plain


def current_facts(facts: ModelFacts, source: Source) -> ModelFacts:
    """A plan's or profile's facts, with today's fingerprints where it was made by an older bitplan for this model."""
    now = {}
    if facts.weights_sha256 != source.weights_sha256 and facts.weights_sha256 == sampled_fingerprint(source.files):
        now["weights_sha256"] = source.weights_sha256
    if facts.config_sha256 == sha256(read_bytes(source.folder / "config.json", CONFIG_LIMIT, ModelUnreadable)):
        now["config_sha256"] = source.config_sha256
    return facts.model_copy(update=now)


def check_model(facts: ModelFacts, source: Source, what: str) -> ModelFacts:
    """The facts of a plan or profile (`what`), with today's fingerprints. Raises PlanMismatch for another model."""
    facts = current_facts(facts, source)
    weights, config = facts.weights_sha256 == source.weights_sha256, facts.config_sha256 == source.config_sha256
    if weights and config:
        return facts
    if weights:
        raise PlanMismatch(
            f"the {what} was made for {facts.id} with another config.json or other code of its repository: restore what"
            f" it was made with, or make a {what} for {source.model} as it is"
        )
    differs = "the weights differ" if config else "config and weights differ"
    raise PlanMismatch(
        f"the {what} was made for {facts.id} (fingerprint {facts.weights_sha256[:12]}), not for {source.model}"
        f" ({source.weights_sha256[:12]}): {differs}; make a {what} for it with"
        f" `bitplan {'plan' if what == 'plan' else 'audit'} {source.model}`"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: a repository may hold the weights once more for other tools."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.exists():
        return [whole]
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    content = read_json(index, error=ModelUnreadable)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ModelUnreadable(f"{index}: weight_map must name the file of each tensor: fetch it again")
    if outside := [shard for shard in places.values() if Path(shard).name != shard]:
        raise ModelUnreadable(f"{index}: weight_map names {outside[0][:200]!r}, which is no file of this folder")
    return sorted(folder / shard for shard in set(places.values()))


def refuse_irregular(folder: Path) -> None:
    """Raises ModelUnreadable where transformers would read a pipe or device of the folder, or a huge file as text."""
    for path in sorted(folder.iterdir()):
        try:
            facts = path.stat()
        except OSError:
            continue  # a link to nothing: where it is needed, its absence is said
        if not path.is_dir() and not stat.S_ISREG(facts.st_mode):
            raise ModelUnreadable(f"{path} is a pipe or device, and a model's files are regular ones")
        if facts.st_size > TEXT_LIMIT and path.suffix in (".json", ".txt", ".jinja", ".py"):
            raise ModelUnreadable(f"{path} has {format_bytes(facts.st_size)}, which no such file of a model has")


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
    except (BitplanError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # what a config's wrong field leads to, model code says in any type
        reason = first_line(error)
        raise ModelUnreadable(f"transformers cannot load {source.model} as a causal LM: {reason}") from error
    model, info = loaded
    if absent := sorted(info["missing_keys"]):  # transformers has filled them with random values
        raise ModelUnreadable(
            f"{source.model} lacks {len(absent)} tensors that {type(model).__name__} needs, {absent[0]} first: name a"
            f" whole checkpoint of a causal LM"
        )
    _report_left_behind(source, type(model).__name__, sorted(info["unexpected_keys"]))
    return model.eval().requires_grad_(False)


CODES = re.compile(r"[._](weight_scale_inv|weight_scale|scale_inv|input_scale|qweight|qzeros|absmax|quant_state\..*)$")
"""What lies beside quantized weights: without it they are codes, and not the weights."""
_REPORTED: set[str] = set()


def _report_left_behind(source: Source, name: str, unexpected: Sequence[str]) -> None:
    """One line, once a process, for the tensors of a checkpoint that the model does not take. Raises ModelUnreadable
    where weights without them mean something else."""
    if codes := [tensor for tensor in unexpected if CODES.search(tensor)]:
        raise ModelUnreadable(
            f"{source.model} holds {codes[0]}, so that its weights are codes that {name} takes for the weights"
            f" themselves: name the full-precision model it came from"
        )
    if unexpected and source.model not in _REPORTED:
        _REPORTED.add(source.model)
        more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
        left = f"left behind, for {name} does not take them: {', '.join(unexpected[:3])}{more}"
        print(printable(f"{source.model}: {left}"), file=sys.stderr)


def transformers_config(source: Source) -> PreTrainedConfig:
    """The config as transformers reads it, once it is plausible. Raises ModelUnreadable."""
    read_config(source.folder)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # a config's wrong field ends in any type
        raise ModelUnreadable(f"transformers cannot load {source.model} as a causal LM: {first_line(error)}") from error
    return config


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


def _lacks_packages(folder: Path) -> str | None:
    """What a folder's tokenizer.model needs that is not installed; transformers names another package for it."""
    path = folder / "tokenizer.model"
    if not path.is_file() or (folder / "tokenizer.json").exists():
        return None
    with open_regular(path, ModelUnreadable) as file:
        if file.read(1) != b"\n":  # SentencePiece's files are protobuf with a repeated field 1; tiktoken's are text
            return None
    there = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    lacking = [package for package, found in there.items() if not found]
    needed = f"its tokenizer.model needs {' and '.join(lacking)}: pip install {' '.join(lacking)}"
    return needed if lacking else None


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Raises ModelUnreadable where the folder has no tokenizer, or its config cannot be read, which transformers needs
    for that."""
    transformers_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
        found = tokenizer("a text to read", add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizers fail in as many types as there are tokenizers
        reason = _lacks_packages(source.folder) or first_line(error)
        raise ModelUnreadable(f"{source.model} has no tokenizer that transformers can load: {reason}") from error
    if set(found) <= set(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer files
        raise ModelUnreadable(f"{source.model} has no tokenizer: add its files to the folder")
    return tokenizer
