"""Which part of every tensor of a model a tensor-parallel rank holds when it only writes. Arithmetic: nothing is read here.

Attention is cut by heads, GeGLU by inner columns, the vocabulary by tokens; norms are whole everywhere. A matrix whose columns
are cut gives each rank a part of a sum, so its bias lies on the first rank alone and is 0 on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from openglm.config import COLUMN_SPLIT, ModelConfig


@dataclass(frozen=True)
class Part:
    """A part of one stored tensor."""

    rows: tuple[range, ...] | None = None
    """Rows, range behind range; None: all."""
    columns: range | tuple[int, ...] | None = None
    """A range; or for scales each column by itself, some perhaps twice; None: all."""
    zero: bool = False
    """Another rank has it: here it is 0."""

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part, from that of the whole tensor."""
        rows = whole[0] if self.rows is None else sum(map(len, self.rows))
        return (rows, *whole[1:]) if self.columns is None else (rows, len(self.columns))


class TensorCut:
    """The parts of rank ``rank`` of ``ranks``. Raises ``ConfigError`` if so many ranks cannot share the model."""

    def __init__(self, config: ModelConfig, rank: int, ranks: int) -> None:
        config.check_ranks(ranks)
        self.config, self.rank, self.ranks = config, rank, ranks
        self.heads = config.num_attention_heads // ranks
        width = self.heads * config.head_size
        self.hidden = range(rank * width, (rank + 1) * width)
        """Columns of the heads that are here, side by side."""
        self.inner = config.inner_share(rank, ranks)
        self.vocabulary = config.vocabulary_share(rank, ranks)

    def part(self, name: str) -> Part:
        """Of a tensor by its name in the checkpoint: a weight, a bias, or the codes, scales and zeros of a quantized matrix."""
        matrix, _, leaf = name.rpartition(".")
        if matrix.endswith("attention.query_key_value"):  # of each head: query, key, value
            return Part((range(3 * self.hidden.start, 3 * self.hidden.stop),))
        if matrix.endswith("mlp.dense_h_to_4h"):
            second = self.config.inner_hidden_size
            return Part((self.inner, range(second + self.inner.start, second + self.inner.stop)))
        if matrix == "word_embeddings":
            return Part((self.vocabulary,))
        if matrix.endswith(COLUMN_SPLIT):
            return Part(zero=self.rank > 0) if leaf == "bias" else Part(columns=self._columns(matrix, leaf))
        return Part()

    def _columns(self, matrix: str, leaf: str) -> range | tuple[int, ...]:
        own, width = self.hidden, self.config.hidden_size
        if matrix.endswith("mlp.dense_4h_to_h"):
            own, width = self.inner, self.config.inner_hidden_size
        scheme = self.config.quantization and self.config.quantization.for_matrix(matrix)
        if scheme is None or leaf == "weight" or (leaf == "codes" and scheme.bits == 8):
            return own
        if leaf == "codes":  # two a byte
            return range(own.start // 2, own.stop // 2)
        # A group that is cut in two, or begins within, becomes some smaller ones with the same scale.
        group, shared = scheme.columns(width), scheme.part_columns(width, own)
        return tuple(column // group for column in own[::shared])
