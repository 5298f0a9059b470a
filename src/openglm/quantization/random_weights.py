"""Networks with random weights of a real shape, made quantized: for measuring speed and memory without a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from openglm.config import ModelConfig
from openglm.models.glm130b import GLM130B
from openglm.quantization.layers import place_quantized


def random_network(config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> GLM130B:
    """A network of any scheme (``config.quantization``, or none) whose weights are drawn where they are, in their own type.

    Nothing is larger on the way than one matrix of codes. Scales are such that activations keep their size.
    """
    with torch.device("meta"):
        network = GLM130B(config)
        if config.quantization is not None:
            place_quantized(network, config.quantization)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        parent, _, leaf = name.rpartition(".")
        module = network.get_submodule(parent)
        made = _draw(leaf, tensor, module, generator, dtype)
        setattr(module, leaf, nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made)
    return network.eval()


def _draw(leaf: str, tensor: Tensor, module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    device = generator.device
    if leaf == "codes":  # any byte is one code of 8 bits or two of 4
        return torch.randint(-127, 128, tensor.shape, dtype=torch.int8, device=device, generator=generator)
    if leaf == "scales":
        scheme = module.scheme
        width = tensor.shape[1] * scheme.columns(getattr(module, "in_features", None) or module.embedding_dim)  # pyright: ignore
        return torch.full(tensor.shape, 1 / (math.sqrt(width) * scheme.largest), dtype=torch.float16, device=device)  # pyright: ignore
    if leaf == "zeros":
        return torch.zeros(tensor.shape, dtype=torch.int8, device=device)
    made = torch.empty(tensor.shape, dtype=dtype, device=device)
    if leaf == "bias":
        return made.zero_()
    return made.fill_(1.0) if tensor.dim() == 1 else made.normal_(0, 1 / math.sqrt(tensor.shape[-1]), generator=generator)
