"""The processes that share a network which only writes, and what they tell each other.

All of them run the same program on the same texts; what only one can know (a file, chance) it tells the others.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from openglm.errors import InputError, OpenGLMError
from openglm.parallel.layout import started

Value = TypeVar("Value")

#: How long a process waits for another: that one may be reading its part from a slow disk.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class TensorGroup:
    """This process among those that share every matrix."""

    rank: int
    size: int
    device: torch.device
    """Where this process computes."""

    @property
    def lead(self) -> bool:
        """True on the process that speaks and writes files."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in the type of ``x``, which may be overwritten."""
        wide = _wide(x)
        with _meeting():
            dist.all_reduce(wide)
        return wide.to(x.dtype)

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """The parts ``[..., w]`` of all ranks side by side, the same bits everywhere. ``widths``: of each rank's part."""
        padded = torch.nn.functional.pad(_wide(x), (0, max(widths) - x.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths]
        with _meeting():
            dist.all_gather(parts, padded)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1).to(x.dtype)

    def told(self, make: Callable[[], Value]) -> Value:
        """What ``make`` gives on the lead, where alone it is called. An ``OpenGLMError`` of it is raised on all ranks."""
        told: list[Any] = [None, None]
        if self.lead:
            try:
                told[0] = make()
            except OpenGLMError as error:
                told[1] = error
        with _meeting():
            dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if told[1] is not None:
            raise told[1]
        return told[0]

    def together(self, make: Callable[[], Value]) -> Value:
        """What ``make`` gives on each rank. An ``OpenGLMError`` of one rank is raised on all, so none waits for it."""
        made: list[Any] = []
        failure: OpenGLMError | None = None
        try:
            made.append(make())
        except OpenGLMError as error:
            failure = error
        failures: list[Any] = [None] * self.size
        with _meeting():
            dist.all_gather_object(failures, failure)
        for found in failures:
            if found is not None:
                raise found
        return made[0]


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """A process that ended tells why itself; those that wait for it say no more than that."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OpenGLMError(
            f"the processes of this run have lost each other ({cause})", hint="one that ended says why in its own message"
        ) from error


def _wide(x: Tensor) -> Tensor:
    """On a CPU half precision is added up in float32, for want of hardware; a GPU's own types travel as they are."""
    return x.float() if x.device.type == "cpu" and x.dtype.itemsize < 4 else x.contiguous()


def connect(device: str | torch.device | None = None) -> TensorGroup | None:
    """Meet the processes that torchrun started, or those of a process group that exists; None where this is the only one.

    ``device``: "cpu" (gloo) or "cuda" (nccl), of which each process takes the GPU of its own number on its machine; None: a
    GPU where there is one. Raises ``InputError`` for another device, and for a process without a GPU.
    """
    size = dist.get_world_size() if dist.is_initialized() else started()
    if size == 1:
        return None
    place = _place(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=_PATIENCE)
        atexit.register(_leave)
    return TensorGroup(dist.get_rank(), size, place)


def _place(device: str | torch.device | None) -> torch.device:
    name = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name not in ("cpu", "cuda"):
        raise InputError(
            f"several processes run on `cpu` or `cuda`, not on `{name}`",
            hint="with `cuda` each takes the GPU of its own number",
            key="device",
        )
    if name == "cpu":
        return torch.device(name)
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise InputError(
            f"process {number + 1} of this machine has no GPU, there are {count}",
            hint="start as many as there are GPUs: torchrun --nproc-per-node",
            key="device",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
