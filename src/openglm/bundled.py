"""Models that ship inside the package, and what a name means. Imports no torch."""

from __future__ import annotations

import difflib
from pathlib import Path

from openglm.errors import ModelNotFoundError

ASSETS = Path(__file__).resolve().parent / "assets"


def bundled_models() -> dict[str, Path]:
    """Name to folder of the bundled models, in alphabetical order."""
    return {file.parent.name: file.parent for file in sorted(ASSETS.glob("*/config.json"))}


def existing_path(model: str | Path) -> Path | None:
    """The file or folder of that name, ``~`` expanded, or None. Raises ``ModelNotFoundError`` if it cannot be looked at."""
    try:
        path = Path(model).expanduser()
        return path if str(model) and path.exists() else None
    except (RuntimeError, ValueError):  # ``~`` of nobody, or a NUL: no file is called so
        return None
    except OSError as error:
        raise ModelNotFoundError(f"cannot look for the model `{model}`: {error.strerror}", path=model) from error


def find_model(model: str | Path) -> Path:
    """The folder of a bundled name or a path. Raises ``ModelNotFoundError`` with the nearest bundled name.

    A bundled name wins over a folder of the same name.
    """
    bundled = bundled_models()
    if str(model) in bundled:
        return bundled[str(model)]
    path = existing_path(model)
    if path is not None:
        return path
    near = difflib.get_close_matches(str(model), list(bundled), n=1, cutoff=0.4)
    known = f"bundled: {', '.join(bundled)}" if bundled else "no model is bundled with this installation"
    hint = f"did you mean `{near[0]}`?" if near else f"give a folder, or a bundled name ({known})"
    raise ModelNotFoundError(f"there is no model `{model}`: neither a bundled name nor a folder", hint=hint, path=model)
