"""The oneDNN products against ``torch.nn.functional.linear``, their readable twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from openglm.config import ModelConfig
from openglm.kernels import onednn
from openglm.models.glm130b import GLM130B

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="torch without oneDNN, or not an x86")


@needs_onednn
@pytest.mark.parametrize("seed", range(40))
def test_products_equal_their_twin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(largest: int) -> int:
        return int(torch.randint(1, largest + 1, (1,), generator=generator))

    n, k = number(300), number(300)
    x = torch.randn(*(number(9) for _ in range(seed % 3)), k, generator=generator)
    weight, bias = torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)
    layouts = [(x, weight)]
    if x.dim() == 2:
        layouts.append((x.t().contiguous().t(), weight))  # columns side by side
    wide = torch.randn(n, 2 * k, generator=generator)
    layouts.append((x, wide[:, :k]))  # part of a larger matrix
    for some, matrix in layouts:
        for offset in (bias, None):
            with torch.inference_mode():
                fast = onednn.linear(some, matrix, offset)
            exact = F.linear(some.double(), matrix.double(), None if offset is None else offset.double())
            assert fast.shape == exact.shape
            # The largest possible sum of the terms bounds what rounding may do.
            bound = F.linear(some.abs(), matrix.abs(), None if offset is None else offset.abs()).double()
            assert ((fast.double() - exact).abs() <= 1e-6 * bound + 1e-12).all()


@needs_onednn
def test_a_network_keeps_its_weights_and_its_logits() -> None:
    config = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, inner_hidden_size=96, vocab_size=80)
    network = GLM130B(config).initialize(3)
    tokens = torch.randint(0, 80, (3, 17), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(17).expand(3, 17)
    before = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    with torch.inference_mode():
        plain = network(tokens, positions)
    onednn.use_onednn(network)
    with torch.inference_mode():
        fast = network(tokens, positions)
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == before
    assert (fast - plain).abs().max() <= 1e-6 * plain.abs().max()
    assert type(network.layers["0"].mlp.dense_h_to_4h) is onednn.OneDNNLinear
    # Gradients, and other dtypes, which take the twin's road.
    network(tokens, positions).square().sum().backward()
    twin = GLM130B(config).initialize(3)
    twin(tokens, positions).square().sum().backward()
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert (one.grad - other.grad).abs().max() <= 2e-6 * other.grad.abs().max()
    with torch.inference_mode():
        assert network.double()(tokens, positions).dtype == torch.float64
