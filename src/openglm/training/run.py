"""A training run from a recipe to a checkpoint, on one process or many; `glm train` is a thin door to ``train``."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openglm.checkpoints import expected_shapes, load_into, save_checkpoint
from openglm.checkpoints.format import check_shape
from openglm.config import ModelConfig
from openglm.data.loader import Loader, Rows
from openglm.data.mixture import Mixture
from openglm.data.readers import find_files
from openglm.data.schedule import values_of
from openglm.data.shards import INDEX, Shard, check_sources, digest, open_shards, write_shards
from openglm.errors import CheckpointError, ConfigError, DataError, TrainingError
from openglm.kernels.compiled import why_not
from openglm.models.glm130b import GLM130B
from openglm.parallel.execution import Execution
from openglm.parallel.stage import fill, parallelize
from openglm.parallel.tensor import local
from openglm.storage import exclusive, remove
from openglm.tokenizers import load_tokenizer
from openglm.training.first_weights import first_weights
from openglm.training.metrics import Recorder, stragglers
from openglm.training.model import MasterWeights, ShardedModel, TrainingModel
from openglm.training.ranks import Ranks, check_batch, connect
from openglm.training.recipe import Recipe, batch_size
from openglm.training.snapshots import Progress, Snapshots, identity
from openglm.training.stability import Edits
from openglm.training.step import StepResult, Trainer
from openglm.training.trackers import Trackers, check_trackers
from openglm.training.validation import Validator
from openglm.version import __version__

#: Bytes of token shards from which on comparing them with their checksums is told.
LARGE = 4_000_000_000

#: Called after every step with the progress, the step's result, and tokens a second.
Watcher = Callable[[Progress, StepResult, float], None]


def prepare_data(recipe: Recipe, out: Path, ranks: Ranks, log: Callable[[str], None]) -> list[Shard]:
    """Token shards of the recipe's corpus, made once below ``out``. The corpus may also be a folder of shards."""
    if not recipe.data.corpus:
        raise DataError("the recipe names no training data", hint="give a folder with --data")
    if not recipe.data.tokenizer:
        raise DataError("the recipe names no tokenizer", hint="give one with --tokenizer, or make one: glm tokenizer train")
    corpus = Path(recipe.data.corpus)
    folder = corpus
    if not (corpus / INDEX).is_file():
        folder = out / "tokens"
        ranks.together(lambda: _tokenize(corpus, folder, recipe.data.tokenizer, log) if ranks.lead else None)

    def read() -> list[Shard]:
        if folder != corpus:
            check_sources([corpus], folder)
        return open_shards(folder, recipe.data.tokenizer)

    shards = ranks.together(read)
    if recipe.data.verify:
        size = sum(shard.info.tokens * shard.tokens.itemsize for shard in shards)
        if size > LARGE:
            log(f"comparing {size / 1e9:.0f} GB of token shards with their checksums (data.verify = false leaves it out)")

        def verify() -> None:  # each process its share
            for shard in shards[ranks.rank :: ranks.layout.world_size]:
                shard.verify(folder)

        ranks.together(verify)
    return shards


def _tokenize(corpus: Path, folder: Path, tokenizer: str, log: Callable[[str], None]) -> None:
    """Make the shards if they are not there. Nothing stays of those that cannot be made."""
    if (folder / INDEX).is_file():
        return
    files = find_files([corpus])
    log(f"tokenizing {len(files)} files of `{corpus}`")
    made = folder if folder.parent.exists() else folder.parent
    try:
        if not any(info.tokens for info in write_shards([corpus], folder, tokenizer, log=log)):
            raise DataError(f"the corpus `{corpus}` is empty: its files hold no document", path=corpus)
    except BaseException:
        remove(made)
        raise


