"""Run with .venv-vllm: a checkpoint folder in compressed-tensors' or GPTQ's layout, by vLLM's CPU build.

vLLM reads the settings, gives each module of its own model a scheme (q/k/v are one module there, and so are gate/up),
loads the weights and runs. On a CPU it multiplies codes of 4 bits only, in half precision: where a checkpoint has no
others, nothing is changed. Any other runs in float32, on the plain kernels below. What is read is read by vLLM.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, which has the kernels below, and whose model is seen
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import reading
import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear import FP8ScaledMMLinearKernel, register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A16Fp8,
    CompressedTensorsWNA16,
)
from vllm.platforms import PlatformEnum


def stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` numbers in each row of words, a little-endian bit stream."""
    every = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    numbers = every.flatten(1)[:, : count * bits].unflatten(1, (count, bits))
    return (numbers << torch.arange(bits, dtype=torch.int32)).sum(-1)


class Plain(MPLinearKernel):
    """Codes of any width, to floats as they are loaded."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        columns, rows = self.config.partition_weight_shape
        kind = self.config.weight_type
        words, scale, zero = self._get_weight_params(layer)
        words, scale = (words, scale) if words.input_dim else (words.T, scale.T)
        has_zero = self.config.zero_points
        middle = stream(zero.T, kind.size_bits, rows).T if has_zero else torch.full_like(scale, kind.bias)
        codes = stream(words, kind.size_bits, columns).view(*scale.shape, -1)
        layer.plain = ((codes - middle.unsqueeze(-1)) * scale.unsqueeze(-1)).view(rows, columns)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.plain, bias)


class PlainFloat8(FP8ScaledMMLinearKernel):
    """e4m3 with a scale per row; vLLM has the weight transposed."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c: object) -> tuple[bool, str | None]:
        return True, None

    def apply_scaled_mm(self, **_: object) -> torch.Tensor:
        raise NotImplementedError

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight.T.float() * layer.weight_scale, bias)


def is_own(folder: Path) -> bool:
    """Whether vLLM has a CPU kernel for all of a checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    groups = config.get("config_groups", {"": {"weights": {"num_bits": 8}}}).values()
    return all(group["weights"]["num_bits"] == 4 for group in groups)


def mend() -> None:
    """Plain kernels in place of vLLM's one. GPTQ's settings refuse 8 bits and float32 on a CPU: no longer."""
    os.environ["VLLM_DISABLED_KERNELS"] = "CPUWNA16LinearKernel"
    register_linear_kernel(Plain, PlatformEnum.CPU)
    kernels._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CPU].append(PlainFloat8)
    auto_gptq.verify_marlin_supported = lambda **_: None
    auto_gptq.AutoGPTQConfig.get_supported_act_dtypes = classmethod(lambda _: [torch.float32])


def word(module: LinearBase) -> str:
    method = module.quant_method
    if isinstance(method, UnquantizedLinearMethod):
        return "not quantized" if isinstance(module.quant_config, auto_gptq.AutoGPTQConfig) else "ignored"
    if isinstance(method, auto_gptq.AutoGPTQLinearMethod):
        return f"{method.quant_config.weight_bits} bits, group_size {method.quant_config.group_size}"
    scheme = module.scheme
    if isinstance(scheme, CompressedTensorsW8A16Fp8):
        return "float 8 bits, a scale per row"
    assert isinstance(scheme, CompressedTensorsWNA16), scheme
    group = f", group_size {scheme.group_size}" if scheme.group_size > 0 else ", a scale per row"
    return f"int {scheme.num_bits} bits{group}"


def words(model: torch.nn.Module) -> dict[str, str]:
    """Every module by its name in the checkpoint."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            parent, _, own = name.rpartition(".")
            for member in model.packed_modules_mapping.get(own, [own]):
                found[f"{parent}.{member}"] = word(module)
    return found


def logits(llm: LLM, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """[texts, tokens - 2, vocabulary]: one token is left for vLLM to say, and its logits are not among the prompt's."""
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    made = torch.empty(len(ids), ids.shape[1] - 2, vocabulary)
    for text, row in enumerate(ids[:, :-1].tolist()):
        [answer] = llm.generate([{"prompt_token_ids": row}], asked, use_tqdm=False)
        told = answer.prompt_logprobs
        spans = list(zip(told.start_indices, told.end_indices, strict=True))[1:]
        for position, (start, end) in enumerate(spans):
            made[text, position, told.token_ids[start:end]] = torch.tensor(told.logprobs[start:end])
    return made


def read(arguments: argparse.Namespace) -> reading.Found:
    own = is_own(Path(arguments.export))
    if not own:
        mend()
    llm = LLM(
        arguments.export,
        dtype="float16" if own else "float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    )
    [found] = llm.apply_model(words)
    ids = load_file(arguments.ids)["ids"]
    return reading.Found(found, logits=logits(llm, ids, llm.llm_engine.model_config.get_vocab_size()))


if __name__ == "__main__":
    reading.run("vllm-cpu", read)
