"""Products of a few rows with a matrix of 4, 8 or 16 bits, and dequantization in tiles for many rows.

The readable twin of both is ``quantization/functional.py``; weights stay packed as a checkpoint has them. Tests, in
tests/test_gpu_kernels.py: ``test_products_are_the_twins`` (with dequantization), ``test_products_of_plain_matrices``,
``test_the_assembly_makes_the_twins_codes``, ``test_a_row_does_not_depend_on_the_others``. What was weighed up:

- **Tensor cores, for one row too.** The rows of the batch are padded to 16, which costs nothing while memory is the limit, and
  makes the arithmetic of a row the same whatever stands beside it: same tiles, same order of the sum, no atomics.
- **Conversions.** An H200 delivers some 37 weights of 4 bits a cycle to each multiprocessor, which issues 128 lanes of
  instructions in it. Codes become float16 by bits: a mask and an exclusive or put ``code + 8`` under the exponent of 1024, one
  subtraction of 1032 leaves the code, exactly, two codes an instruction. Instructions a weight in the inner loop for sm_90
  (Triton 3.6, all included): 1.7 this way; 2.4 where bytes are the unit, as they need permutations; 3.4 where the same is said
  in plain Triton, whose compiler does not pair the codes. Leaving codes as denormal float16 would take 1.3, but the offset of 8
  must then be taken off through the sum of x. Integer products of 8 bits would need activations in two bytes.
- **Weights on the side of the columns of the product.** As rows they would go through Hopper's wgmma, for which Triton moves
  the converted weights about with many permutations: 3.4 instructions a weight.
- **Dealt columns.** A 16-bit unit of the weights holds 2 or 4 neighbours of a row. Taking the same neighbour out of every unit
  meets every second or fourth column of x, so x comes with its columns dealt out, ``[b, planes, units]``; the kernels that make
  x write it so.
"""

# Kernels are a language within the language, which type checkers do not know.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows of a batch that go through the product at once; fewer are padded.
BATCH = 16


def _assembly(bits: int, dtype: torch.dtype, shift: int) -> str:
    """PTX that makes two float16 or bfloat16 numbers of the codes at one place of two units: bits, then ``a * b + c``."""
    half = dtype == torch.float16
    kind, one = ("f16x2", 0x3C00) if half else ("bf16x2", 0x3F80)
    if bits == 8 and not half:  # they do not fit bfloat16's mantissa: (128 + 7 bits) - (128, or 256 where the sign is set)
        work = "lop3.b32 c, a, 0x00800080, 0xc300c300, 0xea; lop3.b32 a, a, 0x007f007f, 0x43004300, 0xea;"
    else:
        mask, offset = (0x0F, 8) if bits == 4 else (0xFF, 128)
        exponent, minus = (0x6400 + offset, 0xE400 + offset) if half else (0x4300 + offset, 0xC300 + offset)
        if half and bits == 4 and shift % 8 == 4:  # left where they are, 16 times as large: 1024 + 16 n, over 16, less 72
            shift, mask, exponent, one, minus = shift - 4, 0xF0, 0x6480, 0x2C00, 0xD480
        work = f"lop3.b32 a, a, {_twice(mask)}, {_twice(exponent)}, 0x6a; mov.b32 c, {_twice(minus)};"
    return f"{{ .reg .b32 a, b, c; shr.b32 a, $1, {shift}; mov.b32 b, {_twice(one)}; {work} fma.rn.{kind} $0, a, b, c; }}"


def _twice(number: int) -> str:
    return f"0x{number:04x}{number:04x}"


@triton.jit
def _codes(units, PLANE: tl.constexpr, BITS: tl.constexpr):
    """The codes of one neighbour in every unit, int16."""
    # The even column of a pair of 4 bits is in the high half of its byte.
    shift: tl.constexpr = 4 * (PLANE ^ 1) if BITS == 4 else 8 * PLANE
    return (units << (16 - BITS - shift)) >> (16 - BITS)


