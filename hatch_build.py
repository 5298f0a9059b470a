"""Compiles the CPU kernels while the package is built, where there is a C compiler; else the package is plain Python."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path(__file__).parent / "src" / "openglm" / "kernels" / "cpu"


class CpuKernels(BuildHookInterface):
    """``build.py`` beside the sources does the work, as it does for ``python -m openglm.kernels.cpu.build``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Put the library beside its sources, and into the wheel."""
        builder = runpy.run_path(str(KERNELS / "build.py"))
        target = KERNELS / builder["LIBRARY"]
        try:
            builder["build"](target)
        except (builder["BuildError"], OSError) as error:
            self.app.display_warning(f"openglm is installed without its CPU kernels, quantized models run slowly: {error}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        if version != "editable":
            build_data["force_include"][str(target)] = f"openglm/kernels/cpu/{target.name}"
