"""The one exception family of openglm.

    OpenGLMError                 anything a user can mend; exit code 2 at the command line
    ├── InputError               the text, the ids or an option that was given
    │   └── UnlearnedMaskError   a mask kind that this model was not trained on
    ├── BusyError                more requests than may wait
    ├── ConfigError              a model configuration, a recipe or templates of instructions
    ├── ModelNotFoundError       a model that is neither bundled nor a folder
    ├── CheckpointError          a model folder, a shard or a tensor in it
    ├── TokenizerError           a tokenizer file
    ├── DataError                training text or token shards
    ├── TrainingError            a run that diverges in spite of all remedies
    └── StorageError             the disk: full, read-only, gone

Every message is one sentence that names the file or key, what was found and what was expected.
The way out goes into ``hint``, so that a caller never has to parse text.
"""

from __future__ import annotations

from pathlib import Path


class OpenGLMError(Exception):
    """What is wrong, in which file (``path``) or key (``key``), and the way out (``hint``)."""

    exit_code = 2

    def __init__(
        self, message: str, *, hint: str | None = None, path: str | Path | None = None, key: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.path = Path(path) if path is not None else None
        self.key = key

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class InputError(OpenGLMError):
    """The text, the ids or an option that a user gave cannot be used."""


class BusyError(OpenGLMError):
    """So many requests are waiting that no more are taken; try again later."""


class UnlearnedMaskError(InputError):
    """The prompt holds a mask kind that this model was not trained on."""


class ConfigError(OpenGLMError):
    """A model configuration, a recipe or a `templates.toml` has a missing, unknown or impossible value."""


class ModelNotFoundError(OpenGLMError):
    """The name is neither a bundled model nor a folder that holds one."""


class CheckpointError(OpenGLMError):
    """A model folder is incomplete or damaged, or holds something else."""


class TokenizerError(OpenGLMError):
    """A tokenizer file cannot be read or does not fit its model."""


class DataError(OpenGLMError):
    """Training text or a token shard cannot be read."""


class TrainingError(OpenGLMError):
    """A run cannot go on: it diverges in spite of all remedies."""


class StorageError(OpenGLMError):
    """The disk refused: full, read-only, or the file has gone."""
