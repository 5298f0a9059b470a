"""One layout with all its figures, and what a whole run costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from openglm.planning.hardware import Cluster
from openglm.planning.layout import Layout, Workload, check_layout
from openglm.planning.memory import GIB, StageMemory, fullest_stage
from openglm.planning.timing import Efficiency, StepTime, step_time

_DAY = 86_400


@dataclass(frozen=True)
class Budget:
    """What a run takes at one speed."""

    tokens_per_second: float
    watts: float
    """Of all GPUs."""
    gpus: int
    uptime: float = 1.0
    """Share of the time that trains; the rest goes to failures, restarts and roll-backs."""
    tokens: float | None = None
    """Of the whole run; None: unknown, and so are its days."""
    price: float | None = None
    """Of a GPU-hour."""
    carbon: float | None = None
    """Grams of CO2 a kWh."""

    @property
    def tokens_per_day(self) -> float:
        """Tokens of a day, failures included."""
        return self.tokens_per_second * _DAY * self.uptime

    @property
    def days(self) -> float | None:
        """Days of the whole run."""
        return None if self.tokens is None else self.tokens / self.tokens_per_day

    def energy(self, days: float) -> float:
        """MWh of the GPUs in so many days; they draw their power while they wait, too."""
        return self.watts * days * 24 / 1e6

    def gpu_hours(self, days: float) -> float:
        """GPU-hours of so many days."""
        return self.gpus * days * 24

    def cost(self, days: float) -> float | None:
        """GPU-hours times their price."""
        return None if self.price is None else self.gpu_hours(days) * self.price

    def co2(self, days: float) -> float | None:
        """Tonnes of CO2."""
        return None if self.carbon is None else self.energy(days) * self.carbon / 1e3


@dataclass(frozen=True)
class Plan:
    """A layout and what follows from it."""

    workload: Workload
    layout: Layout
    cluster: Cluster
    memory: StageMemory
    """Of the fullest stage."""
    time: StepTime

    @property
    def limit(self) -> float:
        """Bytes that a GPU has."""
        return self.cluster.gpu.memory * GIB

    @property
    def fits(self) -> bool:
        """Whether the fullest stage fits one GPU."""
        return self.memory.total <= self.limit

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.workload.tokens / self.time.seconds

    def other_recompute(self) -> StageMemory:
        """The fullest stage with recomputation where the plan has none, and the other way round."""
        other = "layer" if self.layout.recompute == "none" else "none"
        return fullest_stage(self.workload, dataclasses.replace(self.layout, recompute=other))

    def budget(self, *, watts: float | None = None, uptime: float = 1.0, **settings: float | None) -> Budget:
        """Energy and cost; ``watts`` a GPU, by default its datasheet's; ``settings``: tokens, price, carbon."""
        each = self.cluster.gpu.watts if watts is None else watts
        gpus = self.cluster.gpus
        return Budget(self.tokens_per_second, each * gpus, gpus, uptime, **settings)


def make_plan(workload: Workload, layout: Layout, cluster: Cluster, efficiency: Efficiency) -> Plan:
    """All figures of one layout. Raises ``InputError`` if it is impossible; a layout that does not fit is no error."""
    check_layout(workload, layout, cluster.gpus)
    memory = fullest_stage(workload, layout)
    return Plan(workload, layout, cluster, memory, step_time(workload, layout, cluster, efficiency))
