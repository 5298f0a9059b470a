"""Names and shapes of a model's tensors, and the precisions they are stored in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from openglm.config import ModelConfig, QuantizationScheme
from openglm.errors import InputError

#: The released names begin with it; ours do not.
PREFIX = "transformer."

#: Precisions of a checkpoint's tensors, by the name that stands in config.json.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def plain_name(name: str) -> str:
    """The network's own name of a released tensor: without the leading ``transformer.``."""
    return name.removeprefix(PREFIX)


class Expected(NamedTuple):
    """What a checkpoint must hold under a name."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    """None: the checkpoint's own floating type."""


def expected_tensors(config: ModelConfig) -> dict[str, Expected]:
    """Every tensor of the model, in the network's order (SPEC 4.3); of quantized matrices their codes and scales."""
    found: dict[str, Expected] = {}
    for name, shape in expected_shapes(config).items():
        scheme = scheme_of(name, config.quantization)
        if scheme is None:
            found[name] = Expected(shape)
        else:
            matrix = name.removesuffix(".weight")
            found |= {f"{matrix}.{part}": expected for part, expected in quantized_parts(shape, scheme).items()}
    return found


def scheme_of(name: str, scheme: QuantizationScheme | None) -> QuantizationScheme | None:
    """How a tensor is quantized in a model of a scheme; None = it is not."""
    return None if scheme is None or not name.endswith(".weight") else scheme.for_matrix(name.removesuffix(".weight"))


def quantized_parts(shape: tuple[int, ...], scheme: QuantizationScheme) -> dict[str, Expected]:
    """What a quantized matrix ``[n, m]`` is stored as; codes of 4 bits two a byte."""
    rows, columns = shape
    groups = (rows, columns // scheme.columns(columns))
    parts = {
        "codes": Expected((rows, columns if scheme.bits == 8 else columns // 2), torch.int8),
        "scales": Expected(groups, torch.float16),
    }
    return {**parts, "zeros": Expected(groups, torch.int8)} if scheme.zero_point else parts


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every parameter of the plain network, in its order (SPEC 4.3). Builds no network."""
    h, i = config.hidden_size, config.inner_hidden_size
    layer = {
        "input_layernorm.weight": (h,),
        "input_layernorm.bias": (h,),
        "attention.query_key_value.weight": (3 * h, h),
        "attention.query_key_value.bias": (3 * h,),
        "attention.dense.weight": (h, h),
        "attention.dense.bias": (h,),
        "post_attention_layernorm.weight": (h,),
        "post_attention_layernorm.bias": (h,),
        "mlp.dense_h_to_4h.weight": (2 * i, h),
        "mlp.dense_h_to_4h.bias": (2 * i,),
        "mlp.dense_4h_to_h.weight": (h, i),
        "mlp.dense_4h_to_h.bias": (h,),
    }
    shapes: dict[str, tuple[int, ...]] = {"word_embeddings.weight": (config.vocab_size, h)}
    for number in range(config.num_layers):
        shapes.update({f"layers.{number}.{name}": shape for name, shape in layer.items()})
    shapes["final_layernorm.weight"] = shapes["final_layernorm.bias"] = (h,)
    return shapes


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name in ``DTYPES``. Raises ``InputError`` for any other."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise InputError(f"a model cannot be stored or run as `{dtype}`", hint=f"known: {', '.join(DTYPES)}", key="dtype")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
