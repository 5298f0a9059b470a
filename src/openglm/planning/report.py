"""Plans as lines of text and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from openglm.planning.layout import Layout, cut_layers
from openglm.planning.memory import GIB, StageMemory, Term, snapshot_bytes
from openglm.planning.plan import Budget, Plan
from openglm.planning.process import ProcessMemory
from openglm.planning.search import Refusal
from openglm.planning.timing import ACHIEVED_BANDWIDTH

_NAME, _NUMBER = 34, 9


def _row(name: str, value: str, how: str = "") -> str:
    return f"  {name:<{_NAME}}{value:>{_NUMBER}}  {how}".rstrip()


def big(number: float) -> str:
    """1.23 k, M, G, T or P, for counts that nobody reads to the end."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"


def describe_layout(layout: Layout) -> str:
    """One line without numbers that follow from others."""
    return (
        f"tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}; micro-batch {layout.micro_batch}; "
        f"ZeRO-{layout.zero}; recompute {layout.recompute}"
    )


def describe_plan(plan: Plan, budget: Budget) -> list[str]:
    """Everything about one layout, line by line."""
    work, layout = plan.workload, plan.layout
    cut = cut_layers(work.config.num_layers, layout.pipeline)
    return [
        f"layout: {describe_layout(layout)}",
        f"  {layout.micro_batches(work.batch):,} micro-batches a step; layers of the stages: {' '.join(map(str, cut))}",
        "",
        f"memory of a GPU in stage {plan.memory.stage + 1} of {layout.pipeline}, the fullest, in GiB",
        *_memory_lines(plan),
        "",
        "time of a step, in seconds",
        *_time_lines(plan),
        "",
        "run",
        *_budget_lines(plan, budget),
        "",
        *_basis_lines(plan),
    ]


def _memory_lines(plan: Plan) -> list[str]:
    other = plan.other_recompute()
    name = "with recomputation" if plan.layout.recompute == "none" else "without recomputation"
    activations = other.group("activations") / GIB
    how = f"activations {activations:.2f} of it; {_verdict(other.total, plan.limit)}"
    return [
        *term_lines(plan.memory.terms),
        _row("total", f"{plan.memory.total / GIB:.2f}", _verdict(plan.memory.total, plan.limit)),
        _row(name, f"{other.total / GIB:.2f}", how),
        _row("snapshot on disk", f"{snapshot_bytes(plan.workload) / GIB:,.0f}", "weights and optimizer of the whole model"),
    ]


def term_lines(terms: Iterable[Term]) -> list[str]:
    """Name, GiB and arithmetic of each term."""
    return [
        _row(term.name, f"{term.bytes / GIB:.2f}", term.how + ("" if term.basis == "computed" else f" ({term.basis})"))
        for term in terms
    ]


def _verdict(size: float, limit: float) -> str:
    if size <= limit:
        return f"fits {limit / GIB:g}"
    return f"does not fit {limit / GIB:g}, {(size - limit) / GIB:.2f} too much"


def _time_lines(plan: Plan) -> list[str]:
    time = plan.time
    return [
        *(_row(term.name, f"{term.seconds:.3f}", term.how) for term in time.terms),
        _row("total", f"{time.seconds:.3f}", f"bubble {time.bubble:.1%}"),
        _row("model FLOPs", f"{time.mfu:.1%}", f"of the peak (MFU): {time.model_tflops:.1f} TFLOP/s a GPU"),
        _row("hardware FLOPs", f"{time.hfu:.1%}", f"of the peak (HFU): {time.hardware_tflops:.1f} TFLOP/s a GPU"),
    ]


def _budget_lines(plan: Plan, budget: Budget) -> list[str]:
    lines = [
        _row("tokens a second", f"{budget.tokens_per_second:,.0f}"),
        _row("tokens a day", big(budget.tokens_per_day), "" if budget.uptime == 1 else f"at {budget.uptime:.0%} of the time"),
    ]
    spans = [("a day", 1.0)]
    if budget.tokens is not None and budget.days is not None:
        lines.append(_row(f"days for {big(budget.tokens)} tokens", f"{budget.days:.1f}"))
        spans = [("of the run", budget.days)]
    for name, days in spans:
        each = budget.watts / plan.cluster.gpus
        lines += [
            _row(f"GPU-hours {name}", f"{budget.gpu_hours(days):,.0f}"),
            _row(f"energy {name}, MWh", f"{budget.energy(days):,.2f}", f"{each:g} W a GPU, nothing but the GPUs"),
        ]
        cost, co2 = budget.cost(days), budget.co2(days)
        if cost is not None:
            lines.append(_row(f"cost {name}", f"{cost:,.0f}", f"at {budget.price:g} a GPU-hour"))
        if co2 is not None:
            lines.append(_row(f"CO2 {name}, t", f"{co2:,.1f}", f"at {budget.carbon:g} g a kWh"))
    return lines


