import re

import networkx as nx
import pytest
import torch

from bitplan.formats.errors import UsageError
from bitplan.sensitivity.graph import build_graph
from tests import tiny

LAYERS = (0, 1)


def expected_units(name: str) -> dict[str, str]:
    """Unit → kind, written out by hand."""
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    llama_like = {f"model.layers.{i}.{part}": "linear" for i in LAYERS for part in attention + mlp}
    tied = {"model.embed_tokens": "tied"}
    untied = {"model.embed_tokens": "embedding", "lm_head": "linear"}
    experts = {f"model.layers.{i}.mlp.experts.{p}": "experts" for i in LAYERS for p in ("gate_up_proj", "down_proj")}
    moe = untied | experts | {f"model.layers.{i}.{part}": "linear" for i in LAYERS for part in attention}
    shared = {f"model.layers.{i}.mlp.shared_expert.{p}_proj": "linear" for i in LAYERS for p in ("gate", "up", "down")}
    return {
        "llama": llama_like | untied,
        "llama-tied": llama_like | tied,
        "qwen3": llama_like | tied,
        "gemma": llama_like | tied,
        "gemma2": llama_like | tied,
        "gpt2": {"transformer.wte": "tied", "transformer.wpe": "embedding"}
        | {
            f"transformer.h.{i}.{p}": "conv1d"
            for i in LAYERS
            for p in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        },
        "opt": {"model.decoder.embed_tokens": "tied", "model.decoder.embed_positions": "embedding"}
        | {
            f"model.decoder.layers.{i}.self_attn.{p}": "linear"
            for i in LAYERS
            for p in ("q_proj", "k_proj", "v_proj", "out_proj")
        }
        | {f"model.decoder.layers.{i}.{p}": "linear" for i in LAYERS for p in ("fc1", "fc2")},
        "mixtral": moe,
        "qwen3-moe": moe,
        "qwen2-moe": moe | shared | {f"model.layers.{i}.mlp.shared_expert_gate": "linear" for i in LAYERS},
    }[name]


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "qwen3", "gemma", "gemma2", "gpt2", "opt", "mixtral", "qwen3-moe", "qwen2-moe"]
)
class TestArchitectures:
    def test_units(self, name):
        graph = build_graph(tiny.build(name))
        assert {unit.name: unit.kind for unit in graph.units} == expected_units(name)

    def test_every_parameter_is_counted_once(self, name):
        model = tiny.build(name)
        graph = build_graph(model)
        kept = sum(entry.nbytes for entry in graph.unquantized)
        buffers = sum(b.nbytes for n, b in model.named_buffers() if n in model.state_dict())
        units = sum(unit.weights * 4 for unit in graph.units)
        assert units + kept == sum(p.nbytes for p in model.parameters()) + buffers
        assert all(entry.reason for entry in graph.unquantized)

    def test_order_is_the_data_flows(self, name):
        units = build_graph(tiny.build(name)).units
        assert [unit.order for unit in units] == list(range(len(units)))
        assert units[0].kind in ("embedding", "tied")
        assert units[-1].kind != "embedding"
        layers = [int(found[1]) for unit in units if (found := re.search(r"\.(\d+)\.", unit.name))]
        assert layers == sorted(layers)


def groups(graph) -> set[frozenset[str]]:
    return {frozenset(c) for c in nx.connected_components(graph.ties) if len(c) > 1}


def test_siblings_that_servers_fuse_are_tied():
    found = groups(build_graph(tiny.build("llama")))
    layer = "model.layers.{}."
    attention = {frozenset(layer.format(i) + f"self_attn.{p}_proj" for p in "qkv") for i in LAYERS}
    mlp = {frozenset(layer.format(i) + f"mlp.{p}_proj" for p in ("gate", "up")) for i in LAYERS}
    assert found == attention | mlp


