"""Every kernel against the dequantized layer, and which one is taken where."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bitplan.formats import base
from bitplan.formats.base import as_floats
from bitplan.formats.integers import Grid, IntegerFormat
from bitplan.formats.kernels import cpu as numba_kernel
from bitplan.formats.kernels import dispatch as kernels
from bitplan.formats.kernels.dispatch import Machine, choose, linear
from bitplan.formats.modules import pack_parameter
from bitplan.formats.table import FORMATS

pytest.importorskip("numba")
CPU, HOPPER, AMPERE = Machine("cpu"), Machine("cuda", (9, 0)), Machine("cuda", (8, 0))
GROUPED = [f"int{bits}-g64" for bits in (8, 7, 6, 5, 4, 3, 2)]
OTHERS = ["int8", "int4-row", "int4-g32", "int3-g128", "int4-g64-z16", "int1-g32-z16", "binary-g64"]
DOUBLE = ["int4-g32-s4", "int3-g32-s4", "int2-g32-s4"]
ALSO = [*DOUBLE, "ternary-g128", "ternary-g64", "ternary-g32", "fp8", "int8-bnb"]


def layer(name: str, rows: int = 96, columns: int = 192, dtype: torch.dtype = torch.float32):
    """A format, its tensors, and a batch's float64 product with the dequantized weight."""
    format, made = FORMATS[name], torch.Generator().manual_seed(1)
    tensors = format.quantize(torch.randn(rows, columns, generator=made))
    return format, tensors, format.dequantize(tensors, columns, torch.float64)


@pytest.mark.parametrize("batch", [1, 3, 6, numba_kernel.FEW + 1])
@pytest.mark.parametrize("name", GROUPED + OTHERS + ALSO)
def test_product(name, batch, monkeypatch):
    monkeypatch.setitem(base.TILE, "cpu", 64 * 192)  # two tiles, the last one shorter
    monkeypatch.setattr(numba_kernel, "ONE_THREAD", 0)
    format, tensors, whole = layer(name)
    assert choose(format, 192, torch.float32, CPU).name == "numba"
    x, bias = torch.randn(batch, 1, 192), torch.randn(96)
    found = linear(format, x, tensors, 192, bias)
    assert found.shape == (batch, 1, 96)
    assert_close(found.double(), x.double() @ whole.T + bias, rtol=1e-5, atol=1e-4)


def test_without_numba_one_line_says_that_it_is_slow(monkeypatch, capsys):
    format, tensors, whole = layer("int4-g64")
    caches = (choose, numba_kernel.say_slow)
    monkeypatch.setattr(numba_kernel, "find_spec", lambda name: None)
    for cached in caches:
        cached.cache_clear()
    x = torch.randn(3, 192)
    for _ in range(2):
        assert_close(linear(format, x, tensors, 192, None).double(), x.double() @ whole.T, rtol=1e-5, atol=1e-4)
    choose.cache_clear()
    assert capsys.readouterr().err.count("pip install 'bitplan[cpu]'") == 1


def dequantized(format, tensors, columns):
    """What a tile holds, its columns back in their order."""
    fields = numba_kernel._fields(format, columns)
    planes = numba_kernel._cpu_dequantized(*numba_kernel._stored(tensors), columns, *fields)
    order = numba_kernel.in_planes(torch.arange(1.0, columns + 1), numba_kernel._period(*fields[:2]))
    return planes[:, order.argsort()][:, -columns:]  # what is padded has place 0


@pytest.mark.parametrize("name", GROUPED + OTHERS + ALSO)
def test_dequantized_is_the_formats_own_to_the_bit(name):
    format, tensors, _ = layer(name)
    assert torch.equal(dequantized(format, tensors, 192), format.dequantize(tensors, 192, torch.float32))


def test_every_byte_of_fp8_is_torchs():
    numbers = [byte for byte in range(256) if byte & 127 != 127]
    codes = torch.tensor(numbers + numbers[:2], dtype=torch.uint8)
    tensors = {"": codes.view(1, -1).view(torch.int32), "_scale": torch.ones(1, 1).half().view(torch.int16)}
    own = codes.view(torch.float8_e4m3fn).float().view(1, -1)
    for found in (dequantized(FORMATS["fp8"], tensors, 256), FORMATS["fp8"].dequantize(tensors, 256, torch.float32)):
        assert torch.equal(found.view(torch.int32), own.view(torch.int32))  # signs of zeros too


