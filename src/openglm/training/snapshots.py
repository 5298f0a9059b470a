"""Snapshots: the state of a run, to resume it. Whole or absent, with checksums; the newest that verifies is taken.

    SNAPSHOT/tensors/     PyTorch's Distributed Checkpoint: float32 master weights and the moments, cut as the run was
    SNAPSHOT/state.json   samples and tokens so far, loss scale, the recipe, of which model, and the SHA-256 of every file

They load on any other layout: tensors are stored by their names in the network, and GeGLU's first matrix as pairs of
rows. Random state is not stored: every sample, and every dropout mask, is a function of the seed and a number.

Distributed Checkpoint has no commit and reads no checksum (a flipped bit loads silently), hence ours around it.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save

from openglm.config import ModelConfig
from openglm.errors import CheckpointError, StorageError
from openglm.parallel.tensor import is_paired
from openglm.storage import atomic_folder, remove, sha256
from openglm.training.model import MasterWeights, TrainingModel
from openglm.training.optimizer import Optimizer, moments
from openglm.training.ranks import Ranks

FORMAT_VERSION = 2
_NAME = re.compile(r"samples-(\d{10})")


@dataclass
class Progress:
    """How far a run has come."""

    samples: int = 0
    """Position in the order of samples, those that were left out included."""
    steps: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)


#: Fields of ``ModelConfig`` that a run may change: the weights fit and compute the same without them.
_FREE = ("max_sequence_length", "special_tokens", "learned_masks", "quantization")


def identity(config: ModelConfig, tokenizer: str | Path) -> dict[str, Any]:
    """What makes weights those of one model: the numbers of the network, and the SHA-256 of the tokenizer's file."""
    numbers = {key: value for key, value in config.to_dict().items() if key not in _FREE}
    return {**numbers, "tokenizer_sha256": sha256(tokenizer)}


