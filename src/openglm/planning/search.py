"""Layouts that fit, fastest first, and one line for each class of layouts that do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from openglm.errors import InputError
from openglm.planning.hardware import Cluster
from openglm.planning.layout import Layout, Workload, check_even, check_tensor, cut_layers
from openglm.planning.memory import GIB
from openglm.planning.plan import Plan, make_plan
from openglm.planning.timing import Efficiency

_MICRO_BATCHES = (1, 2, 4, 8, 16)
#: What `parallel/` can do; it stores whole layer inputs.
_RECOMPUTE = ("layer", "none")
#: Share of a GPU's memory beyond which a larger micro-batch is not worth the risk.
_COMFORTABLE = 0.9


@dataclass(frozen=True)
class Refusal:
    """A class of layouts that are impossible or do not fit."""

    layouts: str
    why: str


@dataclass(frozen=True)
class Search:
    """What was found."""

    plans: tuple[Plan, ...]
    """Plans that fit, the fastest first: of each tensor, pipeline and data only the best setting of the rest."""
    refused: tuple[Refusal, ...]
    nearest: Plan | None
    """The plan that comes nearest to fitting; None if every layout is impossible."""


def search(
    workload: Workload,
    cluster: Cluster,
    efficiency: Efficiency,
    *,
    tensor: int | None = None,
    pipeline: int | None = None,
    data: int | None = None,
    micro_batch: int | None = None,
    zero: int | None = None,
    recompute: str | None = None,
) -> Search:
    """Try every layout of the GPUs; what is given stays as it is.

    Unless asked for, tensor parallelism stays inside a server, ZeRO 2 and 3 are left to layouts without a pipeline (where
    each micro-batch would exchange gradients or weights anew), and stages share the layers evenly.
    Among equally fast settings: the least ZeRO, then the largest micro-batch that leaves a tenth of the memory free.
    Raises ``InputError`` if a given degree leaves nothing to try.
    """
    refusals = _Refusals(cluster)
    best: list[Plan] = []
    for t in [tensor] if tensor else _divisors(cluster.gpus_per_node):
        try:
            check_tensor(workload.config, t)
        except InputError as error:
            refusals.impossible("tensor", t, error)
            continue
        for p in _pipelines(cluster.gpus, t, pipeline, data):
            try:
                cut_layers(workload.config.num_layers, p)
                if not pipeline:
                    check_even(workload.config.num_layers, p)
            except InputError as error:
                refusals.impossible("pipeline", p, error)
                continue
            d = data or max(cluster.gpus // (t * p), 1)
            plans, errors = [], []
            for layout in _settings(t, p, d, micro_batch, zero, recompute):
                try:
                    plans.append(make_plan(workload, layout, cluster, efficiency))
                except InputError as error:
                    errors.append(error)
            if not plans:
                refusals.impossible("data", d, errors[0])
            elif fitting := [plan for plan in plans if plan.fits]:
                best.append(min(fitting, key=_rank))
            else:
                refusals.too_large(min(plans, key=lambda plan: plan.memory.total))
    if not best and refusals.nearest is None:
        raise refusals.first  # nothing was possible: the reason of the first is the user's
    return Search(tuple(sorted(best, key=_rank)), refusals.lines(), refusals.nearest)


def _rank(plan: Plan) -> tuple[float, ...]:
    # How much faster a larger micro-batch computes is not known; it is taken where memory is there anyway.
    tight = plan.memory.total > _COMFORTABLE * plan.limit
    return (round(plan.time.seconds, 9), plan.layout.zero, tight, -plan.layout.micro_batch, plan.memory.total)


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _pipelines(gpus: int, tensor: int, pipeline: int | None, data: int | None) -> list[int]:
    if pipeline:
        return [pipeline]
    if gpus % tensor or (data and gpus % (tensor * data)):
        return [1]  # refused by the product of the degrees, with the numbers
    return [gpus // (tensor * data)] if data else _divisors(gpus // tensor)


def _settings(t: int, p: int, d: int, micro: int | None, zero: int | None, recompute: str | None) -> Iterator[Layout]:
    stages: Sequence[int] = (0,) if d == 1 else (1, 2, 3) if p == 1 else (1,)
    for b, z, r in itertools.product(
        [micro] if micro else _MICRO_BATCHES, stages if zero is None else [zero], [recompute] if recompute else _RECOMPUTE
    ):
        yield Layout(t, p, d, b, z, r)


class _Refusals:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.found: dict[tuple[str, str], dict[int, InputError]] = {}
        self.large: dict[int, list[Plan]] = {}

    @property
    def first(self) -> InputError:
        return next(iter(next(iter(self.found.values())).values()))

    @property
    def nearest(self) -> Plan | None:
        plans = [plan for group in self.large.values() for plan in group]
        return min(plans, key=lambda plan: plan.memory.total) if plans else None

    def impossible(self, name: str, degree: int, error: InputError) -> None:
        kind = "fewer" if "fewer" in error.message else error.key or ""
        self.found.setdefault((name, kind), {}).setdefault(degree, error)

    def too_large(self, plan: Plan) -> None:
        self.large.setdefault(plan.layout.tensor, []).append(plan)

    def lines(self) -> tuple[Refusal, ...]:
        rows = []
        for (name, _), errors in self.found.items():
            degrees = sorted(errors)
            why = errors[degrees[0]].message + ("; the others likewise" if len(degrees) > 1 else "")
            rows.append(Refusal(f"{name} {', '.join(map(str, degrees))}", why))
        for tensor, plans in self.large.items():
            least = min(plans, key=lambda plan: plan.memory.total)
            pipelines = ", ".join(str(plan.layout.pipeline) for plan in plans)
            terms = sorted(least.memory.terms, key=lambda term: -term.bytes)[:2]
            why = (
                f"{least.memory.total / GIB:.1f} GiB over {self.cluster.gpu.memory:g} GiB at best (pipeline "
                f"{least.layout.pipeline}), because of {' and '.join(f'{t.name} {t.bytes / GIB:.1f} GiB' for t in terms)}"
            )
            rows.append(Refusal(f"tensor {tensor}, pipeline {pipelines}", why))
        return tuple(rows)
