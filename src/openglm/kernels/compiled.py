"""Layers compiled by torch.compile: what lies between the matrix products becomes a few loops over memory instead of many.

The twin is the layer itself (tests/test_compiled.py ``test_losses_and_gradients_of_any_shape_are_the_same``).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def why_not(device: str) -> str | None:
    """None if torch.compile works on a device, else the reason in one line: a function is compiled to find out."""

    def probe(x: Tensor) -> Tensor:
        return (x.sin() * x).sum()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            x = torch.ones(64, device=device, requires_grad=True)
            torch.compile(probe, dynamic=True)(x).backward()
    except Exception as error:  # no compiler, no headers, no Triton, an unknown processor: whatever it is
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return None


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile layers of one kind for training, in place; parameters and their names stay what they are.

    They share one compiled function for all shapes, so that what a step computes does not depend on the steps before it in
    this process. Without gradients, as in validation, they run as they were.
    """
    for layer in layers:
        # The method and not the module: hooks, such as those that gather sharded weights, stay outside.
        compiled = torch.compile(layer.forward, dynamic=True)
        layer.forward = functools.partial(_forward, layer.forward, compiled)


def _forward(plain: Callable[..., Any], compiled: Callable[..., Any], *arguments: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*arguments)
