"""The arithmetic of quantized weights, readable: what every kernel computes, and is compared with (SPEC 6).

Weights only: a code of 8 or 4 bits for each, and a float16 scale for each row, or for each group of columns of a row.
Per row this is the original's arithmetic bit for bit, in float16 with one rounding an operation, but for rows whose scale is
denormal: there the original's codes overflow, and ours are clamped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from openglm.config import QuantizationScheme
from openglm.errors import ConfigError

#: Shares of the largest weight of a group that the clipping search tries as the end of the range.
CLIPS = tuple(1 - k / 40 for k in range(13))


@dataclass(frozen=True)
class Quantized:
    """A matrix ``[n, m]`` as codes and scales."""

    codes: Tensor
    """int8 ``[n, m]``, one code each; ``pack`` puts two of 4 bits into a byte."""
    scales: Tensor
    """float16 ``[n, g]``, g groups of m / g columns."""
    zeros: Tensor | None = None
    """int8 ``[n, g]``: the code of weight 0; None = 0."""

    def dequantize(self) -> Tensor:
        """The weights, float16 ``[n, m]``: code times scale, rounded once."""
        codes = _grouped(self.codes, self.scales.shape[1])
        if self.zeros is not None:
            codes = codes.to(torch.int16) - self.zeros.unsqueeze(-1)
        return (codes.half() * self.scales.unsqueeze(-1)).flatten(1)


def quantize_matrix(weight: Tensor, scheme: QuantizationScheme) -> Quantized:
    """Codes and scales of a weight ``[n, m]`` of any floating type; it is rounded to float16 first.

    Raises ``ConfigError`` if the groups do not divide the rows, or a weight is no finite float16.
    """
    groups = weight.shape[1] // scheme.columns(weight.shape[1])
    grouped = _grouped(weight.half(), groups)  # [n, g, columns]
    if not all(end.isfinite() for end in torch.aminmax(grouped)):  # NaN is passed on
        raise ConfigError("a weight is not finite, or too large for float16", key="weight")
    make = _asymmetric if scheme.zero_point else _symmetric
    best = make(grouped, 1.0, scheme)
    if scheme.clip:
        least = _squared_error(grouped, best)
        for clip in CLIPS[1:]:
            found = make(grouped, clip, scheme)
            error = _squared_error(grouped, found)
            better = error < least
            least = torch.where(better, error, least)
            best = _choose(better, found, best)
    return replace(best, codes=best.codes.flatten(1))


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.view(x.shape[0], groups, -1)


def _symmetric(grouped: Tensor, clip: float, scheme: QuantizationScheme) -> Quantized:
    """Codes ``[n, g, columns]`` around 0 (SPEC 6.2); ``clip`` 1: the range ends at the largest weight."""
    largest = grouped.abs().amax(-1, keepdim=True).float() * clip
    scales = (largest / scheme.largest).half()
    return Quantized(nearest_codes(grouped, scales, None, scheme), scales.squeeze(-1))


def _asymmetric(grouped: Tensor, clip: float, scheme: QuantizationScheme) -> Quantized:
    """Codes over the whole range of ``bits``, -128..127 or -8..7, from the smallest weight (or 0) to the largest (or 0)."""
    low, high = -scheme.largest - 1, scheme.largest
    least = grouped.amin(-1, keepdim=True).float().clamp(max=0) * clip
    most = grouped.amax(-1, keepdim=True).float().clamp(min=0) * clip
    scales = ((most - least) / (high - low)).half()
    steps = torch.where(scales == 0, 1, scales).float()
    zeros = (low - least / steps).round().clamp(low, high).to(torch.int8)
    return Quantized(nearest_codes(grouped, scales, zeros, scheme), scales.squeeze(-1), zeros.squeeze(-1))


def nearest_codes(weights: Tensor, scales: Tensor, zeros: Tensor | None, scheme: QuantizationScheme) -> Tensor:
    """The codes, int8, that come nearest to weights, which are rounded to float16 first; scales and zeros broadcast."""
    weights = weights.half()
    if zeros is None:
        codes = (weights / scales).round_()  # float16, ties to even
        # A scale of 0 divides into infinities; such a group is lost in the original as well, and is 0 here.
        return codes.masked_fill_(scales == 0, 0).clamp_(-scheme.largest, scheme.largest).to(torch.int8)
    steps = torch.where(scales == 0, 1, scales).float()
    return ((weights.float() / steps).round() + zeros).clamp(-scheme.largest - 1, scheme.largest).to(torch.int8)


def _squared_error(grouped: Tensor, found: Quantized) -> Tensor:
    """float32 ``[n, g]``."""
    made = replace(found, codes=found.codes.flatten(1)).dequantize()
    return (_grouped(made, grouped.shape[1]).float() - grouped.float()).square().sum(-1)


def _choose(better: Tensor, found: Quantized, best: Quantized) -> Quantized:
    zeros = None
    if found.zeros is not None and best.zeros is not None:
        zeros = torch.where(better, found.zeros, best.zeros)
    codes = torch.where(better.unsqueeze(-1), found.codes, best.codes)
    return Quantized(codes, torch.where(better, found.scales, best.scales), zeros)


def pack(codes: Tensor) -> Tensor:
    """Codes of 4 bits, int8 ``[n, m]``, m even, as bytes int8 ``[n, m / 2]``: even columns in the high half (SPEC 6.3)."""
    if codes.shape[-1] % 2:
        raise ConfigError(f"rows of {codes.shape[-1]} codes of 4 bits do not fill whole bytes", key="bits")
    return (codes[..., ::2] << 4) | (codes[..., 1::2] & 15)


def unpack(packed: Tensor) -> Tensor:
    """The codes, int8 ``[n, m]``, of bytes int8 ``[n, m / 2]``."""
    return torch.stack([packed >> 4, (packed << 4) >> 4], dim=-1).flatten(-2)


def stored_parts(weight: Quantized, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """What a checkpoint holds of a matrix: "codes" (two of 4 bits a byte), "scales", and "zeros" where there are any."""
    parts = {"codes": pack(weight.codes) if scheme.bits == 4 else weight.codes, "scales": weight.scales}
    return parts if weight.zeros is None else {**parts, "zeros": weight.zeros}


def linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` as the original does it (SPEC 6.4): x float16 ``[..., m]``, the weights dequantized to float16,
    products added up in float32 and rounded once, the bias added in float16. Other types of x compute in their own."""
    matrix = weight.dequantize()
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    product = F.linear(x.to(wide), matrix.to(wide)).to(x.dtype)
    return product if bias is None else product + bias
