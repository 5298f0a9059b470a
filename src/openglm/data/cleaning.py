"""What is mended in a text, and which texts are not worth training on.

``repair`` mends: text that was decoded with the wrong code page (ftfy), control and invisible characters, line ends.
``find_fault`` judges running text by five rules with a threshold for each language. The rules follow Gopher
(Rae et al. 2021, appendix A.1.1) in kind; for Chinese they count characters where English has words. Instructions are
mended, never judged: a good answer may be one word.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from openglm.data.ngrams import Units, ngrams, split_units
from openglm.data.readers import missing


@dataclass(frozen=True)
class Rules:
    """Thresholds of one language; a text beyond one of them is dropped for the reason of that name."""

    too_short: int
    """Fewest units: words, or Chinese characters."""
    repeated_lines: float
    """Largest share of the characters in lines that have occurred before in the same text."""
    repeated_passages: float
    """Largest share of n-grams (``passage`` units) that have occurred before in the same text."""
    passage: int
    few_letters: float
    """Smallest share of letters, digits and Chinese characters among all characters but blanks."""
    long_words: float
    """Largest mean length of a word, in characters: beyond it the text is code, a list of links or encoded data.
    Asked only where most units are words."""
    broken: float = 0.002
    """Largest share of characters that stand for what could not be decoded."""


RULES = {
    "en": Rules(too_short=20, repeated_lines=0.25, repeated_passages=0.3, passage=10, few_letters=0.65, long_words=12.0),
    "zh": Rules(too_short=30, repeated_lines=0.25, repeated_passages=0.3, passage=16, few_letters=0.6, long_words=12.0),
}
REASONS = ("too_short", "repeated_lines", "repeated_passages", "few_letters", "long_words", "broken")

#: What UTF-8 looks like when it was decoded as Windows-1252 or Latin-1: a lead byte and what a continuation becomes.
_MOJIBAKE = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
)
_SURROGATES = re.compile("[\ud800-\udfff]+")
#: Control characters but newline and tab; soft hyphen, zero-width space, marks of direction, BOM.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufff9-\ufffb]+"
)
_LINE_ENDS = re.compile("\r\n?|[\x0c\x85\u2028\u2029]")
_TRAILING = re.compile(r"[ \t\u00a0\u3000]+$", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n{3,}")
#: U+FFFD, and what two of them become when their bytes are read as GBK.
_BROKEN = re.compile("\ufffd|锟斤拷")


@functools.cache
def _fix_encoding() -> Callable[[str], str]:
    try:
        from ftfy import fix_encoding
    except ImportError as error:
        raise missing("ftfy") from error
    return fix_encoding


def without_surrogates(text: str) -> str:
    r"""The text without lone surrogates, which JSON can write (``"\ud800"``) and UTF-8 cannot hold."""
    if text.isascii():
        return text
    # Two halves that were escaped one by one belong together.
    return _SURROGATES.sub(lambda found: found[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore"), text)


def repair(text: str) -> str:
    """The text mended: encoding, NFC, invisible characters, line ends, blanks at line ends, more than one empty line.

    Words, punctuation, full-width forms and quotation marks stay as they are. Raises ``DataError`` if ftfy is missing.
    """
    text = _LINE_ENDS.sub("\n", without_surrogates(text))
    if _MOJIBAKE.search(text):
        # Line by line: one wrongly decoded line is not evidence against the others.
        fix = _fix_encoding()
        text = "\n".join(fix(line) if _MOJIBAKE.search(line) else line for line in text.split("\n"))
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    return _EMPTY_LINES.sub("\n\n", _TRAILING.sub("", text)).strip()


def find_fault(text: str, language: str, units: Units | None = None, rules: dict[str, Rules] | None = None) -> str | None:
    """The name of the first rule that a text breaks, None if it breaks none. Units are computed if they are not given."""
    table = rules or RULES
    rule = table.get(language, table["en"])
    units = split_units(text) if units is None else units
    count = int(units.han.sum()) if language == "zh" else len(units)
    if count < rule.too_short:
        return "too_short"
    if len(_BROKEN.findall(text)) > rule.broken * len(text):
        return "broken"
    letters = int((units.ends - units.starts).sum())
    if letters < rule.few_letters * len("".join(text.split())):
        return "few_letters"
    words = ~units.han
    if 2 * int(words.sum()) > len(units) and float((units.ends - units.starts)[words].mean()) > rule.long_words:
        return "long_words"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    total = sum(map(len, lines))
    if total - sum(map(len, set(lines))) > rule.repeated_lines * total:
        return "repeated_lines"
    passages = ngrams(units.hashes, rule.passage)
    if len(passages) and 1 - len(np.unique(passages)) / len(passages) > rule.repeated_passages:
        return "repeated_passages"
    return None
