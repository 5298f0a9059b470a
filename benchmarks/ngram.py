"""Bits per byte of a 5-gram Kneser-Ney model: the measure that the bundled model is held to.

    python benchmarks/ngram.py --shards runs/tokens --tokenizer runs/tokenizer/unigram.model [--json FILE]

Interpolated modified Kneser-Ney (Chen and Goodman 1999, three discounts an order) over token ids. It is trained on the
running text of all shards but ``validation*`` (``--instructions`` adds the instructions, prompt and answer as one
document) and measured on the validation shards as the model is: documents without their eos, cut into consecutive
windows of 512 tokens, each alone, summed -log2 p over the UTF-8 bytes of the documents. eos is neither learned nor
scored; at the start of a document or window the model backs off to the words there are.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from header import header

from openglm.data.shards import Shard, open_shards
from openglm.errors import DataError, OpenGLMError
from openglm.tokenizers import load_tokenizer

#: Where counts of counts are too few to estimate the discounts.
USUAL_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass
class Table:
    """All n-grams of one order. A *context* is an n-gram of the order below, by its index there."""

    keys: np.ndarray
    """int64 ``[n]``, ascending: context x ids + last token."""
    counts: np.ndarray
    """int32 ``[n]``: how often it occurs (highest order), or behind how many different tokens (the others)."""
    discounts: np.ndarray
    """float64 ``[4]``: of counts 0, 1, 2, and 3 or more."""
    totals: np.ndarray
    """int64 ``[contexts]``: sum of the counts behind each context; 0 = nothing follows it."""
    backoff: np.ndarray
    """float64 ``[contexts]``: probability that each context leaves to the order below."""


class KneserNey:
    """The model of all tokens but ``end``, which closes every document and is never predicted.

    ``tokens``: int ``[t]``, documents one after the other, each closed by ``end``; ids are below ``vocab_size``.
    Needs about 65 bytes a token while it counts.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, end: int, order: int = 5) -> None:
        self.vocab_size, self.end = vocab_size, end
        self.tables: list[Table] = []
        below = np.zeros(len(tokens), dtype=np.int32)  # at each place: the n-gram of the order below that ends there
        keys, counts, contexts = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int32), 1
        for n in range(1, order + 1):
            found = self._keys(below, tokens, n)
            places = np.argsort(found)
            found = found[places]
            first = np.empty(len(found), dtype=bool)  # of all places of one n-gram
            first[:1], first[1:] = True, found[1:] != found[:-1]
            first &= found >= 0
            index = np.cumsum(first, dtype=np.int32) - np.int32(1)  # -1: no n-gram of this order ends here
            if n > 1:
                # Kneser-Ney: below the highest order an n-gram counts once for each different token before it.
                behind = np.bincount(below[places[first]], minlength=len(keys)).astype(np.int32)
                self.tables.append(self._table(keys, behind, contexts))
                contexts = len(keys)
            below[places] = index
            del places, index
            keys = found[first]
            starts = np.append(np.flatnonzero(first), len(found))
            counts = np.diff(starts).astype(np.int32)
            del found, first, starts
        self.tables.append(self._table(keys, counts, contexts))

    def _keys(self, below: np.ndarray, tokens: np.ndarray, n: int) -> np.ndarray:
        """int64 ``[t]``: the key of the n-gram that ends at each place, negative where there is none."""
        keys = np.full(len(tokens), -1, dtype=np.int64)
        if n == 1:
            keys[:] = 0
        else:
            keys[1:] = below[:-1]  # context: what ends at the token before
        known = (keys >= 0) & (tokens != self.end)
        keys *= self.vocab_size
        keys += tokens
        keys[~known] = -1
        return keys

    def _table(self, keys: np.ndarray, counts: np.ndarray, contexts: int) -> Table:
        discounts = np.append(0.0, estimate_discounts(np.bincount(np.minimum(counts, 5), minlength=6)[1:5]))
        context = keys // self.vocab_size
        totals = np.bincount(context, weights=counts, minlength=contexts)
        left = np.bincount(context, weights=discounts[np.minimum(counts, 3)], minlength=contexts)
        return Table(keys, counts, discounts, totals.astype(np.int64), left / np.maximum(totals, 1))

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """float64 ``[t]``: of each token of ``tokens`` after up to order - 1 tokens before it, back to the last ``end``.

        Places that hold ``end`` are nan.
        """
        p = np.full(len(tokens), 1 / (self.vocab_size - 1))
        below = np.zeros(len(tokens), dtype=np.int64)
        for n, table in enumerate(self.tables, 1):
            if len(table.keys) == 0:  # no document is that long
                break
            keys = self._keys(below, tokens, n)
            context = np.maximum(keys // self.vocab_size, 0)
            below = np.minimum(np.searchsorted(table.keys, keys), len(table.keys) - 1)
            seen = table.keys[below] == keys
            count = np.where(seen, table.counts[below], 0)
            below[~seen] = -1
            total = np.where(keys >= 0, table.totals[context], 0)
            rest = count - table.discounts[np.minimum(count, 3)]
            p = np.where(total > 0, rest / np.maximum(total, 1) + table.backoff[context] * p, p)
        p[tokens == self.end] = np.nan
        return p


def estimate_discounts(counts: Sequence[int] | np.ndarray) -> tuple[float, float, float]:
    """Discounts of counts 1, 2 and 3 or more from how many n-grams have count 1, 2, 3 and 4 (Chen and Goodman 1999)."""
    if min(counts) == 0:
        return USUAL_DISCOUNTS
    n1, n2, n3, n4 = (float(n) for n in counts)
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 <= d <= k for k, d in enumerate(found, 1)) else USUAL_DISCOUNTS


