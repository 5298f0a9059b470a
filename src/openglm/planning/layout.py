"""How a model is spread over GPUs, what one step has to compute, and which layouts are impossible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openglm.config import ModelConfig
from openglm.errors import InputError

PRECISIONS = ("bf16", "fp16", "fp32")
RECOMPUTE = ("layer", "partitioned", "none")
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Workload:
    """What is trained: a model, its samples, a step."""

    config: ModelConfig
    batch: int
    """Samples of a step."""
    sequence: int
    """Tokens of a sample."""
    precision: str = "bf16"
    """"bf16", "fp16" (both with float32 masters and moments) or "fp32"."""
    fused_attention: bool = True
    """Whether attention never stores its scores; False: materialised, with a softmax in float32, as in 2022."""
    float32_gradients: bool = False
    """Whether gradients of fp16 are summed in float32, as `parallel/` does it; False: in float16, as the original did."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("sequence", 1)):
            if getattr(self, name) < least:
                raise InputError(f"`{name}` must be at least {least}, not {getattr(self, name)}", key=name)
        _one_of("precision", self.precision, PRECISIONS)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.sequence

    @property
    def layer_flops(self) -> int:
        """Forward FLOPs of a token in one layer, full attention over the sequence (SPEC 9.1.2)."""
        return (self.config.flops_per_token(self.sequence) - self.head_flops) // self.config.num_layers

    @property
    def head_flops(self) -> int:
        """Forward FLOPs of a token in the product with the vocabulary."""
        return 2 * self.config.hidden_size * self.config.vocab_size

    @property
    def model_flops(self) -> int:
        """FLOPs that a step needs: forward, and backward as twice that (SPEC 9.1.2)."""
        return self.tokens * self.config.flops_per_token(self.sequence, training=True)

    def hardware_flops(self, recompute: str) -> int:
        """FLOPs that are done: recomputed layers run forward once more, the vocabulary product does not."""
        again = 0 if recompute == "none" else self.config.num_layers * self.layer_flops
        return self.model_flops + self.tokens * again


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism and what is traded for memory."""

    tensor: int = 1
    """GPUs that share every matrix."""
    pipeline: int = 1
    """Stages that share the layers."""
    data: int = 1
    """Copies of the model that share the batch."""
    micro_batch: int = 1
    """Samples that go through a stage at once."""
    zero: int = 1
    """What the data ranks share: 0 nothing, 1 optimizer, 2 gradients too, 3 weights too (FSDP2: shard after forward)."""
    recompute: str = "layer"
    """"layer": only layer inputs are stored, a layer runs again in the backward pass; "partitioned": the same, and the
    inputs are shared by the tensor ranks, as the original did; "none": everything is stored."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data", "micro_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name.replace('_', '-')}` must be at least 1, not {getattr(self, name)}", key=name)
        _one_of("recompute", self.recompute, RECOMPUTE)
        _one_of("zero", self.zero, ZERO_STAGES)

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.tensor * self.pipeline * self.data

    def micro_batches(self, batch: int) -> int:
        """Micro-batches that a pipeline runs in a step."""
        return batch // (self.data * self.micro_batch)

    def bubble(self, batch: int) -> float:
        """Share of a step in which a stage waits: (p - 1) / (m + p - 1) (SPEC 9.1.2).

        With tensor t on n = t p GPUs, p is n / t: more tensor parallelism shortens the pipeline.
        """
        return (self.pipeline - 1) / (self.micro_batches(batch) + self.pipeline - 1)

    def in_flight(self, stage: int, batch: int) -> int:
        """Micro-batches whose activations a stage holds at once (PipeDream-flush, 1F1B): p at the first, 1 at the last."""
        return min(self.pipeline - stage, self.micro_batches(batch))


def _one_of(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise InputError(f"`{name}` must be one of {', '.join(map(str, known))}, not {value}", key=name)


def cut_layers(num_layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as `parallel/layout.py` cuts them.

    The vocabulary matrix at both ends weighs about a layer, so the first and the last stage are a layer lighter
    (SPEC 9.1.2); what does not divide goes to the middle first. Raises ``InputError`` for more stages than layers.
    """
    if stages > num_layers:
        raise InputError(f"{num_layers} layers are fewer than {stages} stages", hint="lower --pipeline", key="pipeline")
    if stages == 1:
        return (num_layers,)
    each, left = divmod(num_layers + 2, stages)
    order = [*range(1, stages - 1), 0, stages - 1]
    sizes = [each + (stage in order[:left]) for stage in range(stages)]
    sizes[0] -= 1
    sizes[-1] -= 1
    while min(sizes) < 1:
        sizes[sizes.index(min(sizes))] += 1
        sizes[sizes.index(max(sizes))] -= 1
    return tuple(sizes)


def check_even(num_layers: int, stages: int) -> None:
    """Raise ``InputError`` where neither the layers nor the layers and both ends of the vocabulary divide by the stages."""
    if num_layers % stages and (num_layers + 2) % stages:
        raise InputError(
            f"{num_layers} layers do not divide into {stages} stages, not even with one less in the first and the last",
            key="pipeline",
        )


def check_tensor(config: ModelConfig, tensor: int) -> None:
    """Raise ``InputError`` unless heads, inner width and vocabulary divide by ``tensor``."""
    for what, count in (
        ("attention heads", config.num_attention_heads),
        ("rows of the GeGLU", config.inner_hidden_size),
        ("rows of the vocabulary", config.vocab_size),
    ):
        if count % tensor:
            raise InputError(f"{count:,} {what} do not divide by tensor {tensor}", hint="choose another --tensor", key="tensor")


def check_layout(workload: Workload, layout: Layout, gpus: int) -> None:
    """Raise ``InputError`` with one sentence, ``key`` the option, if the layout is impossible whatever the memory."""
    check_tensor(workload.config, layout.tensor)
    cut_layers(workload.config.num_layers, layout.pipeline)
    if layout.gpus != gpus:
        raise InputError(
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} are {layout.gpus:,} GPUs, "
            f"but there are {gpus:,}",
            hint="their product must be the number of GPUs; what is left out of --tensor, --pipeline and --data is searched",
            key="data",
        )
    if workload.batch % (layout.data * layout.micro_batch):
        raise InputError(
            f"a batch of {workload.batch:,} does not divide by data {layout.data} x micro-batch {layout.micro_batch}",
            hint=f"choose a --batch that is a multiple of {layout.data * layout.micro_batch:,}",
            key="batch",
        )
    if layout.pipeline > 1 and layout.micro_batches(workload.batch) < layout.pipeline:
        raise InputError(
            f"{layout.micro_batches(workload.batch)} micro-batches a step are too few for {layout.pipeline} stages",
            hint="raise --batch, or lower --micro-batch or --pipeline",
            key="batch",
        )
