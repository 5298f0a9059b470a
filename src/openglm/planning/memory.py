"""Bytes of one GPU, stage by stage, each term with its arithmetic in words (SPEC 9.1.2)."""

from __future__ import annotations

from dataclasses import dataclass

from openglm.config import ModelConfig
from openglm.planning.layout import Layout, Workload, cut_layers

GIB = 2**30
#: Bytes a number of the computation.
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
#: Bytes of AdamW a parameter: two float32 moments, and a float32 master where the weights are narrower.
OPTIMIZER_WIDTH = {"bf16": 12, "fp16": 12, "fp32": 8}
#: Bytes a logit at the worst moment, the backward pass of the loss: float32 softmax, gradients before and after it.
LOGIT_WIDTH = 12
#: Assumed: driver, CUDA context, communication channels, what the allocator cannot use, GB that are no GiB.
RESERVE = 2 * GIB


def gradient_width(workload: Workload) -> int:
    """Bytes a gradient. FSDP2 sums those of half-precision weights in float32; the original kept float16 ones in float16."""
    return 2 if workload.precision == "fp16" and not workload.float32_gradients else 4


@dataclass(frozen=True)
class Term:
    """A part of a sum."""

    name: str
    bytes: float
    how: str
    """The arithmetic, in words and numbers."""
    basis: str = "computed"
    """"computed" from shapes, "assumed", or "fitted" to measurements."""


@dataclass(frozen=True)
class StageMemory:
    """What one GPU of a pipeline stage holds at its fullest moment."""

    stage: int
    layers: int
    terms: tuple[Term, ...]

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(term.bytes for term in self.terms)

    def group(self, *names: str) -> float:
        """Bytes of the terms whose names begin with one of ``names``."""
        return sum(term.bytes for term in self.terms if term.name.startswith(names))


def layer_parameters(config: ModelConfig, tensor: int = 1) -> int:
    """Parameters of one layer on one tensor rank; norms and the biases behind a sum over ranks are on every rank."""
    h, i = config.hidden_size, config.inner_hidden_size
    return (4 * h * h + 3 * i * h + 3 * h + 2 * i) // tensor + 6 * h


def stage_parameters(config: ModelConfig, layout: Layout, stage: int) -> int:
    """Parameters of one GPU. The tied vocabulary matrix is at both ends of a pipeline, once in a single stage."""
    ends = {0, layout.pipeline - 1}
    count = cut_layers(config.num_layers, layout.pipeline)[stage] * layer_parameters(config, layout.tensor)
    if stage in ends:
        count += config.vocab_size * config.hidden_size // layout.tensor
    if stage == layout.pipeline - 1:
        count += 2 * config.hidden_size
    return count


