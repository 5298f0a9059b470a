"""Models that do not fit: some layers lie in host memory or on disk, and are copied to the device ahead of their use.

Such a layer owns no weights on the device. It takes turns with the others in a few slots, each a whole layer: while one is
computed, a thread fills the next one. Layers run in a circle, pass after pass, so the first ones are on their way again before
the last has run. What is computed is what a resident layer computes, in the same modules and kernels, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from openglm.checkpoints import ModelSource, load_into
from openglm.checkpoints.loading import row_slices
from openglm.kernels.cpu.panels import PanelLinear
from openglm.models.glm130b import GLM130B, KeyValueCache, Layer
from openglm.quantization.layers import fill_panels

#: ``rows(name, start, stop)``: rows of a tensor of the whole model, on the CPU.
Rows = Callable[[str, int, int], Tensor]
#: Layers that have room on the device beside those that stay: one is computed while the next is copied.
SLOTS = 2
#: Numbers that are copied at once. What is read stays in the allocator's hands for a while, so it is little.
SLICE = 1 << 19
#: Where the layers lie that do not stay on the device.
PLACES = ("host", "disk")


class Slot:
    """Memory of one layer on the device, and which layer is in it, or on its way."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.turn = -1
        """Index among the streamed layers; -1 = none."""
        self.filled: Future[None] | None = None
        self.used: torch.cuda.Event | None = None
        """On a GPU: when the computation with what is in it is over."""


class LayerStream(nn.Module):
    """The slots, and the thread that fills them. ``held`` hands out layers, in any order, quickly in that of their numbers.

    ``numbers``: of the streamed layers, ascending; ``layers``: one for each slot, with memory but without content;
    ``rows``: reads a checkpoint's tensors, on the thread.
    """

    def __init__(self, numbers: Sequence[int], layers: Sequence[Layer], rows: Rows) -> None:
        super().__init__()
        # As modules, so that an engine gives them the same kernels as layers that stay.
        self.slots = nn.ModuleList(layers)
        self._numbers, self._rows = list(numbers), rows
        self._order = deque(Slot(layer) for layer in layers)
        """In the order in which they are used next."""
        self._thread = ThreadPoolExecutor(1, "openglm-offload")  # ends by itself when nobody holds it any more
        weight = layers[0].input_layernorm.weight
        self._side = torch.cuda.Stream(weight.device) if weight.is_cuda else None

    @contextlib.contextmanager
    def held(self, number: int) -> Iterator[Layer]:
        """A layer with its weights, as long as the block lasts. Raises what reading it raised, ``CheckpointError`` mostly."""
        turn, first = self._numbers.index(number), self._order[0]
        if first.turn != turn:
            for ahead, slot in enumerate(self._order):
                self._fill_later(slot, (turn + ahead) % len(self._numbers))
        assert first.filled is not None
        try:
            first.filled.result()
        except BaseException:
            for slot in self._order:
                slot.turn = -1  # whoever asks next, asks anew
            raise
        first.layer.attention.layer = number
        try:
            yield first.layer
        finally:
            if self._side is not None:
                first.used = torch.cuda.Event()
                first.used.record(torch.cuda.current_stream(self._side.device))
            self._order.rotate(-1)
            behind = (turn + len(self._order)) % len(self._numbers)
            if behind != turn:
                self._fill_later(first, behind)

    def _fill_later(self, slot: Slot, turn: int) -> None:
        slot.turn = turn
        slot.filled = self._thread.submit(_fill, slot, f"layers.{self._numbers[turn]}", self._rows, self._side)


@torch.inference_mode()
def _fill(slot: Slot, prefix: str, rows: Rows, side: torch.cuda.Stream | None) -> None:
    """Copy a layer's tensors into a slot; on a GPU on a stream of their own, and wait until they are there."""
    with torch.cuda.stream(side):  # without effect for None
        if side is not None and slot.used is not None:
            side.wait_event(slot.used)
        for name, module in slot.layer.named_modules():
            name = f"{prefix}.{name}"
            if isinstance(module, PanelLinear):
                fill_panels(module.matrix, lambda part, start, stop, name=name: rows(f"{name}.{part}", start, stop))
                if module.matrix.bias is not None:
                    _copy(module.matrix.bias, f"{name}.bias", rows)
            else:
                for leaf, target in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    _copy(target, f"{name}.{leaf}", rows)
        if side is not None:
            side.synchronize()