@triton.jit(do_not_specialize=["batch"])
def _product(
    x,  # [batch, PLANES, units]
    weight,  # [rows, units]
    scales,  # float16 [rows, groups]
    bias,  # [rows]
    out,  # float32 [splits, batch, rows]
    batch,
    rows,
    units,
    groups,
    length,  # units of one split, a multiple of UNITS
    BITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,  # units that share a scale, 0: all of a row
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    PLANES: tl.constexpr = 16 // BITS
    # Groups within one tile: mostly one, and two where neither length divides the other.
    PARTS: tl.constexpr = 1 if GROUP == 0 or GROUP % UNITS == 0 else (UNITS - 1) // GROUP + (1 if UNITS % GROUP == 0 else 2)
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    b = tl.arange(0, BATCH)
    unit = tl.arange(0, UNITS)
    own_weights = weight + row[None, :].to(tl.int64) * units + unit[:, None]
    own_x = x + b[:, None] * PLANES * units + unit[None, :]
    total = tl.zeros([BATCH, ROWS], dtype=tl.float32)
    for start in range(split * length, tl.minimum(units, (split + 1) * length), UNITS):
        there = start + unit < units
        tile = tl.load(own_weights + start, mask=there[:, None], other=0)
        for part in tl.static_range(PARTS):
            here = there & ((start + unit) // GROUP == start // GROUP + part) if PARTS > 1 else there
            sums = tl.zeros([BATCH, ROWS], dtype=tl.float32) if GROUP else total
            for plane in tl.static_range(PLANES):
                own = tl.load(own_x + plane * units + start, mask=(b < batch)[:, None] & here[None, :], other=0.0)
                if INTERPRETED:  # the interpreter knows no assembly, and multiplies no bfloat16
                    own, weights = own.to(tl.float32), (_codes(tile, plane, BITS) if BITS < 16 else tile).to(tl.float32)
                elif BITS < 16:
                    weights = tl.inline_asm_elementwise(
                        ASSEMBLY[plane], "=r,r", [tile], dtype=x.dtype.element_ty, is_pure=True, pack=2
                    )
                else:
                    weights = tile
                sums = tl.dot(own, weights, sums)
            if GROUP:
                group = tl.minimum(start // GROUP + part, groups - 1)  # behind the last group sums are 0
                total += sums * tl.load(scales + row * groups + group).to(tl.float32)[None, :]
            else:
                total = sums
    if BITS < 16 and GROUP == 0:
        total *= tl.load(scales + row).to(tl.float32)[None, :]
    if HAS_BIAS:  # noqa: SIM102 - known to the compiler, which the split is not
        if split == 0:  # once: the parts will be added up
            total += tl.load(bias + row).to(tl.float32)[None, :]
    place = out + (split * batch + b[:, None]) * rows + row[None, :]
    tl.store(place, total, mask=(b < batch)[:, None] & inside[None, :])


@triton.jit
def _dequantize(
    weight, scales, out, rows, units, groups, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    """Rows of weights ``[rows, units * PLANES]``: code times scale in float16, rounded once, then in the type of ``out``."""
    PLANES: tl.constexpr = 16 // BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    there = (row < rows)[:, None] & (unit < units)[None, :]
    tile = tl.load(weight + row[:, None].to(tl.int64) * units + unit[None, :], mask=there, other=0)
    group = unit // GROUP if GROUP else unit * 0
    scale = tl.load(scales + row[:, None] * groups + group[None, :], mask=there, other=0.0).to(tl.float32)
    if BITS == 4:
        even = tl.interleave(_scaled(tile, scale, 0, BITS), _scaled(tile, scale, 2, BITS))
        odd = tl.interleave(_scaled(tile, scale, 1, BITS), _scaled(tile, scale, 3, BITS))
    else:
        even, odd = _scaled(tile, scale, 0, BITS), _scaled(tile, scale, 1, BITS)
    column = tl.program_id(1) * UNITS * PLANES + tl.arange(0, UNITS * PLANES)
    there = (row < rows)[:, None] & (column < units * PLANES)[None, :]
    made = tl.interleave(even, odd).to(out.dtype.element_ty)
    tl.store(out + row[:, None].to(tl.int64) * units * PLANES + column[None, :], made, mask=there)


@triton.jit
def _scaled(units, scale, PLANE: tl.constexpr, BITS: tl.constexpr):
    return (_codes(units, PLANE, BITS).to(tl.float32) * scale).to(tl.float16)


#: True in Triton's interpreter.
INTERPRETED = not isinstance(_product, triton.JITFunction)


@dataclass(frozen=True)
class Tiling:
    """How a product is divided among programs; it depends on the matrix and the GPU, never on the batch."""

    rows: int
    units: int
    splits: int
    """Parts of the columns, whose sums are added up by whoever reads them."""
    warps: int = 4
    stages: int = 4


def gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; in the interpreter those of an H200, whose tiles are tested so."""
    if device.type != "cuda":
        return (9, 0), 132
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def tiling(rows: int, units: int, bits: int, group: int, device: torch.device) -> Tiling:
    """The tiles for a matrix of units of 16 bits; ``group``: units that share a scale, 0 = all of a row."""
    capability, processors = gpu(device)
    # Tiles in flight fill shared memory: 227 KB of it on a 9.0 or 10.0, 163 on an 8.0, 99 on most others.
    resident = {(9, 0): 3, (10, 0): 3}.get(capability, 2)
    roomy = capability in ((8, 0), (9, 0), (10, 0))
    height, width = 128, 64 if roomy else 32
    if roomy and bits == 4 and rows >= 256 * processors:
        height, width = 256, 32  # a higher tile reads x less often from shared memory, which is busiest with 4 bits
    if 0 < group < 16 or group % 16:
        width = 16 if group == 8 else width
    elif group:
        width = min(width, group & -group)  # the largest power of two that divides a group
    programs, tiles = processors * resident, -(-rows // height)

    def time(splits: int) -> float:
        """Against a GPU that is busy to the end: the last wave of programs may be short; two of them a multiprocessor read
        as fast as more; and each split is a sum more to be read, which costs less than 3 %."""
        waves = tiles * splits / programs
        busy = waves / -(-waves // 1) if waves > 1 else min(tiles * splits / (2 * processors), 1.0)
        return 1 / busy + 0.03 * splits

    allowed = [splits for splits in range(1, 9) if units >= splits * 8 * width] or [1]
    return Tiling(height, width, min(allowed, key=time), stages=6 if roomy and width * height < 8192 else 4)


@dataclass(frozen=True)
class Matrix:
    """Weights of a linear layer or a tied head, on their device as their layer holds them."""

    weight: Tensor
    """int16 units ``[n, m / planes]`` of 4 or 8 bits a code, or float16 or bfloat16 ``[n, m]``."""
    scales: Tensor | None
    """float16 ``[n, groups]``."""
    bias: Tensor | None
    """``[n]`` of a floating type."""
    bits: int

    @property
    def rows(self) -> int:
        """n."""
        return self.weight.shape[0]

    @property
    def planes(self) -> int:
        """Neighbours in one unit, 16 / bits: into so many planes the columns of x are dealt out."""
        return 16 // self.bits

    @property
    def columns(self) -> int:
        """m."""
        return self.weight.shape[1] * self.planes

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return 1 if self.scales is None else self.scales.shape[1]

    @property
    def group(self) -> int:
        """Units that share a scale; 0: all of a row."""
        return 0 if self.groups == 1 else self.weight.shape[1] // self.groups

    @property
    def tiling(self) -> Tiling:
        """How its products are divided."""
        return tiling(self.rows, self.weight.shape[1], self.bits, self.group, self.weight.device)

    @staticmethod
    def why_not(module: Any) -> str:
        """Why a linear layer or an embedding cannot be one, half a sentence; empty if it can."""
        codes = getattr(module, "codes", None)
        if codes is None:
            return "" if isinstance(getattr(module, "weight", None), Tensor) else "it has no weights"
        if module.zeros is not None:
            return "it has zero points"
        bits, groups = module.scheme.bits, module.scales.shape[1]
        columns = codes.shape[1] * 8 // bits
        if columns % (16 // bits * groups):
            return f"its groups of {columns // groups} weights fill no units of 16 bits"
        return ""

    @classmethod
    def of(cls, module: Any) -> Matrix:
        """The weights of an ``nn.Linear``, a ``QuantizedLinear`` or an embedding of either kind; nothing is copied."""
        bias = getattr(module, "bias", None)
        codes = getattr(module, "codes", None)
        if codes is None:
            return cls(module.weight.detach(), None, bias, 16)
        return cls(codes.view(torch.int16), module.scales, bias, module.scheme.bits)


def deal(x: Tensor, planes: int) -> Tensor:
    """x ``[b, m]`` with its columns dealt out like cards, ``[b, planes, m / planes]``: c goes to [c % planes, c // planes]."""
    return x.unflatten(-1, (-1, planes)).transpose(-1, -2).contiguous()


def partial_products(x: Tensor, matrix: Matrix, tiles: Tiling | None = None) -> Tensor:
    """``x @ matrix.T + bias`` in parts that add up to it: float32 ``[splits, b, n]`` of dealt x ``[b <= 16, planes, units]``.

    x is float16 or bfloat16, and has the type of a matrix of 16 bits. A row of the result does not depend on the others.
    """
    tiles = tiles or matrix.tiling
    b, units = len(x), matrix.weight.shape[1]
    assert b <= BATCH and x.shape[1:] == (matrix.planes, units) and x.is_contiguous()
    out = torch.empty(tiles.splits, b, matrix.rows, dtype=torch.float32, device=x.device)
    # Without tensor cores that Triton knows (below 8.0) rows that are not there would cost as much as those that are.
    batch = BATCH if gpu(x.device)[0] >= (8, 0) else triton.next_power_of_2(b)
    shifts = () if matrix.bits == 16 else (4, 0, 12, 8) if matrix.bits == 4 else (0, 8)
    assembly = tuple(_assembly(matrix.bits, x.dtype, shift) for shift in shifts)
    length = -(-units // (tiles.splits * tiles.units)) * tiles.units
    _product[triton.cdiv(matrix.rows, tiles.rows), tiles.splits](
        x,
        matrix.weight,
        matrix.weight if matrix.scales is None else matrix.scales,
        out if matrix.bias is None else matrix.bias,
        out,
        b,
        matrix.rows,
        units,
        matrix.groups,
        length,
        BITS=matrix.bits,
        ASSEMBLY=assembly,
        INTERPRETED=INTERPRETED,
        HAS_BIAS=matrix.bias is not None,
        GROUP=matrix.group,
        BATCH=batch,
        ROWS=tiles.rows,
        UNITS=tiles.units,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """``x @ matrix.T + bias``, float32 ``[b, n]`` of x ``[b <= 16, m]``."""
    return partial_products(deal(x, matrix.planes), matrix).sum(0)


def dequantize(matrix: Matrix, first: int, last: int, out: Tensor) -> Tensor:
    """Weights of some rows of a quantized matrix, ``[last - first, m]``, put into the memory of ``out``, in its type.

    As the twin has them: code times scale, rounded once to float16. out: float16 or bfloat16, of at least as many numbers.
    """
    assert matrix.scales is not None
    rows, units = last - first, matrix.weight.shape[1]
    made = out.view(-1)[: rows * matrix.columns].view(rows, matrix.columns)
    _dequantize[triton.cdiv(rows, 16), triton.cdiv(units, 128)](
        matrix.weight[first:last],
        matrix.scales[first:last],
        made,
        rows,
        units,
        matrix.groups,
        BITS=matrix.bits,
        GROUP=matrix.group,
        ROWS=16,
        UNITS=128,
    )
    return made


def linear(x: Tensor, matrix: Matrix, scratch: Tensor) -> Tensor:
    """``x @ matrix.T + bias`` for many rows, ``[b, n]`` in the type of x ``[b, m]``.

    A quantized matrix is dequantized in slices of its rows into ``scratch``, a buffer of the type of x that holds at least one
    row; torch multiplies.
    """
    if matrix.bits == 16:
        return torch.nn.functional.linear(x, matrix.weight, None if matrix.bias is None else matrix.bias.to(x.dtype))
    out = x.new_empty(len(x), matrix.rows)
    # Slices of like size, which torch's kernels multiply best in multiples of 256 rows.
    most = scratch.numel() // matrix.columns
    step = -(-matrix.rows // -(-matrix.rows // most))
    step = min(-(-step // 256) * 256, most)
    for first in range(0, matrix.rows, step):
        last = min(first + step, matrix.rows)
        weights = dequantize(matrix, first, last, scratch)
        if matrix.bias is None:
            torch.mm(x, weights.t(), out=out[:, first:last])
        else:
            torch.addmm(matrix.bias[first:last].to(x.dtype), x, weights.t(), out=out[:, first:last])
    return out
