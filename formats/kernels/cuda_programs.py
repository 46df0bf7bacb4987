"""Triton programs that multiply packed codes: `vector_program` for a few rows of inputs, `tile_program` for more.

Both process a row of the weight in runs: 32 codes of b bits, which fill b words and share one group. The position of
code k in a run is known at compile time, so that unpacking takes one or two instructions, in registers.
formats.kernels.cuda imports this module when a weight is first multiplied, since triton may be missing.
May import: triton only.

Arguments of both: x [m, columns]; words int32 [rows, vectors * vector]; scales int16 (bits of fp16) [rows, groups],
for kind "double" [rows, 1]; zeros, by `kind`: "asymmetric" and "double" int32 [zero_words], one stream of groups'
codes; "float_zero" int16 like scales; "fixed" and "fp8" (e4m3 codes): not read; bias [rows] or None. `fixed` is the
zero point that is not stored, for "double" the lowest one; `runs` is the number of runs per group, `vector` the number
of words per load.
"""

import triton
import triton.language as tl

_COUNTS = ["count", "vectors", "groups", "zero_words"]  # not specialised: divisibility by 16 would not help


@triton.jit
def _split(tile):
    """[a, b, n] → n tensors [a, b], in order."""
    count: tl.constexpr = tile.shape[2]
    if count == 1:
        return (tl.reshape(tile, tile.shape[0], tile.shape[1]),)
    else:
        halves = tl.reshape(tile, tile.shape[0], tile.shape[1], 2, count // 2)
        low, high = tl.split(tl.permute(halves, 0, 1, 3, 2))
        return _split(low) + _split(high)


@triton.jit
def _load_words(words, row, run, vectors, bits: tl.constexpr, vector: tl.constexpr):
    """The `bits` words, uint32 [rows, runs] each, of runs `run` of rows `row`; undefined past a row's end, where inputs
    are 0 and every level is finite."""
    at = run * (bits // vector)
    words += (row[:, None] * vectors + at[None, :])[:, :, None] * vector + tl.arange(0, vector)[None, None, :]
    loaded = ()
    for part in tl.static_range(bits // vector):
        tile = tl.load(words + part * vector, mask=(at + part < vectors)[None, :, None])
        loaded = loaded + _split(tile.to(tl.uint32, bitcast=True))
    return loaded


@triton.jit
def _fp8(words, k: tl.constexpr):
    """The value / 256 of e4m3 code k of the runs with these words, in float32."""
    # The 4 exponent and 3 mantissa bits are moved to those of fp16, which leaves a factor 2^-8 (bias 7
    # instead of 15), for subnormals too. Two codes are moved at once: 0 and 2, or 1 and 3. GPUs before 8.9 have no
    # instruction that converts from e4m3.
    pair = words[k // 4] << 8 if k % 2 == 0 else words[k // 4]
    pair = (pair & 0x80008000) | ((pair & 0x7F007F00) >> 1)
    return (pair >> (k % 4 // 2 * 16)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _product(words, value, k: tl.constexpr, bits: tl.constexpr, kind: tl.constexpr):
    """Code k of the runs [rows, runs] times `value` [m, 1, runs] times 2^-85; for e4m3, the code's value / 256 times
    `value`."""
    index: tl.constexpr = k * bits // 32
    first: tl.constexpr = k * bits % 32
    if kind == "fp8":
        return _fp8(words, k)[None] * value
    else:
        # The word with everything but the code masked out *is* a float: the code times 2^(place - 149), a subnormal,
        # which GPUs multiply exactly and at full speed. Scaling the input, below 2^63, cancels the place. So a code
        # costs a mask and a multiply-add; one shift serves all codes of a word that overlap a float's exponent.
        place: tl.constexpr = 0 if first + bits > 32 else first - 9 if first + bits > 23 else first
        if first + bits > 32:
            moved = (words[index] >> first) | (words[index + 1] << (32 - first))
        elif first + bits > 23:
            moved = words[index] >> 9
        else:
            moved = words[index]
        code = (moved & (((1 << bits) - 1) << place)).to(tl.float32, bitcast=True)
        return code[None] * (value * 2.0 ** (64 - place))


@triton.jit
def _level(words, k: tl.constexpr, bits: tl.constexpr, kind: tl.constexpr):
    """Code k of the runs with these words, plus 2^bits, in float32; for e4m3, the code's value / 256."""
    index: tl.constexpr = k * bits // 32
    first: tl.constexpr = k * bits % 32
    if kind == "fp8":
        return _fp8(words, k)
    else:
        # The code is moved to the top of the mantissa of a float with exponent 2^bits. That avoids integer conversion,
        # which GPUs before 9.0 do at an eighth of the speed, and rounding. Bits beside the code are masked out.
        shift: tl.constexpr = first - (23 - bits)
        if shift < 0:
            moved = words[index] << -shift
        elif first + bits > 32:
            moved = (words[index] >> shift) | (words[index + 1] << (32 - shift))
        else:
            moved = words[index] >> shift
        number = (moved & (((1 << bits) - 1) << (23 - bits))) | ((127 + bits) << 23)
        return number.to(tl.float32, bitcast=True)


@triton.jit
def _values(words, scale, offset, k: tl.constexpr, step: tl.constexpr, bits: tl.constexpr, kind: tl.constexpr, dtype):
    """Codes k, k + step, … of the runs as level * scale + offset: the bits of `dtype` [rows, runs, 32 / step]."""
    if step == 32:
        value = (_level(words, k, bits, kind) * scale + offset).to(dtype)
        return value.to(tl.int32 if dtype == tl.float32 else tl.int16, bitcast=True)
    else:
        even = _values(words, scale, offset, k, 2 * step, bits, kind, dtype)
        odd = _values(words, scale, offset, k + step, 2 * step, bits, kind, dtype)
        return tl.reshape(tl.join(even, odd), scale.shape[0], scale.shape[1], 32 // step)


@triton.jit
def _as_float(halves):
    """int16 bits of fp16 values → float32."""
    return halves.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_scales(scales, row, group, inside, kind: tl.constexpr):
    """The bits of the scales of runs, int16 [rows, runs]; of rows [rows, 1] for kind "double"."""
    if kind == "double":
        return tl.load(scales + row)[:, None]
    else:
        return tl.load(scales + group, mask=inside, other=0)


@triton.jit
def _group_code(stream, group, base, stream_words, inside, bits: tl.constexpr):
    """Codes of `bits` bits of a stream, uint32 [rows, runs]; `group` counts from group `base`."""
    first = base * bits
    bit = group * bits + (first % 32).to(tl.int32)
    word = first // 32 + bit // 32
    code = tl.load(stream + word, mask=inside, other=0).to(tl.uint32, bitcast=True) >> (bit % 32)
    if 32 % bits != 0:  # codes straddle words
        more = tl.load(stream + word + 1, mask=inside & (word + 1 < stream_words), other=0)
        code |= (more.to(tl.uint32, bitcast=True) << 1) << (31 - bit % 32)
    return code & ((1 << bits) - 1)


@triton.jit
def _grid(
    scale, zeros, halves, group, base, zero_words, inside, bits: tl.constexpr, kind: tl.constexpr, fixed: tl.constexpr
):
    """The scales and zero points of runs: float32 [rows, runs] each, or a number. `group` counts from group `base`;
    `scale` is the groups' own, or for kind "double" their rows'; `halves` are the bits of fp16 zero points, used for
    kind "float_zero"."""
    if kind == "double":
        code = _group_code(zeros, group, base, zero_words, inside, 6)
        level = ((code & 15) + 1).to(tl.float32) * 0.0625
        return scale * level, (code >> 4).to(tl.float32) + fixed
    elif kind == "asymmetric":
        return scale, _group_code(zeros, group, base, zero_words, inside, bits).to(tl.float32)
    elif kind == "float_zero":
        return scale, _as_float(halves)
    else:
        return scale, fixed


@triton.jit(do_not_specialize=_COUNTS)
def vector_program(
    x,
    words,
    scales,
    zeros,
    bias,
    out,
    count,
    columns,
    rows,
    vectors,
    groups,
    zero_words,
    bits: tl.constexpr,
    kind: tl.constexpr,
    fixed: tl.constexpr,
    runs: tl.constexpr,
    vector: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    """out [count, rows] for count ≤ block_m. An instance has `block_n` rows; a thread processes one run of each at a
    time, holding the run's words and its 32 inputs, and threads communicate only in the last sum. Grid: blocks of
    rows."""
    first = tl.program_id(0).to(tl.int64) * block_n
    row = tl.minimum(tl.arange(0, block_n), (rows - 1 - first).to(tl.int32))
    m = tl.minimum(tl.arange(0, block_m), count - 1)
    words += first * (vectors * vector)
    chunk: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # inputs that a thread loads at once
    total = tl.full((block_m, block_n, block_r), 0, tl.float32)
    for start in range(0, columns, block_r * 32):
        # No vector loads across runs: one run per thread, matching the layout of its inputs.
        run = tl.max_contiguous(start // 32 + tl.arange(0, block_r), 1)
        inside = (run * 32 < columns)[None, :]
        group = row[:, None] * groups + run[None, :] // runs
        loaded = _load_words(words, row, run, vectors, bits, vector)
        scale = _as_float(_load_scales(scales + first * (1 if kind == "double" else groups), row, group, inside, kind))
        halves = tl.load(zeros + first * groups + group, mask=inside, other=0) if kind == "float_zero" else 0
        scale, zero = _grid(scale, zeros, halves, group, first * groups, zero_words, inside, bits, kind, fixed)
        # Σ (code - zero) x = Σ code x - zero Σ x: zero and scale are applied once per run instead of once per code.
        dots = tl.full((block_m, block_n, block_r), 0, tl.float32)
        sums = tl.full((block_m, 1, block_r), 0, tl.float32)
        k = run[:, None] * 32 + tl.arange(0, chunk)[None, :]
        pointers = x + m[:, None, None] * columns + k[None]
        for part in tl.static_range(32 // chunk):
            inputs = _split(tl.load(pointers + part * chunk, mask=(k + part * chunk < columns)[None], other=0))
            for i in tl.static_range(chunk):
                value = inputs[i].to(tl.float32)[:, None, :]
                sums += value
                dots += _product(loaded, value, part * chunk + i, bits, kind)
        total += scale[None] * (dots * (256.0 if kind == "fp8" else 2.0**85) - zero * sums)
    result = tl.sum(total, axis=2)
    n = first.to(tl.int32) + tl.arange(0, block_n)
    if bias is not None:
        result += tl.load(bias + n, mask=n < rows, other=0).to(tl.float32)[None, :]
    m = tl.arange(0, block_m)
    inside = (m < count)[:, None] & (n < rows)[None, :]
    tl.store(out + m[:, None] * rows + n[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_COUNTS, "part_runs"])
def tile_program(
    x,
    words,
    scales,
    zeros,
    bias,
    out,
    count,
    columns,
    rows,
    vectors,
    groups,
    zero_words,
    part_runs,
    bits: tl.constexpr,
    kind: tl.constexpr,
    fixed: tl.constexpr,
    runs: tl.constexpr,
    vector: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    """out [parts, count, rows]: partial products over `part_runs` runs each, a multiple of `block_r`; bias is added to
    part 0. A tile of the weight is dequantized to x's dtype in registers and multiplied. Grid: blocks of rows, blocks
    of x, parts."""
    first = tl.program_id(0).to(tl.int64) * block_n
    first_m = tl.program_id(1).to(tl.int64) * block_m
    part = tl.program_id(2)
    row = tl.minimum(tl.arange(0, block_n), (rows - 1 - first).to(tl.int32))
    m = tl.minimum(tl.arange(0, block_m), (count - 1 - first_m).to(tl.int32))
    words += first * (vectors * vector)
    scales += first * (1 if kind == "double" else groups)
    x += first_m * columns
    start = part * part_runs
    stop = tl.minimum(start + part_runs, (columns + 31) // 32)
    # Two-byte loads cannot be prefetched to shared memory, as Triton does with the others: scales and fp16 zero points
    # are loaded one step ahead into registers.
    run = start + tl.arange(0, block_r)
    group = row[:, None] * groups + run[None, :] // runs
    inside = (run * 32 < columns)[None, :]
    next_scale = _load_scales(scales, row, group, inside, kind)
    next_zero = tl.load(zeros + first * groups + group, mask=inside, other=0) if kind == "float_zero" else 0
    total = tl.full((block_m, block_n), 0, tl.float32)
    for begin in range(start, stop, block_r):
        run = begin + tl.arange(0, block_r)
        group = row[:, None] * groups + run[None, :] // runs
        inside = (run * 32 < columns)[None, :]
        k = begin * 32 + tl.arange(0, block_r * 32)
        inputs = tl.load(x + m[:, None] * columns + k[None, :], mask=(k < columns)[None, :], other=0)
        loaded = _load_words(words, row, run, vectors, bits, vector)
        scale = _as_float(next_scale)
        scale, zero = _grid(scale, zeros, next_zero, group, first * groups, zero_words, inside, bits, kind, fixed)
        ahead = row[:, None] * groups + (run + block_r)[None, :] // runs
        inside = ((run + block_r) * 32 < columns)[None, :]
        next_scale = _load_scales(scales, row, ahead, inside, kind)
        if kind == "float_zero":
            next_zero = tl.load(zeros + first * groups + ahead, mask=inside, other=0)
        if kind == "fp8":
            scale *= 256.0
            offset = zero * scale  # 0
        else:
            offset = -(zero + (1 << bits)) * scale
        # Kept as bits until here: Triton 3.6 fails on some layouts if a reshaped float tile goes to shared memory.
        values = _values(loaded, scale, offset, 0, 1, bits, kind, x.dtype.element_ty)
        weight = tl.reshape(values, block_n, block_r * 32).to(x.dtype.element_ty, bitcast=True)
        total = tl.dot(inputs, tl.trans(weight), total, input_precision="ieee")
    n = first.to(tl.int32) + tl.arange(0, block_n)
    if bias is not None:
        added = tl.load(bias + n, mask=n < rows, other=0).to(tl.float32)
        total += tl.where(part == 0, added, 0.0)[None, :]
    m = tl.arange(0, block_m)
    inside = (m < count - first_m)[:, None] & (n < rows)[None, :]
    out += (part * count + first_m) * rows
    tl.store(out + m[:, None] * rows + n[None, :], total.to(out.dtype.element_ty), mask=inside)
