"""Recipes: TOML files read into frozen dataclasses. An unknown key names the nearest right one."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openglm.config import ModelConfig
from openglm.data.mixture import Objectives
from openglm.data.schedule import Schedule, batch_size_at, learning_rate_at, parse_schedule, values_of
from openglm.errors import ConfigError
from openglm.training.trackers import TRACKERS


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
        """The network's configuration. Raises ``ConfigError`` for an unknown preset or field and for impossible values."""
        try:
            return ModelConfig.preset(self.preset, **self.changes)
        except (TypeError, ValueError) as error:  # a value of a wrong type
            raise ConfigError(f"`model.changes` cannot be used: {error}", key="model.changes") from error


@dataclass(frozen=True)
class DataSection:
    """[data]: where the tokens come from."""

    corpus: str = ""
    """Folder of JSON lines or text; files called validation* are kept for validation. May be given by --data."""
    tokenizer: str = ""
    """Tokenizer file. May be given by --tokenizer."""
    weights: Mapping[str, Schedule] = field(default_factory=dict, metadata={"schedules": True})
    """Pattern of source names to factor on the source's size; a number or a schedule."""
    caps: Mapping[str, int] = field(default_factory=dict)
    """Pattern of source names to documents; a source of more is drawn as if it had only so many (SPEC 3.4.6)."""
    skip: tuple[tuple[int, int], ...] = field(default=(), metadata={"ranges": True})
    """[[from, to], ...]: samples of the run that are left out, from ``from`` up to the one before ``to`` (SPEC 9.2)."""
    verify: bool = True
    """Compare the token shards with their checksums at every start: some seconds a gigabyte, on one process."""


@dataclass(frozen=True)
class OptimizerSection:
    """[optimizer]: AdamW (SPEC 9.1) or Muon. All schedules count samples since the start of the run."""

    name: str = "adamw"
    """"adamw", or "muon": orthogonalized momentum for the layers' matrices, AdamW for all else; in one process only."""
    learning_rate: float = 1e-3
    least_learning_rate: float = 1e-4
    first_learning_rate: float = 0.0
    """Where the warm-up begins."""
    warmup_samples: int = 2_000
    decay_samples: int = 0
    """Where the cosine reaches the least rate; 0 = at the end of the run."""
    rewarm: tuple[tuple[int, int], ...] = field(default=(), metadata={"pairs": True})
    """[[sample, length], ...]: from each sample on the rate climbs anew, within a length. For restarts and edits."""
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only."""
    clip_norm: float = 1.0
    input_gradient_factor: Schedule = field(default=1.0, metadata={"schedule": True})
    """Embedding gradient shrink, input side (SPEC 2.5)."""
    output_gradient_factor: Schedule = field(default=1.0, metadata={"schedule": True})
    """Embedding gradient shrink, output side of the tied matrix (SPEC 9.1.1)."""
    hidden_dropout: Schedule = field(default=0.0, metadata={"schedule": True})
    attention_dropout: Schedule = field(default=0.0, metadata={"schedule": True})
    """Above 0 it loses the fused attention kernel on a CPU."""


@dataclass(frozen=True)
class ParallelSection:
    """[parallel]: the layout of several processes, and what saves memory."""

    data: int = 0
    """Copies that see different samples; 0 = what the other two leave of the processes."""
    tensor: int = 1
    pipeline: int = 1
    recompute: bool = False
    """Keep only each layer's input and compute it again in the backward pass."""
    reshard: bool = False
    """Free gathered weights after the forward pass (ZeRO-3)."""
    timeout: float = 600.0
    """Seconds until a process that no longer answers ends the run."""


