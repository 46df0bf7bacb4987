import os
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # a worker a core: threads of several would wait for each other, in children too

import pytest
import torch
from hypothesis import settings

from bitplan.sensitivity import source as sources
from bitplan.sensitivity.session import Session, open_session
from bitplan.sensitivity.texts.read import read_texts
from bitplan.sensitivity.texts.text import Texts
from tests import tiny

torch.set_num_threads(1)
settings.register_profile("repo", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("repo")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache of the test run's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["BITPLAN_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """checkpoint(name, dtype) → the folder of a tiny model, made once."""
    made: dict[tuple, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tiny.saved(name, tmp_path_factory.mktemp(name), dtype)
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def session_of(checkpoint):
    """session_of(name, dtype) → an opened session on little text, which is the same for all: they share a tokenizer."""
    made: list[Texts] = []

    def get(name: str, dtype: torch.dtype = torch.float32) -> Session:
        source = sources.find(checkpoint(name, dtype))
        if not made:
            made.append(read_texts(source, tokens=1024, length=64))
        return open_session(source, replace(made[0]), device="cpu")

    return get


LONGEST = ("test_readme.py", "test_cli.py", "test_sequence.py", "test_pretrained.py", "test_kernels.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
