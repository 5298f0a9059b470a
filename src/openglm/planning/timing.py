"""Seconds of a step, term by term, and how a measured step calibrates them (SPEC 9.1.2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from openglm.config import ModelConfig
from openglm.errors import InputError
from openglm.planning.hardware import Cluster, find_gpu
from openglm.planning.layout import Layout, Workload, cut_layers
from openglm.planning.memory import WIDTH, gradient_width, outer_stages, stage_parameters

#: Assumed: share of a link's or network's bandwidth that large transfers reach.
ACHIEVED_BANDWIDTH = 0.8
#: Bytes that AdamW moves a parameter: gradient, master and two moments read; master, moments and copy written.
_UPDATE_BYTES = 30


@dataclass(frozen=True)
class Efficiency:
    """What no datasheet says: how much of the peak the products of matrices reach, and what else a step costs."""

    fraction: float
    """Of the peak FLOP/s, while a stage computes."""
    overhead: float = 0.0
    """Seconds a step that neither computing nor communication explains; only two measured steps can tell."""
    basis: str = "given"
    """Where it comes from, in words."""


@dataclass(frozen=True)
class TimeTerm:
    """A part of a step."""

    name: str
    seconds: float
    how: str


@dataclass(frozen=True)
class StepTime:
    """One step. The terms add up to ``seconds``."""

    terms: tuple[TimeTerm, ...]
    bubble: float
    """Share in which a stage waits for others, (p - 1) / (m + p - 1)."""
    efficiency: Efficiency
    model_tflops: float
    """TFLOP/s a GPU that the model needs."""
    hardware_tflops: float
    """TFLOP/s a GPU that are done, recomputation included."""
    mfu: float
    """Model FLOPs as a share of the peak."""
    hfu: float
    """Hardware FLOPs as a share of the peak."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(term.seconds for term in self.terms)

    def group(self, *names: str) -> float:
        """Seconds of the terms whose names begin with one of ``names``."""
        return sum(term.seconds for term in self.terms if term.name.startswith(names))


@dataclass(frozen=True)
class Utilization:
    """What a measured or predicted step makes of the GPUs."""

    model_tflops: float
    hardware_tflops: float
    mfu: float
    hfu: float


def utilization(workload: Workload, recompute: str, cluster: Cluster, seconds: float) -> Utilization:
    """TFLOP/s a GPU and their shares of the peak for a step of ``seconds``: model (MFU) and hardware (HFU)."""
    peak = cluster.gpu.peak_tflops(workload.precision)
    model = workload.model_flops / seconds / cluster.gpus / 1e12
    hardware = workload.hardware_flops(recompute) / seconds / cluster.gpus / 1e12
    return Utilization(model, hardware, model / peak, hardware / peak)


@dataclass(frozen=True)
class _Costs:
    """What a step is made of before the efficiency is known; seconds, of the slowest stage."""

    units: int
    """Micro-batches, and those that a filling and draining pipeline adds."""
    micro_batches: int
    compute: float
    """Of a micro-batch at the peak."""
    tensor: float
    transfer: float
    gather: float
    """Of a micro-batch: weights and gradients between data ranks (ZeRO 2 and 3), beside the computation."""
    edge: float
    """Of a micro-batch: one layer's part of ``gather``, before the first layer or after the last, beside nothing."""
    exchange: float
    """Once a step, after the last micro-batch."""
    update: float

    def micro(self, fraction: float) -> float:
        """Seconds of a micro-batch in the slowest stage."""
        return max(self.compute / fraction + self.tensor + self.transfer, self.gather) + self.edge


def _costs(workload: Workload, layout: Layout, cluster: Cluster) -> _Costs:
    config, gpu = workload.config, cluster.gpu
    tokens = layout.micro_batch * workload.sequence
    hidden = tokens * config.hidden_size * WIDTH[workload.precision]
    peak = gpu.peak_tflops(workload.precision) * 1e12
    passes = 3 if layout.recompute == "none" else 4
    cut = cut_layers(config.num_layers, layout.pipeline)
    work = [layers * passes * workload.layer_flops for layers in cut]
    work[-1] += 3 * workload.head_flops

    def speed(ranks: int) -> float:
        # Ranks lie tensor innermost, then data, then pipeline: what fits a server stays there.
        return (gpu.link if ranks <= cluster.gpus_per_node else gpu.network) * 1e9 * ACHIEVED_BANDWIDTH

    t, d = layout.tensor, layout.data
    # Two sums over tensor ranks a layer and pass; the backward pass counts as one, not two. A ring sends 2 (t - 1) / t.
    sums = 2 * (passes - 1) * max(cut) * hidden * 2 * (t - 1) / t / speed(t)
    # Forward and back again; each tensor rank sends its part.
    transfer = 2 * hidden / t / speed(layout.gpus) if layout.pipeline > 1 else 0.0
    parameters = max(stage_parameters(config, layout, stage) for stage in outer_stages(layout))
    weights, gradients = parameters * WIDTH[workload.precision], parameters * gradient_width(workload)
    ring = (d - 1) / d / speed(t * d)
    gather = {2: gradients, 3: gradients + 2 * weights}.get(layout.zero, 0) * ring
    exchange = {0: 2 * gradients, 1: gradients + weights, 2: weights, 3: 0}[layout.zero] * ring
    shared = d if layout.zero else 1
    micro_batches = layout.micro_batches(workload.batch)
    return _Costs(
        units=micro_batches + layout.pipeline - 1,
        micro_batches=micro_batches,
        compute=max(work) * tokens / t / peak,
        tensor=sums,
        transfer=transfer,
        gather=gather,
        edge=gather / max(cut),
        exchange=exchange,
        update=parameters * _UPDATE_BYTES / shared / (gpu.memory_bandwidth * 1e9),
    )


