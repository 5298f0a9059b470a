"""How many processes hold what: ``ParallelLayout``, its limits, and its device mesh. torch is imported for the mesh only."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openglm.config import ModelConfig
from openglm.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Names of the mesh's axes, outermost first: neighbours in rank are tensor-parallel, for they talk the most.
AXES = ("pipeline", "data", "tensor")


def started() -> int:
    """Processes that torchrun started together with this one; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the three axes. Their product is the number of processes.

    ``data``: copies that see different samples, weights and optimizer sharded over them; ``tensor``: processes that share
    every matrix; ``pipeline``: stages that share the layers.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"`{name}` must be a whole number of at least 1, not {value!r}", key=name)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"data {self.data} x tensor {self.tensor} x pipeline {self.pipeline}"

    def check(self, config: ModelConfig, world_size: int | None = None) -> None:
        """Raise ``ConfigError`` if a network of this shape cannot lie on it, or the processes are not as many."""
        for name, size in (
            ("num_attention_heads", config.num_attention_heads),
            ("inner_hidden_size", config.inner_hidden_size),
            ("vocab_size", config.vocab_size),
        ):
            if size % self.tensor:
                near = [n for n in range(1, self.tensor) if size % n == 0]
                raise ConfigError(
                    f"`{name}` ({size}) cannot be divided over tensor {self.tensor}",
                    hint=f"the next smaller tensor size that divides it is {near[-1]}",
                    key="tensor",
                )
        if self.pipeline > config.num_layers:
            raise ConfigError(
                f"{config.num_layers} layers are too few for {self.pipeline} pipeline stages",
                hint=f"use at most pipeline {config.num_layers}",
                key="pipeline",
            )
        if world_size is not None and world_size != self.world_size:
            raise ConfigError(
                f"{self} needs {self.world_size} processes, but {world_size} were started",
                hint=f"torchrun --nproc-per-node counts one machine's; together they must be {self.world_size}",
                key="data",
            )

    def stage_layers(self, num_layers: int) -> list[range]:
        """Layers of each pipeline stage.

        The vocabulary matrix lies at both ends and weighs about a layer, so the first and the last stage are a layer
        lighter where that comes out (SPEC 9.1.2: 70 layers over 8 stages are 8, six times 9, 8).
        """
        if self.pipeline == 1:
            return [range(num_layers)]
        units, extra = divmod(num_layers + 2, self.pipeline)
        sizes = [units] * self.pipeline
        # What does not divide goes to the middle first.
        order = [*range(1, self.pipeline - 1), 0, self.pipeline - 1]
        for stage in order[:extra]:
            sizes[stage] += 1
        sizes[0] -= 1
        sizes[-1] -= 1
        while min(sizes) < 1:  # fewer layers than two a stage: every stage gets one
            sizes[sizes.index(min(sizes))] += 1
            sizes[sizes.index(max(sizes))] -= 1
        starts = [sum(sizes[:n]) for n in range(self.pipeline + 1)]
        return [range(a, b) for a, b in itertools.pairwise(starts)]

    def mesh(self, device: str) -> DeviceMesh:
        """The device mesh ``[pipeline, data, tensor]`` of a process group that exists already."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if dist.get_world_size() != self.world_size:
            raise ConfigError(f"{self} needs {self.world_size} processes, but {dist.get_world_size()} were started", key="data")
        return init_device_mesh(device, (self.pipeline, self.data, self.tensor), mesh_dim_names=AXES)
