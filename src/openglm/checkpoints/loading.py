"""From a checkpoint to a network, tensor by tensor, and from one format to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openglm.checkpoints.format import DEFAULT_SHARD_BYTES, SavableTokenizer, check_shape, check_tensor, save_checkpoint
from openglm.checkpoints.layout import dtype_name, expected_tensors, plain_name, resolve_dtype, scheme_of
from openglm.config import ModelConfig, QuantizationScheme
from openglm.errors import CheckpointError, InputError
from openglm.models.glm130b import GLM130B
from openglm.quantization.calibration import CalibrationSample, quantize_layers
from openglm.quantization.functional import quantize_matrix, stored_parts
from openglm.quantization.layers import LayerError, place_quantized

Network = TypeVar("Network", bound=nn.Module)

#: Numbers that are converted at once; quantizing needs some forty bytes for each.
SLICE = 1 << 22


class TensorSource(Protocol):
    """What a network is filled from: a configuration and tensors, one at a time."""

    @property
    def config(self) -> ModelConfig:
        """The network's shape and special tokens."""
        ...

    def names(self) -> list[str]:
        """Names of the tensors, as the network has them."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One whole tensor in its stored dtype, on the CPU; the caller may keep it and write to it."""
        ...


class ModelSource(TensorSource, Protocol):
    """A model that lies somewhere."""

    @property
    def dtype(self) -> str:
        """In which the tensors are stored, as in "float16"; of a quantized model, what is not quantized."""
        ...

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer's file, or None where there is none."""
        ...

    @property
    def notes(self) -> list[str]:
        """What was deduced, assumed or ignored; one sentence each."""
        ...

    def rows(self, name: str, start: int, stop: int, columns: range | None = None) -> Tensor:
        """Some rows of a tensor, or some columns of them, in memory of their own; what is not asked for is not read."""
        ...


class StateSource:
    """Tensors that are in memory already, under original names with or without ``transformer.``; handed out as copies."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.dtype: str = dtype_name(next(iter(tensors.values())).dtype) if tensors else "float32"
        self.tokenizer_path: Path | None = None
        self.notes: list[str] = []
        self._tensors = {plain_name(name): tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
        expected = expected_tensors(config)
        for name in self._tensors:
            if name not in expected:
                raise CheckpointError(f"this model has no tensor `{name}`", key=name)
        for name, own in expected.items():
            if name not in self._tensors:
                raise CheckpointError(f"the tensor `{name}` is missing", key=name)
            check_tensor(name, self._tensors[name], own)

    def names(self) -> list[str]:
        """Names of the tensors, in the network's order."""
        return list(expected_tensors(self.config))

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor, so that training the network leaves the caller's tensors alone."""
        return self._tensors[name].detach().clone()

    def rows(self, name: str, start: int, stop: int, columns: range | None = None) -> Tensor:
        """Some rows of a tensor, or some columns of them, in memory of their own."""
        found = self._tensors[name].detach()[start:stop]
        return (found if columns is None else found[:, columns.start : columns.stop]).clone()


