"""One model of the zoo: plan → load → save → load again by plain transformers, and what stays unquantized."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from bitplan.planner.assemble import uniform_plan
from bitplan.planner.hf.checks import resident_bytes
from bitplan.planner.load import load_planned
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import open_session
from bitplan.sensitivity.texts.text import Blocks, Texts
from tests.zoo.tiny_configs import tiny_config

MOST = 3_000_000
"""Parameters of a model that counts as tiny."""
FORMAT = "int4-g32"
IDS = torch.arange(3, 67).view(4, 16)


class NotTiny(Exception):
    """No tiny model of this class is made by rule."""


@dataclass(frozen=True)
class Walked:
    name: str
    planned: float
    """The part of the model's weights that has codes."""
    reasons: tuple[str, ...]
    """Why others, of two dimensions or more, stay unquantized, the most bytes first."""


def build(name: str, folder: Path) -> None:
    """A seeded random model of a config type. Raises NotTiny."""
    try:
        config = tiny_config(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        size = sum(parameter.numel() for parameter in model.parameters())
        if size <= MOST:
            model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
            model(input_ids=IDS, use_cache=False)
    except Exception as error:  # each class refuses sizes in its own way
        raise NotTiny(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}") from error
    if size > MOST:
        raise NotTiny(f"{size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.05)
    model.eval().save_pretrained(folder)


def walk(name: str, folder: Path) -> Walked:
    """Raises AssertionError where bytes or logits differ, NotTiny, and what bitplan raises."""
    build(name, folder / "model")
    source = sources.find(folder / "model")
    blocks = Blocks(IDS)
    session = open_session(source, Texts(blocks, blocks, blocks, blocks, "numbers", 64), device="cpu")
    plan = uniform_plan(session, FORMAT, "nearest")
    model = load_planned(plan, source, "cpu")
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    model.save_pretrained(folder / "saved")
    stored = 0
    for path in (folder / "saved").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    again = AutoModelForCausalLM.from_pretrained(folder / "saved").eval()
    assert plan.bytes == resident_bytes(model) == resident_bytes(again) == stored, "bytes differ"
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS, use_cache=False).logits, expected), "logits differ"
    shutil.rmtree(folder / "saved")
    left: Counter[str] = Counter()
    for entry in plan.unquantized:
        if len(entry.shape) > 1:
            left[entry.reason] += entry.bytes
    weights = sum(unit.experts * unit.rows * unit.columns for unit in plan.packed)
    return Walked(name, weights / plan.provenance.model.parameters, tuple(reason for reason, _ in left.most_common(2)))
