"""Calibration samples: windows of texts, laid out as GLM sees them, for quantization that looks at a layer's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from openglm import infilling
from openglm.config import ModelConfig
from openglm.data.mixture import Objectives
from openglm.data.readers import find_files, read_documents
from openglm.errors import InputError
from openglm.infilling import Layout
from openglm.quantization.calibration import CalibrationSample
from openglm.tokenizers.base import Tokenizer

SAMPLES = 128
SHORTEST, LONGEST = 16, 512
"""Tokens of a sample: those of its text at least, and all at most."""


def calibration_samples(
    files: Sequence[str | Path], tokenizer: Tokenizer, config: ModelConfig, count: int = SAMPLES, seed: int = 0
) -> list[CalibrationSample]:
    """``count`` different windows of the texts, or as many as there are; the same for the same texts, tokenizer and seed.

    They are continuations of a prefix ([gMASK]) and blanks ([MASK]) in turn, as far as the model has learned both. Raises
    ``DataError`` for a file that cannot be read, ``InputError`` for one that holds no text of ``SHORTEST`` tokens.
    """
    if count < 1:
        raise InputError(f"calibration needs at least 1 sample, not {count}", key="samples")
    if seed < 0:
        raise InputError(f"a seed is at least 0, not {seed}", key="seed")
    longest = min(LONGEST, config.max_sequence_length)
    windows: list[np.ndarray] = []
    for path in find_files(files):
        ids = [np.asarray(tokenizer.encode(document.text), dtype=np.int64) for document in read_documents([path])]
        # One place less: a mask, or eos, has to fit in.
        found = [text[start : start + longest - 1] for text in ids for start in range(0, len(text), longest - 1)]
        found = [window for window in found if len(window) >= SHORTEST]
        if not found:
            raise InputError(
                f"`{path}` holds no text of {SHORTEST} tokens, too little for a calibration sample",
                hint="give a longer text",
                path=path,
            )
        windows += found
    rng = np.random.default_rng(seed)
    kinds = [kind for kind in ("[gMASK]", "[MASK]") if kind in config.learned_masks] or ["[MASK]"]
    chosen = rng.permutation(len(windows))[:count]
    layouts = [_lay_out(windows[k], kinds[i % len(kinds)], longest, config, rng) for i, k in enumerate(chosen)]
    return [
        CalibrationSample(
            torch.from_numpy(layout.tokens), torch.from_numpy(layout.positions), torch.from_numpy(layout.visible())
        )
        for layout in layouts
    ]


def _lay_out(window: np.ndarray, kind: str, longest: int, config: ModelConfig, rng: np.random.Generator) -> Layout:
    """As in training (SPEC 3.4): a continuation of random length, or blanks over some of the words, eos at the end."""
    special, objectives = config.special_tokens, Objectives()
    if kind == "[gMASK]":
        least = int(objectives.least_generation_ratio * len(window))
        return infilling.generation_sample(window, int(rng.integers(least, len(window) + 1)), special)
    ratio, mean = objectives.mask_ratio, objectives.mean_span
    length, spans = infilling.draw_spans(len(window), longest - 1, rng, ratio=ratio, mean=mean)
    starts = infilling.place_spans(length, spans, rng)
    text = np.append(window[:length], special["eos"])
    return infilling.blank_sample(text, starts, spans, special, order=rng.permutation(len(spans)))
