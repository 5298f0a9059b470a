"""The compiled library by ctypes: its structures, its functions, and whether it is there."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

from openglm.errors import InputError
from openglm.kernels.cpu.build import HERE, LIBRARY

#: Environment variable that forces a variant: "avx512", "avx2", "neon", "portable", or "none" for no compiled kernels.
VARIANT = "OPENGLM_CPU_KERNELS"


class Matrix(Structure):
    """As ``Matrix`` of panels.h."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int32),
        ("group", c_int32),
        ("chunk", c_int32),
        ("halves", c_int32),
    )


class Layer(Structure):
    """As ``Layer`` of panels.h."""

    _fields_ = (
        ("query_key_value", Matrix),
        ("dense", Matrix),
        ("h_to_4h", Matrix),
        ("four_h_to_h", Matrix),
        ("input_norm", c_void_p * 2),
        ("attention_norm", c_void_p * 2),
    )


class Network(Structure):
    """As ``Network`` of panels.h."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("final_norm", c_void_p * 2),
        ("head", Matrix),
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("heads", c_int64),
        ("head_size", c_int64),
        ("vocabulary", c_int64),
        ("alpha", c_float),
        ("epsilon", c_float),
        ("ends", c_int32),
        ("past", c_int32),
    )


class Step(Structure):
    """As ``Step`` of panels.h."""

    _fields_ = (
        ("sequences", c_int64),
        ("tokens", c_int64),
        ("places", c_void_p),
        ("ids", c_void_p),
        ("embeddings", c_void_p),
        ("positions", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("num_positions", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("layer_stride", c_int64),
        ("head_stride", c_int64),
        ("cache_type", c_int64),
        ("visible", c_void_p),
        ("visible_stride", c_int64),
        ("picked", c_void_p),
        ("num_picked", c_int64),
        ("normed", c_void_p),
        ("logits", c_void_p),
    )


@functools.cache
def _open(path: Path) -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(path))
    except OSError:  # not built, or for another system
        return None
    found.glm_variant.restype = c_char_p
    found.glm_variant.argtypes = [c_int]
    found.glm_choose.argtypes = [c_char_p]
    found.glm_sizes.argtypes = [POINTER(c_int64)]
    found.glm_sizes.restype = None
    for name in ("glm_panel_bytes", "glm_panel_count"):
        function = getattr(found, name)
        function.argtypes, function.restype = [POINTER(Matrix)], c_int64
    found.glm_allocate.argtypes, found.glm_allocate.restype = [c_size_t], c_void_p
    found.glm_free.argtypes, found.glm_free.restype = [c_void_p, c_size_t], None
    found.glm_pack.argtypes = [POINTER(Matrix), c_int64, c_int64, c_void_p, c_int64, c_void_p]
    found.glm_pack.restype = None
    found.glm_linear.argtypes = [POINTER(Matrix), c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int]
    found.glm_step.argtypes = [POINTER(Network), POINTER(Step), c_int]
    found.glm_sums.argtypes = [POINTER(Matrix), c_void_p, c_void_p, c_void_p]
    found.glm_read.argtypes, found.glm_read.restype = [c_void_p, c_size_t, c_int], c_uint64
    sizes = (c_int64 * 4)()
    found.glm_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(kind) for kind in (Matrix, Layer, Network, Step)]:
        return None  # built from other sources
    found.glm_choose(found.glm_variant(0))
    return found


def variants() -> list[str]:
    """Kinds of kernels that run on this machine, best first; none if the library was not built."""
    opened = _open(HERE / LIBRARY)
    names: list[str] = []
    while opened is not None and (name := opened.glm_variant(len(names))) is not None:
        names.append(name.decode())
    return names


def library() -> ctypes.CDLL | None:
    """The library with its variant chosen, or None if it was not built (or ``OPENGLM_CPU_KERNELS=none``).

    Raises ``InputError`` if the environment asks for a variant that does not run here.
    """
    wanted = os.environ.get(VARIANT, "")
    opened = _open(HERE / LIBRARY)
    if wanted == "none" or opened is None:
        return None
    if opened.glm_choose((wanted or variants()[0]).encode()):
        raise InputError(
            f"{VARIANT} asks for `{wanted}`, but this machine runs {', '.join(variants())}", hint="unset it", key=VARIANT
        )
    return opened


def read_bandwidth(size: int = 1 << 30, threads: int = 1, rounds: int = 3) -> float:
    """Bytes a second, the best of some rounds, at which the kernels' threads read memory in huge pages."""
    found = library()
    if found is None:
        raise RuntimeError(why_not())
    address = found.glm_allocate(size)
    if not address:
        raise MemoryError(f"there is no memory for a buffer of {size / 1e9:.1f} GB")
    try:
        ctypes.memset(address, 1, size)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            found.glm_read(address, size, threads)
            times.append(time.perf_counter() - start)
    finally:
        found.glm_free(address, size)
    return size / min(times)


def variant() -> str | None:
    """Name of the kind of kernels in use, or None without compiled kernels."""
    return None if library() is None else os.environ.get(VARIANT) or variants()[0]


def why_not() -> str:
    """One line that says why there are no compiled kernels; empty if there are."""
    if library() is not None:
        return ""
    if os.environ.get(VARIANT) == "none":
        return f"compiled kernels are switched off ({VARIANT}=none)"
    return "quantized layers run slowly without compiled kernels; with a C compiler: python -m openglm.kernels.cpu.build"
