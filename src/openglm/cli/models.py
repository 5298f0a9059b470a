"""Which model a name means: a folder, a bundled one, or one of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openglm.bundled import bundled_models, existing_path, find_model
from openglm.cli import console
from openglm.errors import ModelNotFoundError, StorageError
from openglm.storage import storage_error

if TYPE_CHECKING:
    from openglm.checkpoints import ModelSource
    from openglm.inference.glm import GLM

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: All that a model folder may hold; the hub's other files stay there.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.pt", "*.md", "latest", "LICENSE*"]


def complete_model(incomplete: str) -> list[str]:
    """Bundled names and folders that begin with what was typed, for the shell."""
    names = [name for name in bundled_models() if name.startswith(incomplete)]
    head, _, tail = incomplete.rpartition("/")
    folder = Path((head or "/") if "/" in incomplete else ".")
    try:
        found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name.startswith(tail))
    except OSError:
        found = []
    prefix = f"{head}/" if "/" in incomplete else ""
    return names + [f"{prefix}{name}" for name in found if tail or not name.startswith(".")]


def model_path(model: str, *, download: bool = False) -> str:
    """What ``openglm.load`` takes: a bundled name or a folder, if need be one that was fetched from the hub.

    Raises ``ModelNotFoundError`` for a hub id without ``download`` and for one that cannot be had.
    """
    if model in bundled_models() or existing_path(model) is not None:
        return model
    if not _HUB_ID.fullmatch(model):
        return model  # `load` knows the nearest name
    if not download:
        raise ModelNotFoundError(
            f"there is no folder `{model}`", hint="if it is a hub id, add --download to fetch it from the Hugging Face hub"
        )
    return _download(model)


def _download(model: str) -> str:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ModelNotFoundError(
            "`--download` needs huggingface_hub", hint='install it with: pip install "openglm[hub]"'
        ) from error
    console.note(f"fetching `{model}` from the Hugging Face hub")
    try:
        return snapshot_download(model, allow_patterns=_HUB_FILES)
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise ModelNotFoundError(
                f"the hub has no model `{model}` that may be read", hint="check the name, or log in with `hf auth login`"
            ) from error
        raise ModelNotFoundError(f"the hub did not deliver `{model}`: {_first_line(error)}", hint=_RETRY) from error
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise storage_error(error.filename, error) from error
        raise ModelNotFoundError(f"the hub cannot be reached for `{model}`: {_first_line(error)}", hint=_RETRY) from error
    except StorageError:
        raise
    except Exception as error:  # the client's own kinds, and those of the HTTP library beneath it
        raise ModelNotFoundError(f"the hub did not deliver `{model}`: {_first_line(error)}", hint=_RETRY) from error


_RETRY = "check the connection and run the same command again; what has arrived is kept"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].removesuffix(".")


def model_folder(model: str, *, download: bool = False) -> Path:
    """The folder of a model, wherever it comes from. Raises ``ModelNotFoundError`` with the nearest bundled name."""
    return find_model(model_path(model, download=download))


def open_source(model: str, *, download: bool = False) -> ModelSource:
    """Configuration, tokenizer file and tensors of a model, none of them read yet. Imports torch."""
    folder = model_folder(model, download=download)
    from openglm.checkpoints import open_model

    return open_model(folder)


def load_model(
    model: str, *, download: bool = False, draft: str | None = None, memory: float | None = None, **options: Any
) -> GLM:
    """The model, ready to answer; what the loader deduced goes to stderr. Imports torch.

    ``memory`` in gigabytes; ``options`` are those of ``openglm.load``, and so is what is raised.
    """
    folder = model_folder(model, download=download)  # a wrong name is told before torch is imported
    if draft is not None and draft != "lookup":
        model_folder(draft)
    from openglm.inference.loading import load

    glm = load(str(folder), draft=draft, memory=None if memory is None else memory * 1e9, **options)
    for line in glm.notes:
        console.note(f"note: {line}")
    return glm
