"""Memory of a training run in one CPU process: measured beside what `glm plan --cpu` predicts.

    python benchmarks/plan_memory.py [--preset 110m] [--micro-batch 4] [--sequence 256] [--steps 3] [--json FILE]

A fresh process trains the preset on random tokens through the package's own network and step, two micro-batches a step,
every token with a loss (what ``glm plan`` assumes). Measured is the peak of the resident memory over the whole run, less
what was resident after the imports and one step of a tiny network, which loads the libraries that torch loads late.
Linux only (/proc/self/status).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

_CHILD = "--in-this-process"
_GIB = 2**30


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status does not say")


def train(preset: str, sequence: int, micro_batch: int, steps: int, precision: str) -> None:
    """Steps of two micro-batches of random tokens, in the order of ``training.step.Trainer.step``."""
    import torch

    from openglm.config import ModelConfig
    from openglm.infilling import Batch
    from openglm.models.glm130b import GLM130B
    from openglm.training.model import MasterWeights
    from openglm.training.optimizer import make_optimizer
    from openglm.training.recipe import Recipe

    config = ModelConfig.preset(preset) if preset != "tiny" else ModelConfig(2, 64, 1, 128, 512, 64)
    network = GLM130B(config).initialize(1)
    model = MasterWeights(network, precision)
    optimizer = make_optimizer(model, Recipe().optimizer)
    for step in range(steps):
        batches = []
        for half in range(2):
            generator = torch.Generator().manual_seed(2 * step + half)
            tokens = torch.randint(config.vocab_size, (micro_batch, sequence), generator=generator)
            positions = torch.arange(sequence).expand(micro_batch, sequence)
            mask = torch.ones(micro_batch, sequence, sequence, dtype=torch.bool).tril()
            batches.append(Batch(tokens, positions, mask, torch.ones_like(tokens, dtype=torch.bool), tokens.roll(-1, 1)))
        model.forward_backward(batches, 1 / (2 * micro_batch * sequence))
        model.norms()
        model.scale_gradients(0.5)
        optimizer.step()
        model.publish()
        model.drop_gradients()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Bytes: after the imports, after a tiny step, at the peak of the run."""
    import torch

    import openglm.training.step  # noqa: F401 (its imports belong to the baseline)

    torch.set_num_threads(options.threads)
    imported = resident()
    train("tiny", 64, 2, 1, options.precision)
    ready = resident()
    train(options.preset, options.sequence, options.micro_batch, options.steps, options.precision)
    return {"after_imports": imported, "after_tiny_step": ready, "peak": resident("VmHWM")}


def predict(options: argparse.Namespace):
    """What `glm plan --cpu` says."""
    from openglm.config import ModelConfig
    from openglm.planning import Workload, process_memory

    precision = {"bfloat16": "bf16", "float32": "fp32"}[options.precision]
    workload = Workload(ModelConfig.preset(options.preset), 2 * options.micro_batch, options.sequence, precision)
    return process_memory(workload, options.micro_batch)


def main() -> None:
    """Measure in a fresh process, predict in this one, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="110m")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(_CHILD, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measure(options)))
        return
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], _CHILD], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    measured = json.loads(done.stdout)
    from openglm.planning import report

    predicted = predict(options)
    grown = measured["peak"] - measured["after_tiny_step"]
    print("\n".join(report.process_lines(predicted)))
    print(f"  {'measured':<34}{grown / _GIB:>9.2f}  peak less {measured['after_tiny_step'] / _GIB:.2f} before the run")
    print(f"  {'predicted / measured':<34}{predicted.total / grown:>9.3f}")
    print(f"  {'imports':<34}{measured['after_imports'] / _GIB:>9.2f}  and with the libraries of a first step as above")
    if options.json:
        row = {"options": {k: str(v) for k, v in vars(options).items()}, **measured, **report.process_values(predicted)}
        options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
