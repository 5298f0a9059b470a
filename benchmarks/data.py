"""Speed of every step of `glm data prepare` on one core, and how the cost grows with the size of the corpus.

    python benchmarks/data.py --corpus CORPUS --tokenizer unigram.model [--megabytes 300] [--json FILE]

Without ``--corpus``, texts are made up (`made_up`), so that anybody can run it; a corpus is better. ``--megabytes`` lets the
largest corpus grow to that size by variations of the documents (`varied`). All times are CPU seconds of one process, so other
work on the machine disturbs them little. MB are 10^6 bytes of UTF-8 text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from header import header

from openglm import bundled
from openglm.data import cleaning, duplicates
from openglm.data.decontamination import build_index
from openglm.data.language import identify
from openglm.data.ngrams import split_units
from openglm.data.pieces import Options
from openglm.data.prepare import prepare
from openglm.data.readers import Document, find_files, read_documents
from openglm.tokenizers import load_tokenizer

#: Behind what a text may be cut in two.
_SENTENCE = re.compile(r"(?<=[.!?。！？\n])")
#: Shares of documents that are exact copies, and copies but for a sentence.
COPIES, NEAR_COPIES = 0.05, 0.05


def made_up(count: int) -> Iterator[Document]:
    """Half English, half Chinese documents of random words; about 3 kB each, a tenth of them copies."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 10))) for _ in range(5000)]
    characters = [chr(0x4E00 + k) for k in range(0, 6000, 2)]
    made: list[Document] = []
    for k in range(count):
        if made and rng.random() < 0.1:
            made.append(rng.choice(made))
        elif k % 2:
            sentences = (" ".join(rng.choices(words, k=rng.randrange(5, 25))).capitalize() for _ in range(35))
            made.append(Document(". ".join(sentences) + ".", language="en"))
        else:
            sentences = ("".join(rng.choices(characters, k=rng.randrange(8, 40))) for _ in range(40))
            made.append(Document("。".join(sentences) + "。", language="zh"))
    return iter(made)