def test_a_shared_input_under_two_parents_ties_nothing_across():
    # In Phi, attention and mlp read the very same normalised input.
    found = groups(build_graph(tiny.build("phi")))
    assert found == {frozenset(f"model.layers.{i}.self_attn.{p}_proj" for p in "qkv") for i in LAYERS}


def test_experts_of_a_block_are_tied():
    found = groups(build_graph(tiny.build("mixtral")))
    block = {frozenset(f"model.layers.{i}.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")) for i in LAYERS}
    assert block < found


def test_order_inside_a_llama_layer():
    units = [unit.name for unit in build_graph(tiny.build("llama")).units if ".layers.0." in unit.name]
    parts = [name.rpartition(".")[2].removesuffix("_proj") for name in units]
    assert (
        set(parts[:3]) == set("qkv") and parts[3] == "o" and set(parts[4:6]) == {"gate", "up"} and parts[6:] == ["down"]
    )


def test_a_tied_pair_is_one_unit():
    unit = next(unit for unit in build_graph(tiny.build("gpt2")).units if unit.kind == "tied")
    assert (unit.name, unit.tied, unit.parameter) == ("transformer.wte", ("lm_head",), "transformer.wte.weight")


def test_conv1d_and_experts_have_outputs_first():
    units = {unit.name: unit for unit in build_graph(tiny.build("gpt2")).units}
    assert (units["transformer.h.0.mlp.c_fc"].rows, units["transformer.h.0.mlp.c_fc"].columns) == (256, 64)
    experts = {unit.name: unit for unit in build_graph(tiny.build("mixtral")).units}[
        "model.layers.0.mlp.experts.down_proj"
    ]
    assert (experts.experts, experts.rows, experts.columns) == (4, 64, 96)


def test_keep_moves_units_to_the_kept_and_must_match():
    graph = build_graph(tiny.build("llama"), keep=("*.layers.0.*", "lm_head"))
    assert not [unit.name for unit in graph.units if ".layers.0." in unit.name or unit.name == "lm_head"]
    assert sum(entry.reason == "unquantized on request" for entry in graph.unquantized) == 8
    with pytest.raises(UsageError, match=r"'nothing\.like' matches no unit"):
        build_graph(tiny.build("llama"), keep=("nothing.like",))


def test_what_no_text_runs_through_is_kept_and_said():
    model = tiny.build("llama")
    model.spare = torch.nn.Linear(4, 4)
    graph = build_graph(model)
    assert {k.name: k.reason for k in graph.unquantized}["spare.weight"].startswith("no text runs through it")


def test_a_weight_that_other_code_reads_is_kept_and_said():
    # As in Mamba, whose forward casts to the type of the head's weight before it calls the head.
    model = tiny.build("llama")
    head = model.lm_head
    model.model.norm.register_forward_hook(lambda m, args, out: out.to(head.weight.dtype))
    graph = build_graph(model)
    assert {k.name: k.reason for k in graph.unquantized}["lm_head.weight"].startswith("its weight is read outside")
    assert {unit.name for unit in graph.units} == set(expected_units("llama")) - {"lm_head"}


def test_experts_in_a_list_are_units_also_where_the_probe_misses_them(monkeypatch):
    tiny.listing_experts(monkeypatch)
    graph = build_graph(tiny.build("llama"))
    lists = [f"model.layers.{i}.mlp.experts." for i in LAYERS]
    parts = [f"{n}.{part}_proj" for n in range(8) for part in ("gate", "up", "down")]
    expected = {prefix + part for prefix in lists for part in parts}
    assert {unit.name for unit in graph.units if unit.routed} == expected
    assert {frozenset(prefix + part for part in parts) for prefix in lists} <= groups(graph)
    place = {unit.name: unit.order for unit in graph.units}
    for prefix in lists:
        assert all(place[f"{prefix}{n}.up_proj"] < place[f"{prefix}{n}.down_proj"] for n in range(8))
    assert all(leader.rpartition(".")[0] == name.rpartition(".")[0] for name, leader in graph.readers.items())
