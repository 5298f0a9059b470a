"""How the weights of a run begin: one whole tensor at a time, so that no process holds more than its part and one of them."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from torch import Tensor

from openglm.checkpoints import expected_shapes, open_model
from openglm.checkpoints.loading import TensorSource
from openglm.config import ModelConfig
from openglm.data.mixture import Mixture
from openglm.models.glm130b import initial_values
from openglm.training.head_start import give_head_start
from openglm.training.recipe import Recipe

#: Samples whose targets are counted for ``model.head_start``.
HEAD_START_SAMPLES = 4_000


class FreshWeights:
    """Initial weights as a source: float32, a function of the recipe and the tensor's name, the same on every layout."""

    def __init__(self, recipe: Recipe, config: ModelConfig, mixture: Mixture) -> None:
        self.config = config
        self._recipe, self._mixture = recipe, mixture
        self._shapes = expected_shapes(config)

    def names(self) -> list[str]:
        """As ``TensorSource``."""
        return list(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """As ``TensorSource``."""
        values = initial_values(self.config, name, self._shapes[name], self._recipe.run.seed)
        if self._recipe.model.head_start:
            give_head_start(name, values, self._counts, self._recipe.model.embedding_scale)
        return values

    @cached_property
    def _counts(self) -> np.ndarray:
        return self._mixture.target_counts(HEAD_START_SAMPLES, self.config.vocab_size)


def first_weights(recipe: Recipe, config: ModelConfig, mixture: Mixture) -> TensorSource:
    """A checkpoint if the recipe names one, else an initialisation with the recipe's head start."""
    return open_model(recipe.model.initial) if recipe.model.initial else FreshWeights(recipe, config, mixture)