def _basis_lines(plan: Plan) -> list[str]:
    """Which inputs are neither shapes nor datasheets."""
    used, gpu = plan.time.efficiency, plan.cluster.gpu
    peak = gpu.peak_tflops(plan.workload.precision)
    # The authors' fraction is a fit for their machine alone.
    guess = ", a guess for other GPUs until --calibrate" if "A100" in used.basis and not gpu.name.startswith("a100") else ""
    lines = [f"fitted: {used.fraction:.1%} of {peak:g} TFLOP/s while computing, {used.basis}{guess}"]
    if used.overhead:
        lines.append(f"fitted: {used.overhead:.2f} s of overhead a step, {used.basis}")
    lines.append(
        f"assumed: links and network reach {ACHIEVED_BANDWIDTH:.0%} of {gpu.link:g} and {gpu.network:g} GB/s a GPU; the "
        "fraction of the peak is the same for every layout"
    )
    return [*lines, f"datasheet: {gpu.source}"]


def table(plans: Sequence[Plan]) -> list[str]:
    """One line a layout."""
    lines = [f"  {'tensor':>6}{'pipeline':>10}{'data':>6}{'micro-batch':>13}{'ZeRO':>6}{'recompute':>11}"]
    lines[0] += f"{'GiB':>8}{'s/step':>9}{'tokens/s':>12}{'bubble':>8}{'MFU':>7}"
    for plan in plans:
        a, time = plan.layout, plan.time
        lines.append(
            f"  {a.tensor:>6} {a.pipeline:>9} {a.data:>5} {a.micro_batch:>12} {a.zero:>5} {a.recompute:>10}"
            f" {plan.memory.total / GIB:>7.1f} {time.seconds:>8.3g} {plan.tokens_per_second:>11,.0f}"
            f" {time.bubble:>7.1%} {time.mfu:>6.1%}"
        )
    return lines


def refusal_lines(refused: Sequence[Refusal]) -> list[str]:
    """One line for each class of layouts that cannot be."""
    return [f"  {refusal.layouts}: {refusal.why}" for refusal in refused]


def plan_values(plan: Plan, budget: Budget) -> dict[str, Any]:
    """A plan as plain values; sizes in bytes, times in seconds."""
    time = plan.time
    return {
        "layout": vars(plan.layout),
        "gpus": plan.cluster.gpus,
        "micro_batches": plan.layout.micro_batches(plan.workload.batch),
        "stage_layers": list(cut_layers(plan.workload.config.num_layers, plan.layout.pipeline)),
        "fits": plan.fits,
        "memory": {"limit": plan.limit, **_stage_values(plan.memory)},
        "memory_other_recompute": _stage_values(plan.other_recompute()),
        "snapshot_bytes": snapshot_bytes(plan.workload),
        "time": {
            "seconds": time.seconds,
            "terms": [vars(term) for term in time.terms],
            "bubble": time.bubble,
            "model_tflops_per_gpu": time.model_tflops,
            "hardware_tflops_per_gpu": time.hardware_tflops,
            "mfu": time.mfu,
            "hfu": time.hfu,
            "efficiency": {**vars(time.efficiency), "fitted": True},
        },
        "budget": budget_values(budget),
    }


def _stage_values(memory: StageMemory) -> dict[str, Any]:
    return {"stage": memory.stage, "layers": memory.layers, "total": memory.total, "terms": [vars(t) for t in memory.terms]}


def budget_values(budget: Budget) -> dict[str, Any]:
    """Days, energy and cost of the run, or of one day where its tokens are not known."""
    days = 1.0 if budget.days is None else budget.days
    return {
        **dataclasses.asdict(budget),
        "tokens_per_day": budget.tokens_per_day,
        "days": budget.days,
        "counted_days": days,
        "gpu_hours": budget.gpu_hours(days),
        "energy_mwh": budget.energy(days),
        "cost": budget.cost(days),
        "co2_tonnes": budget.co2(days),
    }


def process_lines(memory: ProcessMemory) -> list[str]:
    """The fuller moment of a run in one process."""
    when = "the backward pass of the loss" if memory.moment == "backward" else "the update of the weights"
    return [
        f"memory of the process beyond its imports, fullest in {when}, in GiB",
        *term_lines(memory.terms),
        _row("total", f"{memory.total / GIB:.2f}"),
    ]


def process_values(memory: ProcessMemory) -> dict[str, Any]:
    """The same as plain values, in bytes."""
    return {"moment": memory.moment, "total": memory.total, "terms": [vars(term) for term in memory.terms]}
