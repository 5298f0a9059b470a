"""How long each process works by itself in a step: in every collective all wait for the slowest, so whole steps take equally
long on each and say nothing of who is slow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Stopwatch:
    """Seconds of a process's own work, as a mean over some steps.

    It stands still in ``together``, where processes wait for each other. Forward and backward are such a place, for every
    axis of a layout has its collectives there; in between, each layer's forward pass is timed (``follow``), on a GPU by its
    own clock. So a process is found that is slow to load its data, to compute or to update its weights. Each event of a
    watch costs under a microsecond on a CPU, and some on a GPU.
    """

    def __init__(self) -> None:
        self._in_step = False
        self._since: float | None = None
        self._opened: torch.cuda.Event | None = None
        self._stretches: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._gpu = False
        self._seconds = 0.0
        self._steps = 0

    def begin(self) -> None:
        """A step begins, with the wait for its data."""
        self._in_step = True
        self._run()

    def end(self) -> None:
        """The step is over; validation, snapshots and the like do not count."""
        self._stand()
        self._in_step = False
        self._steps += 1

    def mean(self) -> float:
        """Seconds a step since this was last asked."""
        found = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """What happens inside waits for other processes. Of the main thread only."""
        ran = self._since is not None
        self._stand()
        try:
            yield
        finally:
            self._since = self._opened = None  # a stretch that was broken off does not count
            if self._stretches:
                torch.cuda.synchronize()  # else the next thing that the device is asked for waits for the others, too
                self._seconds += sum(start.elapsed_time(end) for start, end in self._stretches) / 1000
                self._stretches.clear()
            if ran:
                self._run()

    def follow(self, layers: Iterable[nn.Module], *, cut: bool, device: str) -> None:
        """Time the parts of layers in which no process waits for another; weights are gathered before a layer's hooks.

        ``cut``: the layers are tensor-parallel. Then the two halves of each are timed up to the product that is summed over
        the ranks, else the layer.
        """
        self._gpu = device.startswith("cuda")
        for layer in layers:
            if cut:
                for half, last in (("attention", "dense"), ("mlp", "dense_4h_to_h")):
                    layer.get_submodule(half).register_forward_pre_hook(self._enter)
                    layer.get_submodule(f"{half}.{last}").register_forward_pre_hook(self._leave)
            else:
                layer.register_forward_pre_hook(self._enter)
                layer.register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        if not self._in_step:
            return
        if self._gpu:
            self._opened = torch.cuda.Event(enable_timing=True)
            self._opened.record()
        else:
            self._run()

    def _leave(self, *_: object) -> None:
        if self._opened is not None:
            closed = torch.cuda.Event(enable_timing=True)
            closed.record()
            self._stretches.append((self._opened, closed))
            self._opened = None
        elif self._in_step:
            self._stand()

    def _run(self) -> None:
        self._since = time.perf_counter()

    def _stand(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None