@pytest.mark.parametrize("columns", [20, 172, 1280])
def test_every_trit_of_a_word_is_read(columns):
    format = FORMATS["ternary-g32"]
    codes = torch.randint(3, (64, columns), generator=torch.Generator().manual_seed(2))
    codes[0], codes[1] = 2, 0
    groups = format.groups(columns)
    tensors = format.store(codes, Grid(torch.rand(64, groups) + 1, torch.ones(64, groups)))
    assert torch.equal(dequantized(format, tensors, columns), format.dequantize(tensors, columns, torch.float32))


@pytest.mark.parametrize("name", ["int4-g128", "int8-g128", "int3-g128"])
def test_a_last_group_that_is_shorter(name):
    format, tensors, whole = layer(name)  # 192 columns: a group and a half
    for batch in (1, 20):
        x = torch.randn(batch, 192)
        assert_close(linear(format, x, tensors, 192, None).double(), x.double() @ whole.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4-g64", "int5-g64", "ternary-g64", "fp8"])
@pytest.mark.parametrize(("quick", "batch"), [(True, 1), (True, 8), (False, 16), (False, 40)])
def test_halves_are_multiplied_in_float32_and_rounded_once(name, dtype, quick, batch, monkeypatch):
    monkeypatch.setattr(numba_kernel, "QUICK_HALVES", {dtype} if quick else set())
    format, tensors, whole = layer(name)
    x, bias = torch.randn(batch, 192).to(dtype), torch.randn(96).to(dtype)
    found = linear(format, x, tensors, 192, bias)
    assert found.dtype == dtype
    # A sum that lies near the middle of two halves may be rounded to either: they are eps apart.
    expected = (x.double() @ whole.T + bias).to(dtype)
    assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4-g64", "int5-g64", "ternary-g64", "fp8"])
def test_many_halves_are_multiplied_with_weights_rounded_to_halves(name, dtype, monkeypatch):
    """As the dequantized layer in that type does, where torch is quick at it."""
    monkeypatch.setattr(numba_kernel, "QUICK_HALVES", {dtype})
    monkeypatch.setitem(base.TILE, "cpu", 64 * 192)
    format, tensors, whole = layer(name)
    x, bias = torch.randn(9, 192).to(dtype), torch.randn(96).to(dtype)
    found, weight = linear(format, x, tensors, 192, bias), format.dequantize(tensors, 192, dtype)
    eps = torch.finfo(dtype).eps
    assert torch.equal(weight, whole.to(dtype))
    assert_close(found, torch.nn.functional.linear(x, weight, bias), rtol=eps, atol=1e-4)
    assert_close(found, (x.double() @ weight.double().T + bias).to(dtype), rtol=eps, atol=1e-4)


@pytest.mark.parametrize("shape", [(192,), (0, 192), (2, 3, 192)])
def test_inputs_may_have_any_shape(shape):
    format, tensors, whole = layer("int3-g64")
    x = torch.randn(shape)
    found = linear(format, x, tensors, 192, None)
    assert_close(found.double(), x.double() @ whole.T, rtol=1e-5, atol=1e-4)


def test_threads_share_the_rows(monkeypatch):
    monkeypatch.setattr(numba_kernel, "ONE_THREAD", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)  # 96 rows do not divide
    format, tensors, whole = layer("int3-g64")
    x = torch.randn(2, 192)
    assert_close(linear(format, x, tensors, 192, None).double(), x.double() @ whole.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["int4-g64", "int8", "int4-g64-z16", "ternary-g64", "fp8", "int8-bnb"])
def test_ops_are_torchs(name):
    format, tensors, _ = layer(name)
    stored, fields = numba_kernel._stored(tensors), numba_kernel._fields(format, 192)
    torch.library.opcheck(numba_kernel._cpu_product, (torch.randn(2, 192), *stored, *fields))
    torch.library.opcheck(numba_kernel._cpu_dequantized, (*stored, 192, *fields))


class TestTiles:
    @pytest.mark.parametrize("name", ["ternary-g64", "fp8", "nf4", "int4-g64", "bf16"])
    def test_are_the_rows_of_the_whole(self, name):
        format, tensors, whole = layer(name)
        for start, stop in ((0, 32), (32, 96), (64, 77)):
            part = format.rows_of(tensors, start, stop, 192)
            assert torch.equal(format.dequantize(part, 192, torch.float64), whole[start:stop])

    @pytest.mark.parametrize("name", ["ternary-g64", "fp8", "int2-g64", "fp32"])
    def test_a_tile_at_a_time_is_the_same_product(self, name, monkeypatch):
        format, tensors, _ = layer(name)
        x, bias = torch.randn(3, 192), torch.randn(96)
        whole = format.linear(x, tensors, 192, bias)
        seen = []
        dequantize = type(format).dequantize
        monkeypatch.setattr(
            type(format), "dequantize", lambda *args: (seen.append(len(args[1][""])), dequantize(*args))[1]
        )
        monkeypatch.setitem(base.TILE, "cpu", 32 * 192)
        assert_close(format.linear(x, tensors, 192, bias), whole, rtol=1e-5, atol=1e-5)
        assert seen == [32, 32, 32]


def test_trained_scales_are_dequantized_and_get_their_gradients():
    format, tensors, _ = layer("int4-g64")
    scale = as_floats(tensors["_scale"], torch.float16).float().requires_grad_()
    linear(format, torch.randn(2, 192), tensors | {"_scale": scale}, 192, None).sum().backward()
    assert scale.grad is not None and scale.grad.abs().sum() > 0


class TestChoice:
    @pytest.mark.parametrize("name", list(FORMATS))
    @pytest.mark.parametrize("on", [CPU, AMPERE, HOPPER], ids=str)
    def test_every_format_has_a_kernel_and_a_reason(self, name, on):
        kernel = choose(FORMATS[name], 4096, torch.bfloat16, on)
        assert kernel.name and kernel.why

    def test_what_a_kernel_cannot_take_is_dequantized_and_says_why(self):
        assert choose(FORMATS["int4-g64"], 196, torch.float32, CPU) == kernels.Kernel(
            "dequantize", "196 columns do not fill whole runs of 8 codes"
        )
        assert choose(IntegerFormat("", 4, group=64), 192, torch.float32, CPU).name == "numba"

    def test_without_numba(self, monkeypatch):
        monkeypatch.setattr(numba_kernel, "find_spec", lambda name: None)
        choose.cache_clear()
        for name in ("int4-g64", "fp8", "ternary-g64", "int8-bnb"):
            format, tensors, whole = layer(name)
            kernel = choose(format, 192, torch.float32, CPU)
            assert kernel.name == "dequantize" and "pip install" in kernel.why
            x = torch.randn(3, 192)
            assert_close(linear(format, x, tensors, 192, None).double(), x.double() @ whole.T, rtol=1e-5, atol=1e-4)
        choose.cache_clear()

    @pytest.mark.parametrize("name", ["int4-g64", "ternary-g64"])
    @pytest.mark.parametrize("batch", [2, 40])
    def test_meta_tensors_go_the_way_of_the_machine_that_is_assumed(self, name, batch):
        format, tensors, _ = layer(name)
        absent = {suffix: tensor.to("meta") for suffix, tensor in tensors.items()}
        with kernels.as_if_on(CPU):
            out = linear(format, torch.empty(batch, 192, device="meta", dtype=torch.bfloat16), absent, 192, None)
        assert (out.shape, out.dtype, out.device.type) == ((batch, 96), torch.bfloat16, "meta")


def test_fp8_products_are_within_the_inputs_rounding():
    _, tensors, whole = layer("fp8")
    x = torch.randn(2, 20, 192)
    found = kernels._scaled_mm(x, tensors, torch.ones(96))
    expected = x.double() @ whole.T + 1
    assert found.shape == (2, 20, 96)
    # e4m3 has 3 bits of mantissa: half a step is 2^-4 of an input, and the errors of 192 inputs add as noise.
    assert float((found - expected).std() / expected.std()) < 2**-4


@pytest.mark.parametrize("name", ["int4-g64", "int8", "ternary-g64", "fp8", "nf4", "int8-bnb"])
def test_a_packed_layer_compiles_without_a_break(name):
    torch._dynamo.reset()
    layers = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).requires_grad_(False)
    for module in (layers[0], layers[2]):
        tensors = FORMATS[name].quantize(module.weight)
        pack_parameter(module, "weight", FORMATS[name])
        for suffix, tensor in tensors.items():
            module._parameters["weight" + suffix].data = tensor
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (1, 20):
            x = torch.randn(batch, 128)
            assert_close(compiled(x), layers(x))