def _copy(target: Tensor, name: str, rows: Rows) -> None:
    """Fill a tensor by a stored one of any dtype, a slice at a time."""
    for start, stop in row_slices(target.shape, SLICE):
        found = rows(name, start, stop)
        if target.is_cuda:
            found = found.to(target.dtype)
            found = found if found.is_pinned() else found.pin_memory()
        target[start:stop].copy_(found, non_blocking=True)


class StreamedLayer(nn.Module):
    """Stands in for a layer of a network, with the same ``forward``; the weights are the stream's to bring."""

    def __init__(self, number: int, stream: LayerStream) -> None:
        super().__init__()
        self.number, self.stream = number, stream

    def held(self) -> contextlib.AbstractContextManager[Layer]:
        """The layer with its weights, as long as the block lasts."""
        return self.stream.held(self.number)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KeyValueCache | None = None) -> Tensor:
        """As ``Layer.forward``."""
        with self.held() as layer:
            return layer(x, rotary, mask, cache)


def load_streamed(
    network: GLM130B,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    *,
    resident: int,
    place: str,
    slots: int = SLOTS,
) -> GLM130B:
    """Fill an empty network of which only so many layers stay on the device; the others stay at a ``place`` of ``PLACES``.

    ``dtype``: of all that is not quantized. Layers that stay lie evenly between the others, so that copying never rests.
    Raises as ``load_into``.
    """
    numbers = streamed_layers(len(network.layers), resident)
    if not numbers:
        return load_into(network, source, dtype, device)
    layers: dict[str, Any] = dict(network.layers.items())
    moving = {number: layers.pop(str(number)) for number in numbers}
    network.layers = nn.ModuleDict(layers)
    load_into(network, source, dtype, device)
    made = [_with_memory(moving[number], dtype, device) for number in numbers[:slots]]
    rows = source.rows if place == "disk" else _in_host_memory(source, moving, dtype if device.type == "cuda" else None)
    stream = LayerStream(numbers, made, rows)
    layers |= {str(number): StreamedLayer(number, stream) for number in numbers}
    network.layers = nn.ModuleDict({str(number): layers[str(number)] for number in range(len(layers))})
    return network


def streamed_layers(layers: int, resident: int) -> list[int]:
    """Which of the layers go if so many stay: spread evenly."""
    gone = layers - resident
    return [number for number in range(layers) if (number + 1) * gone // layers > number * gone // layers]


def _with_memory(layer: Layer, dtype: torch.dtype, device: torch.device) -> Layer:
    """A layer on the meta device gets memory, without content, in place."""
    for module in layer.modules():
        for leaf, own in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if isinstance(own, nn.Parameter):
                setattr(module, leaf, nn.Parameter(torch.empty(own.shape, dtype=dtype, device=device), requires_grad=False))
            else:  # codes and scales are what they are
                setattr(module, leaf, torch.empty(own.shape, dtype=own.dtype, device=device))
    return layer


def _in_host_memory(source: ModelSource, layers: dict[int, Layer], dtype: torch.dtype | None) -> Rows:
    """Read layers into host memory: as stored, or for a GPU in its ``dtype`` and pinned, so that it may fetch them itself."""
    kept: dict[str, Tensor] = {}
    for number, layer in layers.items():
        for leaf, own in [*layer.named_parameters(), *layer.named_buffers()]:
            name = f"layers.{number}.{leaf}"
            kind = source.rows(name, 0, 1).dtype
            if dtype is not None and isinstance(own, nn.Parameter):
                kind = dtype
            kept[name] = torch.empty(own.shape, dtype=kind, pin_memory=dtype is not None)
            for start, stop in row_slices(own.shape):
                kept[name][start:stop].copy_(source.rows(name, start, stop))
    return lambda name, start, stop: kept[name][start:stop]