def training_tokens(shards: Iterable[Shard], end: int) -> np.ndarray:
    """The shards one after the other, every document closed by ``end``; a prompt and its answer are one document."""
    parts: list[np.ndarray] = []
    for shard in shards:
        tokens = np.asarray(shard.tokens)
        parts.append(tokens if shard.info.kind == "text" else np.insert(tokens, shard.offsets[2::2], end))
    return np.concatenate(parts)


def window_tokens(shard: Shard, window: int, end: int) -> np.ndarray:
    """The documents of a shard without their ``end``, cut into windows that are each closed by ``end``."""
    parts: list[np.ndarray] = []
    for index in range(shard.info.documents):
        document = shard.document(index)
        document = document[document != end]
        for start in range(0, len(document), window):
            parts += [document[start : start + window], np.asarray([end], dtype=document.dtype)]
    return np.concatenate(parts)


def measure(model: KneserNey, shard: Shard, window: int) -> dict[str, float]:
    """Bits per byte of one validation shard."""
    p = model.probabilities(window_tokens(shard, window, model.end))
    bits = -np.log2(p[~np.isnan(p)])
    return {
        "bits_per_byte": round(float(bits.sum() / shard.info.bytes), 5),
        "bits_per_token": round(float(bits.mean()), 5),
        "tokens": len(bits),
        "bytes": shard.info.bytes,
        "documents": shard.info.documents,
    }


def main() -> int:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shards", default="runs/tokens", help="folder of token shards (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", default="runs/tokenizer/unigram.model", help="the shards' tokenizer (default: %(default)s)"
    )
    parser.add_argument("--order", type=int, default=5, help="longest n-gram (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--instructions", action="store_true", help="train on the instructions, too")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures into a file")
    arguments = parser.parse_args()
    try:
        report = run(arguments)
    except OpenGLMError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def run(arguments: argparse.Namespace) -> dict:
    """The figures, printed as they come. Raises ``DataError`` for shards that are missing or another tokenizer's."""
    start = time.monotonic()
    tokenizer = load_tokenizer(arguments.tokenizer)
    end = tokenizer.special_tokens["eos"]
    shards = open_shards(arguments.shards, arguments.tokenizer)
    held_out = [shard for shard in shards if shard.info.name.startswith("validation")]
    kinds = ("text", "instructions") if arguments.instructions else ("text",)
    chosen = [shard for shard in shards if shard not in held_out and shard.info.kind in kinds]
    if not chosen or not held_out:
        raise DataError(f"`{arguments.shards}` lacks shards to train on or shards called `validation*`")
    tokens = training_tokens(chosen, end)
    print(f"{len(tokens):,} tokens of {len(chosen)} shards, {', '.join(kinds)}", flush=True)
    model = KneserNey(tokens, tokenizer.vocab_size, end, arguments.order)
    report = {
        **header(machine=arguments.machine),
        "model": f"{arguments.order}-gram, interpolated modified Kneser-Ney, {tokenizer.vocab_size:,} ids",
        "window": arguments.window,
        "training": {
            "kinds": list(kinds),
            "tokens": len(tokens),
            "bytes": sum(shard.info.bytes for shard in chosen),
            "shards": [shard.info.name for shard in chosen],
        },
        "ngrams": [len(table.keys) for table in model.tables],
        "discounts": [[round(float(d), 4) for d in table.discounts[1:]] for table in model.tables],
    }
    print("\n| n | n-grams | discounts |\n|---|---|---|")
    for n, (size, discounts) in enumerate(zip(report["ngrams"], report["discounts"], strict=True), 1):
        print(f"| {n} | {size:,} | {', '.join(f'{d:.3f}' for d in discounts)} |")
    print(
        "\n| measured on | documents | bytes | tokens | bits per token | bits per byte |\n|---|---|---|---|---|---|", flush=True
    )
    report["validation"] = {}
    for shard in held_out:
        row = report["validation"][shard.info.name] = measure(model, shard, arguments.window)
        print(
            f"| {shard.info.name} | {row['documents']:,} | {row['bytes']:,} | {row['tokens']:,} "
            f"| {row['bits_per_token']:.3f} | {row['bits_per_byte']:.4f} |",
            flush=True,
        )
    report["seconds"] = round(time.monotonic() - start)
    report["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)  # Linux: in KiB
    print(f"\n{report['seconds']} s, {report['peak_memory_gb']} GB at most")
    return report


if __name__ == "__main__":
    sys.exit(main())
