"""The network of GLM-130B at any size, in plain PyTorch (paper, section 2; SPEC 1 and 2).

What is unusual about it:

- **Post-norm residuals, DeepNorm style**: the skip connection carries the *normalised* value, weighted by
  alpha = sqrt(2 layers): ``h = alpha * LN(x) + f(LN(x))``.
- **Positions and the mask are data.** Part A (the text with its blanks) is seen by everybody, part B (the answers) is
  causal, and all tokens of a short answer may share the position of their blank. `infilling.py` lays this out; the
  network only looks positions up.
- **Rotary positions** on the whole head, by position id. Tables are exact float32, or rounded to float16 the way the
  released weights were trained (``rotary_dtype``).
- **GeGLU** whose *first* half is linear and whose second half goes through erf GELU.
- **Biases** on every linear layer; none on the embedding, which is also the head (tied).
- **Query, key and value of one head lie side by side** in the fused projection.
- **Embedding gradient shrink**: values unchanged, gradients into the tied matrix scaled, each side by its own factor.

The original divides queries by (layer number) and multiplies scores by it again, against float16 overflow only
(SPEC 2.4). It cancels exactly; the attention used here accumulates scores in float32 and needs no such guard.

Shapes: b batch, s sequence, t keys seen (cache included), A heads, d head size, h hidden, i inner, v vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openglm.config import ModelConfig


class KeyValueCache(Protocol):
    """What attention needs of a cache: store new keys and values, hand back all that may be seen."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[b, A, s, d]`` keys (rotated) and values of a layer; return all of its ``[b, A, t, d]``."""
        ...


class RotaryTable:
    """Cosines and sines by position id, grown on demand (SPEC 2.3).

    ``float32``: exact. ``float16``: inverse frequencies, angles, cosines and sines are each rounded to float16, as in
    the original; beyond an angle of 1,024 a step is then a whole radian, which the released weights have learned.
    """

    def __init__(self, head_size: int, dtype: str) -> None:
        self.head_size = head_size
        self.dtype = getattr(torch, dtype)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def table(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[2, at least length, d]``: cosines and sines in the dtype of the computation."""
        found = self._tables.get((device, dtype))
        if found is None or found.shape[1] < length:
            length = max(length, 2 * found.shape[1] if found is not None else 1024)
            theta = 10000.0 ** (-torch.arange(0, self.head_size, 2, dtype=torch.float32, device=device) / self.head_size)
            positions = torch.arange(length, dtype=torch.float32, device=device)
            # A product of two float16 numbers fits float32, so rounding once afterwards is float16 arithmetic.
            angle = torch.outer(positions, theta.to(self.dtype).float()).to(self.dtype).float()
            found = torch.stack([angle.cos(), angle.sin()]).to(self.dtype).to(dtype).repeat(1, 1, 2)
            self._tables[device, dtype] = found
        return found

    def lookup(self, positions: Tensor, dtype: torch.dtype, length: int) -> Tensor:
        """``[2, b, 1, s, d]``: cosine and sine for positions ``[b, s]`` below ``length``."""
        return self.table(length, positions.device, dtype)[:, positions].unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[k], x[k + d/2]) of ``[b, A, s, d]`` by the angle of its position."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class _ShrinkGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0] * ctx.factor, None


def shrink_gradient(x: Tensor, factor: float) -> Tensor:
    """``factor * x + (1 - factor) * stop_gradient(x)`` (SPEC 2.5), bit-equal to x; only the gradient is scaled."""
    return x if factor == 1.0 else _ShrinkGradient.apply(x, factor)  # pyright: ignore[reportReturnType]


class Attention(nn.Module):
    """Multi-head attention with one fused projection, rows ordered by head: query, key, value (SPEC 2.2, 2.4)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.dropout = 0.0  # of attention weights, in training
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        b, s, _ = x.shape
        # The number of heads is left to the shape: under tensor parallelism a rank holds only some of them.
        qkv = self.query_key_value(x).view(b, s, -1, 3 * self.head_size).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=-1)  # each [b, A, s, d]
        cos, sin = rotary
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(self.layer, key, value)  # [b, A, t, d]
        dropout = self.dropout if self.training else 0.0
        # Scale 1/sqrt(d), softmax in float32.
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.dense(out.transpose(1, 2).reshape(b, s, -1))


class GeGLU(nn.Module):
    """``4h_to_h(u * gelu(v))`` with ``[u ; v] = h_to_4h(x)``: first half linear, second half gated (SPEC 1.4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        linear, gate = self.dense_h_to_4h(x).chunk(2, dim=-1)  # each [b, s, i]
        return self.dense_4h_to_h(linear * F.gelu(gate))


class Layer(nn.Module):
    """One DeepNorm layer: norm, attention, norm, GeGLU, each skip weighted by alpha (SPEC 2.1)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.alpha = config.deepnorm_alpha
        self.dropout = 0.0  # of each branch, in training
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = GeGLU(config)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KeyValueCache | None = None) -> Tensor:
        normed = self.input_layernorm(x)
        branch = F.dropout(self.attention(normed, rotary, mask, cache), self.dropout, self.training)
        normed = self.post_attention_layernorm(torch.add(branch, normed, alpha=self.alpha))
        branch = F.dropout(self.mlp(normed), self.dropout, self.training)
        return torch.add(branch, normed, alpha=self.alpha)


