"""Bytes of a training run in one process on a CPU, as `training/step.py` does it."""

from __future__ import annotations

from dataclasses import dataclass

from openglm.planning.layout import Workload
from openglm.planning.memory import LOGIT_WIDTH, WIDTH, Term, layer_activations

#: Fitted to measured runs (docs/planning.md): what glibc's malloc holds beyond the live blocks, as a share of the
#: activations, whose blocks are too small for it to give them back to the system one by one.
HEAP_HOLES = 0.6


@dataclass(frozen=True)
class ProcessMemory:
    """The two moments that can be the fullest: the backward pass of the loss, and the update of the weights."""

    backward: tuple[Term, ...]
    update: tuple[Term, ...]

    @property
    def moment(self) -> str:
        """ "backward" or "update"."""
        return max(("backward", "update"), key=self._size)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Terms of the fuller moment."""
        return self.backward if self.moment == "backward" else self.update

    @property
    def total(self) -> float:
        """Bytes at the fuller moment, beyond what the process holds after its imports."""
        return self._size(self.moment)

    def _size(self, moment: str) -> float:
        return sum(term.bytes for term in getattr(self, moment))


def process_memory(workload: Workload, micro_batch: int, *, loss_share: float = 1.0, snapshots: bool = True) -> ProcessMemory:
    """Memory of a run whose micro-batches hold ``micro_batch`` whole samples of ``workload.sequence`` tokens.

    ``workload.precision``: "bf16" (a working copy beside float32 masters) or "fp32". ``loss_share``: part of the tokens
    that carry loss; only these go through the head. ``snapshots``: whether one is on its way to the disk, as in every run of
    `glm train` after each ``run.snapshot_every`` steps. Nothing is recomputed and nothing is shared.
    """
    config, width = workload.config, WIDTH[workload.precision]
    count = config.parameter_count
    tokens = micro_batch * workload.sequence
    rows = round(tokens * loss_share)
    several = workload.batch > micro_batch
    billions = f"{count / 1e9:.3f} G parameters"
    state = [Term("master weights", 4 * count, f"{billions} x 4 bytes")]
    if width < 4:
        state.append(Term("working copy", width * count, f"{billions} x {width} bytes"))
    state.append(Term("AdamW moments", 8 * count, f"{billions} x 2 x 4 bytes"))
    if snapshots:
        state.append(Term("snapshot copy", 12 * count, f"{billions} x 12 bytes, while it is written beside the run"))
    layer = layer_activations(workload, tokens)
    activations = config.num_layers * layer + 2 * tokens * config.head_size * width + 2 * rows * config.hidden_size * width
    backward = [
        *state,
        # Those of earlier micro-batches wait in the width of the working copy.
        *([Term("gradients", width * count, f"{billions} x {width} bytes, of the micro-batches before")] if several else []),
        Term(
            "activations",
            activations,
            f"{config.num_layers} layers x {layer / 2**20:.1f} MiB for {tokens:,} tokens, rotary table, what the head reads",
        ),
        Term("logits", rows * config.vocab_size * LOGIT_WIDTH, f"{rows:,} rows x {config.vocab_size:,} x {LOGIT_WIDTH} bytes"),
        Term("holes in the heap", HEAP_HOLES * activations, f"{HEAP_HOLES:.0%} of the activations, kept by malloc", "fitted"),
    ]
    update = [
        *state,
        Term("gradients", 4 * count, f"{billions} x 4 bytes, for the optimizer"),
        Term("weights before it", 4 * count, f"{billions} x 4 bytes, where the norms of updates are logged"),
    ]
    return ProcessMemory(tuple(backward), tuple(update))
