"""Architectures of transformers: a sample in `make test`, all of them in `make test-all`."""

import pytest

from bitplan.formats.errors import BitplanError
from tests.zoo.tiny_configs import causal_types
from tests.zoo.walk import NotTiny, walk

SAMPLE = ("falcon_mamba", "gpt_bigcode", "hrm_text", "mvp", "olmoe")
"""A state space, one head of keys and values, weights that transformers splits from one tensor, an
embedding whose code asks its weight for its device, experts."""


def check(name, folder, known):
    try:
        walk(name, folder)
    except NotTiny as error:
        pytest.skip(str(error))
    except (BitplanError, RuntimeError, AttributeError, AssertionError):
        if name not in known:
            raise
        pytest.xfail(known[name])
    assert name not in known, "it works now: take it out of FAILING, and make docs/zoo.md again"


FAILING: dict[str, str] = {}
"""What does not work yet, and why."""


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name, tmp_path):
    check(name, tmp_path, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in causal_types() if name not in SAMPLE])
def test_all(name, tmp_path):
    check(name, tmp_path, FAILING)
