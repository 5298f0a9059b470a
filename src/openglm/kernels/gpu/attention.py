"""Attention of one new token a row over the cache, split over its columns.

Programs take stretches of ``COLUMNS`` columns each, so that one row occupies a whole GPU; a second kernel joins what they
found. The stretches depend on nothing but the columns, so a row's result does not depend on the batch. Twin:
``scaled_dot_product_attention`` over the columns that a row may see (tests/test_gpu_kernels.py
``test_attention_is_the_twins``).
"""

# Kernels are a language within the language, which type checkers do not know.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openglm.kernels.gpu.fused import _dealt

#: Columns of the cache that one program reads.
COLUMNS = 256
#: Below any score, and finite, so that a lane without columns makes no NaN.
LEAST = tl.constexpr(-1e30)


@triton.jit
def _attend(
    queries,  # [rows, heads, SIZE]
    keys,
    values,  # [heads, columns, SIZE]
    starts,
    lengths,
    sources,
    shared,  # int32 [rows]
    sums,  # float32 [rows, heads, splits, SIZE]
    marks,  # float32 [rows, heads, splits, 2]: the largest score, and the sum of the weights relative to it
    heads,
    columns,
    scale,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # SIZE or the next power of two
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (row * heads + head).to(tl.int64)
    own = tl.load(starts + row)
    length = tl.where(own < 0, 0, tl.load(lengths + row) + 1)  # with the new one
    source, common = tl.load(sources + row), tl.load(shared + row)
    d = tl.arange(0, WIDTH)
    query = tl.load(queries + place * SIZE + d, mask=d < SIZE, other=0.0).to(tl.float32) * scale
    # Every lane of BLOCK columns keeps a softmax of its own, so that threads meet only once, behind the loop.
    largest = tl.full([BLOCK], LEAST, tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in tl.range(split * COLUMNS, tl.minimum(length, (split + 1) * COLUMNS), BLOCK, num_stages=3):
        column = start + tl.arange(0, BLOCK)
        inside = column < length
        at = tl.where(column < common, source + column, own + column - common)
        cell = (head.to(tl.int64) * columns + at)[:, None] * SIZE + d[None, :]
        there = inside[:, None] & (d < SIZE)[None, :]
        key = tl.load(keys + cell, mask=there, other=0.0).to(tl.float32)
        value = tl.load(values + cell, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(inside, tl.sum(key * query[None, :], axis=1), float("-inf"))
        most = tl.maximum(largest, scores)
        share = tl.exp(scores - most)
        fade = tl.exp(largest - most)
        weight = weight * fade + share
        total = total * fade[:, None] + value * share[:, None]
        largest = most
    top = tl.max(largest, axis=0)
    fade = tl.exp(largest - top)
    place = place * tl.num_programs(2) + split
    tl.store(sums + place * SIZE + d, tl.sum(total * fade[:, None], axis=0), mask=d < SIZE)
    tl.store(marks + place * 2, top)
    tl.store(marks + place * 2 + 1, tl.sum(weight * fade, axis=0))


@triton.jit
def _join(
    sums,
    marks,
    out,
    heads,
    splits,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PLANES: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    place = (row * heads + head).to(tl.int64) * splits
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    largest = tl.load(marks + (place + split) * 2, mask=split < splits, other=float("-inf"))
    weight = tl.load(marks + (place + split) * 2 + 1, mask=split < splits, other=0.0)
    # Stretches behind the end of a row have nothing; a row that is not there has none at all, and comes out as 0.
    fade = tl.where(weight > 0, tl.exp(largest - tl.max(largest, axis=0)), 0.0)
    there = (split < splits)[:, None] & (d < SIZE)[None, :]
    parts = tl.load(sums + (place + split)[:, None] * SIZE + d[None, :], mask=there, other=0.0)
    total = tl.sum(weight * fade, axis=0)
    made = tl.sum(parts * fade[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    column = _dealt(head * SIZE + d, heads * SIZE, PLANES)
    tl.store(out + row.to(tl.int64) * heads * SIZE + column, made.to(out.dtype.element_ty), mask=d < SIZE)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    sources: Tensor,
    shared: Tensor,
    longest: int,
    planes: int = 1,
) -> Tensor:
    """Each row's query against its columns of the cache, ``[rows, planes, heads * d / planes]``: columns dealt into planes.

    queries: ``[rows, heads, d]``. keys, values: of one layer, ``[heads, columns, d]``, contiguous. starts, lengths, sources,
    shared: int32 ``[rows]``; row b sees lengths[b] + 1 columns, ``longest`` at most: the first shared[b] of them from column
    sources[b] on, the others from starts[b] on. A row with a start below 0 is not there: its result is 0.
    """
    rows, heads, d = queries.shape
    splits, width = triton.cdiv(longest, COLUMNS), triton.next_power_of_2(d)
    sums = queries.new_empty(rows, heads, splits, d, dtype=torch.float32)
    marks = queries.new_empty(rows, heads, splits, 2, dtype=torch.float32)
    _attend[rows, heads, splits](
        queries, keys, values, starts, lengths, sources, shared, sums, marks, heads, keys.shape[1], d**-0.5,
        SIZE=d, WIDTH=width, COLUMNS=COLUMNS, BLOCK=32,
    )  # fmt: skip
    out = queries.new_empty(rows, planes, heads * d // planes)
    _join[rows, heads](
        sums,
        marks,
        out,
        heads,
        splits,
        SIZE=d,
        WIDTH=width,
        SPLITS=triton.next_power_of_2(splits),
        PLANES=planes,
        num_warps=1,
    )
    return out
