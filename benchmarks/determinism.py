"""How many greedy texts change with the company that they are written in, with and without the deterministic mode.

    python benchmarks/determinism.py --text FILE [--model nano] [--dtype bfloat16] [--json FILE]

Every text of the files is cut to its first tokens and continued greedily: alone, and side by side with others. Counted are
the continuations that are not the same, and those whose log-probabilities differ in any bit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from header import header

import openglm
from openglm.data.readers import read_documents


def main() -> None:
    """Count, print, and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dtype")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    glm = openglm.load(args.model, dtype=args.dtype)
    assert glm.tokenizer is not None
    texts = []
    for path in args.text:  # as many of each file, of lengths from 8 to 40 tokens
        for number, document in enumerate(read_documents([path])):
            if number < args.texts // len(args.text):
                texts.append(glm.tokenizer.decode(glm.tokenizer.encode(document.text)[: 8 + number * 7 % 33]))
    rows: list[dict[str, Any]] = []
    for deterministic in (False, True):
        options = {"max_tokens": args.tokens, "deterministic": deterministic}
        together = glm.generate_batch(texts, batch_size=args.batch, **options)
        alone = [glm.generate(text, **options) for text in texts]
        changed = sum(one.text != other.text for one, other in zip(together, alone, strict=True))
        bits = sum(one.log_probabilities != other.log_probabilities for one, other in zip(together, alone, strict=True))
        rows.append({"deterministic": deterministic, "texts": len(texts), "changed": changed, "other_bits": bits})
        print(rows[-1])
    if args.json:
        result = {
            **header(device=glm.engine.device, machine=args.machine),
            "model": Path(args.model).name,
            "batch": args.batch,
            "kernel": glm.engine.kernel is not None,
            "dtype": str(glm.engine.dtype),
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