def layer_activations(workload: Workload, tokens: int, tensor: int = 1) -> int:
    """Bytes that one layer stores for its backward pass, for ``tokens`` of whole samples.

    Ten widths of h (input and output of both norms; query, key and value before and after the rotation; the attention's
    output) and four of i (both halves, the gated half after GELU, their product), the attention's log-sums, statistics of
    the norms, and the mask in the width of the computation. Norms are not split over tensor ranks, all else is.
    """
    config, width = workload.config, WIDTH[workload.precision]
    h, i, heads = config.hidden_size, config.inner_hidden_size, config.num_attention_heads // tensor
    values = tokens * (4 * h + (6 * h + 4 * i) // tensor + 4) * width
    places = tokens * workload.sequence
    values += places * width + tokens * heads * 4
    if not workload.fused_attention:  # scores, their float32 softmax, its rounded copy, the dropout mask
        values += places * heads * (2 * width + 5)
    return values


def stage_memory(workload: Workload, layout: Layout, stage: int) -> StageMemory:
    """All terms of one stage, in bytes a GPU."""
    parameters = stage_parameters(workload.config, layout, stage)
    terms = [
        *_state(workload, layout, parameters),
        *_activations(workload, layout, stage),
        *_buffers(workload, layout),
        Term("reserve", RESERVE, "driver, communication channels, allocator", "assumed"),
    ]
    layers = cut_layers(workload.config.num_layers, layout.pipeline)[stage]
    return StageMemory(stage, layers, tuple(term for term in terms if term.bytes))


def _state(workload: Workload, layout: Layout, parameters: int) -> list[Term]:
    rows = (
        ("weights", WIDTH[workload.precision], 3),
        ("gradients", gradient_width(workload), 2),
        ("optimizer", OPTIMIZER_WIDTH[workload.precision], 1),
    )
    terms = []
    for name, width, stage in rows:
        shared = layout.data if layout.zero >= stage else 1
        how = f"{parameters / 1e9:.3f} G parameters x {width} bytes" + (f" / {shared} data ranks" if shared > 1 else "")
        terms.append(Term(name, parameters * width / shared, how))
    return terms


def _activations(workload: Workload, layout: Layout, stage: int) -> list[Term]:
    config, width = workload.config, WIDTH[workload.precision]
    tokens = layout.micro_batch * workload.sequence
    layers = cut_layers(config.num_layers, layout.pipeline)[stage]
    flying = layout.in_flight(stage, workload.batch)
    one = layer_activations(workload, tokens, layout.tensor)
    hidden = tokens * config.hidden_size * width
    gradients = tokens * (2 * config.hidden_size + 4 * config.inner_hidden_size // layout.tensor) * width
    if layout.recompute != "none":
        shared = layout.tensor if layout.recompute == "partitioned" else 1
        split = f" / {shared} tensor ranks" if shared > 1 else ""
        how = f"{flying} in flight x {layers} layers x {hidden / 2**20:.1f} MiB of inputs{split}"
        stored = Term("activations, stored", flying * layers * hidden / shared, how)
        gathered, words = (hidden, ", its whole input") if shared > 1 else (0, "")
        working = Term("activations, working", one + gradients + gathered, f"one layer recomputed, its gradients{words}")
    else:
        how = f"{flying} in flight x {layers} layers x {one / 2**20:.1f} MiB"
        stored = Term("activations, stored", flying * layers * one, how)
        working = Term("activations, working", gradients, "gradients of activations in one layer")
    if stage == layout.pipeline - 1:
        rows = config.vocab_size // layout.tensor
        # The head comes before the first layer of the backward pass: never both at once.
        head = tokens * rows * LOGIT_WIDTH + 2 * hidden
        if head > working.bytes:
            how = f"{tokens:,} tokens x {rows:,} logits x {LOGIT_WIDTH} bytes in the backward pass of the loss"
            working = Term("activations, working", head, how)
    return [stored, working]


def _buffers(workload: Workload, layout: Layout) -> list[Term]:
    config = workload.config
    hidden = layout.micro_batch * workload.sequence * config.hidden_size * WIDTH[workload.precision]
    layer = layer_parameters(config, layout.tensor)
    size, parts = 0.0, []
    if layout.pipeline > 1:
        size += 4 * hidden
        parts.append("two sent and two received hidden states")
    if layout.data > 1:
        size += layer * gradient_width(workload)
        parts.append("one layer's gradients on their way")
        if layout.zero == 3:
            size += 2 * layer * WIDTH[workload.precision]
            parts.append("two layers' gathered weights")
    return [Term("buffers", size, ", ".join(parts))]


def fullest_stage(workload: Workload, layout: Layout) -> StageMemory:
    """The stage that needs most memory: what decides whether a layout fits."""
    stages = outer_stages(layout)
    return max((stage_memory(workload, layout, stage) for stage in stages), key=lambda memory: memory.total)


def outer_stages(layout: Layout) -> tuple[int, ...]:
    """First, second and last stage. Those between hold no more than the second: as many layers or fewer, fewer in flight."""
    return tuple(sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1}))


def snapshot_bytes(workload: Workload) -> int:
    """Size of a snapshot: weights and optimizer; 14 bytes a parameter in half precision (SPEC 9.1.2)."""
    width = OPTIMIZER_WIDTH[workload.precision] + WIDTH[workload.precision]
    return workload.config.parameter_count * width
