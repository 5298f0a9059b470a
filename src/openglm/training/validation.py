"""Bits per byte of plain continuation: independent of the vocabulary, so that it compares with anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from openglm.data.shards import Shard
from openglm.infilling import Batch, Layout, language_model_windows
from openglm.models.glm130b import GLM130B
from openglm.tokenizers.base import Tokenizer
from openglm.training.step import token_losses


def continuation_windows(document: np.ndarray, special, window: int = 512) -> list[Layout]:
    """Cut a document into consecutive windows of at most ``window`` tokens, each alone as unidirectional [gMASK]."""
    layouts: list[Layout] = []
    for start in range(0, len(document), window):
        piece = document[start : start + window]
        layouts += language_model_windows(piece, special, max_length=window + 1, generation_length=window, unidirectional=True)
    return layouts


@torch.inference_mode()
def bits(network: GLM130B, layouts: Sequence[Layout], device: torch.device | str = "cpu", places: int = 8_192) -> float:
    """Sum of -log2 p over all targets of the layouts."""
    total = 0.0
    ordered = sorted(layouts, key=len)
    while ordered:
        count = max(1, places // len(ordered[-1]))
        group, ordered = ordered[-count:], ordered[:-count]
        losses, _ = token_losses(network, Batch.stack(group), device)
        total += float(losses.double().sum())
    return total / math.log(2)


def bits_per_byte(
    network: GLM130B,
    documents: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    *,
    window: int = 512,
    device: torch.device | str = "cpu",
) -> float:
    """Bits per UTF-8 byte of documents (token ids without end-of-text), window by window."""
    layouts: list[Layout] = []
    size = 0
    for document in documents:
        layouts += continuation_windows(document, tokenizer.special_tokens, window)
        size += len(tokenizer.decode(document.tolist()).encode())
    return bits(network, layouts, device) / max(size, 1)


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

    def __call__(self, network: GLM130B, device: torch.device | str = "cpu") -> dict[str, float]:
        """Language to bits per byte."""
        return {
            language: bits_per_byte(network, documents, self.tokenizer, window=self.window, device=device)
            for language, documents in self.documents.items()
        }
