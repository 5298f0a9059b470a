"""Matrix products in float32 on x86 CPUs, through oneDNN instead of torch's default BLAS.

Both ship with torch. The default (MKL) is tuned for Intel's processors; on an AMD EPYC oneDNN reads the same weights,
as they lie, 1.3 to 2.4 times faster (docs/lab-book.md has the table). torch itself takes this road only for half
precision or in compiled graphs. The readable twin is ``torch.nn.functional.linear``, which also serves whatever this
path does not: other dtypes and devices, gradients.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openglm.models.glm130b import GLM130B


def available() -> bool:
    """True if this machine is an x86 and torch was built with oneDNN and the operator used here."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x ``[..., k]``, weight ``[n, k]``, bias ``[n]``; returns ``[..., n]``.

    Through oneDNN for float32 on a CPU without gradients, else ``torch.nn.functional.linear``.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(nn.Linear):
    """A linear layer over the very parameters of another one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return linear(input, self.weight, self.bias)


def use_onednn(network: GLM130B) -> None:
    """Let all of a network's products take this road, in place; parameters and their names stay what they are."""
    if not available():
        return
    network.vocabulary_product = linear
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, OneDNNLinear(child))
