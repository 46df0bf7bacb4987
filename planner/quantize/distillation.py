"""Distillation: codes stay fixed, scales and unquantized vectors are trained for least KL to the full-precision model.

As in EfficientQAT's second phase (Chen et al. 2024) and mlx-lm's distilled quantization: AdamW on the healing text,
which is longer than the calibration text: trained on the text that codes were fitted to, scales have little left to
learn. Every few steps the KL on the search text is evaluated, and the state with the least is kept, the start included;
after an evaluation without a gain, training returns to the best state with a smaller step size. The packed model itself
is trained; its weights are dequantized in each pass. State is saved at every evaluation, and an interrupted run
resumes.
May import: formats, sensitivity, planner.codes/hf/plan, planner.quantize.sequential.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitplan.formats.base import as_bits, as_floats
from bitplan.formats.errors import RoundingFailed
from bitplan.formats.modules import Packed
from bitplan.formats.table import format_named
from bitplan.planner.codes import codes_folder, missing_codes, unit_path, unquantized_path
from bitplan.planner.hf.quantizer import PlanConfig
from bitplan.planner.plan import Plan, PlannedUnit
from bitplan.planner.quantize.mixed import mixed_precision
from bitplan.planner.quantize.sequential import Sequence
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.forward import predictions
from bitplan.sensitivity.loss import Reference, log_probabilities
from bitplan.sensitivity.progress import progress
from bitplan.sensitivity.session import SEED, Session, load_reference
from bitplan.sensitivity.store import IN_MEMORY, load_tensors, locked, save_tensors
from bitplan.sensitivity.texts.text import HEALING, Blocks
from bitplan.sensitivity.vocabulary import vocabulary_size
from bitplan.sensitivity.weight_cache import for_file, mark_workspace

Aim = Callable[[int], Tensor]
"""Log-probabilities float32 [1, length - 1, vocabulary] by a text block's number."""
TOKENS = 2048
"""Of one step."""
STEPS = HEALING // TOKENS
LOGIT_BYTES = 512 << 20
"""The most that the logits of a step take at once."""
LOOK = 25
"""Steps between two looks at the search text."""
SCALE_RATE = 2e-3
"""AdamW's learning rate of scales and zeros, times their own mean size."""
VECTOR_RATE = 1e-3
"""That of other vectors, times their own mean size."""
CALMER = 0.3
"""What rates are multiplied by when a look finds no gain."""
CALMEST = 0.05
"""Rates times so little end the training."""


def round_missing(plan: Plan, session: Session) -> None:
    """Make the codes of the plan that the cache lacks, distilled where the plan says so. Raises RoundingFailed."""
    if not missing_codes(plan):
        return
    undistilled = plan.model_copy(update={"distilled": False})
    with locked(codes_folder(undistilled)):
        mark_workspace(codes_folder(plan).parents[1], plan.provenance.model.id)
        if missing_codes(undistilled):
            Sequence(undistilled, session).run()
        if plan.distilled and missing_codes(plan):
            heal(plan, undistilled, session)


def heal(plan: Plan, undistilled: Plan, session: Session) -> None:
    """Train, and write the healed codes of every unit to the cache. Raises RoundingFailed where the loss is NaN."""
    text, full_precision = session.texts.healing, _full_precision(session)
    search = _reference(session, full_precision)
    aim = full_precision(text.ids)
    student = sources.load_model(session.source, session.device, quantization_config=PlanConfig(undistilled))
    healing = Distillation(student, plan)
    healing.run(text, aim, search)
    healing.write()


def _full_precision(session: Session) -> Callable[[Tensor], Aim]:
    """Gives the log-probabilities of some text, which are computed each time that they are used: those of 32,768 tokens
    and a vocabulary of 150,000 take 20 GB. A model that can be cut is run once, but for what follows its blocks."""
    chain = session.chain()
    if not chain.why:
        return partial(predictions, chain)
    model = session.model if session.whole else load_reference(session.source, session.device)
    return lambda ids: torch.no_grad()(lambda block: log_probabilities(model, ids[block : block + 1]))


