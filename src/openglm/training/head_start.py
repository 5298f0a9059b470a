"""A head start for small models: the network knows word frequencies before its first step.

A DeepNorm network whose head is tied can only say how frequent a word is by giving all its states a common direction.
Each layer normalises what it is given, so that direction crowds out what tells one token from another, and small
models sit at the entropy of single words for many hundred thousand tokens before they look at their input (figures in
docs/lab-book.md). Here one coordinate of the tied matrix holds the frequencies from the start: the final norm has the
constant ``STRENGTH`` there, and the first norm shuts it out of the layers. All of it is an ordinary initialisation, and
trains on.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Value of the final norm at the coordinate; the larger, the less the frequencies disturb the embedding's variance.
STRENGTH = 30.0


def give_head_start(name: str, values: Tensor, counts: np.ndarray, embedding_scale: float) -> None:
    """Change the initial values of the parameter ``name`` in place: the log-frequencies of ``counts`` (``[vocabulary]``) go
    into coordinate 0 of the tied matrix.

    ``embedding_scale`` shrinks the rest of the matrix first: a fresh network expects every token to repeat itself, with
    a logit of hidden size x standard deviation, and has to unlearn that.
    """
    if name == "word_embeddings.weight":
        smoothed = np.log((counts + 0.5) / (counts + 0.5).sum())
        values *= embedding_scale
        values[:, 0] = torch.from_numpy((smoothed - smoothed.mean()) / STRENGTH).to(values)
    elif name == "final_layernorm.bias":
        values[0] = STRENGTH
    elif name in ("final_layernorm.weight", "layers.0.input_layernorm.weight", "layers.0.input_layernorm.bias"):
        values[0] = 0.0
