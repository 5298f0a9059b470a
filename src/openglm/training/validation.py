"""Bits per byte of plain continuation: independent of the vocabulary, so that it compares with anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from openglm.data.shards import Shard
from openglm.infilling import Batch, Layout, language_model_windows
from openglm.models.glm130b import GLM130B
from openglm.tokenizers.base import Tokenizer
from openglm.training.model import token_losses


def continuation_windows(document: np.ndarray, special, window: int = 512) -> list[Layout]:
    """Cut a document into consecutive windows of at most ``window`` tokens, each alone as unidirectional [gMASK]."""
    layouts: list[Layout] = []
    for start in range(0, len(document), window):
        piece = document[start : start + window]
        layouts += language_model_windows(piece, special, max_length=window + 1, generation_length=window, unidirectional=True)
    return layouts


#: Losses in nats, float32 ``[b, s]``, of a batch; 0 where there is no target.
Losses = Callable[[Batch], Tensor]


def network_losses(network: GLM130B, device: torch.device | str = "cpu") -> Losses:
    """The losses of a plain network."""

    @torch.inference_mode()
    def losses(batch: Batch) -> Tensor:
        return token_losses(network, batch, device)[0]

    return losses


def bits(losses_of: Losses, layouts: Sequence[Layout], places: int = 8_192) -> float:
    """Sum of -log2 p over all targets of the layouts."""
    total = 0.0
    ordered = sorted(layouts, key=len)
    while ordered:
        count = max(1, places // len(ordered[-1]))
        group, ordered = ordered[-count:], ordered[:-count]
        total += float(losses_of(Batch.stack(group, multiple=8)).double().sum())
    return total / math.log(2)


def bits_per_byte(
    losses_of: Losses,
    documents: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    *,
    window: int = 512,
) -> float:
    """Bits per UTF-8 byte of documents (token ids without end-of-text), window by window."""
    layouts: list[Layout] = []
    size = 0
    for document in documents:
        layouts += continuation_windows(document, tokenizer.special_tokens, window)
        size += len(tokenizer.decode(document.tolist()).encode())
    return bits(losses_of, layouts) / max(size, 1)


class Validator:
    """Bits per byte by language on the same pieces of the validation shards each time."""

    def __init__(self, shards: Sequence[Shard], tokenizer: Tokenizer, *, windows: int, window: int = 512) -> None:
        self.tokenizer, self.window = tokenizer, window
        self.documents: dict[str, list[np.ndarray]] = {}
        eos = tokenizer.special_tokens["eos"]
        for shard in shards:
            # One window from each of many documents, evenly over the file.
            chosen = np.unique(np.linspace(0, shard.info.documents - 1, min(windows, shard.info.documents)).astype(int))
            pieces = [np.asarray(shard.document(int(k))[:window], dtype=np.int64) for k in chosen]
            self.documents.setdefault(shard.info.language, []).extend(p[p != eos] for p in pieces)

    def __call__(self, losses_of: Losses) -> dict[str, float]:
        """Language to bits per byte."""
        return {
            language: bits_per_byte(losses_of, documents, self.tokenizer, window=self.window)
            for language, documents in self.documents.items()
        }