def _idle_patterns(recipe: Recipe, sources: Sequence[str]) -> Iterator[str]:
    """A line for the patterns of ``data.weights`` and ``data.caps`` that fit no source: a recipe may serve several corpora."""
    for key, patterns in (("weights", recipe.data.weights), ("caps", recipe.data.caps)):
        idle = []
        for pattern in patterns:
            if not fnmatch.filter(sources, pattern):
                near = difflib.get_close_matches(pattern, sources, n=1, cutoff=0.75)
                idle.append(f"`{pattern}`" + (f" (did you mean `{near[0]}`?)" if near else ""))
        if idle:
            yield f"no source of the training data fits {', '.join(idle)} in data.{key}"


def configure(recipe: Recipe, vocab_size: int, special: dict[str, int], learned: tuple[str, ...]) -> ModelConfig:
    """The network's configuration with the tokenizer's ids and the kinds of blanks that the samples hold."""
    config = recipe.model.config()
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} pieces, more than the network's vocabulary of {config.vocab_size}",
            hint="set model.changes.vocab_size or train a smaller tokenizer",
            key="vocab_size",
        )
    own = {name: token for name, token in special.items() if name != "unk"}
    return dataclasses.replace(config, special_tokens=own, learned_masks=learned)


def build_model(
    recipe: Recipe, config: ModelConfig, mixture: Mixture, ranks: Ranks, log: Callable[[str], None] = lambda _: None
) -> TrainingModel:
    """The network with its first weights, ready to train on this process's place in the layout."""
    device = recipe.run.device
    why = _why_not_compile(recipe, ranks) if recipe.run.compile else None
    if why:
        log(f"the layers are not compiled: {why}")
    compile = recipe.run.compile and why is None
    source = first_weights(recipe, config, mixture)
    with torch.device("meta"):  # each process fills its part of every tensor in turn, and never holds the whole network
        network = GLM130B(config)
    if ranks.mesh is None:
        network = load_into(network, source, "float32", device)
        return MasterWeights(network, recipe.run.precision, compile=compile, recompute=recipe.parallel.recompute)
    p = recipe.parallel
    stage = parallelize(
        network,
        ranks.layout,
        ranks.mesh,
        precision=recipe.run.precision,
        recompute=p.recompute,
        reshard=p.reshard,
        compile=compile,
    )
    stage.to_empty(device=device)

    def whole(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = source.tensor(name).float()
        check_shape(None, name, tuple(tensor.shape), shape)
        return tensor

    fill(stage, whole)
    dtype = getattr(torch, recipe.run.precision)
    execution = Execution(stage, ranks.layout, ranks.mesh, dtype, timedelta(seconds=p.timeout))
    return ShardedModel(execution, ranks.stopwatch)


def _why_not_compile(recipe: Recipe, ranks: Ranks) -> str | None:
    """None if the layers can be compiled, else the reason; the same on every process."""
    if ranks.layout.tensor > 1:
        return "torch.compile does not go together with tensor parallelism"
    o = recipe.optimizer
    if max(*values_of(o.hidden_dropout), *values_of(o.attention_dropout), 0.0) > 0:
        return "compiled dropout would draw other masks, and compile anew with every change of a schedule"
    return next((why for why in ranks.gather(why_not(recipe.run.device)) if why), None)


class Run:
    """A run in its folder: builds everything, resumes, steps, answers to spikes, saves."""

    def __init__(
        self, recipe: Recipe, out: Path, ranks: Ranks, held: contextlib.ExitStack, *, fresh: bool, log: Callable[[str], None]
    ) -> None:
        self.recipe, self.out, self.ranks = recipe, out, ranks
        self.log = log if ranks.lead else lambda _: None
        check_batch(recipe, ranks.layout)
        there = ranks.told(out.exists())
        if there:  # else nothing is made before the data is known to be good
            _hold(out, ranks, held)
        shards = prepare_data(recipe, out, ranks, self.log)
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        validation = [shard for shard in shards if shard.info.name.startswith("validation")]
        training = [shard for shard in shards if not shard.info.name.startswith("validation")]
        for line in _idle_patterns(recipe, [shard.info.name for shard in training]):
            self.log(line)
        self.mixture = Mixture(
            training,
            self.tokenizer,
            recipe.objectives,
            seed=recipe.run.seed,
            weights=recipe.data.weights,
            caps=recipe.data.caps,
        )
        special = dict(self.tokenizer.special_tokens)
        self.config = configure(recipe, self.tokenizer.vocab_size, special, self.mixture.masks)
        self.rows = Rows(recipe.run.micro_tokens, recipe.objectives.long_window if recipe.run.aggregate else 0)
        self.validator = Validator(validation, self.tokenizer, windows=recipe.run.validation_windows)
        model = build_model(recipe, self.config, self.mixture, ranks, self.log)
        self.trainer = Trainer(model, recipe, ranks, Edits() if fresh else Edits.load(out / "edits.json"))
        self.progress = Progress()
        self.made_with = {"openglm": __version__, "torch": str(torch.__version__), "shards": digest(shards)}
        if not there:
            _hold(out, ranks, held)
        if fresh:
            self.mixture.sample(0)  # schedules may leave no source there: the last that an input can do wrong
            ranks.together(lambda: _clear(out) if ranks.lead else None)
        r = recipe.run
        self.snapshots = Snapshots(
            out / "snapshots",
            ranks,
            keep=r.keep_snapshots,
            keep_every=r.keep_every,
            model=identity(self.config, recipe.data.tokenizer),
        )
        resumed = self._resume()
        self.snapshots.clean()
        trackers = Trackers(r.trackers, out, recipe.to_dict(), self.log) if ranks.lead else None
        self.recorder = ranks.together(lambda: Recorder(out, ranks.lead, from_samples=self.progress.samples, trackers=trackers))
        if resumed:
            self.recorder.note("resume", self.progress.samples, **resumed)
        self._tell_damaged()
        self.loader = Loader(self.mixture, self.rows, ranks.data_rank, ranks.layout.data)

    def _resume(self) -> dict[str, Any]:
        """Take up the newest snapshot; returns which one and what changed since, nothing where there is none."""
        found = self.snapshots.newest()
        if found is None:
            return {}
        path, state = found
        self._take_up(path, state)
        self.log(f"resumed from `{path.name}`: {self.progress.samples:,} samples, {self.progress.tokens:,} tokens")
        before = state.get("made_with", self.made_with)  # older snapshots do not say
        changes = [*_changes(state["recipe"], self.recipe.to_dict(), Recipe().to_dict()), *_changes(before, self.made_with, {})]
        for change in changes:
            self.log(f"changed since then: {change}")
        return {"snapshot": path.name, "changes": changes}

    def _take_up(self, path: Path, state: dict[str, Any]) -> None:
        self.progress = self.snapshots.load(path, state, self.trainer.model, self.trainer.optimizer)
        try:
            self.trainer.restore(state["trainer"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"`{path / 'state.json'}` is not what a run wrote there: its `trainer` cannot be read",
                hint="remove this snapshot to go on from the one before",
                path=path,
                key="trainer",
            ) from error

    def _tell_damaged(self) -> None:
        for name in self.snapshots.damaged:
            self.log(f"the snapshot `{name}` is damaged and was passed over")
            self.recorder.note("damaged", self.progress.samples, why=f"the snapshot `{name}` was passed over")

    def _check_weights(self) -> None:
        """Raise ``TrainingError`` on all processes if a weight is not finite: such weights are never written."""
        weights = self.trainer.model.weights().items()
        own = next((name for name, weight in weights if not local(weight.detach()).isfinite().all()), None)
        for name in self.ranks.gather(own):
            if name is not None:
                raise TrainingError(
                    f"the weights are not finite at sample {self.progress.samples:,} (`{name}`), so they are not saved",
                    hint="lower optimizer.learning_rate, and run the same command: it goes on from the last snapshot",
                    key="optimizer",
                )

    def save(self) -> None:
        """Begin a snapshot of where the run stands."""
        self._check_weights()
        state = {"recipe": self.recipe.to_dict(), "made_with": self.made_with, "trainer": self.trainer.state()}
        self.snapshots.save(self.trainer.model, self.trainer.optimizer, self.progress, state)

    def validate(self) -> dict[str, float]:
        """Bits per byte by language."""
        model = self.trainer.model
        model.network.eval()
        try:
            return self.validator(model.losses)
        finally:
            model.network.train()

    def following(self, samples: int) -> int:
        """The next sample that neither an intervention nor the recipe leaves out."""
        return self.trainer.edits.position(samples, self.recipe.data.skip)

    def _size(self, samples: int) -> int:
        """Samples of the step that begins there: none that is left out is among them."""
        room = self.trainer.edits.room(samples, self.recipe.data.skip)
        return int(max(min(batch_size(self.recipe, samples), room), 0))

    def steps(self, stop: Callable[[], bool], watch: Watcher | None) -> None:
        """Train until the recipe's samples are done or ``stop`` says so."""
        r, progress, stopwatch = self.recipe.run, self.progress, self.ranks.stopwatch
        last = time.monotonic()
        while (position := self.following(progress.samples)) < r.samples:
            if position != self.trainer.edits.position(progress.samples):
                self.recorder.note("left_out", progress.samples, until=position)
                self.log(f"samples {progress.samples:,} to {position:,} are left out: data.skip")
            size = self._size(position)
            following = self.following(position + size)
            stopwatch.begin()
            batch = self.loader.batch(position, size, (following, self._size(following)) if following < r.samples else None)
            logged = (progress.steps + 1) % r.log_every == 0
            result = self.trainer.step(batch, self.rows, measure_updates=logged)
            stopwatch.end()
            now = time.monotonic()
            taken, last = now - last, now
            if result.verdict != "step" or result.why:
                self.recorder.note(result.verdict, position, why=result.why, loss=result.loss, norm=result.gradient_norm)
                if result.verdict != "step":
                    self.log(f"sample {position:,}: {result.verdict}, {result.why}")
            if result.alarm:
                self.recorder.note("alarm", position, why=result.alarm)
                self.log(f"sample {position:,}: {result.alarm}")
            if result.verdict == "rollback":
                self._roll_back(position + size)
                progress = self.progress
                last = time.monotonic()
                continue
            progress.samples = position + size
            progress.steps += 1
            progress.tokens += result.tokens
            progress.targets += result.targets
            progress.seconds += taken
            speed = result.tokens / taken
            done = following >= r.samples
            stopping = self.ranks.told(stop())
            saving = progress.steps % r.snapshot_every == 0 or done or stopping
            self.recorder.step(progress, result, taken)
            if progress.steps % r.validate_every == 0 or done or stopping:
                progress.validation = self.validate()
            if watch and self.ranks.lead:
                watch(progress, result, speed)
            if logged or saving:  # what a snapshot holds is in the metrics, too
                times = self.ranks.gather(stopwatch.mean())
                slow = stragglers(times, self.ranks.layout, self.config.num_layers)
                self.recorder.row(progress, result, speed, times, slow)
            if saving:
                self.save()
            last = time.monotonic()  # validation and snapshots are not training time
            if stopping:
                break

    def _roll_back(self, end: int) -> None:
        """Return to the last snapshot before the trouble, and edit what lies ahead as the recipe's policy says."""
        policy, edits, guard = self.recipe.stability, self.trainer.edits, self.trainer.guard
        edits.rollbacks += 1
        suspect = guard.suspect if guard.suspect is not None else end
        found = self.snapshots.newest(at_most=suspect)
        if found is None or edits.rollbacks > policy.most_rollbacks:
            reason = "there is no snapshot before it" if found is None else f"rolled back {policy.most_rollbacks} times already"
            raise TrainingError(
                f"the run diverges at sample {suspect:,}, and {reason}",
                hint="lower optimizer.learning_rate or look at the data there, and run the same command: it resumes",
                key="stability",
            )
        path, state = found
        self._take_up(path, state)
        self.snapshots.forget_after(self.progress.samples)
        start = self.progress.samples
        self.recorder.rewind(start)
        if policy.skip_samples:
            edits.skipped.append((start, end))
        edits.shrink *= policy.shrink
        if policy.rewarm_samples:
            edits.rewarm.append((self.following(start), policy.rewarm_samples))
        if self.ranks.lead:
            edits.save(self.out / "edits.json")
        self.recorder.note("rollback", suspect, to=path.name, **dataclasses.asdict(edits))
        self._tell_damaged()
        left_out = f", leaving out samples {start:,} to {end:,}" if policy.skip_samples else ""
        self.log(f"rolled back to `{path.name}`{left_out}")

    def export(self) -> Path:
        """Write the weights as a float16 checkpoint to ``out/model``, one whole tensor in memory at a time."""
        self._check_weights()
        target, weights = self.out / "model", self._whole_weights()

        def write() -> None:
            try:
                if self.ranks.lead:
                    save_checkpoint(target, self.config, weights, tokenizer=self.tokenizer, dtype="float16", replace=True)
            finally:
                for _ in weights:  # whatever happens to the lead, the others hand theirs in
                    pass

        self.ranks.together(write)
        return target

    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of every weight, on the lead; the other processes hand in theirs, stage by stage."""
        ranks, own = self.ranks, self.trainer.model.whole_weights()
        names = ranks.gather(list(self.trainer.model.weights()))
        shapes, seen = expected_shapes(self.config), set[str]()
        each = ranks.layout.data * ranks.layout.tensor
        for first in range(0, len(names), each):  # the first process of each stage speaks for it
            for name in names[first]:
                tensor = next(own)[1].cpu() if first <= ranks.rank < first + each else None
                if name not in seen:  # the tied matrix is at both ends
                    tensor = ranks.to_lead(first, tensor, shapes[name])
                    if tensor is not None:
                        yield name, tensor
                seen.add(name)

    def close(self) -> None:
        """End threads and files."""
        self.loader.close()
        self.recorder.close()
        self.snapshots.close()


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    fresh: bool = False,
    stop_after: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = print,
    watch: Watcher | None = None,
) -> Path:
    """Train until the recipe's samples are done; returns the folder of the finished checkpoint, ``out/model``.

    Under torchrun every process calls it, and the recipe's [parallel] says who does what. Resumes from the newest
    snapshot in ``out``; ``fresh`` removes what is there, once data, tokenizer and network are known to be good.
    ``stop_after``: seconds after which to save a snapshot and stop; ``should_stop``: asked after each step, True does the
    same. The checkpoint is written from wherever the run stands. Metrics go to ``out/metrics.jsonl``, interventions to
    ``out/events.jsonl``. An ``OpenGLMError`` of one process is raised on all.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    check_trackers(recipe.run.trackers)
    ranks = connect(recipe)
    with ranks.named_if_silent(), contextlib.ExitStack() as held:
        run = Run(recipe, Path(out), ranks, held, fresh=fresh, log=log)
        try:
            left = recipe.run.samples - run.progress.samples
            run.log(f"{run.config.parameter_count:,} parameters, {left:,} samples to go")
            began = time.monotonic()

            def stop() -> bool:
                return should_stop() or (stop_after is not None and time.monotonic() - began > stop_after)

            run.steps(stop, watch)
            if run.following(run.progress.samples) < recipe.run.samples:
                run.log(f"stopped after {time.monotonic() - began:.0f} s; the same command goes on from here")
            return run.export()
        finally:
            run.close()


def _clear(out: Path) -> None:
    """Remove what an earlier run left; its last model stays until this one has its own."""
    for name in ("snapshots", "metrics.jsonl", "events.jsonl", "edits.json", "tensorboard"):
        remove(out / name)


def _hold(out: Path, ranks: Ranks, held: contextlib.ExitStack) -> None:
    """Two runs in one folder would remove each other's snapshots. All processes raise if another run has it."""
    hint = "wait until it has ended, or give another --out"
    ranks.together(lambda: held.enter_context(exclusive(out, hint)) if ranks.lead else None)


def _changes(old: dict[str, Any], new: dict[str, Any], default: dict[str, Any], path: str = "") -> Iterator[str]:
    """Keys of a recipe that differ, as ``section.key: old -> new``. One that an older program did not know has its default."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, default.get(key)), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, default.get(key, {}), f"{path}{key}.")
        elif before != after:
            yield f"{path}{key}: {before} -> {after}"
