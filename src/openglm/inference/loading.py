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
from openglm.checkpoints.quantizing import QuantizingSource
from openglm.checkpoints.rank import RankSource
from openglm.config import ModelConfig, QuantizationScheme
from openglm.errors import InputError
from openglm.inference.glm import GLM
from openglm.inference.offload import PLACES, SLOTS, load_streamed
from openglm.inference.speculation import LookupDrafter, ModelDrafter, check_draft
from openglm.models.glm130b import GLM130B
from openglm.parallel.group import TensorGroup, connect
from openglm.parallel.inference import RankNetwork, cut_network
from openglm.planning.inference import RESERVE, WIDTHS, Use, estimate, layer_bytes, layers_that_fit, verdict
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
    offload: str | None = None,
    memory: float | None = None,
    tensor_parallel: bool = False,
    bits: int | None = None,
    group: int | None = None,
    head_bits: int | None = None,
) -> GLM:
    """A model by the name of a bundled one, or from a folder: our own format, or a released checkpoint.

    A bundled name wins over a folder of the same name (write ``./nano`` for that one). ``device`` None: a GPU where
    there is one. ``dtype`` None: float32 on the CPU, as stored elsewhere. ``rotary_dtype`` and ``config`` replace what
    the folder says, ``tokenizer`` (a file, a folder or an object) the folder's own. ``cache_dtype``: of keys and values,
    "float32", "float16", "bfloat16" or "int8". ``draft`` makes answers come faster and leaves them what they are: "lookup"
    proposes what stands in the text already, a smaller model (by name, folder or object) what it would write itself.
    ``offload``: layers that do not fit on the device stay in memory beside it ("host") or in the folder ("disk"), and are
    copied ahead of their use; "auto" takes the host for a GPU if they fit there, else the disk. ``memory``: bytes that weights,
    keys and values and activations may then take on the device; None: all it has, less a reserve. On a CPU "host" keeps
    layers as they are stored, in the same memory: half precision is widened as it is used.

    ``bits`` (8 or 4) quantizes the layers' matrices of a plain model as they are read, with a scale a row or for ``group``
    columns; ``head_bits`` the embedding, which is also the head. It is what ``glm quantize`` writes, and not kept.

    ``tensor_parallel``: the processes that torchrun started share every matrix; each reads and holds its part. All of them
    must then make the same calls with the same texts, and get the same answers; ``device`` is "cpu" or "cuda", of which each
    takes the GPU of its own number. Without torchrun it changes nothing.

    Raises ``ModelNotFoundError`` with the nearest bundled name, ``CheckpointError`` for a damaged or foreign folder,
    ``ConfigError`` or ``TokenizerError`` for what it holds, for processes that do not divide its heads, for ``bits`` of a
    model that has some already, or ``group`` or ``head_bits`` without ``bits``; ``InputError`` for a dtype or device that
    cannot be used, options that exclude each other (``bits`` and ``offload``), or a model that is larger than the memory.
    Where one process fails, all do. With ``offload`` an answer raises too, if the folder has changed or gone.
    """
    if offload not in (None, "auto", *PLACES):
        raise InputError(f"`offload` must be auto, {' or '.join(PLACES)}, not {offload!r}", key="offload")
    if memory is not None and (offload is None or not memory > 0):
        what = "goes with `offload`" if offload is None else "must be above 0"
        raise InputError(f"`memory` {what}", key="memory")
    if offload is not None and tensor_parallel:
        raise InputError("`offload` and tensor parallelism exclude each other", hint="take more processes", key="offload")
    scheme = QuantizationScheme.of(bits, group, head_bits)
    if scheme is not None and offload is not None:
        raise InputError(
            "`bits` does not go with offloaded layers, which are read again for each token",
            hint="store the model quantized with `glm quantize`, and offload that",
            key="bits",
        )
    processes = connect(device) if tensor_parallel else None

    def make() -> GLM:
        return _load(
            model,
            dtype=dtype,
            device=device,
            rotary_dtype=rotary_dtype,
            config=config,
            tokenizer=tokenizer,
            cache_dtype=cache_dtype,
            draft=draft,
            offload=offload,
            memory=memory,
            scheme=scheme,
            processes=processes,
        )

    if processes is None:
        return make()
    glm = processes.together(make)
    glm.engine.agree()
    return glm