def load_into(
    network: Network, source: TensorSource, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Network:
    """Replace the network's parameters by those of a source, one at a time; returns the network.

    The network is usually built on the meta device, so that memory holds the model and one tensor more. It may be a
    part of the whole: only what it has is read. ``dtype`` None keeps the stored one. A tensor of our own format that
    needs neither another dtype nor another device stays memory-mapped (private, copy on write: training may change
    it, the file stays as it is). Raises ``CheckpointError`` for a missing or misshaped tensor.
    """
    target = resolve_dtype(dtype) if dtype is not None else None
    names = set(source.names())
    for name, own in [*network.named_parameters(), *network.named_buffers()]:
        if name not in names:
            hint = "it is quantized; take the one that it was made from" if source.config.quantization else None
            raise CheckpointError(f"the checkpoint has no tensor `{name}`", hint=hint, key=name)
        loaded = source.tensor(name)
        check_shape(None, name, tuple(loaded.shape), tuple(own.shape))
        owner, _, leaf = name.rpartition(".")
        if isinstance(own, nn.Parameter):
            loaded = nn.Parameter(loaded.to(device=device, dtype=target), requires_grad=own.requires_grad)
        else:  # codes and scales are what they are
            loaded = loaded.to(device=device)
        setattr(network.get_submodule(owner), leaf, loaded)
    return network


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of a name; None: a GPU where there is one. Raises ``InputError`` for one that this machine lacks."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch: unknown name, or built without it
        raise InputError(f"this machine has no device `{device}`", hint="use `cpu`", key="device") from error
    return found


class _WithoutInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are. PyTorch would import a second of compiler to "fill" tensors without memory."""

    _FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def empty_network(config: ModelConfig) -> GLM130B:
    """The network on the meta device: names and shapes without memory, at any size in milliseconds."""
    with torch.device("meta"), _WithoutInitialisation():
        network = GLM130B(config)
        if config.quantization is not None:
            place_quantized(network, config.quantization)
        return network


def load_network(source: ModelSource, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> GLM130B:
    """The network of a source, in evaluation mode, on the given device and in the given dtype (None: as stored)."""
    return load_into(empty_network(source.config), source, dtype, device).eval()


def network_from_state(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> GLM130B:
    """A network from tensors under original names, with or without ``transformer.``; the tensors are copied.

    Raises ``CheckpointError`` naming a missing, unknown or misshaped tensor.
    """
    return load_network(StateSource(config, tensors), dtype, device)


def convert_source(
    source: ModelSource,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = "float16",
    tokenizer: SavableTokenizer | str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    replace: bool = False,
    progress: Callable[[int, int], Any] | None = None,
    scheme: QuantizationScheme | None = None,
    calibration: Sequence[CalibrationSample] = (),
) -> list[LayerError]:
    """Write a source as a folder of our own format, a slice of a tensor in memory at a time; see ``save_checkpoint``.

    ``tokenizer`` None takes the source's own. ``progress(done, total)`` is called after each tensor. ``scheme`` quantizes
    the layers' matrices on the way; what that did to each is returned. With ``calibration`` samples that is done by GPTQ, a
    layer in memory at a time. Raises ``ConfigError`` for a source that is quantized already, or groups that do not divide
    its rows.
    """
    config, errors = source.config.quantized(scheme), list[LayerError]()
    shapes = expected_tensors(source.config)

    def tensors() -> Iterator[tuple[str, int, Tensor]]:
        names = source.names()
        gptq = None
        if scheme is not None and calibration:
            gptq = quantize_layers(empty_network(source.config).eval(), source.tensor, calibration, scheme)
        for done, name in enumerate(names, 1):
            own, slices = scheme_of(name, scheme), row_slices(shapes[name].shape)
            if own is None:
                for start, stop in slices:
                    yield name, start, source.rows(name, start, stop)
            elif gptq is not None and name.startswith("layers."):
                error, parts = next(gptq)  # of the next matrix, under its own name
                yield from ((f"{error.name}.{part}", 0, tensor) for part, tensor in parts.items())
                errors.append(error)
            else:
                matrix = _Slices(name.removesuffix(".weight"))
                for start, stop in slices:
                    yield from matrix.quantize(start, source.rows(name, start, stop), own)
                errors.append(matrix.error())
            if progress is not None:
                progress(done, len(names))

    save_checkpoint(
        folder,
        config,
        tensors(),
        tokenizer=tokenizer if tokenizer is not None else source.tokenizer_path,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        replace=replace,
    )
    return errors


def row_slices(shape: Sequence[int], numbers: int = SLICE) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a tensor, so many numbers at most where a row is not more than that."""
    rows = max(numbers // max(torch.Size(shape[1:]).numel(), 1), 1)
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


class _Slices:
    """A matrix that is quantized a slice of its rows at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._difference = self._size = 0.0
        self._bytes = 0

    def quantize(self, start: int, exact: Tensor, scheme: QuantizationScheme) -> Iterator[tuple[str, int, Tensor]]:
        """The parts of some rows, under their names."""
        made = quantize_matrix(exact, scheme)
        parts = stored_parts(made, scheme)
        self._difference += float((made.dequantize().float() - exact.float()).square().sum(dtype=torch.float64))
        self._size += float(exact.float().square().sum(dtype=torch.float64))
        self._bytes += sum(part.nbytes for part in parts.values())
        for part, tensor in parts.items():
            yield f"{self.name}.{part}", start, tensor

    def error(self) -> LayerError:
        """What it did to the whole matrix."""
        return LayerError(self.name, (self._difference / max(self._size, 1e-60)) ** 0.5, self._bytes)