class Snapshots:
    """The snapshots of a run, in one folder. ``save`` returns once the state is copied; writing goes on beside the run.

    ``model``: of which they are (``identity``); one that says it is of another is refused.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, *, keep: int, keep_every: int = 0, model: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.ranks, self.keep, self.keep_every = folder, ranks, keep, keep_every
        self.model = dict(model or {})
        self.damaged: list[str] = []
        """Names of those that the last ``newest`` passed over; on the lead."""
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, model: TrainingModel, optimizer: Optimizer, progress: Progress, state: dict[str, Any]) -> None:
        """Begin ``samples-NNNNNNNNNN``; waits for the one before. ``state``: plain values that ``load`` returns."""
        self.wait()
        target = self.folder / f"samples-{progress.samples:010d}"
        stack = contextlib.ExitStack()
        temporary = stack.enter_context(atomic_folder(target, replace=True)) if self.ranks.lead else None
        temporary = Path(self.ranks.told(temporary))
        tensors = _tensors(model, optimizer, saving=True)
        single = self.ranks.mesh is None
        _hush()
        try:
            written = async_save(tensors, checkpoint_id=temporary / "tensors", process_group=self.ranks.writing, no_dist=single)
        except BaseException:
            stack.__exit__(*sys.exc_info())
            raise
        whole = {"format_version": FORMAT_VERSION, "progress": asdict(progress), "model": self.model, **state}
        self._writing = self._pool.submit(self._finish, written, temporary, stack, whole)  # pyright: ignore[reportArgumentType]

    def _finish(self, written: Future[Any], temporary: Path, stack: contextlib.ExitStack, state: dict[str, Any]) -> None:
        with stack:
            try:
                written.result()
            except CheckpointException as error:  # derives from BaseException
                cause = next(iter(error.failures.values()), (error, None))[0]
                raise StorageError(f"cannot write the snapshot `{temporary.parent}`: {cause}", path=temporary) from error
            self.ranks.barrier(writing=True)
            if self.ranks.lead:
                files = sorted(path for path in (temporary / "tensors").iterdir() if path.is_file())
                state["sha256"] = {f"tensors/{path.name}": sha256(path) for path in files}
                (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        if self.ranks.lead:
            self._prune()

    def wait(self) -> None:
        """Until what ``save`` began is on disk under its name. Raises what went wrong there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _all(self) -> list[Path]:
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)) if self.folder.is_dir() else []

    def _prune(self) -> None:
        names = self._all()
        kept: set[int] = set()
        for path in names[: -self.keep]:
            samples = int(path.name.rpartition("-")[2])
            # Of each stretch of `keep_every` samples the first snapshot stays.
            if self.keep_every and samples // self.keep_every not in kept:
                kept.add(samples // self.keep_every)
            else:
                remove(path)

    def forget_after(self, samples: int) -> None:
        """Remove snapshots of more than ``samples``: they are on the wrong side of a spike."""
        self.wait()
        if self.ranks.lead:
            for path in self._all():
                if int(path.name.rpartition("-")[2]) > samples:
                    remove(path)
        self.ranks.barrier()

    def newest(self, at_most: int | None = None) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole snapshot and its state, of at most so many samples; None if there is none. A collective.

        Raises ``CheckpointError`` if there are some but all are damaged, or the newest whole one has another format.
        """
        self.wait()
        return self.ranks.told(self.ranks.together(lambda: self._newest(at_most) if self.ranks.lead else None))

    def _newest(self, at_most: int | None) -> tuple[Path, dict[str, Any]] | None:
        self.damaged = []
        for path in reversed(self._all()):
            if at_most is None or int(path.name.rpartition("-")[2]) <= at_most:
                state = _verified(path)
                if state is not None:
                    return path, state
                self.damaged.append(path.name)
        if self.damaged:
            raise CheckpointError(
                f"every snapshot in `{self.folder}` is damaged ({', '.join(self.damaged)})",
                hint="put a whole one there, or start anew with --fresh",
                path=self.folder,
            )
        return None

    def clean(self) -> None:
        """Remove what a killed process left half written."""
        if self.ranks.lead and self.folder.is_dir():
            for path in self.folder.glob(".samples-*.part"):
                remove(path)

    def load(self, path: Path, state: dict[str, Any], model: TrainingModel, optimizer: Optimizer) -> Progress:
        """Put a snapshot's weights and moments in place. Raises ``CheckpointError`` if it is of another model."""
        tensors = _tensors(model, optimizer, saving=False)
        names = {name for names in self.ranks.gather(list(tensors)) for name in names}
        self.ranks.together(lambda: self._fit(path, state, tensors, names))
        _hush()
        try:
            load_tensors(
                tensors,
                checkpoint_id=path / "tensors",
                process_group=self.ranks.writing,
                no_dist=self.ranks.mesh is None,
            )
        except CheckpointException as error:
            raise CheckpointError(f"cannot read the snapshot `{path}`: {error}", path=path) from error
        model.publish()
        return Progress(**state["progress"])

    def _fit(self, path: Path, state: dict[str, Any], tensors: dict[str, Tensor], names: set[str]) -> None:
        """Leave out of ``tensors`` what a changed optimizer begins anew; raise if the snapshot is of another model.

        ``names``: of the tensors of all processes.
        """
        stored_model = state.get("model", {})  # older snapshots do not say
        for key, value in self.model.items():
            if (there := stored_model.get(key, value)) != value:
                what = "its tokenizer is another one" if key == "tokenizer_sha256" else f"its `{key}` is {there}, not {value}"
                raise _another_model(path, key, what)
        metadata = FileSystemReader(path / "tensors").read_metadata().state_dict_metadata
        for name in metadata:
            if name.startswith("weights/") and name not in names:
                raise _another_model(path, name, f"this one has no `{name.partition('/')[2]}`")
        for name, tensor in list(tensors.items()):
            stored = metadata.get(name)
            kind, _, rest = name.partition("/")
            if stored is None and kind == "optimizer" and f"weights/{rest.rpartition('/')[0]}" in metadata:
                del tensors[name]  # the optimizer was changed: its moments begin at zero
            elif stored is None or tuple(getattr(stored, "size", ())) != tuple(tensor.shape):
                raise _another_model(path, name, f"`{name.partition('/')[2]}` does not fit")


def _another_model(path: Path, key: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"the snapshot `{path}` is of another model: {what}",
        hint="give another --out, or --fresh to start anew",
        path=path,
        key=key,
    )


def _hush() -> None:
    # Distributed Checkpoint warns, in its own thread, that a process alone is alone.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _verified(path: Path) -> dict[str, Any] | None:
    """The state of a snapshot whose checksums hold, else None. Raises ``CheckpointError`` for one of another format."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version = int(state.get("format_version", 1))
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"the snapshot `{path}` has format {version}, newer than this program's {FORMAT_VERSION}",
                hint="update openglm",
                path=path,
            )
        if version < FORMAT_VERSION:
            raise CheckpointError(
                f"the snapshot `{path}` has format {version}; this program reads {FORMAT_VERSION}",
                hint="go on from the run's model: --set model.initial=RUN/model with another --out; or --fresh to start anew",
                path=path,
            )
        Progress(**state["progress"])
        parts = (state["recipe"], state["trainer"], state.get("model", {}), state.get("made_with", {}))
        if all(isinstance(part, dict) for part in parts) and _sums_hold(path, state["sha256"]):
            return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StorageError):
        return None
    return None


def _sums_hold(path: Path, sums: dict[str, str]) -> bool:
    return bool(sums) and all(sha256(path / name) == digest for name, digest in sums.items())


def _tensors(model: TrainingModel, optimizer: Optimizer, *, saving: bool) -> dict[str, Tensor]:
    """Name to tensor of all that a snapshot holds; the tensors themselves, so that loading fills them in place."""
    tensors: dict[str, Tensor] = {}
    plain = isinstance(model, MasterWeights)
    first = plain or getattr(model.network, "first", True)
    for name, parameter in model.weights().items():
        if saving and name.startswith("word_embeddings") and not first:
            continue  # the last stage's copy of the tied matrix

        def shaped(tensor: Tensor, name: str = name) -> Tensor:
            if plain and tensor.dim() and is_paired(name):
                return tensor.unflatten(0, (2, -1)).transpose(0, 1)  # a view: loading writes through it
            return tensor

        tensors[f"weights/{name}"] = shaped(parameter.detach())
        for key, moment in moments(optimizer, parameter).items():
            tensors[f"optimizer/{name}/{key}"] = shaped(moment)
    return tensors
