"""GPTQ: codes of a matrix that keep its products with known inputs, not its weights (Frantar et al. 2023, arXiv 2210.17323).

For a matrix W ``[n, m]`` and the inputs x that it meets, with the Hessian H = sum of x xᵀ ``[m, m]``, the squared error of
the products is the sum over rows d of W - Q of d H dᵀ. Columns are rounded from the first to the last, and what the
rounding of column j did wrong is made up for, as far as H allows, by the columns that are still to come:

    e = (w_j - q_j) / U_jj,    w_k -= e U_jk  for all k > j,    where H^-1 = Uᵀ U, U upper triangular

which is Optimal Brain Quantization in a fixed order: U_jj U_j is the first row of the inverse of H without its first j - 1
columns and rows (paper, equations 2 and 3; section 3.3, step 3). Scales are found as without data, those of a group when the
walk reaches it, so the result is stored and run as any quantized matrix.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from openglm.config import QuantizationScheme
from openglm.errors import ConfigError
from openglm.quantization.functional import Quantized, nearest_codes, quantize_matrix

#: Columns whose errors reach the columns behind them in one product (paper, section 3.3, step 2).
BLOCK = 128
#: Added to the diagonal of the Hessian, as a share of its mean (paper, section 3.3, step 3).
DAMPING = 0.01
#: Weights that are worked on at once: rows do not depend on each other.
SLICE = 1 << 24


def gptq_matrix(weight: Tensor, hessian: Tensor, scheme: QuantizationScheme) -> Quantized:
    """Codes and scales of a weight ``[n, m]`` of any floating type for inputs of a Hessian, float32 ``[m, m]``.

    An input that was always 0 says nothing about its column, which is rounded to nearest; with a diagonal Hessian all are, and
    the result is that of ``quantize_matrix``. Raises ``ConfigError`` as that does, and for a Hessian that is none.
    """
    scheme.columns(weight.shape[1])  # groups that do not fit are told before the long part
    factor = inverse_factor(hessian)
    parts = [_walk(rows, factor, scheme) for rows in weight.split(max(SLICE // weight.shape[1], 1))]
    zeros = torch.cat([part.zeros for part in parts if part.zeros is not None]) if scheme.zero_point else None
    return Quantized(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]), zeros)


def _walk(weight: Tensor, factor: Tensor, scheme: QuantizationScheme) -> Quantized:
    rest = weight.float().t().contiguous()  # [m, n], so that a column lies in one piece
    codes = torch.empty(rest.shape, dtype=torch.int8)
    columns, by_row = scheme.columns(len(rest)), replace(scheme, group=None, ranks=1)
    groups: list[Quantized] = []
    for first in range(0, len(rest), columns):
        last = first + columns
        groups.append(found := quantize_matrix(rest[first:last].t(), by_row))
        scales, zeros = found.scales.squeeze(1), None if found.zeros is None else found.zeros.squeeze(1)
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            errors = torch.empty_like(rest[start:stop])
            for j in range(start, stop):
                codes[j] = nearest_codes(rest[j], scales, zeros, scheme)
                made = replace(found, codes=codes[j].unsqueeze(1)).dequantize().squeeze(1)
                errors[j - start] = (rest[j] - made) / factor[j, j]
                rest[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
            rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    every = torch.cat([group.zeros for group in groups if group.zeros is not None], 1) if scheme.zero_point else None
    return Quantized(codes.t().contiguous(), torch.cat([group.scales for group in groups], 1), every)


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, float32 ``[m, m]``, upper triangular, with Uᵀ U the inverse of the damped Hessian.

    The inverse itself is never made: with the Hessian read from its end, H = R Rᵀ for an upper triangular R, and U = R^-1.
    In float32, or where rounding has spoiled that, in float64. Raises ``ConfigError`` for what is no Hessian.
    """
    for dtype in (torch.float32, torch.float64):
        damped = hessian.flip(0, 1).to(dtype)
        diagonal = damped.diagonal()
        dead = diagonal == 0
        diagonal += DAMPING * diagonal.mean()
        diagonal[dead] = 1
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(lower.diagonal().isfinite().all()):
            identity = torch.eye(len(lower), dtype=dtype)
            return torch.linalg.solve_triangular(lower, identity, upper=False, out=identity).flip(0, 1).float()
    raise ConfigError("the Hessian of a matrix's inputs is not finite, or not that of any inputs", key="hessian")


def output_errors(weight: Tensor, made: Quantized, hessian: Tensor, scheme: QuantizationScheme) -> tuple[float, float]:
    """Relative root mean square error of the products with the inputs of a Hessian: of ``made``, and of rounding to nearest."""
    exact = ours = nearest = 0.0
    start = 0
    for rows in weight.split(max(SLICE // weight.shape[1], 1)):
        part = slice(start, start := start + len(rows))
        own = replace(
            made, codes=made.codes[part], scales=made.scales[part], zeros=None if made.zeros is None else made.zeros[part]
        )
        exact += _squared_products(rows.float(), hessian)
        ours += _squared_products(rows.float() - own.dequantize().float(), hessian)
        nearest += _squared_products(rows.float() - quantize_matrix(rows, scheme).dequantize().float(), hessian)
    exact = max(exact, 1e-60)
    return (ours / exact) ** 0.5, (nearest / exact) ** 0.5


def _squared_products(rows: Tensor, hessian: Tensor) -> float:
    # In float32 a sum that is nearly 0 may come out below it.
    return max(float(((rows @ hessian) * rows).sum(dtype=torch.float64)), 0.0)
