"""Recipes: TOML files read into frozen dataclasses. An unknown key names the nearest right one."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openglm.config import ModelConfig
from openglm.data.mixture import Objectives
from openglm.errors import ConfigError


@dataclass(frozen=True)
class ModelSection:
    """[model]: the network."""

    preset: str = "nano"
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``ModelConfig`` that differ from the preset."""
    initial: str = ""
    """Checkpoint folder to start from; empty = fresh weights."""
    head_start: bool = False
    """Fresh weights know the frequencies of single tokens (``training/head_start.py``)."""
    embedding_scale: float = 1.0
    """With ``head_start``: factor on the initial embedding."""

    def config(self) -> ModelConfig:
        """The network's configuration."""
        return ModelConfig.preset(self.preset, **self.changes)


@dataclass(frozen=True)
class DataSection:
    """[data]: where the tokens come from."""

    corpus: str = ""
    """Folder of JSON lines or text; files called validation* are kept for validation. May be given by --data."""
    tokenizer: str = ""
    """Tokenizer file. May be given by --tokenizer."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Pattern of source names to factor on the source's size."""


@dataclass(frozen=True)
class OptimizerSection:
    """[optimizer]: AdamW, its schedules in samples."""

    learning_rate: float = 1e-3
    least_learning_rate: float = 1e-4
    warmup_samples: int = 2_000
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only."""
    clip_norm: float = 1.0
    input_gradient_factor: float = 1.0
    """Embedding gradient shrink, input side (SPEC 2.5)."""
    output_gradient_factor: float = 1.0
    """Embedding gradient shrink, output side of the tied matrix."""


@dataclass(frozen=True)
class RunSection:
    """[run]: how long, how large, how often."""

    samples: int = 100_000
    batch_size: int = 32
    """Samples a step."""
    micro_tokens: int = 4_096
    """Places of one micro-batch, padding included."""
    precision: str = "bfloat16"
    """"bfloat16": a working copy beside float32 master weights; or "float32"."""
    device: str = "cpu"
    seed: int = 1234
    threads: int = 0
    """CPU threads; 0 = torch's choice."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl."""
    snapshot_every: int = 200
    """Steps between two snapshots."""
    validate_every: int = 200
    """Steps between two validations."""
    validation_windows: int = 24
    """Windows per language in a validation during the run."""
    keep_snapshots: int = 2


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    objectives: Objectives = field(default_factory=Objectives)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    run: RunSection = field(default_factory=RunSection)

    def __post_init__(self) -> None:
        self.model.config()  # raises for an unknown preset or field
        _require(self.run.samples >= 1, "run.samples", self.run.samples, "at least 1")
        for name in ("batch_size", "log_every", "snapshot_every", "validate_every", "validation_windows", "keep_snapshots"):
            _require(getattr(self.run, name) >= 1, f"run.{name}", getattr(self.run, name), "at least 1")
        _require(self.run.threads >= 0, "run.threads", self.run.threads, "at least 0 (0 = torch's choice)")
        for key, value in dataclasses.asdict(self.objectives).items():
            if key.endswith(("_share", "_ratio")):
                _require(0 <= value <= 1, f"objectives.{key}", value, "in 0..1")
        # Spans are Poisson numbers of 1 to 39; a mean far from these would be drawn forever.
        _require(0.1 <= self.objectives.mean_span <= 39, "objectives.mean_span", self.objectives.mean_span, "in 0.1..39")
        _require(self.run.precision in ("bfloat16", "float32"), "run.precision", self.run.precision, '"bfloat16" or "float32"')
        _require(0 <= self.optimizer.learning_rate < 1, "optimizer.learning_rate", self.optimizer.learning_rate, "in 0..1")
        longest = max(self.objectives.window, self.objectives.long_window)
        _require(
            longest <= self.model.config().max_sequence_length,
            "objectives.window",
            longest,
            f"at most the model's context of {self.model.config().max_sequence_length}",
        )
        _require(self.objectives.window >= 32, "objectives.window", self.objectives.window, "at least 32")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a snapshot."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _require(holds: bool, key: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"`{key}` is {value!r}, but must be {wanted}", key=key)


def _section(kind: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"`{path}` must be a table of keys", key=path)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    made: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{path}.{key}" if path else key
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"a recipe has no key `{full}`", hint=hint, key=full)
        default = fields[key].default
        if default is dataclasses.MISSING and fields[key].default_factory is not dataclasses.MISSING:
            default = fields[key].default_factory()  # pyright: ignore[reportCallIssue]
        if dataclasses.is_dataclass(default):
            made[key] = _section(type(default), value, full)
        else:
            made[key] = _value(value, default, full)
    return kind(**made)


def _value(value: Any, default: Any, key: str) -> Any:
    if isinstance(default, bool) or isinstance(value, bool):
        good = isinstance(value, bool) and isinstance(default, bool)
    elif isinstance(default, float):
        good, value = isinstance(value, int | float), float(value) if isinstance(value, int) else value
    elif isinstance(default, tuple):
        good, value = isinstance(value, Sequence) and len(value) == len(default), tuple(value)
    elif isinstance(default, Mapping):
        good = isinstance(value, Mapping)
    else:
        good = isinstance(value, type(default))
    if not good:
        raise ConfigError(f"`{key}` is {value!r}, but must be like {default!r}", key=key)
    return value


def read_recipe(path: str | Path | None, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file (None: defaults) with ``section.key=value`` changes on top, values written as in TOML.

    Raises ``ConfigError`` naming the file and key.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the recipe `{path}`: {error.strerror}", path=path) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"`{path}` is not valid TOML: {error}", path=path) from error
    for change in changes:
        name, separator, text = change.partition("=")
        section, _, key = name.strip().partition(".")
        if not separator or not key:
            raise ConfigError(f"`{change}` is not of the form section.key=value", key=change)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        values.setdefault(section, {})[key] = value
    try:
        return _section(Recipe, values, "")
    except ConfigError as error:
        if path is None:
            raise
        raise ConfigError(f"`{path}`: {error.message}", hint=error.hint, path=path, key=error.key) from error


def learning_rate(recipe: Recipe, samples: int) -> float:
    """Rate at a number of samples seen: linear warm-up, then cosine to ``least_learning_rate`` (SPEC 9.1)."""
    o, total = recipe.optimizer, recipe.run.samples
    if samples < o.warmup_samples:
        return o.learning_rate * (samples + 1) / o.warmup_samples
    progress = min((samples - o.warmup_samples) / max(total - o.warmup_samples, 1), 1.0)
    return o.least_learning_rate + (o.learning_rate - o.least_learning_rate) * (1 + math.cos(math.pi * progress)) / 2
