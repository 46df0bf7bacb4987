"""Do rotated weights without groups lose less than groups at equal bytes? `make bench-rotation`, on SmolLM2-135M.

A copy of the model is rotated as QuaRot (Ashkboos et al. 2024) and SpinQuant (Liu et al. 2025) rotate offline: norms'
weights are folded into the linear layers that read them, the hidden states are turned by an orthogonal R1, and each
head's values by R2; the function stays the same. A tied head is untied for that, since only it takes the last norm's
weight: kept in bf16, as the embedding is here for both copies, it would cost another table. Rows of codes are compared
by what each copy loses to itself. May import: everything.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import scipy.linalg
import torch
from scipy.fft import dct
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.machine import described
from benchmarks.real_model import logits
from benchmarks.rounding import Case, _ends_kept
from bitplan.formats.errors import BitplanError
from bitplan.planner.assemble import uniform_plan
from bitplan.planner.evaluate.objective import Objective
from bitplan.planner.load import load_planned
from bitplan.planner.quantize.distillation import round_missing
from bitplan.planner.report.tables import table
from bitplan.sensitivity.chain import find_blocks
from bitplan.sensitivity.source import load_tokenizer

FORMATS = {4: ("int4-g128", "int4-row"), 3: ("int3-g128", "int3-row")}
TOLERANCE = 1e-3
"""How much a logit may change, in float32."""
SEED = 3


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Float64 [size, size]: a Hadamard matrix of the largest power of two that divides `size`, times a cosine transform
    of the rest (Kronecker), with random signs."""
    power = size & -size
    whole = torch.from_numpy(scipy.linalg.hadamard(power) / power**0.5).double()
    rest = torch.from_numpy(dct(torch.eye(size // power).double().numpy(), norm="ortho"))
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return torch.kron(whole, rest) * signs


@torch.no_grad()
def rotate(model: PreTrainedModel) -> None:
    """Turn a Llama's hidden states and values, in place; its head must be its own."""
    config, generator = model.config, torch.Generator().manual_seed(SEED)
    turn = orthogonal(config.hidden_size, generator)

    def fold(norm: torch.nn.Module, readers: list[torch.nn.Module]) -> None:
        for reader in readers:
            reader.weight.copy_((reader.weight.double() * norm.weight.double()) @ turn)
        norm.weight.fill_(1)

    embedding = model.get_input_embeddings()
    embedding.weight.copy_(embedding.weight.double() @ turn)
    for path in find_blocks(model):
        block = model.get_submodule(path)
        attention, mlp = block.self_attn, block.mlp
        fold(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
        fold(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
        heads, kept = config.num_attention_heads, config.num_key_value_heads
        own = [orthogonal(attention.head_dim, generator) for _ in range(kept)]
        values = attention.v_proj.weight.double().unflatten(0, (kept, -1))
        attention.v_proj.weight.copy_(torch.cat([r.T @ part for r, part in zip(own, values, strict=True)]))
        outputs = attention.o_proj.weight.double().unflatten(1, (heads, -1)).unbind(1)
        turned = [part @ own[head * kept // heads] for head, part in enumerate(outputs)]
        attention.o_proj.weight.copy_(turn.T @ torch.cat(turned, 1))
        mlp.down_proj.weight.copy_(turn.T @ mlp.down_proj.weight.double())
    fold(model.get_submodule(model.base_model_prefix).norm, [model.get_output_embeddings()])


def copies(model: str, folder: Path) -> dict[str, Path]:
    """The model with a head of its own, and a rotated copy, both float32. Raises BitplanError."""
    tokenizer, made = load_tokenizer(Case(model, "", "").source), {}
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = logits(plain)
    head = plain.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    plain.config.tie_word_embeddings = False
    for name in ("as it is", "rotated"):
        if name == "rotated":
            rotate(plain)
        made[name] = folder / name
        plain.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
        change = float((logits(AutoModelForCausalLM.from_pretrained(made[name])) - before).abs().max())
        if not change <= TOLERANCE:
            raise BitplanError(f"{name}: a logit changed by {change:.1e}, and {TOLERANCE} is the most it should")
        print(f"{name}: logits differ by {change:.1e} at most", file=sys.stderr)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs=3, metavar=("MODEL", "TEXT", "HELDOUT"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--bits", type=int, nargs="+", default=list(FORMATS), choices=list(FORMATS))
    arguments = parser.parse_args()
    model, text, heldout = arguments.model
    rows = []
    with tempfile.TemporaryDirectory() as name:
        made = copies(model, Path(name))
        for bits in arguments.bits:
            for copy, folder in made.items():
                case = Case(str(folder), text, heldout)
                session = _ends_kept(case, case.texts(arguments.tokens))
                for format in FORMATS[bits]:
                    began = time.perf_counter()
                    plan = uniform_plan(session, format, "gptq")
                    round_missing(plan, session)
                    found = Objective(session).heldout(load_planned(plan, session.source, "cpu"))
                    size = sum(unit.bytes for unit in plan.units if not unit.is_native)
                    rows.append((str(bits), format, copy, f"{size:,}", f"{found.kl:.4f} ± {found.kl_se or 0:.4f}"))
                    print(*rows[-1], f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(("bits", "format", "weights", "bytes of linear layers", "held-out KL"), rows, left=3))
    print(described("cpu"))


if __name__ == "__main__":
    main()
