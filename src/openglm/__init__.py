"""openglm: GLM-130B as software. See ``load``; everything public is listed in ``__all__``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from openglm.version import __version__

if TYPE_CHECKING:
    from openglm.config import ModelConfig
    from openglm.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        InputError,
        ModelNotFoundError,
        OpenGLMError,
        StorageError,
        TokenizerError,
        UnlearnedMaskError,
    )
    from openglm.inference.glm import GLM
    from openglm.inference.loading import load
    from openglm.inference.results import ChoiceScore, FillResult, GenerateResult, ScoreResult, Span
    from openglm.inference.sampling import SamplingSettings
    from openglm.tokenizers import load_tokenizer

#: Name to the room that has it. Looked up on first use: importing openglm must not import torch.
_ROOMS = {
    "openglm.config": ("ModelConfig",),
    "openglm.errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "InputError",
        "ModelNotFoundError",
        "OpenGLMError",
        "StorageError",
        "TokenizerError",
        "UnlearnedMaskError",
    ),
    "openglm.inference.glm": ("GLM",),
    "openglm.inference.loading": ("load",),
    "openglm.inference.results": ("ChoiceScore", "FillResult", "GenerateResult", "ScoreResult", "Span"),
    "openglm.inference.sampling": ("SamplingSettings",),
    "openglm.tokenizers": ("load_tokenizer",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "GLM",
    "CheckpointError",
    "ChoiceScore",
    "ConfigError",
    "DataError",
    "FillResult",
    "GenerateResult",
    "InputError",
    "ModelConfig",
    "ModelNotFoundError",
    "OpenGLMError",
    "SamplingSettings",
    "ScoreResult",
    "Span",
    "StorageError",
    "TokenizerError",
    "UnlearnedMaskError",
    "__version__",
    "load",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'openglm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ROOM_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
