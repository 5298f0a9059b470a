"""What a machine can do at best, measured: how fast it reads memory, how fast it multiplies matrices."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from openglm.kernels import onednn
from openglm.kernels.cpu.library import library, read_bandwidth
from openglm.storage import total_memory
from openglm.version import __version__

#: Bytes of the buffers that are read: far more than any cache holds, and little beside a model.
CPU_BUFFER, GPU_BUFFER = 1 << 30, 1 << 28
#: Matrix products grow from the first size until one takes so many seconds, or has the last size.
SMALLEST, LARGEST, LONG_ENOUGH = 512, 8_192, 0.05
REPEATS = 4


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of wall time."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def read_rate(device: torch.device) -> tuple[float, str]:
    """Bytes a second that memory gives, the best of some rounds, and how it was read.

    On a CPU by the threads of the compiled kernels, or as torch sums a tensor where there are none; on a GPU as it copies
    within its memory, where every byte counts twice, read and written.
    """
    if device.type != "cpu":
        source = torch.ones(GPU_BUFFER, dtype=torch.int8, device=device)
        target = torch.empty_like(source)

        def copy() -> None:
            for _ in range(REPEATS):
                target.copy_(source)

        return 2 * REPEATS * source.nbytes / _best(copy, device), "a copy on the device, both directions counted"
    size = min(CPU_BUFFER, total_memory() // 16)
    if library() is not None:
        return read_bandwidth(size, torch.get_num_threads()), "the threads of the compiled kernels"
    values = torch.ones(size // 4)
    return values.nbytes / _best(values.sum, device), "a sum by torch"


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of some square matrix products; in float32 on an x86 by oneDNN, too, as the engine has them."""
    roads: list[Callable[..., torch.Tensor]] = [F.linear]
    if device.type == "cpu" and dtype == torch.float32 and onednn.available():
        roads.append(onednn.linear)
    fastest, size = 0.0, SMALLEST
    with torch.inference_mode():
        while True:
            x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            seconds = min(_best(lambda road=road, x=x, weight=weight: road(x, weight), device) for road in roads)
            fastest = max(fastest, 2 * size**3 / seconds)
            if size == LARGEST or seconds > LONG_ENOUGH:
                return fastest
            size *= 2


def _best(work: Callable[[], object], device: torch.device) -> float:
    work()
    return min(timed(work, device) for _ in range(REPEATS))


def peak_memory(device: torch.device) -> tuple[int | None, str]:
    """Bytes held at most, so far, and by what: a GPU's allocator, or this process (None where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "the allocator of the GPU"
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), "this process"
    try:
        import resource
    except ImportError:  # Windows
        return None, "this process"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10, "this process"


def machine_name(device: torch.device) -> str:
    """The model of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration, UnicodeDecodeError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, object]:
    """What a figure depends on, for a report."""
    gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "name": machine_name(device),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory": gpu or total_memory(),
        "torch": torch.__version__,
        "openglm": __version__,
    }