def step_time(workload: Workload, layout: Layout, cluster: Cluster, efficiency: Efficiency) -> StepTime:
    """Predict a step: (m + p - 1) micro-batches of the slowest stage, then gradients, weights and optimizer."""
    costs = _costs(workload, layout, cluster)
    m, extra = costs.micro_batches, layout.pipeline - 1
    compute = costs.compute / efficiency.fraction
    waiting = costs.micro(efficiency.fraction) - compute - costs.tensor - costs.transfer
    terms = (
        TimeTerm("compute", m * compute, f"{m} micro-batches x {compute * 1e3:.1f} ms in the slowest stage"),
        TimeTerm("tensor communication", m * costs.tensor, "sums over tensor ranks, two a layer and pass"),
        TimeTerm("pipeline communication", m * costs.transfer, "hidden states to the next stage, gradients back"),
        TimeTerm(
            "data communication, waited for", m * waiting, "weights and gradients between data ranks that no computing hides"
        ),
        TimeTerm("bubble", extra * costs.micro(efficiency.fraction), f"{extra} more micro-batches to fill and drain"),
        TimeTerm("data communication", costs.exchange, "gradients and weights between data ranks, once a step"),
        TimeTerm("optimizer", costs.update, f"{_UPDATE_BYTES} bytes a parameter through the GPU's memory"),
        TimeTerm("overhead", efficiency.overhead, "fitted: what two measured steps have in common beyond the rest"),
    )
    terms = tuple(term for term in terms if term.seconds > 1e-9)
    used = utilization(workload, layout.recompute, cluster, sum(term.seconds for term in terms))
    return StepTime(terms, layout.bubble(workload.batch), efficiency, **vars(used))


def calibrate(
    workload: Workload, layout: Layout, cluster: Cluster, measured: Sequence[tuple[float, int]], basis: str | None = None
) -> Efficiency:
    """The efficiency that explains measured steps, given as (seconds, batch), of this layout on this cluster.

    One step gives the fraction of the peak; two of different batches give the overhead, too. Raises ``InputError`` where
    no fraction between 0 and 1 explains them.
    """
    if not 1 <= len(measured) <= 2 or len({batch for _, batch in measured}) < len(measured):
        raise InputError("a calibration takes one measured step, or two of different batches", key="calibrate")
    points = []
    for seconds, batch in sorted(measured, key=lambda point: point[1]):
        if not 0 < seconds < float("inf") or batch < 1 or batch % (layout.data * layout.micro_batch):
            raise InputError(
                f"a measured step of {seconds:g} s at batch {batch:,} does not belong to data {layout.data} x "
                f"micro-batch {layout.micro_batch}",
                hint="give a time above 0, and a batch that the layout divides",
                key="calibrate",
            )
        points.append((seconds, _costs(Workload(**{**vars(workload), "batch": batch}), layout, cluster)))
    seconds, costs = points[0]
    once = costs.exchange + costs.update
    if len(points) == 2:
        micro = (points[1][0] - seconds) / (points[1][1].units - costs.units)
        overhead = seconds - once - costs.units * micro
    else:
        micro, overhead = (seconds - once) / costs.units, 0.0
    micro -= costs.edge
    left = micro - costs.tensor - costs.transfer
    fraction = costs.compute / left if left > 0 else float("inf")
    spoken = " and ".join(f"{seconds:g} s at batch {batch:,}" for seconds, batch in measured)
    if fraction > 1 or overhead < -1e-9 or micro < costs.gather:
        reason = (
            "the larger batch would be too slow for its size"
            if overhead < 0
            else "its communication alone would take longer"
            if left <= 0 or micro < costs.gather
            else f"that is {fraction:.2g} times the GPU's peak"
        )
        raise InputError(
            f"the measured step of {spoken} cannot be true of this layout on these GPUs: {reason}",
            hint="check --gpu, --gpus and the layout that was measured",
            key="calibrate",
        )
    return Efficiency(fraction, max(overhead, 0.0), basis or f"fitted to the measured {spoken}")


#: Measured by the authors of GLM-130B: seconds and batch (public training log; SPEC 9.1.2).
PAPER_STEP = (88.5, 4_224)


def paper_case() -> tuple[Workload, Layout, Cluster]:
    """GLM-130B as it was trained: 96 servers of 8 A100 40 GB; tensor 4, pipeline 8, data 24; micro-batch 1; ZeRO-1.

    Layer inputs partitioned over the tensor ranks; attention scores stored, for fused attention came later."""
    workload = Workload(ModelConfig.preset("130b"), PAPER_STEP[1], 2_048, "fp16", fused_attention=False)
    return workload, Layout(4, 8, 24, recompute="partitioned"), Cluster(96, 8, find_gpu("a100-40"))


@functools.cache
def paper_efficiency() -> Efficiency:
    """The efficiency of the authors' run; the best guess for a machine that nobody has measured."""
    seconds, batch = PAPER_STEP
    basis = f"fitted to the step of {seconds} s at batch {batch:,} that GLM-130B took on 768 A100"
    return calibrate(*paper_case(), [PAPER_STEP], basis)
