"""What a snapshot costs: seconds that training waits, seconds until it is on disk, and how steps slow down meanwhile.

    python benchmarks/snapshots.py [--recipe recipes/nano.toml] [--threads 2] [--rounds 5] [--json FILE]

The cost is (time of a stretch of steps with a save at its beginning) - (time of the same stretch without), over the
time of the recipe's interval between two snapshots. Both kinds of stretch take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from header import header

from openglm.infilling import Batch, generation_sample
from openglm.models.glm130b import GLM130B
from openglm.training.model import MasterWeights
from openglm.training.optimizer import make_optimizer
from openglm.training.ranks import Ranks
from openglm.training.recipe import read_recipe
from openglm.training.snapshots import Progress, Snapshots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/nano.toml"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of a stretch")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = read_recipe(args.recipe)
    config = recipe.model.config()
    model = MasterWeights(GLM130B(config).initialize(0).to(recipe.run.device), recipe.run.precision)
    optimizer = make_optimizer(model, recipe.optimizer)
    rng = np.random.default_rng(0)
    window = recipe.objectives.window
    rows = [
        generation_sample(rng.integers(100, config.vocab_size, window - 1), window // 2, config.special_tokens)
        for _ in range(recipe.run.batch_size)
    ]
    each = max(recipe.run.micro_tokens // window, 1)
    batches = [Batch.stack(rows[start : start + each]) for start in range(0, len(rows), each)]
    targets = len(rows) * (window // 2)

    def stretch() -> float:
        began = time.perf_counter()
        for _ in range(args.steps):
            model.forward_backward(batches, 1 / targets)
            optimizer.step()
            model.publish()
            model.drop_gradients()
        return time.perf_counter() - began

    plain, saving, waits, written = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(Path(folder), Ranks(), keep=1)
        stretch()
        for number in range(args.rounds):
            plain.append(stretch())
            began = time.perf_counter()
            snapshots.save(model, optimizer, Progress(samples=number), {})
            waits.append(time.perf_counter() - began)
            saving.append(waits[-1] + stretch())
            snapshots.wait()
            written.append(time.perf_counter() - began)
        snapshots.close()
    step = statistics.median(plain) / args.steps
    cost = statistics.median(saving) - statistics.median(plain)
    interval = step * recipe.run.snapshot_every
    row = {
        "recipe": str(args.recipe),
        "parameters": config.parameter_count,
        "step, s": round(step, 3),
        "training waits, s": round(statistics.median(waits), 3),
        "on disk at most after, s": round(statistics.median(written), 3),
        "cost of a snapshot, s": round(cost, 3),
        "interval, s": round(interval, 1),
        "cost, % of the interval": round(100 * cost / interval, 3),
    }
    for name, value in row.items():
        print(f"{name:28} {value}")
    if args.json:
        result = {**header(machine=args.machine), "rows": [row]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
