"""The processes of a run: who this one is, and the few things that they tell each other. One process needs none of it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh

from openglm.errors import ConfigError, OpenGLMError, TrainingError
from openglm.parallel.layout import AXES, ParallelLayout
from openglm.training.recipe import Recipe
from openglm.training.stopwatch import Stopwatch

#: Seconds that processes have to answer, once one of them has waited in vain; and that they may come up apart.
ROLL_CALL, MEETING = 2.0, 60.0

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among all; sums, gathered objects and barriers that are nothing on a single process."""

    layout: ParallelLayout = field(default_factory=ParallelLayout)
    mesh: DeviceMesh | None = None
    rank: int = 0
    side: dist.ProcessGroup | None = None
    """A gloo group of all processes for objects."""
    writing: dist.ProcessGroup | None = None
    """Another one, for the threads that write snapshots meanwhile: two threads must not share a group."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    """Of this process's own work; it stands still while the process is with the others."""

    @property
    def lead(self) -> bool:
        """True on the process that writes files and speaks."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the samples is this process's."""
        return 0 if self.mesh is None else self.mesh["data"].get_local_rank()

    def data_sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the data ranks."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def data_most(self, number: float) -> float:
        """The largest over the data ranks."""
        return self._reduce([number], dist.ReduceOp.MAX)[0]

    def _reduce(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if self.mesh is None or self.layout.data == 1:
            return list(numbers)
        with self.stopwatch.together():
            tensor = torch.tensor(numbers, dtype=torch.float64, device=self.mesh.device_type)
            dist.all_reduce(tensor, op=operation, group=self.mesh.get_group("data"))
            return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What every process hands in, by rank."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.layout.world_size
        with self.stopwatch.together():
            dist.all_gather_object(values, value, group=self.side)
        return values

    def told(self, value: Any) -> Any:
        """What the lead hands in."""
        if self.mesh is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.side)
        return values[0]

    def to_lead(self, source: int, tensor: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor | None:
        """On the lead the float32 tensor on the CPU that the process ``source`` has; None on the others."""
        if self.rank == source != 0:
            assert tensor is not None
            dist.send(tensor.contiguous(), dst=0, group=self.side)
        if not self.lead:
            return None
        if source:
            tensor = torch.empty(*shape)
            dist.recv(tensor, src=source, group=self.side)
        return tensor

    def together(self, make: Callable[[], Value]) -> Value:
        """What ``make`` gives on each process. An ``OpenGLMError`` of one is raised on all, so that none waits for it.

        ``make`` must not wait for a process that may have raised.
        """
        made: list[Any] = [None]
        failure: OpenGLMError | None = None
        try:
            made[0] = make()
        except OpenGLMError as error:
            if self.mesh is None:
                raise
            failure = error
        for found in self.gather(failure):
            if found is not None:
                raise found
        return made[0]

    def barrier(self, *, writing: bool = False) -> None:
        """Wait for all; ``writing``: on the snapshots' group."""
        if self.mesh is not None:
            dist.barrier(group=self.writing if writing else self.side)

    @contextlib.contextmanager
    def named_if_silent(self) -> Iterator[None]:
        """Raise ``TrainingError`` with the ranks that no longer answer where gloo only says that it has waited long enough.

        NCCL ends the process from another thread instead, and names the collective.
        """
        try:
            yield
        except Exception as error:
            if self.mesh is None or not _waited_in_vain(error):
                raise
            silent = self._silent()
            who = f"rank {', '.join(map(str, silent))} no longer answers" if silent else "the processes lost each other"
            raise TrainingError(
                f"{who}: the others have waited as long as `parallel.timeout` says",
                hint="the same command goes on from the newest snapshot; torchrun --max-restarts gives it by itself",
                key="parallel.timeout",
            ) from error

    def _silent(self) -> list[int]:
        """Ranks that do not come to the store; those that do have waited for the same one, so they come together."""
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=ROLL_CALL))
        missing = list(range(self.layout.world_size))
        until = time.monotonic() + ROLL_CALL
        try:
            store.set(f"openglm/here/{self.rank}", "")
            while missing and time.monotonic() < until:
                missing = [rank for rank in missing if not store.check([f"openglm/here/{rank}"])]
                time.sleep(0.05)
        except RuntimeError:
            return [0]  # the store is the lead's
        return missing


