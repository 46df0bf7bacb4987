"""The Triton programs against the dequantized product: on a GPU where there is one, else by Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch.nn.functional import linear as dense
from torch.testing import assert_close

from bitplan.formats.floats import Float8Format
from bitplan.formats.integers import IntegerFormat
from bitplan.formats.kernels import cuda as triton_kernel
from bitplan.formats.table import format_named

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MISSING = find_spec("triton") is None
runs = pytest.mark.skipif(MISSING, reason="triton is not installed")
if DEVICE == "cpu" and not MISSING:
    import triton.language as tl

    # Triton decides when functions are defined whether they are compiled or interpreted.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import bitplan.formats.kernels.cuda_programs  # noqa: F401


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """torch may have imported triton earlier, so that `tl.sum`, the one function used that is itself written in Triton,
    was defined to be compiled."""
    if DEVICE == "cpu" and not MISSING:
        monkeypatch.setattr(tl, "sum", lambda tile, axis: tl.reduce(tile, axis, tl.standard._sum_combine))


SHAPES = [(0, 200), (32, 200), (64, 96), (128, 320)]
CASES = [
    (bits, zero)
    for bits, zero in product(range(1, 9), ("asymmetric", "float_zero", "symmetric", "mid_rise"))
    if (bits, zero) != (1, "symmetric")  # its scales would be infinite
]
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(format, count, rows, columns, dtype=torch.float32, bias=True, x=None):
    """The kernel's product of `count` rows, or of x, is that of the dequantized weight in float64."""
    tensors = format.quantize(normal(rows, columns, seed=1) * 0.1)
    weight = format.dequantize(tensors, columns, torch.float32).double()
    x = normal(count, columns, seed=2).to(dtype) if x is None else x
    added = normal(rows, seed=3).to(dtype) if bias else None
    expected = dense(x.double(), weight, None if added is None else added.double()).to(dtype)
    stored = {suffix: tensor.to(DEVICE) for suffix, tensor in tensors.items()}
    found = triton_kernel.linear(format, x.to(DEVICE), stored, columns, None if added is None else added.to(DEVICE))
    assert_close(found.cpu(), expected, **TOLERANCE[dtype])


@runs
@pytest.mark.parametrize(("bits", "zero_point"), CASES)
def test_every_width_and_zero_point(bits, zero_point):
    for i, (group, columns) in enumerate(SHAPES):
        format = IntegerFormat("", bits, group=group, zero_point=zero_point)
        some = [(1, 17, 3, 16)[(i + bits) % 4]]
        for count in some if DEVICE == "cpu" else (1, 2, 3, 4, 5, 16, 17, 40, 70, 200):
            dtype = torch.float32 if count <= triton_kernel.FEW else torch.float16
            check(format, count, 3, columns, dtype, bias=bool(i % 2))


@runs
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["int4-g64", "int3-g32-z16", "int8", "fp8", "int3-g32-s4"])
def test_every_type_and_number_of_inputs(name, dtype):
    for count in (1, 3, 16, 17, 40):
        if DEVICE == "cuda" or dtype != torch.bfloat16 or count <= triton_kernel.FEW:  # interpreted, its dot is wrong
            check(format_named(name), count, 3 if count < 16 else 70, 134, dtype)


@runs
@pytest.mark.parametrize("name", ["int5-g32", "int4-g64-z16", "int2-g32-s4"])
def test_rows_longer_than_a_program(name):
    """Several steps of a loop; with more inputs, several parts, that are summed."""
    check(format_named(name), 1, 2, 4096 + 160)
    check(format_named(name), 6, 2, 2048 + 160, torch.float16)


@runs
def test_inputs_of_any_shape_and_layout():
    format = format_named("int4-g64")
    check(format, 0, 5, 96, x=normal(2, 3, 96))
    check(format, 0, 5, 96, x=normal(96))
    check(format, 0, 5, 96, x=normal(96, 3).T)
    check(format, 0, 5, 96, x=normal(6, 200)[::2, 7:103])
    check(format, 0, 5, 96, x=normal(0, 96))


@runs
@pytest.mark.parametrize("count", [4, 5])
def test_fp8_has_all_its_values(count, monkeypatch):
    """Every e4m3 code, subnormals too, at every place of a word; and scales near the ends of fp16."""
    monkeypatch.setattr(triton_kernel, "_vector_blocks", lambda *_: (4, 256, 32))
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes % 128 == 127] = 0  # not a number: never stored
    for scale in (1.0, 1e-6, 1000.0):
        tensors = {
            "": codes.view(256, 1).repeat(1, 4).view(torch.int32),
            "_scale": torch.full((256, 1), scale).half().view(torch.int16),
        }
        x = torch.eye(count, 4)
        expected = dense(x, format_named("fp8").dequantize(tensors, 4, torch.float32))
        stored = {suffix: tensor.to(DEVICE) for suffix, tensor in tensors.items()}
        found = triton_kernel.linear(format_named("fp8"), x.to(DEVICE), stored, 4, None)
        assert_close(found.cpu(), expected, rtol=1e-6, atol=0)


