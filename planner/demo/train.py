"""Train the embedded model from scratch: `python -m bitplan.planner.demo.train --out planner/demo/model`.

A Llama of 3.9M parameters on the standard library's sources. Matrices are trained with Muon
(Jordan et al. 2024), embeddings and norms with AdamW; the learning rate warms up, stays, then falls
linearly to zero. May import: sensitivity.texts.stdlib, torch, transformers, tokenizers.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitplan.sensitivity.texts import stdlib

VOCABULARY = 2048
CONTEXT = 512
END = "<|endoftext|>"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONTEXT)


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one int64 vector, each ended by the end token."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents):
        ids += [*encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def loss_of(model: LlamaForCausalLM, blocks: torch.Tensor) -> torch.Tensor:
    """Mean nats per predicted token over blocks [n, length + 1]."""
    logits = model(blocks[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), blocks[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    count = (len(ids) - 1) // CONTEXT
    blocks = torch.stack([ids[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(count)])
    losses = [loss_of(model, part).item() * len(part) for part in blocks.split(16)]
    return sum(losses) / count


def write_texts(folder: Path) -> None:
    """The demo's own text, so that its figures do not depend on which Python runs it: part of the training modules, to
    calibrate and to choose with, and the beginnings of the held-out ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.txt").write_text(stdlib.calibration_text(260_000), encoding="utf-8")
    (folder / "heldout.txt").write_text(
        "\n".join(document[:6_500] for document in stdlib.held_out_documents()), encoding="utf-8"
    )


def train(out: Path, steps: int, batch: int, seed: int, device: str) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    documents = stdlib.training_documents()
    random.Random(seed).shuffle(documents)
    tokenizer = train_tokenizer(documents)
    ids = encode(tokenizer, documents)
    held_out = encode(tokenizer, ["\n".join(stdlib.held_out_documents())]).to(device)
    print(f"{len(documents)} modules, {len(ids):,} tokens; {len(held_out):,} held out", file=sys.stderr)

    model = new_model()
    model.to(torch.device(device))  # type: ignore[arg-type]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 50, max(0.0, (steps - step) / (0.5 * steps)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
    began, running = time.time(), 0.0
    for step in range(steps):
        starts = torch.randint(len(ids) - CONTEXT - 1, (batch,), generator=generator)
        blocks = torch.stack([ids[s : s + CONTEXT + 1] for s in starts.tolist()]).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, blocks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 49 or step == steps - 1:
            left = (time.time() - began) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps} loss {running:.4f}, {left / 60:.1f} min left", file=sys.stderr, flush=True)

    model = model.bfloat16().eval()
    final = held_out_loss(model, held_out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "modules": len(documents),
        "text_sha256": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        "tokens_in_text": len(ids),
        "tokens_seen": steps * batch * CONTEXT,
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "minutes": round((time.time() - began) / 60, 1),
        "final_training_loss": round(running, 4),
        "held_out_loss": round(final, 4),
        "held_out_perplexity": round(math.exp(final), 3),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 512 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.batch, arguments.seed, arguments.device)
    write_texts(arguments.out.parent / "text")
