"""Memory of `glm train` on a CPU: measured beside what `glm plan --cpu` predicts.

    python benchmarks/plan_memory.py [--preset 110m] [--micro-batch 4] [--sequence 256] [--steps 6] [--json FILE]

`glm train` itself runs in a process of its own on made-up text: the preset in two micro-batches a step, with a snapshot
after every second step, so that the next steps go on beside its writing. Every token carries a loss and every row is full, as
``glm plan`` assumes: plain language modelling of long documents. Measured is the most that was resident, less that of the same
run with a tiny network, which holds the libraries, the text and the threads. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from header import header

from openglm.config import ModelConfig
from openglm.data.shards import write_shards
from openglm.planning import Workload, process_memory, report
from openglm.tokenizers.unigram import train_unigram

_GIB = 2**30
PIECES = 512
TINY = ["num_layers=2", "hidden_size=64", "num_attention_heads=1", "inner_hidden_size=128", f"vocab_size={PIECES}"]


def made_up(folder: Path) -> tuple[Path, Path]:
    """Token shards of documents that are longer than any window, and a tokenizer small enough for the tiny network."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 10))) for _ in range(2_000)]
    texts = [" ".join(rng.choices(words, k=4_000)) for _ in range(20)]
    text, tokens, tokenizer = folder / "text", folder / "tokens", folder / "unigram.model"
    text.mkdir()
    rows = (json.dumps({"text": text, "lang": "en"}) + "\n" for text in texts)
    (text / "made-up.jsonl").write_text("".join(rows), encoding="utf-8")
    train_unigram(texts[:5], tokenizer, vocab_size=PIECES, threads=1)
    write_shards([text], tokens, tokenizer, workers=1)
    return tokens, tokenizer


def resident(options: argparse.Namespace, shards: Path, tokenizer: Path, out: Path, changes: list[str]) -> int:
    """Bytes that were resident at most in a run of `glm train`."""
    run = {
        "samples": 2 * options.micro_batch * options.steps,
        "batch_size": 2 * options.micro_batch,
        "micro_tokens": options.micro_batch * options.sequence,
        "precision": options.precision,
        "threads": options.threads,
        "snapshot_every": 2,
        "keep_snapshots": 1,
        "log_every": 1,
    }
    sizes = {"window": options.sequence, "long_window": options.sequence, "unidirectional": "true"}
    changes = [f"run.{key}={value}" for key, value in run.items()] + changes
    changes += [f"objectives.{key}={value}" for key, value in sizes.items()]
    recipe = out.with_suffix(".toml")
    recipe.write_text(f'[model]\npreset = "{options.preset}"\n', encoding="utf-8")
    command = [sys.executable, "-m", "openglm", "train", recipe, "--data", shards, "--tokenizer", tokenizer, "--out", out]
    process = subprocess.Popen(
        [*map(str, command), *(word for change in changes for word in ("--set", change))], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(said)
    assert any((out / "snapshots").iterdir())
    return usage.ru_maxrss * 1024  # Linux counts in KiB


def main() -> None:
    """Measure, predict, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="110m")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards, tokenizer = made_up(folder)
        tiny = [f"model.changes.{change}" for change in TINY]
        least = resident(options, shards, tokenizer, folder / "tiny", tiny)
        most = resident(options, shards, tokenizer, folder / "run", [])
    precision = {"bfloat16": "bf16", "float32": "fp32"}[options.precision]
    workload = Workload(ModelConfig.preset(options.preset), 2 * options.micro_batch, options.sequence, precision)
    predicted = process_memory(workload, options.micro_batch)
    print("\n".join(report.process_lines(predicted)))
    print(f"  {'measured':<34}{(most - least) / _GIB:>9.2f}  {most / _GIB:.2f} less {least / _GIB:.2f} of a tiny network")
    print(f"  {'predicted / measured':<34}{predicted.total / (most - least):>9.3f}")
    if options.json:
        found = {"measured": most - least, "most_resident": most, "of_a_tiny_network": least}
        found["predicted_over_measured"] = round(predicted.total / (most - least), 4)
        row = {**header(machine=options.machine), **found, **report.process_values(predicted)}
        options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
