"""Where golden data is found, and small models made by the tests themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(max(1, min(2, os.cpu_count() or 1)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden and evaluation data: ``OPENGLM_SHARED``, else ``../shared`` beside the repository."""
    folder = Path(os.environ.get("OPENGLM_SHARED") or ROOT.parent / "shared")
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden data at {folder} (set OPENGLM_SHARED)")
    return folder
