"""The measures of a small model: bits per byte, 500 fixed blanks, and samples for its card.

    python benchmarks/bundled_model.py [--model nano] [--left-only] [--corpus FOLDER] [--json FILE] [--card FILE]

All from the corpus's validation files, which are read at run time:

* bits per byte of all documents, cut into windows of at most 512 tokens, each alone as unidirectional [gMASK];
* blanks: 250 English and 250 Chinese passages with one span missing, filled greedily with at most 16 tokens. They depend
  on the files, the tokenizer and a seed; the SHA-256 of their ids says whether two runs had the same;
* with ``--left-only`` the model sees what stands before a blank and goes on, as a causal model must. It need not know where
  to end: what counts is whether the missing tokens are the next ones;
* samples picked by a fixed seed, good and bad as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from header import header

from openglm import GLM, OpenGLMError, load
from openglm.data.readers import Document, read_documents
from openglm.evaluation.blanks import (
    ANSWER,
    BLANKS,
    SEED,
    Blank,
    Draws,
    count_exact,
    draw_blanks,
    draw_passage,
    fill_blanks,
    fingerprint,
    is_exact,
    split_sentences,
    tokenizer_of,
)
from openglm.tokenizers.base import Tokenizer
from openglm.training.validation import bits_per_byte, network_losses

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {"en": "English", "zh": "Chinese"}
SAMPLE_SEED = 2025
SAMPLE_FILLS, SAMPLE_GENERATIONS = 6, 3
OPENING = (12, 40)
"""Tokens of a text to continue."""
GENERATION: dict[str, int | float] = {"max_tokens": 64, "temperature": 0.8, "top_p": 0.9, "seed": 1}


# ---------------------------------------------------------------------------------------------------------------------
# The card


_MARKDOWN = re.compile(r"([\\`*_<>|#\[\]~])")


def escape(text: str) -> str:
    """Text as it stands in a cell of a markdown table."""
    return _MARKDOWN.sub(r"\\\1", text).replace("\n", " ⏎ ")


def fill_rows(
    blanks: Sequence[Blank], answers: Sequence[tuple[list[int], bool]], exact: Sequence[bool], tokenizer: Tokenizer
) -> Iterator[str]:
    """A table row for each of some blanks, the same ones for every model."""
    draws = Draws(SAMPLE_SEED)
    for language, name in LANGUAGES.items():
        left = [k for k, blank in enumerate(blanks) if blank.language == language]
        for _ in range(min(SAMPLE_FILLS, len(left))):
            k = left.pop(draws.below(len(left)))
            blank, (answer, ended) = blanks[k], answers[k]
            expected = tokenizer.decode(blank.answer)
            before, after = tokenizer.decode(blank.part_a[: blank.index]), tokenizer.decode(blank.part_a[blank.index + 1 :])
            # The blank before a word belongs to its first token; readers expect it outside of the answer.
            text = f"{escape(before)}{' ' if expected.startswith(' ') else ''}`[MASK]`{escape(after)}"
            written = escape(tokenizer.decode(answer).removeprefix(" ")) + ("" if ended else " …")
            mark = "yes" if exact[k] else "no"
            yield f"| {name} ({blank.source}) | {text} | {escape(expected.removeprefix(' '))} | {written} | {mark} |"


def generation_parts(glm: GLM, documents: Mapping[str, Sequence[Document]]) -> Iterator[str]:
    """Texts that the model goes on with, the same ones for every model."""
    draws = Draws(SAMPLE_SEED)
    tokenizer = tokenizer_of(glm)
    for language, found in documents.items():
        split = [(document, split_sentences(document.text)) for document in found if document.text.strip()]
        for _ in range(SAMPLE_GENERATIONS):
            document, text, _ = draw_passage(split, tokenizer, draws, *OPENING)
            answer = glm.generate(text, **GENERATION).answer  # pyright: ignore[reportArgumentType]
            opening, answer = (escape(part).replace(" ⏎ ", "  \n> ") for part in (text, answer))
            yield f"{LANGUAGES[language]} ({document.source}):\n\n> <b>{opening}</b>{answer}"


def measures_table(report: Mapping) -> str:
    """The figures as markdown."""
    counts = report["blanks"]
    rows = ["| | English | Chinese | both |", "|---|---|---|---|"]
    bits = report["bits_per_byte"]
    if bits:
        rows.append(f"| bits per byte, validation | {bits['en']:.4f} | {bits['zh']:.4f} | |")
    cells = [f"{row['exact']} of {row['blanks']}" for row in counts["by_language"].values()]
    rows += [
        f"| blanks filled exactly | {' | '.join(cells)} |",
        "",
        "| missing tokens | blanks | filled exactly |",
        "|---|---|---|",
    ]
    rows += [f"| {n} | {row['blanks']} | {row['exact']} |" for n, row in counts["by_span_length"].items()]
    return "\n".join([*rows, "", f"The blanks have SHA-256 `{counts['sha256']}`."])


def card(report: Mapping, fills: Sequence[str], generations: Sequence[str]) -> str:
    """The fragment of a model card: figures and samples."""
    settings = ", ".join(f"{name} {value}" for name, value in GENERATION.items())
    return "\n".join(
        [
            "## Measures\n",
            measures_table(report),
            "\n## Samples\n",
            f"Picked from the validation texts by a fixed seed ({SAMPLE_SEED}), good and bad as they come. ⏎ is a new line.\n",
            f"Blanks, filled greedily with at most {ANSWER} tokens:\n",
            "| from | text | expected | model | exact |\n|---|---|---|---|---|",
            *fills,
            f"\nTexts (bold) and how the model goes on ({settings}):\n",
            "\n\n".join(generations) + "\n",
        ]
    )


def verdict(new: Mapping, old: Mapping) -> str:
    """Whether a model may replace an earlier one: fewer bits per byte in both languages, and more exact fills."""
    if new["blanks"]["sha256"] != old["blanks"]["sha256"]:
        return "not comparable: the blanks are not the same"
    if not new["bits_per_byte"] or not old["bits_per_byte"]:
        return "not comparable: bits per byte were not measured"
    better = [new["bits_per_byte"][name] < old["bits_per_byte"][name] for name in LANGUAGES]
    exact = [report["blanks"]["by_language"]["all"]["exact"] for report in (new, old)]
    allowed = all(better) and exact[0] > exact[1]
    return f"{'may' if allowed else 'must not'} replace it ({exact[0]} against {exact[1]} exact fills)"


# ---------------------------------------------------------------------------------------------------------------------
# The command


def measure_bits(glm: GLM, documents: Mapping[str, Sequence[Document]]) -> dict[str, float]:
    """Language to bits per byte of all documents."""
    tokenizer = tokenizer_of(glm)
    return {
        language: bits_per_byte(
            network_losses(glm.network, glm.engine.device),
            (np.asarray(tokenizer.encode(document.text), dtype=np.int64) for document in found),
            tokenizer,
        )
        for language, found in documents.items()
    }


def run(
    glm: GLM,
    documents: Mapping[str, Sequence[Document]],
    *,
    blanks: int = BLANKS,
    bits: bool = True,
    left_only: bool = False,
) -> tuple[dict, str]:
    """All measures: the figures, and the fragment of the card."""
    tokenizer = tokenizer_of(glm)
    start = time.monotonic()
    chosen = draw_blanks(documents, tokenizer, blanks)
    answers = list(fill_blanks(glm, chosen, left_only=left_only))
    exact = [is_exact(blank, *answer, tokenizer) for blank, answer in zip(chosen, answers, strict=True)]
    report = {
        "parameters": glm.config.parameter_count,
        "dtype": str(glm.engine.dtype).removeprefix("torch."),
        "left_only": left_only,
        "bits_per_byte": {},
        "blanks": {"sha256": fingerprint(chosen), "seed": SEED, **count_exact(chosen, exact)},
    }
    if bits:
        report["bits_per_byte"] = {language: round(value, 5) for language, value in measure_bits(glm, documents).items()}
    fills = list(fill_rows(chosen, answers, exact, tokenizer))
    generations = list(generation_parts(glm, documents))
    report["seconds"] = round(time.monotonic() - start)
    return report, card(report, fills, generations)


def main() -> int:
    """Measure and print."""
    shared = Path(os.environ.get("OPENGLM_SHARED") or ROOT.parent / "shared")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a bundled name, or a checkpoint folder (default: %(default)s)")
    parser.add_argument(
        "--corpus", type=Path, default=shared / "data" / "corpus", help="folder of validation-en and -zh.jsonl.zst"
    )
    parser.add_argument("--device", help="where to run (default: a GPU where there is one)")
    parser.add_argument("--no-bits", action="store_true", help="blanks and samples only: bits per byte take minutes")
    parser.add_argument("--left-only", action="store_true", help="blanks from the text before them, as a causal model")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures into a file")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="figures of an earlier model: say whether this one may replace it"
    )
    parser.add_argument("--card", type=Path, metavar="FILE", help="write figures and samples as markdown into a file")
    arguments = parser.parse_args()
    try:
        documents = {name: list(read_documents([arguments.corpus / f"validation-{name}.jsonl.zst"])) for name in LANGUAGES}
        glm = load(arguments.model, device=arguments.device)
        report, text = run(glm, documents, bits=not arguments.no_bits, left_only=arguments.left_only)
    except OpenGLMError as error:
        print(error, file=sys.stderr)
        return 2
    model = Path(arguments.model).name
    report = {**header(machine=arguments.machine), "model": model, **report}
    print(measures_table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.against:
        print(verdict(report, json.loads(arguments.against.read_text(encoding="utf-8"))))
    if arguments.card:
        arguments.card.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