@runs
@pytest.mark.parametrize("size", [1e-10, 1e15])
def test_large_and_small_inputs_keep_their_precision(size):
    """Codes are multiplied as subnormals: nothing overflows or is flushed to zero on the way."""
    format = format_named("int6-g64")
    tensors = format.quantize(normal(3, 96))
    weight = format.dequantize(tensors, 96, torch.float32)
    x = normal(1, 96, seed=2) * size
    found = triton_kernel.linear(format, x.to(DEVICE), {s: t.to(DEVICE) for s, t in tensors.items()}, 96, None)
    assert_close(found.cpu() / size, dense(x / size, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int3-g64", "int8", "fp8"])
def test_meta_tensors_go_round_it(name):
    format = format_named(name)
    tensors = format.zeros(7, 200, "meta")
    x, bias = torch.empty(2, 3, 200, dtype=torch.bfloat16, device="meta"), torch.empty(7, device="meta")
    out = triton_kernel.linear(format, x, tensors, 200, bias)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 7), torch.bfloat16, "meta")


@runs
def test_op_is_as_torch_wants_it():
    format = format_named("int4-g64")
    tensors = {suffix: tensor.to(DEVICE) for suffix, tensor in format.quantize(normal(5, 96)).items()}
    x = normal(2, 3, 96).to(DEVICE)
    arguments = (x, tensors[""], tensors["_scale"], tensors["_zero"], None, 96, 4, 64, "asymmetric")
    torch.library.opcheck(triton_kernel._packed_linear, arguments, test_utils=("test_schema", "test_faketensor"))


@runs
def test_compilers_see_one_node():
    format = format_named("int4-g64")
    tensors = {suffix: tensor.to(DEVICE) for suffix, tensor in format.quantize(normal(5, 96)).items()}
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = normal(2, 3, 96).to(DEVICE)
    run = torch.compile(lambda x: triton_kernel.linear(format, x, tensors, 96, None), backend=backend, fullgraph=True)
    assert torch.equal(run(x), triton_kernel.linear(format, x, tensors, 96, None))
    assert seen == [torch.ops.bitplan.packed_linear.default]


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "why"),
    [
        ("int4-g64", torch.bfloat16, (9, 0), None),
        ("int3-row", torch.float16, (8, 0), None),
        ("binary-g64", torch.float32, (8, 6), None),
        ("fp8", torch.bfloat16, (8, 0), None),
        ("int4-g32-s4", torch.bfloat16, (8, 0), None),
        ("int4-g64", torch.bfloat16, (7, 5), "compute capability below 8.0"),
        ("int4-g64", torch.float64, (9, 0), "inputs are float64"),
        ("ternary-g64", torch.bfloat16, (9, 0), "its codes are not bit fields"),
        ("nf4", torch.bfloat16, (9, 0), "its codes are not bit fields"),
    ],
)
def test_what_it_cannot_take(name, dtype, capability, why, monkeypatch):
    monkeypatch.setattr(triton_kernel, "find_spec", lambda name: object())
    assert triton_kernel.unsupported(format_named(name), 4096, dtype, capability) == why
    monkeypatch.setattr(triton_kernel, "find_spec", lambda name: None)
    assert triton_kernel.unsupported(format_named(name), 4096, dtype, capability) == "triton is not installed"


COMPILE = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bitplan.formats.kernels import cuda_programs as triton_programs

def built(name, capability, bits, kind, warps, **blocks):
    program = getattr(triton_programs, name)
    zeros = "*i32" if kind in ("asymmetric", "double") else "*i16"
    types = dict(x="*bf16", words="*i32", scales="*i16", zeros=zeros, out="*bf16")
    fixed = dict(bits=bits, kind=kind, fixed=0.0, runs=1 if kind == "double" else 2, vector=4, bias=None, **blocks)
    names = program.arg_names
    source = ASTSource(
        program,
        {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in fixed.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "words", "out", "columns", "rows")},
    )
    options = dict(num_warps=warps, num_stages=3, enable_fp_fusion=True)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(made.asm["cubin"]) > 1000
    return made.asm["ptx"]

decode = built("vector_program", 80, 4, "asymmetric", 4, block_m=1, block_n=4, block_r=128)
assert len(re.findall(r"ld\\.global\\.v4\\.b32", decode)) == 4 + 4  # a run of each row, 32 inputs
assert "fma.rn.f32" in decode and ".ftz" not in decode  # subnormals are not flushed
assert "fma.rn.f32" in built("vector_program", 80, 4, "double", 4, block_m=1, block_n=4, block_r=128)
assert "mma.sync" in built("tile_program", 80, 4, "double", 4, block_m=16, block_n=64, block_r=4)
assert "wgmma" in built("tile_program", 90, 8, "fp8", 4, block_m=64, block_n=64, block_r=2)
assert "mma.sync" in built("tile_program", 80, 4, "float_zero", 4, block_m=16, block_n=64, block_r=2)
"""


@runs
def test_compiles_without_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4-g64", "int3-g64", "int8", "int2-g32", "fp8", "int4-g32-s4"])
@pytest.mark.parametrize("count", [1, 4, 16, 300])
def test_on_a_gpu_under_compile_and_in_a_graph(name, count):
    format: IntegerFormat | Float8Format = format_named(name)  # type: ignore[assignment]
    tensors = {s: t.cuda() for s, t in format.quantize(normal(2000, 2048) * 0.05).items()}
    weight = format.dequantize(tensors, 2048, torch.float32)
    x = normal(count, 2048, seed=1).cuda().bfloat16()

    def run(x):
        return triton_kernel.linear(format, x, tensors, 2048, None) + 1

    expected = (dense(x.float(), weight) + 1).bfloat16()
    assert_close(run(x), expected, rtol=2e-2, atol=5e-2)
    assert_close(torch.compile(run, fullgraph=True)(x), expected, rtol=2e-2, atol=5e-2)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        out = run(static)
    static.copy_(x)
    graph.replay()
    assert torch.equal(out, run(x))
