"""`glm fill` and `glm generate` as a person meets them: seconds of a new process, and of a model that is loaded already,
in INT8 (the default) and in float32.

    python benchmarks/first_answer.py [--rounds 7] [--text FILE ...] [--machine WORDS] [--json FILE]

Both types take turns; figures are medians of the rounds. With texts (JSONL, .zst too) also what INT8 costs: bits per byte of
all of them in both types.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from openglm.bundled import find_model
from openglm.evaluation.ceilings import machine_name
from openglm.kernels.cpu.library import variant

TYPES = {"int8": [], "float32": ["--dtype", "float32"]}
OPTIONS: dict[str, dict[str, Any]] = {"int8": {"bits": 8, "head_bits": 8}, "float32": {}}
TASKS = {
    "fill a blank": ["fill", "The capital of France is [MASK]."],
    "write 64 tokens": ["generate", "Once upon a time", "--min-tokens", "64", "--max-tokens", "64"],
}


def seconds(words: list[str]) -> float:
    """Of one command, from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "openglm", *words, "--device", "cpu"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def weights_sha256() -> str:
    """Of the bundled model's weights: which snapshot of the training was measured."""
    files = json.loads((find_model("nano") / "checksums.json").read_text(encoding="utf-8"))["files"]
    return next(file["sha256"] for name, file in files.items() if name.endswith(".safetensors"))


def within(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of loading and of 64 tokens in this process; medians."""
    from openglm import load

    times: dict[str, dict[str, list[float]]] = {"load": {}, "write 64 tokens": {}}
    for number in range(rounds + 1):
        for name, options in OPTIONS.items():
            start = time.perf_counter()
            glm = load("nano", device="cpu", **options)
            loaded = time.perf_counter()
            glm.generate("Once upon a time", min_tokens=64, max_tokens=64)  # the first packs, allocates and plans
            again = time.perf_counter()
            glm.generate("Once upon a time", min_tokens=64, max_tokens=64)
            if number:
                times["load"].setdefault(name, []).append(loaded - start)
                times["write 64 tokens"].setdefault(name, []).append(time.perf_counter() - again)
    return {task: {name: round(statistics.median(found), 3) for name, found in own.items()} for task, own in times.items()}


def bits(texts: list[Path], **options: Any) -> float:
    """Bits per byte of all texts."""
    import numpy as np

    from openglm import load
    from openglm.data.readers import read_documents
    from openglm.training.validation import bits_per_byte, network_losses

    glm = load("nano", device="cpu", **options)
    assert glm.tokenizer is not None
    ids = (np.asarray(glm.tokenizer.encode(document.text), dtype=np.int64) for document in read_documents(texts))
    return bits_per_byte(network_losses(glm.network, glm.engine.device), ids, glm.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if variant() in (None, "portable"):
        parser.error("the default is INT8 only where compiled kernels run: python -m openglm.kernels.cpu.build")
    found: dict[str, Any] = {
        "date": str(datetime.date.today()),
        "command": shlex.join(["python", *sys.argv]),
        "machine": args.machine or f"{machine_name(torch.device('cpu'))}, {os.cpu_count()} cores",
        "model": f"nano, sha256 of its weights {weights_sha256()[:12]}",
        "rounds": args.rounds,
        "seconds": {},
    }
    for task, words in TASKS.items():
        times: dict[str, list[float]] = {name: [] for name in TYPES}
        for number in range(args.rounds + 1):
            for name, more in TYPES.items():
                value = seconds([*words, *more])
                if number:  # the first reads files that were not in memory
                    times[name].append(value)
        found["seconds"][task] = {name: round(statistics.median(values), 3) for name, values in times.items()}
        print(f"{task:16}", "  ".join(f"{name} {value:.2f} s" for name, value in found["seconds"][task].items()), flush=True)
    found["seconds_in_a_process"] = within(args.rounds)
    for task, own in found["seconds_in_a_process"].items():
        print(f"in a process, {task}:", "  ".join(f"{name} {value:.3f} s" for name, value in own.items()), flush=True)
    if args.text:
        int8, float32 = (bits(args.text, **OPTIONS[name]) for name in ("int8", "float32"))
        found["bits_per_byte"] = {"int8": int8, "float32": float32}
        print(f"bits per byte    int8 {int8:.5f}  float32 {float32:.5f} ({int8 / float32 - 1:+.4%})")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
