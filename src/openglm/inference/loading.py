"""From a name or a folder to a model that is ready for use."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from openglm.bundled import find_model
from openglm.checkpoints import ModelSource, empty_network, load_into, open_model, resolve_device
from openglm.checkpoints.layout import dtype_name, resolve_dtype
from openglm.checkpoints.rank import RankSource
from openglm.config import ModelConfig
from openglm.errors import InputError
from openglm.inference.glm import GLM
from openglm.inference.speculation import LookupDrafter, ModelDrafter, check_draft
from openglm.parallel.group import TensorGroup, connect
from openglm.parallel.inference import RankNetwork, cut_network
from openglm.planning.inference import Use, estimate, verdict
from openglm.storage import total_memory
from openglm.tokenizers import load_tokenizer
from openglm.tokenizers.base import Tokenizer


def load(
    model: str | Path = "nano",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    rotary_dtype: str | None = None,
    config: ModelConfig | Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    cache_dtype: str | torch.dtype | None = None,
    draft: str | Path | GLM | None = None,
    tensor_parallel: bool = False,
) -> GLM:
    """A model by the name of a bundled one, or from a folder: our own format, or a released checkpoint.

    A bundled name wins over a folder of the same name (write ``./nano`` for that one). ``device`` None: a GPU where
    there is one. ``dtype`` None: float32 on the CPU, as stored elsewhere. ``rotary_dtype`` and ``config`` replace what
    the folder says, ``tokenizer`` (a file, a folder or an object) the folder's own. ``cache_dtype``: of keys and values,
    "float32", "float16", "bfloat16" or "int8". ``draft`` makes answers come faster and leaves them what they are: "lookup"
    proposes what stands in the text already, a smaller model (by name, folder or object) what it would write itself.

    ``tensor_parallel``: the processes that torchrun started share every matrix; each reads and holds its part. All of them
    must then make the same calls with the same texts, and get the same answers; ``device`` is "cpu" or "cuda", of which each
    takes the GPU of its own number. Without torchrun it changes nothing.

    Raises ``ModelNotFoundError`` with the nearest bundled name, ``CheckpointError`` for a damaged or foreign folder,
    ``ConfigError`` or ``TokenizerError`` for what it holds or for processes that do not divide its heads, ``InputError`` for a
    dtype or device that cannot be used, or a model that is larger than the memory; where one process fails, all do.
    """
    group = connect(device) if tensor_parallel else None

    def make() -> GLM:
        return _load(model, dtype, device, rotary_dtype, config, tokenizer, cache_dtype, draft, group)

    return make() if group is None else group.together(make)


def _load(
    model: str | Path,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    rotary_dtype: str | None,
    config: ModelConfig | Mapping[str, Any] | None,
    tokenizer: Tokenizer | str | Path | None,
    cache_dtype: str | torch.dtype | None,
    draft: str | Path | GLM | None,
    group: TensorGroup | None,
) -> GLM:
    source = open_model(find_model(model), config)
    changes = {} if rotary_dtype is None else {"rotary_dtype": rotary_dtype}
    chosen = dataclasses.replace(source.config, **changes)
    place = resolve_device(device if group is None else group.device)
    if dtype is None and place.type == "cpu":
        dtype = "float32"
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    elif tokenizer is None and source.tokenizer_path is not None:
        tokenizer = load_tokenizer(source.tokenizer_path)
    network = empty_network(chosen)
    if group is not None:
        network = cut_network(network, group)
    _refuse_too_large(chosen, source, dtype, place, 1 if group is None else group.size)
    network = load_into(network, RankSource(source, network.cut) if isinstance(network, RankNetwork) else source, dtype, place)
    glm = GLM(network.eval().requires_grad_(False), tokenizer, source.notes)
    if cache_dtype is not None:
        glm.engine.set_cache_dtype(cache_dtype)
    if draft == "lookup":
        glm.engine.drafter = LookupDrafter()
    elif draft is not None:
        smaller = draft if isinstance(draft, GLM) else load(draft, device=place)
        check_draft(glm.engine, smaller.engine)
        glm.engine.drafter = ModelDrafter(smaller.engine)
    return glm


def _refuse_too_large(
    config: ModelConfig, source: ModelSource, dtype: str | torch.dtype | None, place: torch.device, ranks: int
) -> None:
    """Say so before anything is read, if the weights alone are more than there is memory."""
    stored = getattr(source, "dtype", "float16")
    name = stored if dtype is None else dtype_name(resolve_dtype(dtype))
    if place.type == "cpu" and name == stored and ranks == 1:
        return  # memory-mapped: the system reads what is needed
    if place.type == "cpu":
        memory = total_memory() / min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    else:
        memory = torch.cuda.get_device_properties(place).total_memory
    kind = "cpu" if place.type == "cpu" else "gpu"
    fits, sentence = verdict(estimate(config, Use(dtype=name, context=1, device=kind, gpus=ranks)), memory)
    if not fits:
        raise InputError(sentence, key="model")