def corpus_documents(folder: Path, count: int) -> list[Document]:
    """``count`` documents, drawn evenly from the beginning of every file of running text."""
    files = [path for path in find_files([folder]) if not path.name.startswith(("validation", "instructions"))]
    share = -(-count // len(files))
    return [document for path in files for document in itertools.islice(read_documents([path]), share)][:count]


def varied(documents: Sequence[Document]) -> Iterator[Document]:
    """The documents, and then ever more: copies, near copies, and the sentences of two documents of one language by turns."""
    rng = random.Random(2)
    yield from documents
    languages: dict[str | None, list[Document]] = {}
    for document in documents:
        languages.setdefault(document.language or identify(document.text), []).append(document)
    while True:
        one = rng.choice(documents)
        kind = rng.random()
        if kind < COPIES:
            yield one
            continue
        language = one.language or identify(one.text)
        other = _SENTENCE.split(rng.choice(languages[language]).text)
        own = _SENTENCE.split(one.text)
        if kind < COPIES + NEAR_COPIES:
            own[rng.randrange(len(own))] = rng.choice(other)
            yield Document("".join(own), language=language)
        else:
            rng.shuffle(other)
            pairs = itertools.zip_longest(own[::2], other[::2], fillvalue="")
            yield Document("".join(itertools.chain.from_iterable(pairs)), language=language)


def measure(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what came of it."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def steps(documents: list[Document], tokenizer: Any, evaluation: Path | None, folder: Path) -> list[dict[str, Any]]:
    """Documents, MB and tokens a CPU second of each step alone."""
    size = sum(len(document.text.encode()) for document in documents) / 1e6
    path = folder / "documents.jsonl"
    rows = (json.dumps({"text": document.text}, ensure_ascii=False) for document in documents)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    table: list[dict[str, Any]] = []

    def add(step: str, seconds: float) -> None:
        table.append({"step": step, "documents_per_second": len(documents) / seconds, "MB_per_second": size / seconds})

    identify("An English sentence that is long enough to load the model for languages, once and for all time.")
    split_units("warm")
    seconds, _ = measure(lambda: list(read_documents([path])))
    add("read JSON lines", seconds)
    seconds, texts = measure(lambda: [cleaning.repair(document.text) for document in documents])
    add("repair", seconds)
    seconds, languages = measure(lambda: [identify(text) for text in texts])
    add("identify the language", seconds)
    seconds, units = measure(lambda: [split_units(text) for text in texts])
    add("split into units", seconds)
    triples = list(zip(texts, languages, units, strict=True))
    seconds, _ = measure(lambda: [cleaning.find_fault(*triple) for triple in triples])
    add("judge by the rules", seconds)
    if evaluation is not None:
        seconds, index = measure(lambda: build_index(evaluation, folder / "index"))
        names = {key: value for key, value in index.meta.items() if key != "files"}
        table.append({"step": "index the evaluation texts", "seconds": seconds, **names})
        seconds, _ = measure(lambda: [index.find(each) for each in units])
        add("look for evaluation texts", seconds)
    seconds, _ = measure(lambda: [duplicates.fingerprint(text) for text in texts])
    add("fingerprint", seconds)
    seconds, _ = measure(lambda: duplicates.signatures([s for s in map(duplicates.shingles, units) if len(s)]))
    add("MinHash", seconds)
    seconds, tokens = measure(lambda: sum(len(tokenizer.encode(text)) for text in texts))
    add("tokenize", seconds)
    for row in table:
        if "documents_per_second" in row:
            row["tokens_per_second"] = row["documents_per_second"] * tokens / len(documents)
    return table


def growth(documents: list[Document], largest: int, tokenizer: Path, folder: Path) -> list[dict[str, Any]]:
    """The whole command at a quarter, a half and all of ``largest`` bytes of text, in one process, without decontamination (its
    index costs the same at any size)."""
    table = []
    for size in (largest // 4, largest // 2, largest):
        path, out = folder / f"corpus-{size}" / "part.jsonl", folder / f"shards-{size}"
        path.parent.mkdir()
        with path.open("w", encoding="utf-8") as file:
            written = 0
            for number, document in enumerate(varied(documents)):
                if written >= size:
                    break
                written += len(document.text.encode())
                file.write(json.dumps({"text": document.text, "id": str(number)}) + "\n")
        seconds, report = measure(lambda path=path, out=out: prepare([path], out, tokenizer, Options(), workers=1))
        read, kept = report["sources"][0]["read"], report["sources"][0]["kept"]
        dropped = report["sources"][0]["dropped"]
        shutil.rmtree(path.parent)
        shutil.rmtree(out)
        table.append(
            {
                "documents": read["documents"],
                "MB": read["bytes"] / 1e6,
                "tokens_kept": kept["tokens"],
                "duplicates": dropped.get("duplicate", {}).get("documents", 0),
                "near_duplicates": dropped.get("near_duplicate", {}).get("documents", 0),
                "seconds": seconds,
                "documents_per_second": read["documents"] / seconds,
                "tokens_per_second": kept["tokens"] / seconds,
                "MB_per_second": read["bytes"] / 1e6 / seconds,
            }
        )
    return table


def deduplication(sizes: list[int]) -> list[dict[str, Any]]:
    """The one step that is not spread over cores: decisions over signatures, a tenth of them near copies."""
    table = []
    rng = np.random.default_rng(0)
    for count in sizes:
        signatures = rng.integers(0, 1 << 16, size=(count, duplicates.PERMUTATIONS), dtype=np.uint16)
        order = rng.permutation(count)
        copies = order[: count // 10]
        signatures[copies] = signatures[order[-len(copies) :]]
        noise = rng.random((len(copies), duplicates.PERMUTATIONS)) < 0.1
        signatures[copies] = np.where(noise, rng.integers(0, 1 << 16, size=noise.shape, dtype=np.uint16), signatures[copies])
        eligible = np.ones(count, bool)
        seconds, found = measure(lambda s=signatures, e=eligible: duplicates.near_duplicates(s, e, 0.8))
        row = {"documents": count, "seconds": seconds, "microseconds_per_document": 1e6 * seconds / count}
        table.append({**row, "dropped": int((found >= 0).sum())})
    return table


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder of texts; without it they are made up")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file; without it the bundled one")
    parser.add_argument("--evaluation", type=Path, help="folder of evaluation texts")
    parser.add_argument("--documents", type=int, default=4000, help="of the corpus, or made up")
    parser.add_argument("--megabytes", type=float, help="of the largest corpus; without it that of the documents")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--signatures", type=int, default=400_000, help="of the largest size of the deduplication alone")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    tokenizer_path = args.tokenizer or bundled.find_model("nano") / "unigram.model"
    documents = corpus_documents(args.corpus, args.documents) if args.corpus else list(made_up(args.documents))
    random.Random(1).shuffle(documents)
    largest = round(args.megabytes * 1e6) if args.megabytes else sum(len(each.text.encode()) for each in documents)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = load_tokenizer(tokenizer_path)
        libraries = ("rensa", "ftfy", "py3langid", "sentencepiece")
        result = {
            **header(*libraries, machine=args.machine),
            "clock": "CPU seconds of one process",
            "corpus": "given" if args.corpus else "made up",
            "steps": steps(documents[: len(documents) // 2], tokenizer, args.evaluation, folder),
            "growth": growth(documents, largest, tokenizer_path, folder),
            "deduplication": deduplication([args.signatures // 4, args.signatures // 2, args.signatures]),
        }
    for title in ("steps", "growth", "deduplication"):
        print(f"\n{title}")
        for row in result[title]:
            print(
                "  "
                + "  ".join(
                    f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
            )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
