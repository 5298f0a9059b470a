"""A training run from a recipe to a checkpoint; `glm train` is a thin door to ``train``."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from openglm.checkpoints import load_into, open_model, save_checkpoint
from openglm.config import ModelConfig
from openglm.data.loader import batches
from openglm.data.mixture import Mixture
from openglm.data.readers import find_files
from openglm.data.shards import INDEX, Shard, check_sources, open_shards, write_shards
from openglm.errors import ConfigError, DataError
from openglm.models.glm130b import GLM130B
from openglm.storage import Journal, remove
from openglm.tokenizers import load_tokenizer
from openglm.training.head_start import give_head_start
from openglm.training.recipe import Recipe
from openglm.training.snapshots import Progress, load_snapshot, newest_snapshot, save_snapshot
from openglm.training.step import MasterWeights, StepResult, make_optimizer, train_step
from openglm.training.validation import Validator

#: Samples whose targets are counted for ``model.head_start``.
HEAD_START_SAMPLES = 4_000

#: Called after every step with the progress, the step's result, and tokens a second.
Watcher = Callable[[Progress, StepResult, float], None]


def prepare_data(recipe: Recipe, out: Path, log: Callable[[str], None]) -> list[Shard]:
    """Token shards of the recipe's corpus, made once below ``out``. The corpus may also be a folder of shards."""
    if not recipe.data.corpus:
        raise DataError("the recipe names no training data", hint="give a folder with --data")
    if not recipe.data.tokenizer:
        raise DataError("the recipe names no tokenizer", hint="give one with --tokenizer, or make one: glm tokenizer train")
    corpus = Path(recipe.data.corpus)
    if (corpus / INDEX).is_file():
        return open_shards(corpus, recipe.data.tokenizer)
    folder = out / "tokens"
    if not (folder / INDEX).is_file():
        log(f"tokenizing {len(find_files([corpus]))} files of `{corpus}`")
        write_shards([corpus], folder, recipe.data.tokenizer, log=log)
    check_sources([corpus], folder)
    return open_shards(folder, recipe.data.tokenizer)


