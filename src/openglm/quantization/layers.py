"""Quantized layers, put into a plain network from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openglm.config import QuantizationScheme
from openglm.errors import ConfigError
from openglm.kernels.cpu.library import why_not
from openglm.kernels.cpu.panels import PANEL, PanelEmbedding, PanelLinear, PanelMatrix, panel_product
from openglm.quantization.functional import Quantized, linear, pack, quantize_matrix, unpack

#: The matrices of a layer that are quantized; embedding, norms and biases stay as they are (SPEC 6.1).
MATRICES = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

#: Codes that are packed for the kernels at once.
SLICE = 1 << 22


class QuantizedLinear(nn.Module):
    """A linear layer that holds codes instead of weights, and dequantizes them in every call: the twin of the kernels."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, weight: Quantized, scheme: QuantizationScheme, bias: Tensor | None) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = weight.codes.shape
        self.register_buffer("codes", pack(weight.codes) if scheme.bits == 4 else weight.codes)
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
        self.register_buffer("codes", pack(weight.codes) if scheme.bits == 4 else weight.codes)
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
    for name, module in _matrices(network):
        _put(network, name, QuantizedLinear(_empty(module.out_features, module.in_features, scheme), scheme, module.bias))
    if scheme.head is not None:
        vocabulary, hidden = network.word_embeddings.weight.shape
        _put_embedding(network, _empty(vocabulary, hidden, scheme.head), scheme.head)


def _empty(n: int, m: int, scheme: QuantizationScheme) -> Quantized:
    groups = (n, m // scheme.columns(m))
    zeros = torch.empty(groups, dtype=torch.int8) if scheme.zero_point else None
    return Quantized(torch.empty(n, m, dtype=torch.int8), torch.empty(groups, dtype=torch.float16), zeros)


def _put_embedding(network: Any, weight: Quantized, scheme: QuantizationScheme) -> None:
    network.word_embeddings = QuantizedEmbedding(weight, scheme, network.final_layernorm)
    network.vocabulary_product = linear


def _matrices(network: Any) -> list[tuple[str, nn.Linear]]:
    """Names and modules of the matrices that are quantized. Raises ``ConfigError`` if they are already."""
    found = []
    for number, layer in network.layers.items():
        for own in MATRICES:
            name, module = f"layers.{number}.{own}", layer.get_submodule(own)
            if not isinstance(module, nn.Linear):
                hint = "quantize the checkpoint that it was made from"
                raise ConfigError(f"`{name}` is quantized already", hint=hint, key=name)
            found.append((name, module))
    return found


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


@torch.no_grad()
def quantize(network: Any, scheme: QuantizationScheme, done: Callable[[LayerError], None] = lambda _: None) -> list[LayerError]:
    """Quantize a plain network's layers in place, matrix by matrix; ``done`` is told of each. Returns all errors.

    Whatever a matrix needs is freed before the next, so the peak lies about one matrix above the network. Raises
    ``ConfigError`` for a network that is quantized already, and, before anything is changed, for groups that do not fit.
    """
    found = _matrices(network)
    for _, module in found:
        scheme.columns(module.in_features)
    errors = []
    if scheme.head is not None:
        exact = network.word_embeddings.weight.detach()
        made = quantize_matrix(exact, scheme.head)
        _put_embedding(network, made, scheme.head)
        errors.append(_error("word_embeddings", exact, made, network.word_embeddings))
        done(errors[-1])
    for name, module in found:
        exact, made = module.weight.detach(), quantize_matrix(module.weight.detach(), scheme)
        _put(network, name, QuantizedLinear(made, scheme, module.bias))
        errors.append(_error(name, exact, made, network.get_submodule(name)))
        done(errors[-1])
    return errors


def _error(name: str, exact: Tensor, made: Quantized, module: nn.Module) -> LayerError:
    difference = (made.dequantize().float() - exact.float()).norm()
    size = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return LayerError(name, float(difference / exact.float().norm().clamp(min=1e-30)), size)


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
    for name, module in found:
        if isinstance(module, QuantizedEmbedding):
            network.word_embeddings = PanelEmbedding(_packed(module, None), module._like[0])
            network.vocabulary_product = panel_product
        else:
            _put(network, name, PanelLinear(_packed(module, module.bias, 2 if name.endswith("dense_h_to_4h") else 1)))
    return ""


def _packed(module: QuantizedLinear | QuantizedEmbedding, bias: Tensor | None, halves: int = 1) -> PanelMatrix:
    codes, scales, scheme = module.codes, module.scales, module.scheme
    rows = len(scales)
    columns = codes.shape[1] * (2 if scheme.bits == 4 else 1)
    packed = PanelMatrix(rows, columns, scheme.bits, scheme.group, bias, halves)
    own, slices = rows // halves, max(SLICE // columns // PANEL, 1) * PANEL
    for half in range(0, rows, own):
        for first in range(half, half + own, slices):
            part = slice(first, min(first + slices, half + own))
            packed.pack(first, unpack(codes[part]) if scheme.bits == 4 else codes[part], scales[part])
    return packed
