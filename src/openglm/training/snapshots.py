"""Snapshots: the state of a run, to resume it. Whole or absent, with checksums; the newest that verifies is taken.

    SNAPSHOT/tensors/     PyTorch's Distributed Checkpoint: float32 master weights and the moments, cut as the run was
    SNAPSHOT/state.json   samples and tokens so far, loss scale, the recipe, and the SHA-256 of every file

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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save

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


class Snapshots:
    """The snapshots of a run, in one folder. ``save`` returns once the state is copied; writing goes on beside the run."""

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int, keep_every: int = 0) -> None:
        self.folder, self.ranks, self.keep, self.keep_every = folder, ranks, keep, keep_every
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
        whole = {"format_version": FORMAT_VERSION, "progress": asdict(progress), **state}
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
        """The newest whole snapshot and its state, of at most so many samples; None if there is none. A collective."""
        self.wait()
        found = None
        if self.ranks.lead:
            for path in reversed(self._all()):
                if at_most is None or int(path.name.rpartition("-")[2]) <= at_most:
                    state = _verified(path)
                    if state is not None:
                        found = (path, state)
                        break
        return self.ranks.told(found)

    def clean(self) -> None:
        """Remove what a killed process left half written."""
        if self.ranks.lead and self.folder.is_dir():
            for path in self.folder.glob(".samples-*.part"):
                remove(path)

    def load(self, path: Path, state: dict[str, Any], model: TrainingModel, optimizer: Optimizer) -> Progress:
        """Put a snapshot's weights and moments in place. Raises ``CheckpointError`` if it is of another network."""
        tensors = _tensors(model, optimizer, saving=False)
        metadata = FileSystemReader(path / "tensors").read_metadata().state_dict_metadata
        for name, tensor in list(tensors.items()):
            stored = metadata.get(name)
            kind, _, rest = name.partition("/")
            if stored is None and kind == "optimizer" and f"weights/{rest.rpartition('/')[0]}" in metadata:
                del tensors[name]  # the optimizer was changed: its moments begin at zero
                continue
            if stored is None or tuple(getattr(stored, "size", ())) != tuple(tensor.shape):
                raise CheckpointError(
                    f"the snapshot `{path}` is of another network: `{name.partition('/')[2]}` does not fit",
                    hint="give another --out, or --fresh to start anew",
                    path=path,
                    key=name,
                )
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


def _hush() -> None:
    # Distributed Checkpoint warns, in its own thread, that a process alone is alone.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _verified(path: Path) -> dict[str, Any] | None:
    """The state of a snapshot whose checksums hold, else None. Raises ``CheckpointError`` for one of another format."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version = state.get("format_version", 1)
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
        if all(sha256(path / name) == digest for name, digest in state["sha256"].items()):
            return state
    except (OSError, ValueError, KeyError, AttributeError, StorageError):
        return None
    return None


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