def connect(recipe: Recipe) -> Ranks:
    """The processes that torchrun started, on the recipe's layout; a process alone if there was no torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    p = recipe.parallel
    layout = ParallelLayout(p.data or max(size // (p.tensor * p.pipeline), 1), p.tensor, p.pipeline)
    layout.check(recipe.model.config(), size)
    if size == 1:
        return Ranks()
    device = recipe.run.device
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit = timedelta(seconds=p.timeout)
    set_timeout = dist.distributed_c10d._set_pg_timeout
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        meeting = max(limit, timedelta(seconds=MEETING))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            dist.init_process_group(
                backend, timeout=meeting, store=_own_store(meeting), rank=int(os.environ["RANK"]), world_size=size
            )
        else:
            dist.init_process_group(backend, timeout=meeting)
        set_timeout(limit)
    mesh = layout.mesh("cuda" if device.startswith("cuda") else "cpu")
    for axis in AXES:  # whose groups begin with torch's half an hour
        set_timeout(limit, mesh.get_group(axis))
    side: Any = dist.new_group(backend="gloo", timeout=limit)
    writing: Any = dist.new_group(backend="gloo", timeout=limit)
    return Ranks(layout, mesh, dist.get_rank(), side, writing)


def _own_store(limit: timedelta) -> Any:
    """A store for the processes of this start alone.

    torchrun keeps one store through all its restarts, in which processes that are started anew find the addresses of dead
    ones and try to connect to them until the restarts are used up. So the lead opens a store of its own and leaves only its
    address in torchrun's, with a word that the store itself knows, too: an address of an earlier lead is read again.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torchrun = TCPStore(address, port, is_master=False, timeout=limit)
    key = "openglm/store"
    if os.environ["RANK"] == "0":
        # The address by which this machine reaches torchrun's store; on the machine of the store that may be the loopback's.
        with socket.create_connection((address, port)) as connection:
            own = connection.getsockname()[0]
        host = address if own.startswith("127.") or own == "::1" else own
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        word = uuid.uuid4().hex
        store.set(key, word)
        torchrun.set(key, f"{host} {store.port} {word}")
        return store
    until = time.monotonic() + limit.total_seconds()
    while True:
        host, found, word = torchrun.get(key).decode().split()
        try:
            with socket.create_connection((host, int(found)), timeout=5.0):
                pass
            store = TCPStore(host, int(found), is_master=False, timeout=timedelta(seconds=10))
            if store.get(key).decode() == word:
                store.set_timeout(limit)
                return store
        except (OSError, RuntimeError):  # torch's own are RuntimeErrors
            pass
        if time.monotonic() > until:
            hint = "can the machines reach each other under this address?"
            raise TrainingError(f"the lead's store at {host}:{found} does not answer", hint=hint, key="parallel.timeout")
        time.sleep(0.1)


def _waited_in_vain(error: BaseException | None) -> bool:
    """True if gloo's timeout lies behind an error: what fails afterwards, as a snapshot that is being written, covers it."""
    while error is not None:
        if isinstance(error, RuntimeError) and "Timed out" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_batch(recipe: Recipe, layout: ParallelLayout) -> None:
    """Raise ``ConfigError`` if the recipe's batches cannot be cut as the layout needs."""
    if layout.pipeline > 1 and not recipe.run.aggregate:
        raise ConfigError("a pipeline needs micro-batches of one shape", hint="set run.aggregate = true", key="run.aggregate")
