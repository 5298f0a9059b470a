"""What a recipe would do, without data and without memory: the network on the meta device, cut as its layout says."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openglm.models.glm130b import GLM130B
from openglm.parallel.layout import ParallelLayout
from openglm.parallel.stage import Stage
from openglm.planning import Cluster, Efficiency, Layout, Plan, Workload, make_plan
from openglm.training.ranks import check_batch
from openglm.training.recipe import Recipe

_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class StageShape:
    """One pipeline stage."""

    layers: range
    parameters: int
    """Of the whole stage, all its tensor ranks together; the tied matrix counts on both ends."""


def layout_of(recipe: Recipe, processes: int | None) -> ParallelLayout:
    """The recipe's layout on so many processes; None: on as few as it takes. Raises ``ConfigError`` if it is impossible."""
    p = recipe.parallel
    data = p.data or max((processes or 1) // (p.tensor * p.pipeline), 1)
    layout = ParallelLayout(data, p.tensor, p.pipeline)
    layout.check(recipe.model.config(), processes)
    check_batch(recipe, layout)
    return layout


def stages(recipe: Recipe, layout: ParallelLayout) -> list[StageShape]:
    """Build every stage as a run would, on the meta device."""
    config = recipe.model.config()
    found = []
    for layers in layout.stage_layers(config.num_layers):
        with torch.device("meta"):
            stage = Stage(GLM130B(config), layers)
        found.append(StageShape(layers, sum(parameter.numel() for parameter in stage.parameters())))
    return found


def plan_of(recipe: Recipe, layout: ParallelLayout, cluster: Cluster, efficiency: Efficiency) -> Plan:
    """Memory and time of the recipe's steps. A mean sample counts as a full window."""
    r, p = recipe.run, recipe.parallel
    window = recipe.objectives.long_window if r.aggregate else recipe.objectives.window
    workload = Workload(recipe.model.config(), r.batch_size, window, _PRECISIONS[r.precision], float32_gradients=True)
    # Weights stay gathered between micro-batches of a pipeline; without one gradients are sharded at once.
    zero = 3 if p.reshard else 1 if layout.pipeline > 1 else 2
    spread = Layout(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data,
        micro_batch=max(r.micro_tokens // window, 1),
        zero=zero if layout.data > 1 else 0,
        recompute="layer" if p.recompute else "none",
    )
    return make_plan(workload, spread, cluster, efficiency)
