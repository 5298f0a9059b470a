"""Compile the CPU kernels with the system's C compiler: ``python -m openglm.kernels.cpu.build``.

Installing the package runs this too, from its build hook, so it needs the standard library only. Each variant is compiled
with the options of its own kind of processor and chosen when the library is loaded, so one build serves all machines of an
architecture.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "libpanels.so"

#: -fno-math-errno and -fno-trapping-math let loops with rintf and sqrtf become vectors; infinities and NaN stay what they are.
OPTIONS = ("-O3", "-std=c11", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
#: Options of each variant, by architecture.
VARIANTS = {
    "x86": {
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
    },
    "arm": {"neon": ("-march=armv8.2-a+dotprod+fp16",)},
}


class BuildError(Exception):
    """No compiler, or one that fails; the message says which."""


def build(target: Path, *, compiler: str | None = None, machine: str | None = None) -> None:
    """Compile the library to a file, which appears whole or not at all.

    ``compiler``: a command, default ``$CC`` or cc; ``machine``: as ``platform.machine()`` names it, for cross compilers.
    Raises ``BuildError``.
    """
    if os.name == "nt":
        raise BuildError("the kernels need POSIX threads")
    command = shlex.split(compiler or os.environ.get("CC", "cc"))
    if not command or shutil.which(command[0]) is None:
        raise BuildError(f"there is no C compiler (`{command[0] if command else ''}`)")
    machine = (machine or platform.machine()).lower()
    family = "x86" if machine in ("x86_64", "amd64") else "arm" if machine in ("aarch64", "arm64") else ""
    variants = {"portable": ()} | VARIANTS.get(family, {})
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = []

        def compile_one(source: str, name: str, options: tuple[str, ...]) -> None:
            objects.append(str(Path(folder) / f"{name}.o"))
            _run([*command, *OPTIONS, *options, "-c", str(HERE / source), "-o", objects[-1]])

        for name, options in variants.items():
            compile_one("variant.c", name, (*options, f"-DVARIANT={name}", f"-DVARIANT_{name}"))
        compile_one("pool.c", "pool", ())
        compile_one("library.c", "library", tuple(f"-DHAS_{name}" for name in variants))
        made = Path(folder) / LIBRARY
        _run([*command, "-shared", "-pthread", *objects, "-lm", "-o", str(made)])
        os.replace(made, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise BuildError(f"`{command[0]}` failed: {first}")


if __name__ == "__main__":
    try:
        build(HERE / LIBRARY)
    except BuildError as error:
        sys.exit(f"error: {error}")
    print(f"built {HERE / LIBRARY}")