def _configure(recipe: Recipe, vocab_size: int, special: dict[str, int]) -> ModelConfig:
    config = recipe.model.config()
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} pieces, more than the network's vocabulary of {config.vocab_size}",
            hint="set model.changes.vocab_size or train a smaller tokenizer",
            key="vocab_size",
        )
    own = {name: token for name, token in special.items() if name != "unk"}
    share = recipe.objectives.generation_share
    learned = ("[MASK]", "[gMASK]") if 0 < share < 1 else ("[gMASK]",) if share else ("[MASK]",)
    return dataclasses.replace(config, special_tokens=own, learned_masks=learned)


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

    Resumes from the newest snapshot in ``out``; ``fresh`` removes what is there. ``stop_after``: seconds after which to
    save a snapshot and stop; ``should_stop``: asked after each step, True does the same. The checkpoint is written from
    wherever the run stands. Metrics go to ``out/metrics.jsonl``.
    """
    out = Path(out)
    if fresh:
        remove(out / "snapshots")
        remove(out / "metrics.jsonl")
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    shards = prepare_data(recipe, out, log)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    validation = [shard for shard in shards if shard.info.name.startswith("validation")]
    training = [shard for shard in shards if not shard.info.name.startswith("validation")]
    config = _configure(recipe, tokenizer.vocab_size, dict(tokenizer.special_tokens))
    mixture = Mixture(training, tokenizer, recipe.objectives, seed=recipe.run.seed, weights=recipe.data.weights)
    validator = Validator(validation, tokenizer, windows=recipe.run.validation_windows)

    network = GLM130B(config).initialize(recipe.run.seed)
    if recipe.model.initial:
        load_into(network, open_model(recipe.model.initial), "float32", "cpu")
    elif recipe.model.head_start:
        give_head_start(network, mixture.target_counts(HEAD_START_SAMPLES, config.vocab_size), recipe.model.embedding_scale)
    network.input_gradient_factor = recipe.optimizer.input_gradient_factor
    network.output_gradient_factor = recipe.optimizer.output_gradient_factor
    network.to(recipe.run.device)
    master = MasterWeights(network, recipe.run.precision)
    optimizer = make_optimizer(master, recipe)
    progress = Progress()
    found = newest_snapshot(out / "snapshots")
    if found is not None:
        progress = load_snapshot(found[0], master, optimizer, found[1])
        log(f"resumed from `{found[0].name}`: {progress.samples:,} samples, {progress.tokens:,} tokens")
        for change in _changes(found[1]["recipe"], recipe.to_dict()):
            log(f"changed since then: {change}")

    def sizes() -> Iterator[int]:
        left = recipe.run.samples - progress.samples
        while left > 0:
            yield min(recipe.run.batch_size, left)
            left -= recipe.run.batch_size

    def snapshot() -> None:
        save_snapshot(out / "snapshots", master, optimizer, progress, recipe.to_dict(), recipe.run.keep_snapshots)

    log(f"{config.parameter_count:,} parameters, {recipe.run.samples - progress.samples:,} samples to go")
    began, last = time.monotonic(), time.monotonic()
    with Journal(out / "metrics.jsonl") as metrics:
        for batch in batches(mixture, progress.samples, sizes(), recipe.run.micro_tokens):
            result = train_step(network, master, optimizer, batch, recipe)
            if not math.isfinite(result.loss):
                raise ConfigError(
                    f"the loss is {result.loss} at step {progress.steps + 1}",
                    hint="lower optimizer.learning_rate and run the same command: it resumes from the last snapshot",
                    key="optimizer.learning_rate",
                )
            now = time.monotonic()
            speed = batch.tokens / (now - last)
            progress.samples += sum(len(micro.samples) for micro in batch.micro_batches)
            progress.steps += 1
            progress.tokens += batch.tokens
            progress.targets += batch.targets
            progress.seconds += now - last
            last = now
            done = progress.samples >= recipe.run.samples
            stop = should_stop() or (stop_after is not None and now - began > stop_after)
            if progress.steps % recipe.run.validate_every == 0 or done or stop:
                network.eval()
                progress.validation = validator(network, recipe.run.device)
                network.train()
            if watch:
                watch(progress, result, speed)
            if progress.steps % recipe.run.log_every == 0 or done or stop:
                metrics.append(_row(progress, result, speed))
            if progress.steps % recipe.run.snapshot_every == 0 or done or stop:
                snapshot()
            last = time.monotonic()  # validation and snapshots are not training time
            if stop:
                log(f"stopped after {now - began:.0f} s; the same command goes on from here")
                break
    return export(out, network, master, config, tokenizer)


def _changes(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[str]:
    """Keys of a recipe that differ, as ``section.key: old -> new``."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{path}{key}.")
        elif before != after:
            yield f"{path}{key}: {before} -> {after}"


def export(out: Path, network: GLM130B, master: MasterWeights, config: ModelConfig, tokenizer: Any) -> Path:
    """Write the weights as a float16 checkpoint to ``out/model``."""
    target = out / "model"
    tensors = {name: p.detach().cpu() for name, p in zip(master.names, master.master, strict=True)}
    save_checkpoint(target, config, tensors, tokenizer=tokenizer, dtype="float16", replace=True)
    return target


def _row(progress: Progress, result: StepResult, speed: float) -> dict[str, Any]:
    return {
        "step": progress.steps,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "loss": round(result.loss, 5),
        "losses": {name: round(total / max(count, 1), 4) for name, (total, count) in sorted(result.groups.items())},
        "gradient_norm": round(result.gradient_norm, 4),
        "learning_rate": result.learning_rate,
        "tokens_per_second": round(speed, 1),
        "bits_per_byte": {name: round(value, 4) for name, value in progress.validation.items()},
    }
