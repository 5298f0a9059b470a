"""What lies between the products, in one kernel each: skip and norm, GeGLU, rotary positions and the write to the cache.

Each reads what a product left, ``[splits, rows, n]``: the parts of its sum, added up in their order (one part of float16 or
bfloat16 where torch multiplied). Arithmetic is float32 with one rounding at the end. Outputs that the next product reads have
their columns dealt out (``products.deal``).

Twins, and tests in tests/test_gpu_kernels.py: ``layer_norm(alpha * skip + branch)`` as a layer of ``models/glm130b.py`` has it
(``test_norms_are_the_twins``), its GeGLU (``test_geglu_is_the_twins``), its ``rotate``
(``test_rotary_positions_and_the_write_are_the_twins``).
"""

# Kernels are a language within the language, which type checkers do not know.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _added(parts, place, there, SPLITS: tl.constexpr, distance):
    """The parts of a sum, added up in float32; each lies ``distance`` behind the one before."""
    total = tl.load(parts + place, mask=there, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * distance + place, mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit
def _dealt(column, width, PLANES: tl.constexpr):
    """Where a column of a row lies once the columns are dealt out."""
    return (column % PLANES) * (width // PLANES) + column // PLANES


@triton.jit(do_not_specialize=["rows"])
def _normalize(
    skip,  # [rows, width]
    parts,  # [SPLITS, rows, width], not read if SPLITS = 0
    weight,
    bias,  # [width]
    out,  # [rows, width]
    dealt,  # [rows, PLANES, width / PLANES]
    rows,
    width,
    alpha,
    epsilon,
    SPLITS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < width
    x = tl.load(skip + row * width + column, mask=there, other=0.0).to(tl.float32)
    if SPLITS > 0:
        x = x * alpha + _added(parts, row * width + column, there, SPLITS, rows.to(tl.int64) * width)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(there, x - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
    normed = normed * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    normed = (normed + tl.load(bias + column, mask=there, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * width + column, normed, mask=there)
    if PLANES > 1:
        tl.store(dealt + row * width + _dealt(column, width, PLANES), normed, mask=there)


def normalize(
    skip: Tensor, parts: Tensor | None, alpha: float, norm: tuple[Tensor, Tensor, float], planes: int = 1
) -> tuple[Tensor, Tensor]:
    """``LayerNorm(alpha * skip + branch)``, ``[rows, h]``, and the same with columns dealt into planes.

    skip: ``[rows, h]``. parts: of the branch, ``[splits, rows, h]``; None = no branch, and skip as it is. norm: weight, bias
    and epsilon.
    """
    rows, width = skip.shape
    out = skip.new_empty(rows, width)
    dealt = skip.new_empty(rows, planes, width // planes) if planes > 1 else out.unsqueeze(1)
    block = triton.next_power_of_2(width)
    _normalize[(rows,)](
        skip, skip if parts is None else parts, norm[0], norm[1], out, dealt, rows, width, alpha, norm[2],
        SPLITS=0 if parts is None else len(parts), PLANES=planes, WIDTH=block, num_warps=min(max(block // 1024, 4), 16),
    )  # fmt: skip
    return out, dealt


@triton.jit(do_not_specialize=["rows"])
def _geglu(parts, out, rows, inner, SPLITS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < inner
    distance = rows.to(tl.int64) * 2 * inner
    linear = _added(parts, row * 2 * inner + column, there, SPLITS, distance)
    gate = _added(parts, row * 2 * inner + inner + column, there, SPLITS, distance)
    made = linear * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * inner + _dealt(column, inner, PLANES), made.to(out.dtype.element_ty), mask=there)


def geglu(parts: Tensor, like: Tensor, planes: int = 1) -> Tensor:
    """``u * gelu(v)`` with ``[u ; v]`` the sum of parts ``[splits, rows, 2 i]``; dealt out, of the type of ``like``."""
    splits, rows, both = parts.shape
    inner, block = both // 2, 1024
    out = like.new_empty(rows, planes, inner // planes)
    _geglu[rows, triton.cdiv(inner, block)](parts, out, rows, inner, SPLITS=splits, PLANES=planes, BLOCK=block)
    return out


@triton.jit(do_not_specialize=["rows"])
def _rotate(
    parts,  # [SPLITS, rows, heads, 3, 2, half]
    table,  # float32 [2, length, 2, half]: cosines and sines, the same in both halves
    positions,  # int64 [rows]
    columns,  # int32 [rows], below 0: nothing is written
    queries,  # [rows, heads, 2, half]
    keys,
    values,  # [heads, capacity, 2, half]
    rows,
    heads,
    half,
    length,
    capacity,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = pair < heads * half
    head, d = pair // half, pair % half
    distance = rows.to(tl.int64) * heads * 6 * half
    place = (row * heads + head) * 6 * half + d
    angle = tl.load(positions + row) * 2 * half + d
    cos = tl.load(table + angle, mask=there, other=0.0)
    sin = tl.load(table + length * 2 * half + angle, mask=there, other=0.0)
    first = _added(parts, place, there, SPLITS, distance)
    second = _added(parts, place + half, there, SPLITS, distance)
    own = queries + (row * heads + head) * 2 * half + d
    tl.store(own, (first * cos - second * sin).to(queries.dtype.element_ty), mask=there)
    tl.store(own + half, (second * cos + first * sin).to(queries.dtype.element_ty), mask=there)
    column = tl.load(columns + row)
    if column >= 0:
        cell = (head.to(tl.int64) * capacity + column) * 2 * half + d
        first = _added(parts, place + 2 * half, there, SPLITS, distance)
        second = _added(parts, place + 3 * half, there, SPLITS, distance)
        tl.store(keys + cell, (first * cos - second * sin).to(keys.dtype.element_ty), mask=there)
        tl.store(keys + cell + half, (second * cos + first * sin).to(keys.dtype.element_ty), mask=there)
        first = _added(parts, place + 4 * half, there, SPLITS, distance)
        second = _added(parts, place + 5 * half, there, SPLITS, distance)
        tl.store(values + cell, first.to(values.dtype.element_ty), mask=there)
        tl.store(values + cell + half, second.to(values.dtype.element_ty), mask=there)


def rotate(parts: Tensor, table: Tensor, positions: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Turn queries and keys by their positions; queries ``[rows, heads, d]`` come back, keys and values go into the cache.

    parts: of the fused projection, ``[splits, rows, heads * 3 * d]``, query, key and value of a head side by side. table:
    float32 ``[2, length, d]``, ``RotaryTable.table``. positions: int64 ``[rows]``, below length. columns: int32 ``[rows]``,
    where in the cache a row goes; one below 0 writes nothing. keys, values: of one layer, ``[heads, columns, d]``, contiguous;
    queries have their type.
    """
    splits, rows, _ = parts.shape
    heads, capacity, d = keys.shape
    queries, block = keys.new_empty(rows, heads, d), 256
    _rotate[rows, triton.cdiv(heads * d // 2, block)](
        parts, table, positions, columns, queries, keys, values, rows, heads, d // 2, table.shape[1], capacity,
        SPLITS=splits, BLOCK=block,
    )  # fmt: skip
    return queries