@dataclass(frozen=True)
class StabilitySection:
    """[stability]: what is done about spikes (SPEC 9.2). Steps that are not finite are always skipped."""

    window: int = 128
    """Steps that a new one is compared with."""
    skip_norm: float = 0.0
    """Skip a step whose gradient norm is above this many times the window's median; 0 = never."""
    spike_loss: float = 0.0
    """Roll back once the loss lies this many nats above the window's median; 0 = never."""
    patience: int = 3
    """Steps in a row that must show it."""
    skip_samples: bool = True
    """After a roll-back, leave out the samples between the snapshot and the spike."""
    shrink: float = 1.0
    """Factor on the input gradient factor after each roll-back."""
    rewarm_samples: int = 0
    """After a roll-back, samples over which the rate climbs anew."""
    most_skips: int = 20
    """Steps skipped in a row before it rolls back (float16's loss scale may need some)."""
    most_rollbacks: int = 5
    """In one run; then it stops and says so."""
    alarm_scale: float = 256.0
    """Float16: the loss scale, which begins at 65,536, at or below which each halving is an alarm; 0 = none."""


@dataclass(frozen=True)
class RunSection:
    """[run]: how long, how large, how often."""

    samples: int = 100_000
    batch_size: int = 32
    """Samples a step."""
    batch_ramp: tuple[int, ...] = ()
    """[first size, increment, samples]: the batch grows to its size in equal increments (SPEC 9.1)."""
    micro_tokens: int = 4_096
    """Places of one micro-batch, padding included."""
    aggregate: bool = False
    """Put samples side by side in rows of ``objectives.long_window``, each with attention to itself only (SPEC 3.4.5)."""
    precision: str = "bfloat16"
    """"float32", or "bfloat16" or "float16" for computing beside float32 master weights."""
    device: str = "cpu"
    seed: int = 1234
    threads: int = 0
    """CPU threads of each process; 0 = torch's choice."""
    compile: bool = False
    """Compile the layers (torch.compile): half a minute at the start, faster steps after. Where there is no C++ compiler (for
    a CPU), or with tensor parallelism, one line says that they are not."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl; a row tells of every step since the last one."""
    snapshot_every: int = 200
    """Steps between two snapshots."""
    validate_every: int = 200
    """Steps between two validations."""
    validation_windows: int = 24
    """Windows per language in a validation during the run."""
    keep_snapshots: int = 2
    """Newest snapshots that stay."""
    keep_every: int = 0
    """Beside these, one snapshot for every so many samples stays for good; 0 = none."""
    trackers: tuple[str, ...] = field(default=(), metadata={"names": tuple(TRACKERS)})
    """Where metrics are mirrored beside metrics.jsonl: "tensorboard", "trackio"."""