class GLM130B(nn.Module):
    """Tokens, positions and a mask in; logits out. Parameter names are the released ones without `transformer.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        #: Attention heads that are here: under tensor parallelism some of the model's.
        self.heads = config.num_attention_heads
        self.rotary = RotaryTable(config.head_size, config.rotary_dtype)
        #: Gradient factors of the tied matrix: as input embedding, and as output head (SPEC 2.5, 9.1.1).
        self.input_gradient_factor = 1.0
        self.output_gradient_factor = 1.0
        #: How hidden states meet the tied matrix; an engine may put a faster product here.
        self.vocabulary_product: Callable[[Tensor, Tensor], Tensor] = F.linear
        # Given a weight, torch does not draw one, which on the meta device would import a compiler.
        embeddings = torch.empty(config.vocab_size, config.hidden_size)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, _weight=embeddings)
        # A dictionary, so that a part of the network keeps the global numbers in its names.
        self.layers = nn.ModuleDict({str(n): Layer(config, n) for n in range(config.num_layers)})
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits of every position, or of some rows only.

        tokens, positions: int64 ``[b, s]``. mask: bool ``[b, s, t]`` (or ``[b, 1, s, t]``), True = may attend; None = all
        may be seen. cache: keys and values of earlier tokens; t counts them. rows: int64 ``[n]``, indices into the
        flattened ``[b * s]``: only these get the final norm and the product with the vocabulary.

        Returns ``[b, s, v]``, or ``[n, v]`` with ``rows``, in the dtype of the weights.
        """
        x = self.hidden_states(tokens, positions, mask, cache=cache)
        return self.logits(x if rows is None else x.flatten(0, 1)[rows])

    def hidden_states(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, *, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Output of the last layer before the final norm, ``[b, s, h]``; arguments as in ``forward``."""
        return self.run_layers(self.embed(tokens), positions, mask, cache=cache)

    def embed(self, tokens: Tensor) -> Tensor:
        """Input vectors ``[b, s, h]`` of tokens ``[b, s]``."""
        return shrink_gradient(self.word_embeddings(tokens), self.input_gradient_factor)

    def run_layers(
        self, x: Tensor, positions: Tensor, mask: Tensor | None = None, *, cache: KeyValueCache | None = None
    ) -> Tensor:
        """All layers that are here, ``[b, s, h]`` to ``[b, s, h]``."""
        # A position counts tokens, so it lies below their number; asking the tensor would make a GPU wait.
        length = max(self.config.max_sequence_length, positions.shape[-1] if mask is None else mask.shape[-1])
        rotary = self.rotary.lookup(positions, x.dtype, length)
        if mask is not None and mask.dim() == 3:
            mask = mask.unsqueeze(1)  # over heads
        for layer in self.layers.values():
            x = layer(x, rotary, mask, cache)
        return x

    def set_dropout(self, hidden: float, attention: float) -> None:
        """Dropout of the layers' branches and of the attention weights while ``training`` (SPEC 9.1: 0.1 both)."""
        for layer in self.layers.values():
            assert isinstance(layer, Layer)
            layer.dropout, layer.attention.dropout = hidden, attention

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and tied head: ``[..., h]`` to ``[..., v]``."""
        matrix = shrink_gradient(self.word_embeddings.weight, self.output_gradient_factor)
        return self.vocabulary_product(self.final_layernorm(x), matrix)

    @torch.no_grad()
    def initialize(self, seed: int) -> GLM130B:
        """DeepNorm initialisation, in place: ``initial_values`` of every parameter."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_values(self.config, name, parameter.shape, seed))
        return self


def initial_values(config: ModelConfig, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """DeepNorm initialisation of one whole parameter, float32 (SPEC 9.1.1): a function of the seed and its name only.

    Biases 0, norms 1. Value, output and GeGLU matrices: Xavier normal with gain (2 layers)^(-1/2). Embedding, query and
    key: normal with standard deviation sqrt(1 / (3 hidden)).
    """
    h, i, d = config.hidden_size, config.inner_hidden_size, config.head_size
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "layernorm" in name:
        return torch.ones(shape)
    # Each matrix has a generator of its own, so that no number depends on what else was drawn.
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode())))
    plain = math.sqrt(1 / (3 * h))
    gain = 1 / math.sqrt(2 * config.num_layers)
    if "query_key_value" in name:
        by_head = draw.view(-1, 3, d, h)
        by_head[:, :2] *= plain
        by_head[:, 2] *= gain * math.sqrt(2 / (h + h))
    elif "attention.dense" in name:
        draw *= gain * math.sqrt(2 / (h + h))
    elif "mlp" in name:
        draw *= gain * math.sqrt(2 / (h + i))
    else:
        draw *= plain
    return draw
