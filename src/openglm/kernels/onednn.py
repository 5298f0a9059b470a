"""Matrix products in float32 on x86 CPUs, through oneDNN instead of torch's default BLAS.

Both ship with torch. The default (MKL) is tuned for Intel's processors; on an AMD EPYC oneDNN reads the same weights,
as they lie, 1.3 to 2.4 times faster at few rows and some 10 % faster at thousands (docs/lab-book.md has the tables).
torch itself takes this road only for half precision or in compiled graphs. The readable twin is
``torch.nn.functional.linear``, which also serves whatever this path does not: other dtypes and devices
(tests/test_onednn.py ``test_products_equal_their_twin``).
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def available() -> bool:
    """True if this machine is an x86 and torch was built with oneDNN and the operator used here."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x ``[..., k]``, weight ``[n, k]``, bias ``[n]``; returns ``[..., n]``, with gradients.

    Through oneDNN for float32 on a CPU, else ``torch.nn.functional.linear``.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        of_x = _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        # A sum over thousands of rows: MKL is as fast here.
        of_weight = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


class OneDNNLinear(nn.Linear):
    """A linear layer over the very parameters of another one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return linear(input, self.weight, self.bias)


def use_onednn(network: nn.Module) -> None:
    """Let all of a network's products take this road, in place; parameters and their names stay what they are.

    ``network``: one with a ``vocabulary_product``, as ``GLM130B`` has.
    """
    if not available():
        return
    if network.vocabulary_product is F.linear:
        network.vocabulary_product = linear  # pyright: ignore[reportArgumentType]
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, OneDNNLinear(child))
