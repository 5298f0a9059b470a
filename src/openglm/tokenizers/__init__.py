"""Text to ids and back: the released vocabulary of GLM-130B (``icetk``) and our own (``unigram``)."""

from __future__ import annotations

from pathlib import Path

from openglm.errors import InputError, TokenizerError
from openglm.tokenizers.base import MASK_WORDS, StreamDecoder, Tokenizer

__all__ = ["MASK_WORDS", "StreamDecoder", "Tokenizer", "load_tokenizer"]

#: Files that a folder is searched for (``icetk.FILE_NAME``, ``unigram.FILE_NAME``).
FILE_NAMES = ("ice_text.model", "unigram.model")


def load_tokenizer(path: str | Path, whitespace: str = "keep") -> Tokenizer:
    """A tokenizer from its file, or from the folder that holds it; the content decides which one it is.

    ``whitespace`` is for GLM-130B's ``ice_text.model``: "keep" (SPEC 7.3) or "collapse" (SPEC 7.2). Our own tokenizer
    keeps everything. Raises ``TokenizerError`` for a file that is missing, damaged or foreign, ``InputError`` for a
    ``whitespace`` that is unknown or that the tokenizer does not have.
    """
    if whitespace not in ("keep", "collapse"):
        raise InputError(f'`whitespace` may be "keep" or "collapse", not {whitespace!r}')
    path = _file_of(Path(path))
    # Only now: importing this package must stay cheap.
    from openglm.tokenizers.icetk import IcetkTokenizer, is_icetk
    from openglm.tokenizers.unigram import UnigramTokenizer

    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise TokenizerError(f"cannot read the tokenizer `{path}`: {error.strerror}", path=path) from error
    if is_icetk(head):
        return IcetkTokenizer(path, whitespace)
    tokenizer = UnigramTokenizer(path)
    if whitespace == "collapse":
        raise InputError(
            f"`{path}` is a tokenizer that loses nothing, so it cannot collapse whitespace",
            hint='whitespace="collapse" is for `ice_text.model`',
        )
    return tokenizer


def _file_of(path: Path) -> Path:
    if not path.exists():
        raise TokenizerError(f"there is no tokenizer at `{path}`", hint="give the file or the folder that holds it", path=path)
    if not path.is_dir():
        return path
    found = [path / name for name in FILE_NAMES if (path / name).is_file()]
    if len(found) == 1:
        return found[0]
    what = "no tokenizer" if not found else "two tokenizers"
    raise TokenizerError(
        f"the folder `{path}` holds {what} ({' or '.join(FILE_NAMES)})", hint="give the file itself", path=path
    )
