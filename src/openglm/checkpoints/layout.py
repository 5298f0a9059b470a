"""Names and shapes of a model's tensors, and the precisions they are stored in."""

from __future__ import annotations

import torch

from openglm.config import ModelConfig
from openglm.errors import InputError

#: The released names begin with it; ours do not.
PREFIX = "transformer."

#: Precisions of a checkpoint's tensors, by the name that stands in config.json.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def plain_name(name: str) -> str:
    """The network's own name of a released tensor: without the leading ``transformer.``."""
    return name.removeprefix(PREFIX)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor of the model, in the network's order (SPEC 4.3). Builds no network."""
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