#: The least that a number may be, by key.
_LEAST = {
    0: "model.embedding_scale optimizer.warmup_samples optimizer.decay_samples optimizer.weight_decay parallel.data run.seed "
    "run.threads run.keep_every stability.alarm_scale stability.skip_norm stability.spike_loss stability.shrink "
    "stability.rewarm_samples "
    "stability.most_rollbacks",
    1: "parallel.tensor parallel.pipeline run.samples run.batch_size run.micro_tokens run.log_every run.snapshot_every "
    "run.validate_every run.validation_windows run.keep_snapshots stability.window stability.patience stability.most_skips",
    32: "objectives.window objectives.long_window",
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    objectives: Objectives = field(default_factory=Objectives)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    run: RunSection = field(default_factory=RunSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    stability: StabilitySection = field(default_factory=StabilitySection)

    def __post_init__(self) -> None:
        _check_numbers(dataclasses.asdict(self))
        self.model.config()  # raises for an unknown preset or field
        for least, keys in _LEAST.items():
            for key in keys.split():
                section, _, name = key.partition(".")
                value = getattr(getattr(self, section), name)
                _require(value >= least, key, value, f"at least {least}")
        r, o, s, objectives = self.run, self.optimizer, self.stability, self.objectives
        for section in ("objectives", "optimizer"):
            for key, value in vars(getattr(self, section)).items():
                if key.endswith(("_share", "_ratio", "_gradient_factor", "_dropout")):
                    highest = 0.99 if key.endswith("_dropout") else 1
                    good = all(0 <= v <= highest for v in values_of(value))
                    _require(good, f"{section}.{key}", value, f"in 0..{highest}")
        shares = self.objectives.generation_share + self.objectives.sentence_share
        most = "0..1 together with objectives.generation_share"
        _require(shares <= 1 + 1e-9, "objectives.sentence_share", self.objectives.sentence_share, f"in {most}")
        for name, value in self.data.weights.items():
            _require(all(v >= 0 for v in values_of(value)), f"data.weights.{name}", value, "at least 0")
        for name, value in self.data.caps.items():
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            _require(good, f"data.caps.{name}", value, "a whole number of at least 1")
        ramp = r.batch_ramp
        good = len(ramp) == 3 and all(isinstance(n, int) for n in ramp) and 1 <= ramp[0] <= r.batch_size and min(ramp[1:]) >= 1
        wanted = "[first size, increment, samples] in whole numbers, the first size at most run.batch_size"
        _require(not ramp or good, "run.batch_ramp", ramp, wanted)
        # Spans are Poisson numbers of 1 to 39; a mean far from these would be drawn forever.
        _require(0.1 <= objectives.mean_span <= 39, "objectives.mean_span", objectives.mean_span, "in 0.1..39")
        known = ("float32", "bfloat16", "float16")
        _require(r.precision in known, "run.precision", r.precision, "one of " + ", ".join(known))
        _require(o.name in ("adamw", "muon"), "optimizer.name", o.name, '"adamw" or "muon"')
        for key in ("learning_rate", "least_learning_rate", "first_learning_rate"):
            _require(0 <= getattr(o, key) < 1, f"optimizer.{key}", getattr(o, key), "in 0..1")
        _require(all(0 <= beta < 1 for beta in o.betas), "optimizer.betas", o.betas, "two numbers from 0 to below 1")
        _require(o.epsilon > 0, "optimizer.epsilon", o.epsilon, "above 0")
        _require(o.clip_norm > 0, "optimizer.clip_norm", o.clip_norm, "above 0")
        good = all(start >= 0 and length > 0 for start, length in o.rewarm)
        _require(good, "optimizer.rewarm", o.rewarm, "[[sample, length], ...], each length above 0")
        _require(s.shrink <= 1, "stability.shrink", s.shrink, "in 0..1")
        _require(0 < self.parallel.timeout <= 1e9, "parallel.timeout", self.parallel.timeout, "seconds above 0, at most 1e9")
        longest = max(objectives.window, objectives.long_window)
        context = self.model.config().max_sequence_length
        _require(longest <= context, "objectives.window", longest, f"at most the model's context of {context}")
        if r.aggregate:  # all samples go into rows of that length
            good = objectives.long_window >= objectives.window
            _require(good, "objectives.long_window", objectives.long_window, "at least objectives.window with run.aggregate")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a snapshot."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _require(holds: bool, key: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"`{key}` is {value!r}, but must be {wanted}", key=key)


def _check_numbers(values: Mapping[str, Any]) -> None:
    for key, value in _numbers(values):
        # False for NaN, too. Seeds have 64 bits.
        _require(abs(value) < 1 << 64, key, value, "a finite number below 2^64")


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a table of tables and lists, with its key."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part, path)
    elif isinstance(value, int | float):
        yield path, value


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
        elif fields[key].metadata.get("schedule"):
            made[key] = parse_schedule(value, full)
        elif fields[key].metadata.get("schedules"):
            made[key] = {name: parse_schedule(v, f"{full}.{name}") for name, v in _value(value, default, full).items()}
        elif fields[key].metadata.get("pairs"):
            made[key] = parse_schedule(value, full) if value else ()
            if not isinstance(made[key], tuple):
                raise ConfigError(f"`{full}` is {value!r}, but must be pairs like [[20000, 500]]", key=full)
        elif fields[key].metadata.get("ranges"):
            made[key] = _ranges(value, full)
        elif fields[key].metadata.get("names"):
            made[key] = _names(value, fields[key].metadata["names"], full)
        else:
            made[key] = _value(value, default, full)
    return kind(**made)


def _value(value: Any, default: Any, key: str) -> Any:
    if isinstance(default, bool) or isinstance(value, bool):
        good = isinstance(value, bool) and isinstance(default, bool)
    elif isinstance(default, float):
        good, value = isinstance(value, int | float), float(value) if isinstance(value, int) else value
    elif isinstance(default, tuple):
        good = isinstance(value, Sequence) and not isinstance(value, str) and (not default or len(value) == len(default))
        good = good and all(isinstance(part, int | float) and not isinstance(part, bool) for part in value)
        value = tuple(value) if good else value
    elif isinstance(default, Mapping):
        good = isinstance(value, Mapping)
    else:
        good = isinstance(value, type(default))
    if not good:
        raise ConfigError(f"`{key}` is {value!r}, but must be like {default!r}", key=key)
    return value


def _ranges(value: Any, key: str) -> tuple[tuple[int, int], ...]:
    """Pairs of whole numbers, the first one below the second."""

    def good(pair: Any) -> bool:
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(number) is int for number in pair)
        return whole and 0 <= pair[0] < pair[1]

    if not (isinstance(value, Sequence) and all(good(pair) for pair in value)):
        raise ConfigError(f"`{key}` is {value!r}, but must be ranges of samples like [[4000, 4200]]: from, to", key=key)
    return tuple((start, end) for start, end in value)


def _names(value: Any, known: Sequence[str], key: str) -> tuple[str, ...]:
    """A list of known names; a single one may stand alone."""
    names = [value] if isinstance(value, str) else value
    if not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"`{key}` is {value!r}, but must be a list of names", hint=f"known: {', '.join(known)}", key=key)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"`{key}` does not know `{name}`", hint=hint, key=key)
    return tuple(names)


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
        except ValueError as error:
            raise ConfigError(f"`{path}` is not valid TOML: {error}", path=path) from error
    for change in changes:
        name, separator, text = change.partition("=")
        # Dots part the names, but not within quotes.
        *tables, key = (part.strip().strip('"') for part in re.split(r'\.(?=(?:[^"]*"[^"]*")*[^"]*$)', name))
        if not separator or not tables or not all((*tables, key)):
            raise ConfigError(f"`{change}` is not of the form section.key=value", key=change)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except ValueError:
            value = text.strip()
        table = values
        for part in tables:  # as in model.changes.hidden_size
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"`{part}` in `{change}` is no table of keys", hint=f"write {part}=VALUE", key=change)
        # First, for of patterns the first that fits wins.
        others = {name: other for name, other in table.items() if name != key}
        table.clear()
        table.update({key: value, **others})
    try:
        _check_numbers(values)
        return _section(Recipe, values, "")
    except ConfigError as error:
        if path is None:
            raise
        raise ConfigError(f"`{path}`: {error.message}", hint=error.hint, path=path, key=error.key) from error


def learning_rate(recipe: Recipe, samples: int, rewarm: Sequence[tuple[float, float]] = ()) -> float:
    """Rate at a number of samples seen (SPEC 9.1); ``rewarm``: climbs beside the recipe's own."""
    o = recipe.optimizer
    return learning_rate_at(
        samples,
        rate=o.learning_rate,
        least=o.least_learning_rate,
        first=o.first_learning_rate,
        warmup=o.warmup_samples,
        decay=o.decay_samples or recipe.run.samples,
        rewarm=[*o.rewarm, *rewarm],
    )


def batch_size(recipe: Recipe, samples: int) -> int:
    """Samples of the step that begins after so many samples; the last step takes what is left."""
    return min(batch_size_at(recipe.run.batch_size, recipe.run.batch_ramp, samples), recipe.run.samples - samples)
