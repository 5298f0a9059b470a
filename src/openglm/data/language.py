"""Which language a document is in: "en", "zh" or "other".

Chinese is told by its script. What is written in Latin letters goes through py3langid (langid.py of Lui and Baldwin 2012,
97 languages, BSD licence; its model is part of the package, so nothing is downloaded).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from openglm.data.ngrams import HAN, OTHER_SYLLABLE, WORD, code_points, kinds_of
from openglm.data.readers import missing

LANGUAGES = ("en", "zh", "other")
#: As in `shards.py`: Chinese if more than a third of the letters are.
HAN_SHARE = 1 / 3
#: More than this share of kana or Korean among the characters without an alphabet: not Chinese.
SYLLABLE_SHARE = 0.2
#: Latin text of fewer letters is taken for English: there is too little to go by.
FEWEST_LETTERS = 60
#: Latin text is "other" only if the model is this sure.
SURE = 0.95
#: Characters that are looked at.
SEEN = 1_000

_ENGLISH = {"en", "eng", "english"}
_CHINESE = {"zh", "zho", "chi", "cmn", "yue", "chinese", "mandarin"}


def declared_language(name: str | None) -> str | None:
    """ "en", "zh" or "other" for what a row declares ("en-GB", "eng_Latn", "zh_CN", "cmn_Hani"); None if it says nothing."""
    if not name or name.lower() in ("und", "unknown", "none", "null"):
        return None
    head = name.lower().replace("-", "_").split("_")[0]
    return "en" if head in _ENGLISH else "zh" if head in _CHINESE else "other"


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise missing("py3langid") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str, declared: str | None = None) -> str:
    """The language of a text; what its row declares wins. Raises ``DataError`` if py3langid is not installed."""
    language = declared_language(declared)
    if language is not None:
        return language
    codes = code_points(text[:SEEN])
    kinds = kinds_of(codes)
    han, syllables, words = (int((kinds == kind).sum()) for kind in (HAN, OTHER_SYLLABLE, WORD))
    letters = han + syllables + words
    if not letters:
        return "other"
    if (han + syllables) / letters > HAN_SHARE:
        return "other" if syllables > SYLLABLE_SHARE * (han + syllables) else "zh"
    # Latin letters and digits lie below U+0250; Cyrillic, Arabic and the others above.
    if int(((codes < 0x250) & (kinds == WORD)).sum()) < words / 2:
        return "other"
    if words < FEWEST_LETTERS:
        return "en"
    found, probability = _identifier().classify(text[:SEEN])
    return "other" if found != "en" and float(np.asarray(probability)) > SURE else "en"