def _load(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    rotary_dtype: str | None,
    config: ModelConfig | Mapping[str, Any] | None,
    tokenizer: Tokenizer | str | Path | None,
    cache_dtype: str | torch.dtype | None,
    draft: str | Path | GLM | None,
    offload: str | None,
    memory: float | None,
    scheme: QuantizationScheme | None,
    processes: TensorGroup | None,
) -> GLM:
    source: ModelSource = open_model(find_model(model), config)
    if scheme is not None:
        source = QuantizingSource(source, scheme)
    changes = {} if rotary_dtype is None else {"rotary_dtype": rotary_dtype}
    chosen = dataclasses.replace(source.config, **changes)
    place = resolve_device(device if processes is None else processes.device)
    if dtype is None and place.type == "cpu":
        dtype = "float32"
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    elif tokenizer is None and source.tokenizer_path is not None:
        tokenizer = load_tokenizer(source.tokenizer_path)
    if place.type == "cuda":
        computed = resolve_dtype(source.dtype if dtype is None else dtype)
        check_type(torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place), computed)
    network, notes = empty_network(chosen), list(source.notes)
    if processes is not None:
        network = cut_network(network, processes)
    if offload is None:
        _refuse_too_large(source, dtype, place, 1 if processes is None else processes.size, scheme)
        load_into(network, RankSource(source, network.cut) if isinstance(network, RankNetwork) else source, dtype, place)
    else:
        notes += _load_what_fits(network, source, dtype, place, offload, memory, cache_dtype)
    glm = GLM(network.eval().requires_grad_(False), tokenizer, notes)
    if cache_dtype is not None:
        known = len(glm.engine.notes)
        glm.engine.set_cache_dtype(cache_dtype)
        glm.notes += glm.engine.notes[known:]
    if draft == "lookup":
        glm.engine.drafter = LookupDrafter()
    elif draft is not None:
        smaller = draft if isinstance(draft, GLM) else load(draft, device=place)
        check_draft(glm.engine, smaller.engine)
        glm.engine.drafter = ModelDrafter(smaller.engine)
    return glm


def check_type(gpu: str, capability: tuple[int, int], dtype: torch.dtype) -> None:
    """Raises ``InputError`` if a GPU of this compute capability does not compute in a type."""
    if dtype == torch.bfloat16 and capability < (8, 0):
        raise InputError(
            f"{gpu} (compute capability {capability[0]}.{capability[1]}) does not compute in bfloat16",
            hint="take float16",
            key="dtype",
        )


def _refuse_too_large(
    source: ModelSource,
    dtype: str | torch.dtype | None,
    place: torch.device,
    processes: int,
    scheme: QuantizationScheme | None,
) -> None:
    """Say so before anything is read, if the weights alone are more than there is memory."""
    config, (stored, name) = source.config, _dtype_names(source, dtype)
    if place.type == "cpu" and name == stored and processes == 1 and config.quantization is None:
        return  # memory-mapped: the system reads what is needed
    memory = _memory(place)
    if place.type == "cpu":
        memory /= min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    fits, sentence = verdict(estimate(config, Use(dtype=name, context=1, device=_kind(place), gpus=processes)), memory)
    if not fits:
        hint = 'with offload="auto" (`glm fill --offload auto`) layers that do not fit are read as they are needed'
        if scheme is not None:
            hint = "fewer bits take less; or store it with `glm quantize`, and offload that"
        raise InputError(sentence, hint=hint, key="model")


def _load_what_fits(
    network: GLM130B,
    source: ModelSource,
    dtype: str | torch.dtype | None,
    place: torch.device,
    offload: str,
    memory: float | None,
    cache_dtype: str | torch.dtype | None,
) -> list[str]:
    """Fill a network of which some layers may be streamed; returns notes that say which. Raises ``InputError``."""
    stored, name = _dtype_names(source, dtype)
    config, kind = network.config, _kind(place)
    cache = name if cache_dtype is None else str(cache_dtype).removeprefix("torch.")
    use = Use(
        dtype=name,
        cache=cache if cache in WIDTHS else "float16",
        context=config.max_sequence_length,
        device=kind,
    )
    found = estimate(config, use)
    if memory is not None:  # of the model alone
        found = dataclasses.replace(found, terms=tuple(term for term in found.terms if term.name != "reserve"))
    # On a CPU, the host is the device: layers that do not stay are there all the same, but as they are stored.
    kept = layer_bytes(estimate(config, dataclasses.replace(use, dtype=stored))) if (kind, offload) == ("cpu", "host") else 0.0
    resident = layers_that_fit(found, _memory(place) if memory is None else memory, SLOTS, kept)
    gone = config.num_layers - resident
    if offload == "auto":
        offload = "host" if kind == "gpu" and gone * layer_bytes(found) + RESERVE["cpu"] <= total_memory() else "disk"
    load_streamed(network, source, resolve_dtype(name), place, resident=resident, place=offload)
    if not gone:
        return []
    where = "stay in host memory" if offload == "host" else "are read from disk"
    return [f"{resident} of {config.num_layers} layers fit on the device, the others {where} and are copied as they are needed"]


def _dtype_names(source: ModelSource, dtype: str | torch.dtype | None) -> tuple[str, str]:
    """The stored type, and the one to compute in."""
    return source.dtype, source.dtype if dtype is None else dtype_name(resolve_dtype(dtype))


def _kind(place: torch.device) -> str:
    return "cpu" if place.type == "cpu" else "gpu"


def _memory(place: torch.device) -> float:
    """Bytes that the device has."""
    return torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else total_memory()
