"""Quantized layers, put into a plain network from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openglm.config import QUANTIZED_MATRICES, QuantizationScheme
from openglm.errors import ConfigError
from openglm.kernels.cpu.library import why_not
from openglm.kernels.cpu.panels import PANEL, PanelEmbedding, PanelLinear, PanelMatrix, panel_product
from openglm.quantization.functional import Quantized, linear, pack, quantize_matrix, unpack

#: Codes that are packed for the kernels at once.
SLICE = 1 << 22


def _stored(codes: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Codes as they are kept. Those without content are not computed with: on the meta device torch would import a compiler."""
    if scheme.bits == 8:
        return codes
    return codes.new_empty(codes.shape[0], codes.shape[1] // 2) if codes.is_meta else pack(codes)


class QuantizedLinear(nn.Module):
    """A linear layer that holds codes instead of weights, and dequantizes them in every call: the twin of the kernels."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, weight: Quantized, scheme: QuantizationScheme, bias: Tensor | None) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = weight.codes.shape
        self.register_buffer("codes", _stored(weight.codes, scheme))
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Quantized:
        """Codes and scales as ``functional`` has them."""
        return Quantized(unpack(self.codes) if self.scheme.bits == 4 else self.codes, self.scales, self.zeros)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself, with the scheme."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


class QuantizedEmbedding(nn.Module):
    """The tied matrix in codes: rows are dequantized as they are looked up, and all of them to meet hidden states.

    ``like``: a module whose weight has the network's type; rows come in that type.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, weight: Quantized, scheme: QuantizationScheme, like: Any) -> None:
        super().__init__()
        self.scheme = scheme
        self.num_embeddings, self.embedding_dim = weight.codes.shape
        self.register_buffer("codes", _stored(weight.codes, scheme))
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self._like = [like]  # in a list: it is no part of this module

    @property
    def weight(self) -> Quantized:
        """Codes and scales as ``functional`` has them."""
        return self._rows(slice(None))

    def _rows(self, rows: slice | Tensor) -> Quantized:
        codes, zeros = self.codes[rows], self.zeros
        return Quantized(
            unpack(codes) if self.scheme.bits == 4 else codes, self.scales[rows], None if zeros is None else zeros[rows]
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows ``[..., h]`` of tokens ``[...]``."""
        found = self._rows(tokens.flatten()).dequantize().to(self._like[0].weight.dtype)
        return found.view(*tokens.shape, -1)


def place_quantized(network: Any, scheme: QuantizationScheme) -> None:
    """Put quantized layers without content in the places of a plain network's; a checkpoint then fills them."""
    for name, module, own in _matrices(network, scheme):
        n, m = module.weight.shape
        groups = (n, m // own.columns(m))
        zeros = torch.empty(groups, dtype=torch.int8) if own.zero_point else None
        empty = Quantized(torch.empty(n, m, dtype=torch.int8), torch.empty(groups, dtype=torch.float16), zeros)
        _put_quantized(network, name, module, empty, own)


def _matrices(network: Any, scheme: QuantizationScheme) -> list[tuple[str, nn.Linear | nn.Embedding, QuantizationScheme]]:
    """Names, modules and schemes of the matrices to quantize. Raises ``ConfigError`` if they are already, or do not fit."""
    found = []
    names = [f"layers.{number}.{own}" for number in network.layers for own in QUANTIZED_MATRICES]
    for name in ["word_embeddings", *names]:
        own, module = scheme.for_matrix(name), network.get_submodule(name)
        if own is None:
            continue
        if not isinstance(module, nn.Linear | nn.Embedding):
            hint = "quantize the checkpoint that it was made from"
            raise ConfigError(f"`{name}` is quantized already", hint=hint, key=name)
        own.columns(module.weight.shape[1])
        found.append((name, module, own))
    return found


def _put_quantized(
    network: Any, name: str, module: nn.Linear | nn.Embedding, weight: Quantized, scheme: QuantizationScheme
) -> nn.Module:
    if isinstance(module, nn.Linear):
        made: nn.Module = QuantizedLinear(weight, scheme, module.bias)
    else:
        made = QuantizedEmbedding(weight, scheme, network.final_layernorm)
        network.vocabulary_product = linear
    _put(network, name, made)
    return made


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


@dataclass(frozen=True)
class LayerError:
    """What quantization did to one matrix."""

    name: str
    relative_error: float
    """Norm of the difference over the norm of the weights."""
    bytes: int
    """Of codes, scales and zeros."""
    output_error: float | None = None
    """Norm of the difference of its products with the calibration inputs over the norm of the products; None without GPTQ."""
    nearest_output_error: float | None = None
    """The same, had the weights been rounded to the nearest codes."""


@torch.no_grad()
def quantize(network: Any, scheme: QuantizationScheme, done: Callable[[LayerError], None] = lambda _: None) -> list[LayerError]:
    """Quantize a plain network's layers in place, matrix by matrix; ``done`` is told of each. Returns all errors.

    Whatever a matrix needs is freed before the next, so the peak lies about one matrix above the network. Raises
    ``ConfigError`` for a network that is quantized already, and, before anything is changed, for groups that do not fit.
    """
    errors = []
    for name, module, own in _matrices(network, scheme):
        exact = module.weight.detach()
        made = quantize_matrix(exact, own)
        put = _put_quantized(network, name, module, made, own)
        difference = (made.dequantize().float() - exact.float()).norm()
        size = sum(buffer.numel() * buffer.element_size() for buffer in put.buffers())
        errors.append(LayerError(name, float(difference / exact.float().norm().clamp(min=1e-30)), size))
        done(errors[-1])
    return errors


def use_panels(network: Any) -> str:
    """Let the quantized layers of a network on the CPU run in the compiled kernels, in place.

    Their codes are packed for the kernels, one matrix at a time, and given up. Returns why not, in one line, where that cannot
    be: the layers then stay what they are, with the same results. Empty: it is done, or there is nothing to do.
    """
    found = [
        (name, module) for name, module in network.named_modules() if isinstance(module, QuantizedLinear | QuantizedEmbedding)
    ]
    if not found or found[0][1].codes.device.type != "cpu":
        return ""
    if reason := why_not():
        return reason
    if any(module.zeros is not None for _, module in found):
        return "the CPU kernels know no zero points, so quantized layers run slowly"
    if any(_columns(module) % 32 for _, module in found if module.scales.shape[1] > 1):
        return "the CPU kernels need a multiple of 32 columns a scale, so quantized layers run slowly"
    found.reverse()
    while found:  # none is kept longer than it takes to pack it
        name, module = found.pop()
        if isinstance(module, QuantizedEmbedding):
            network.word_embeddings = PanelEmbedding(_packed(module, None), module._like[0])
            network.vocabulary_product = panel_product
        else:
            _put(network, name, PanelLinear(_packed(module, module.bias, 2 if name.endswith("dense_h_to_4h") else 1)))
    return ""


def _columns(module: QuantizedLinear | QuantizedEmbedding) -> int:
    """Columns that share a scale."""
    return module.codes.shape[1] * (2 if module.scheme.bits == 4 else 1) // module.scales.shape[1]


def _packed(module: QuantizedLinear | QuantizedEmbedding, bias: Tensor | None, halves: int = 1) -> PanelMatrix:
    codes, scales, scheme = module.codes, module.scales, module.scheme
    rows, columns = len(scales), codes.shape[1] * (2 if scheme.bits == 4 else 1)
    group = _columns(module) if scales.shape[1] > 1 else None
    packed = PanelMatrix(rows, columns, scheme.bits, group, bias, halves)
    fill_panels(packed, lambda part, first, end: getattr(module, part)[first:end])
    return packed


def fill_panels(matrix: PanelMatrix, rows: Callable[[str, int, int], Tensor]) -> None:
    """Pack a matrix for the kernels, a slice of its rows at a time.

    ``rows(part, first, end)``: rows of its "codes" int8 (two of 4 bits a byte) or "scales" float16, as a checkpoint has them.
    """
    own, slices = matrix.rows // matrix.structure.halves, max(SLICE // matrix.columns // PANEL, 1) * PANEL
    for half in range(0, matrix.rows, own):
        for first in range(half, half + own, slices):
            end = min(first + slices, half + own)
            codes = rows("codes", first, end)
            matrix.pack(first, unpack(codes) if matrix.bits == 4 else codes, rows("scales", first, end))