def _reference(session: Session, full_precision: Callable[[Tensor], Aim]) -> Reference:
    """Full precision on the search text, which is kept where it takes no more than IN_MEMORY bytes."""
    blocks = session.texts.search
    kept = 4 * blocks.ids.numel() * vocabulary_size(session.model) <= IN_MEMORY
    return Reference(None, blocks, full_precision(blocks.ids), kept)


def _drawn(blocks: int, batch: int, step: int) -> Tensor:
    """The text's blocks of a step, int64 [batch]: all blocks come once before any comes again."""
    batch = min(batch, blocks)
    rounds: dict[int, Tensor] = {}
    for i in range(step * batch, (step + 1) * batch):
        generator = torch.Generator().manual_seed(SEED + i // blocks)
        rounds.setdefault(i // blocks, torch.randperm(blocks, generator=generator))
    return torch.stack([rounds[i // blocks][i % blocks] for i in range(step * batch, (step + 1) * batch)])


class Distillation:
    """A packed model in float32 whose scales and vectors are parameters."""

    def __init__(self, model: PreTrainedModel, plan: Plan):
        self.model, self.plan, self.folder = model, plan, codes_folder(plan)
        torch.nn.Module.float(model)  # packed tensors are integers, and stay
        self.trained: dict[str, tuple[nn.Parameter, torch.dtype]] = {}
        """Name → a float32 parameter and the type that it is stored in."""
        groups = []
        for unit in plan.packed:
            for name in unit.holders:
                path, _, weight = name.rpartition(".")
                module = model.get_submodule(path)
                assert isinstance(module, Packed)
                module.slots[weight] = replace(module.slots[weight], dtype=torch.float32)
                for suffix, dtype in format_named(unit.format).floats.items():
                    if (first := unit.parameter + suffix) not in self.trained:
                        start = as_floats(module._parameters[weight + suffix], dtype).float()  # type: ignore[arg-type]
                        self.trained[first] = nn.Parameter(start.clone()), dtype
                        rate = SCALE_RATE * float(start.abs().mean())
                        groups.append({"params": [self.trained[first][0]], "rate": rate})
                    module._parameters[weight + suffix] = self.trained[first][0]
        parameters = dict(model.named_parameters())
        for entry in plan.unquantized:
            found = parameters.get(entry.name)
            if found is not None and found.ndim == 1 and found.is_floating_point():
                found.requires_grad_(True)
                self.trained[entry.name] = found, getattr(torch, entry.dtype)  # type: ignore[assignment]
                size = float(found.detach().abs().mean()) or 1.0
                groups.append({"params": [found], "rate": VECTOR_RATE * size})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, betas=(0.9, 0.95))
        if 4 * plan.provenance.model.parameters > IN_MEMORY and model.supports_gradient_checkpointing:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Run blocks again in the backward pass instead of keeping their weights. Only the blocks themselves are given
        that they train: their dropouts are not."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    def run(self, text: Blocks, aim: Aim, search: Reference) -> None:
        """Train on `text`, whose full-precision log-probabilities are `aim`'s; stop by `search`."""
        ids, device = text.ids, self.model.device
        batch = max(1, TOKENS // ids.shape[1])
        per_part = max(1, LOGIT_BYTES // (4 * ids.shape[1] * vocabulary_size(self.model)))
        done, least, calm, best = self._restore()
        if done < 0:
            least, done = self._look(search), 0
        bar = progress(total=STEPS, initial=done, desc="healing", unit="step")
        while done < STEPS and calm > CALMEST:
            rate = calm * min(1.0, (done % LOOK + 1) / 5)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            drawn = _drawn(len(ids), batch, done)
            self.optimizer.zero_grad()
            # In parts whose logits fit in memory: gradients add up.
            for part in drawn.split(per_part):
                loss = self._loss(ids[part].to(device), torch.cat([aim(i) for i in part.tolist()]))
                if not loss.isfinite():
                    raise RoundingFailed(f"healing: the loss is {loss.item()} at step {done}; plan without --heal")
                (loss * (len(part) / len(drawn))).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            done += 1
            bar.update()
            if done % LOOK == 0 or done == STEPS:
                kl = self._look(search)
                if kl < least:
                    least, best = kl, self._copy()
                else:
                    calm *= CALMER
                    self._put(best)
                    self.optimizer.state.clear()
                self._save(done, least, calm, best)
                bar.set_postfix(kl=f"{least:.5f}", refresh=False)
        bar.close()
        self._put(best)

    def _loss(self, ids: Tensor, aim: Tensor) -> Tensor:
        """Cross-entropy to probabilities whose logarithms are `aim` [blocks, length - 1, vocabulary], nats per token: a
        scalar with the KL's gradients."""
        with mixed_precision(ids.device):
            logits = self.model(input_ids=ids, use_cache=False).logits
        log_q = logits[:, :-1].float().log_softmax(-1)
        return -(aim.to(log_q.device).exp_() * log_q).sum(-1).mean()

    def write(self) -> None:
        """The best state as stored tensors: changed kept tensors first, then every unit's."""
        stored = {name: p.detach().to(dtype).cpu() for name, (p, dtype) in self.trained.items()}
        for entry in self.plan.unquantized:
            if entry.name in stored:
                save_tensors(unquantized_path(self.folder, entry.name), {"tensor": stored[entry.name]})
        for unit in self.plan.packed:
            save_tensors(unit_path(self.folder, unit.name), for_file(self._tensors(unit, stored)))
        self._state.unlink(missing_ok=True)

    def _tensors(self, unit: PlannedUnit, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        path, _, weight = unit.parameter.rpartition(".")
        module = self.model.get_submodule(path)
        assert isinstance(module, Packed)
        trained = {suffix: stored.get(unit.parameter + suffix) for suffix in module.tensors(weight)}
        return {
            suffix: tensor.cpu() if (value := trained[suffix]) is None else as_bits(value)
            for suffix, tensor in module.tensors(weight).items()
        }

    # State ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _look(self, search: Reference) -> float:
        """KL on the search text with every parameter as it would be stored."""
        exact = self._copy()
        self._put({name: value.to(self.trained[name][1]).float() for name, value in exact.items()})
        kl = search.evaluate(self.model).kl
        self._put(exact)
        return kl

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, (parameter, _) in self.trained.items()}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.trained[name][0].copy_(value)

    @property
    def _state(self) -> Path:
        return self.folder / "healing.safetensors"

    def _save(self, done: int, least: float, calm: float, best: dict[str, Tensor]) -> None:
        tensors = {"progress": torch.tensor([done, least, calm], dtype=torch.float64)}
        for name, (parameter, _) in self.trained.items():
            tensors |= {f"now:{name}": parameter.detach(), f"best:{name}": best[name]}
            tensors |= {f"{kind}:{name}": moment for kind, moment in self.optimizer.state.get(parameter, {}).items()}
        save_tensors(self._state, tensors)

    def _restore(self) -> tuple[int, float, float, dict[str, Tensor]]:
        """Steps done (-1: none), least KL, factor of the rates, best state: of an interrupted run, or of the start."""
        tensors = load_tensors(self._state, str(self.model.device))
        if tensors is None:
            return -1, float("inf"), 1.0, self._copy()
        for name, (parameter, _) in self.trained.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"now:{name}"])
            if f"step:{name}" in tensors:
                kinds = ("exp_avg", "exp_avg_sq")
                moments = {kind: tensors[f"{kind}:{name}"] for kind in kinds}
                self.optimizer.state[parameter] = {"step": tensors[f"step:{name}"].cpu(), **moments}
        done, least, calm = tensors["progress"].tolist()
        return int(done), least, calm, {name: tensors[f"best:{name}"] for name in self.trained}
