"""The layers of a network, quantized by GPTQ one after the other on the inputs that calibration samples bring them.

Every matrix sees what the matrices before it, quantized already, make of the samples: query_key_value, dense, dense_h_to_4h,
dense_4h_to_h, then the next layer. Memory holds the samples' hidden states, one layer in float32, and some five times the
square of the widest input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openglm.config import QUANTIZED_MATRICES, QuantizationScheme
from openglm.errors import ConfigError
from openglm.models.glm130b import GLM130B, Layer
from openglm.quantization.functional import quantize_matrix, stored_parts
from openglm.quantization.gptq import gptq_matrix, output_errors
from openglm.quantization.layers import LayerError


@dataclass(frozen=True)
class CalibrationSample:
    """One sequence as the network takes it: no longer than it allows, without padding."""

    tokens: Tensor
    """int64 ``[s]``."""
    positions: Tensor
    """int64 ``[s]``."""
    mask: Tensor
    """bool ``[s, s]``, True = may attend."""


class _Reached(Exception):
    """A pass has come to the matrix whose inputs are wanted; the rest of the layer is not needed."""


@torch.no_grad()
def quantize_layers(
    network: GLM130B, read: Callable[[str], Tensor], samples: Sequence[CalibrationSample], scheme: QuantizationScheme
) -> Iterator[tuple[LayerError, dict[str, Tensor]]]:
    """What was done to each matrix of the layers, in order, and what a checkpoint holds of it (``stored_parts``).

    ``network``: plain, on the meta device; it is used up. ``read``: one of its tensors by name, as ``ModelSource.tensor``.
    Raises ``ConfigError`` for weights that are not finite, or make hidden states that are not.
    """
    states = _embed(read, samples, scheme)
    for number in list(network.layers):
        layer = network.layers.pop(number)
        assert isinstance(layer, Layer)
        layer.load_state_dict({name: read(f"layers.{number}.{name}").float() for name in layer.state_dict()}, assign=True)

        def run(k: int, layer: Layer = layer) -> Tensor:
            sample = samples[k]
            rotary = network.rotary.lookup(sample.positions.unsqueeze(0), torch.float32, network.config.max_sequence_length)
            return layer(states[k], rotary, sample.mask)

        for matrix in QUANTIZED_MATRICES:
            name, module = f"layers.{number}.{matrix}", layer.get_submodule(matrix)
            own = scheme.for_matrix(name)
            assert own is not None and isinstance(module, nn.Linear)
            yield _quantize(name, module, _hessian(module, run, len(samples)), own)
        for k in range(len(samples)):
            states[k] = run(k)
        layer.to("meta")  # what it held is free before the next one is read


def _quantize(
    name: str, module: nn.Linear, hessian: Tensor, scheme: QuantizationScheme
) -> tuple[LayerError, dict[str, Tensor]]:
    """Quantize a matrix, and let the layer go on with what its codes stand for."""
    exact = module.weight
    try:
        made = gptq_matrix(exact, hessian, scheme)
    except ConfigError as error:
        raise ConfigError(f"`{name}`: {error.message}", hint=error.hint, key=name) from error
    rounded, parts = made.dequantize().float(), stored_parts(made, scheme)
    module.weight = nn.Parameter(rounded, requires_grad=False)
    difference = float((rounded - exact).norm() / exact.norm().clamp(min=1e-30))
    size = sum(part.nbytes for part in parts.values())
    return LayerError(name, difference, size, *output_errors(exact, made, hessian, scheme)), parts


def _embed(read: Callable[[str], Tensor], samples: Sequence[CalibrationSample], scheme: QuantizationScheme) -> list[Tensor]:
    """Input vectors, float32 ``[1, s, h]`` of each sample, as the quantized network will look them up."""
    ids, places = torch.cat([sample.tokens for sample in samples]).unique(return_inverse=True)
    rows, head = read("word_embeddings.weight")[ids], scheme.for_matrix("word_embeddings")
    if head is not None:
        rows = quantize_matrix(rows, head).dequantize()
    return [rows[part].float().unsqueeze(0) for part in places.split([len(sample.tokens) for sample in samples])]


def _hessian(module: nn.Linear, run: Callable[[int], Tensor], count: int) -> Tensor:
    """Sum of x xᵀ over the inputs x of a linear layer in ``count`` passes, float32 ``[m, m]``."""
    hessian = torch.zeros(module.in_features, module.in_features)

    def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, 1)  # [s, m]
        hessian.addmm_(x.t(), x)
        raise _Reached

    hook = module.register_forward_pre_hook(add)
    try:
        for k in range(count):
            try:
                run(k)
            except _Reached:
                continue
    finally:
        hook.remove()
    return hessian
