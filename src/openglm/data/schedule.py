"""Everything that changes during a run, as functions of the samples seen since its start.

Samples, not steps: a step's size changes with the batch, and a run that is resumed or edited still means the same place
(SPEC 9.2 tells of a schedule that was counted wrongly and took four times as long).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from openglm.errors import ConfigError

#: A number, or points ``(sample, value)`` with straight lines between them and constant ends.
Schedule = float | tuple[tuple[float, float], ...]


def parse_schedule(value: object, key: str) -> Schedule:
    """A schedule from a recipe: ``0.1`` or ``[[0, 0.1], [20000, 1.0]]``. Raises ``ConfigError`` naming the key."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    points = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    good = len(points) > 0 and all(
        isinstance(point, Sequence)
        and len(point) == 2
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in point)
        for point in points
    )
    if not good:
        raise ConfigError(
            f"`{key}` is {value!r}, but must be a number or points like [[0, 0.1], [20000, 1.0]]: sample, value", key=key
        )
    made = tuple((float(sample), float(number)) for sample, number in points)
    if any(later[0] <= earlier[0] for earlier, later in itertools.pairwise(made)):
        raise ConfigError(f"`{key}` is {value!r}, but its samples must ascend", key=key)
    return made


def value_at(schedule: Schedule, samples: float) -> float:
    """The value of a schedule after so many samples."""
    if not isinstance(schedule, tuple):
        return schedule
    before = schedule[0]
    for point in schedule:
        if samples < point[0]:
            if point is before:
                return point[1]
            part = (samples - before[0]) / (point[0] - before[0])
            return before[1] + part * (point[1] - before[1])
        before = point
    return before[1]


def values_of(schedule: Schedule) -> list[float]:
    """Every value that it names."""
    return [value for _, value in schedule] if isinstance(schedule, tuple) else [schedule]


def batch_size_at(size: int, ramp: Sequence[int], samples: int) -> int:
    """Samples of the step that begins after ``samples``.

    ``ramp``: (first size, increment, samples), as in SPEC 9.1: from the first size up to ``size`` in equal increments,
    each lasting equally many samples; () = always ``size``.
    """
    if not ramp:
        return size
    first, increment, length = ramp
    increments = (size - first) // increment
    if increments <= 0 or samples >= length:
        return size
    return min(first + increment * (samples * increments // length), size)


def learning_rate_at(
    samples: int,
    *,
    rate: float,
    least: float,
    first: float,
    warmup: int,
    decay: int,
    rewarm: Sequence[tuple[float, float]] = (),
) -> float:
    """Linear warm-up from ``first``, cosine to ``least`` at ``decay`` samples, constant behind it (SPEC 9.1).

    ``rewarm``: (sample, length) pairs; from each sample on the rate climbs from near 0 to its course within length.
    """
    if samples < warmup:
        value = first + (rate - first) * (samples + 1) / warmup
    else:
        part = min((samples - warmup) / max(decay - warmup, 1), 1.0)
        value = least + (rate - least) * (1 + math.cos(math.pi * part)) / 2
    for start, length in rewarm:
        if start <= samples < start + length:
            value *= (samples - start + 1) / length
    return value
