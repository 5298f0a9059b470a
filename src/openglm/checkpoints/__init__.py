"""Models on disk: our own format, import of released weights, conversion, verification.

``open_model`` finds out what lies in a folder and returns a ``ModelSource``; ``load_network`` makes a network of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from openglm.checkpoints.format import (
    CHECKSUM_FILE,
    CONFIG_FILE,
    DEFAULT_SHARD_BYTES,
    INDEX_FILE,
    Checkpoint,
    SavableTokenizer,
    open_checkpoint,
    save_checkpoint,
)
from openglm.checkpoints.layout import expected_shapes
from openglm.checkpoints.loading import (
    ModelSource,
    StateSource,
    convert_source,
    empty_network,
    load_into,
    load_network,
    network_from_state,
    resolve_device,
)
from openglm.checkpoints.released import ReleasedCheckpoint, open_released, save_released
from openglm.config import ModelConfig, QuantizationScheme
from openglm.errors import CheckpointError, ModelNotFoundError

__all__ = [
    "Checkpoint",
    "ModelSource",
    "ReleasedCheckpoint",
    "StateSource",
    "convert",
    "empty_network",
    "expected_shapes",
    "load_into",
    "load_network",
    "network_from_state",
    "open_checkpoint",
    "open_model",
    "open_released",
    "resolve_device",
    "save_checkpoint",
    "save_released",
]

_RELEASED_SHARD = "mp_rank_*_model_states.pt"


def open_model(path: str | Path, config: ModelConfig | Mapping[str, Any] | None = None) -> ModelSource:
    """Open whatever model lies in a folder: our own format or the released layout.

    ``config`` replaces or supplies the folder's configuration. Raises ``ModelNotFoundError`` where nothing is,
    ``CheckpointError`` that says what the thing is if it is no model that is read here, or what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise ModelNotFoundError(f"there is no folder `{path}`", path=path)
    if not path.is_dir():
        raise CheckpointError(f"`{path}` is a file, but a model is a folder", hint="give the folder that holds it", path=path)
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", path=path) from error
    if _is_own(path, names):
        return open_checkpoint(path, ModelConfig.from_dict(config) if isinstance(config, Mapping) else config)
    if "latest" in names:
        return open_released(path, config)
    raise _unknown(path, names)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | torch.dtype | None = "float16",
    config: ModelConfig | Mapping[str, Any] | None = None,
    tokenizer: SavableTokenizer | str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    replace: bool = False,
    progress: Callable[[int, int], Any] | None = None,
    scheme: QuantizationScheme | None = None,
) -> ModelSource:
    """Turn a model folder of any kind that is read here into our own format; returns the source with its notes.

    Streams: memory holds a slice of a tensor. ``dtype`` None keeps the stored one; ``tokenizer`` None takes the source's own;
    ``scheme`` quantizes on the way.
    """
    opened = open_model(source, config)
    convert_source(
        opened,
        target,
        dtype=dtype,
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
        replace=replace,
        progress=progress,
        scheme=scheme,
    )
    return opened


def _is_own(path: Path, names: set[str]) -> bool:
    if CHECKSUM_FILE in names or any(re.match(r"model-\d{5}-of-\d{5}\.safetensors", name) for name in names - {CONFIG_FILE}):
        return not _foreign_config(path, names)
    return CONFIG_FILE in names and "format_version" in _config(path)


def _foreign_config(path: Path, names: set[str]) -> bool:
    """A config.json that another program wrote (a broken or missing one is ours, half-downloaded)."""
    values = _config(path) if CONFIG_FILE in names else {}
    return bool(values) and "format_version" not in values


def _config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads((path / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _unknown(path: Path, names: set[str]) -> CheckpointError:
    """The error for a folder that is no model here: it says what the folder is."""
    hint = f"a model folder holds `{CONFIG_FILE}` and safetensors, or `latest` and `<iteration>/mp_rank_00_model_states.pt`"
    values = _config(path)
    if not names:
        what = "is empty"
    elif list(path.glob(_RELEASED_SHARD)):
        what, hint = (
            "holds shards of a released model, but no `latest`",
            f"give the folder above, with `{path.name}` in its `latest`",
        )
    elif list(path.glob(f"*/{_RELEASED_SHARD}")):
        what, hint = (
            "holds a released model, but no `latest`",
            "write a file `latest` that holds the name of the iteration's folder",
        )
    elif "latest_checkpointed_iteration.txt" in names:
        what, hint = "is a checkpoint of another training program, which is not read", "convert it to the released layout first"
    elif "model_type" in values or "architectures" in values or any(name.startswith("pytorch_model") for name in names):
        kind = values.get("model_type") or (values.get("architectures") or ["unknown"])[0]
        what = f"is a Hugging Face model of the kind `{kind}`, which is not read"
    elif any(name.endswith((".part", ".incomplete", ".aria2", ".crdownload")) for name in names):
        what, hint = "is an unfinished download", "finish the download"
    elif INDEX_FILE in names or any(name.endswith(".safetensors") for name in names):
        what = f"holds safetensors, but no `{CONFIG_FILE}` of openglm"
    else:
        what = "holds no model"
    return CheckpointError(f"`{path}` {what}", hint=hint, path=path)
