"""Shapes and mixtures at equal samples: short runs of one recipe with changes, and the bits per byte that each reaches.

    python benchmarks/compare_runs.py recipes/nano.toml --data SHARDS --tokenizer FILE --samples 2000 \\
        --run "as it is" \\
        --run "12 layers of 320: model.changes.num_layers=12 model.changes.hidden_size=320 model.changes.num_attention_heads=5"

Samples are a function of the seed and their number, so all runs of one mixture read the same text. The runs go one after
the other through ``glm train``, each in a folder of its own below ``--out``, where a second call finds what is finished. Loss
and speed are those of the second half of a run: the mean, and the median.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from header import header

from openglm.checkpoints import open_model


def train(recipe: Path, given: list[str], changes: list[str], out: Path) -> list[dict[str, Any]]:
    """Run it to its end, if it is not there yet; returns the rows of its metrics."""
    asked = {"recipe": recipe.read_text(encoding="utf-8"), "given": given, "changes": changes}
    done = out / "compared.json"
    if not done.is_file():
        command = [sys.executable, "-m", "openglm", "train", str(recipe), *given, "--out", str(out), "--plain"]
        for change in changes:
            command += ["--set", change]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        done.write_text(json.dumps(asked), encoding="utf-8")
    elif json.loads(done.read_text(encoding="utf-8")) != asked:
        raise SystemExit(f"error: `{out}` holds another run of this name; give another name or --out")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--run", action="append", required=True, metavar="NAME[: KEY=VALUE ...]")
    parser.add_argument("--out", type=Path, default=Path("runs/compared"))
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{'run':40} {'parameters':>11} {'tokens':>10} {'tokens/s':>9} {'loss':>7}  bits per byte")
    for run in args.run:
        name, _, text = run.partition(":")
        changes = [f"run.samples={args.samples}", *shlex.split(text)]
        out = args.out / re.sub(r"\W+", "-", name.strip().lower())
        metrics = train(args.recipe, ["--data", args.data, "--tokenizer", args.tokenizer], changes, out)
        last, half = metrics[-1], metrics[len(metrics) // 2 :]  # the first rows hold the compiler's time
        row = {
            "name": name.strip(),
            "changes": changes,
            "parameters": open_model(out / "model").config.parameter_count,
            "tokens": last["tokens"],
            "tokens_per_second": round(statistics.median(row["tokens_per_second"] for row in half), 1),
            "loss": round(statistics.mean(row["loss"] for row in half), 4),
            "bits_per_byte": last["bits_per_byte"],
        }
        rows.append(row)
        bits = "  ".join(f"{language} {value:.4f}" for language, value in row["bits_per_byte"].items())
        print(
            f"{row['name']:40} {row['parameters']:11,} {row['tokens']:10,} {row['tokens_per_second']:9.0f} "
            f"{row['loss']:7.3f}  {bits}",
            flush=True,
        )
    if args.json:
        result = {**header(machine=args.machine), "recipe": str(args.recipe), "samples": args.samples, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
