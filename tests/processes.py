"""Worker processes that stay, one process group (gloo) for each number of them; torch is imported once."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

#: Seconds to wait for a result; and for those of the other ranks once one has failed.
TIMEOUT, AFTER_FAILURE = 120.0, 3.0


def _work(rank: int, world_size: int, meeting: str, connection: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    while True:
        function, arguments = connection.recv()
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Workers:
    """``run(world_size, function, ...)`` calls a module-level function on every rank and returns all results."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "openglm.training.run", "pytest"])
        self._folder = tempfile.TemporaryDirectory()
        self._groups: dict[int, list[tuple[Any, Any]]] = {}
        self._started = 0

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results by rank. Raises ``AssertionError`` with the failed ranks' tracebacks."""
        group = self._groups.get(world_size) or self._start(world_size)
        for _, connection in group:
            connection.send((function, arguments))
        results, failures = [], []
        for rank, (_, connection) in enumerate(group):
            # One failed rank leaves the others waiting for it.
            answered = connection.poll(AFTER_FAILURE if failures else TIMEOUT)
            good, value = connection.recv() if answered else (False, "no answer")
            (results if good else failures).append(value if good else f"rank {rank}:\n{value}")
        if failures:
            self.end(world_size)
            raise AssertionError("\n".join(failures))
        return results

    def _start(self, world_size: int) -> list[tuple[Any, Any]]:
        self._started += 1
        meeting = str(Path(self._folder.name) / str(self._started))
        group = []
        for rank in range(world_size):
            ours, theirs = self._context.Pipe()
            worker = self._context.Process(target=_work, args=(rank, world_size, meeting, theirs), daemon=True)
            worker.start()
            group.append((worker, ours))
        self._groups[world_size] = group
        return group

    def end(self, world_size: int) -> None:
        """End the processes of one group; the next ``run`` starts new ones."""
        for worker, connection in self._groups.pop(world_size):
            worker.kill()
            worker.join()
            connection.close()

    def close(self) -> None:
        """End all processes."""
        for world_size in list(self._groups):
            self.end(world_size)
        self._folder.cleanup()
