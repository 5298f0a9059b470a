"""Tokens a second of the training step, and its share of the machine's own matrix-product peak, in one run.

    python benchmarks/training.py [--threads 2] [--rounds 5] [--device cuda] [--models 10m 20m 30m] [--json FILE]

Model FLOPs are 6 P + 12 N h s a token; the peak is the fastest of a few large products in the same dtype, with the same
threads, measured right before. Beside each shape stands transformers' own training step of a causal Llama of the same
widths, dtype, tokens and optimizer. Steps of all variants take turns, and medians are compared. On one GPU:

    python benchmarks/training.py --device cuda --models 1.3b --rounds 10 --batch 8 --sequence 2048
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from pathlib import Path

import numpy as np
import torch

import openglm
from openglm.config import PRESETS, ModelConfig
from openglm.evaluation.ceilings import product_rate, timed
from openglm.infilling import Batch, Layout, generation_sample, language_model_windows
from openglm.models.glm130b import GLM130B
from openglm.training.model import MasterWeights
from openglm.training.optimizer import make_optimizer
from openglm.training.recipe import Recipe

#: Shapes that fit a laptop: hidden, heads of 64, inner, layers, vocabulary.
SMALL = {"10m": (256, 4, 704, 9, 8_192), "20m": (384, 6, 1_024, 10, 8_192), "30m": (448, 7, 1_216, 11, 16_384)}


def shape(name: str, sequence: int) -> ModelConfig:
    """A small shape or a preset."""
    if name in PRESETS:
        return ModelConfig.preset(name)
    hidden, heads, inner, layers, vocabulary = SMALL[name]
    return ModelConfig(layers, hidden, heads, inner, vocabulary, max_sequence_length=max(sequence, 1024))


def blanks(config: ModelConfig, rows: int, sequence: int, seed: int = 0) -> list[Layout]:
    """[gMASK] samples whose prefix is uniform, as in training: every length of part A."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        tokens = rng.integers(100, config.vocab_size, sequence - 1)
        made.append(generation_sample(tokens, int(rng.integers(int(0.2 * sequence), sequence)), config.special_tokens))
    return made


def causal(config: ModelConfig, like: list[Layout], seed: int = 0) -> list[Layout]:
    """As many tokens without a part A, and as many targets: plain causal attention."""
    rng = np.random.default_rng(seed)
    made = []
    for layout in like:
        tokens = rng.integers(100, config.vocab_size, len(layout) - 1)
        (window,) = language_model_windows(
            tokens, config.special_tokens, max_length=len(layout), generation_length=len(layout), unidirectional=True
        )
        assert window.targets is not None and layout.targets is not None
        made.append(Layout(window.tokens, window.positions, 0, targets=np.where(layout.targets < 0, -1, window.targets)))
    return made


class Ours:
    """The package's step on one process."""

    def __init__(
        self,
        config: ModelConfig,
        precision: str,
        device: str,
        batch: Batch,
        *,
        recompute: bool = False,
        compile: bool = False,
    ) -> None:
        network = GLM130B(config).initialize(0)
        if recompute:
            from openglm.parallel.stage import RecomputedLayer

            for layer in network.layers.values():
                layer.__class__ = RecomputedLayer
        self.model = MasterWeights(network.to(device), precision, compile=compile)
        self.optimizer = make_optimizer(self.model, Recipe().optimizer)
        self.batch = batch
        assert batch.targets is not None
        self.targets = int((batch.targets >= 0).sum())

    def step(self) -> None:
        """Forward, backward, clip, update."""
        self.model.forward_backward([self.batch], 1 / self.targets)
        norm = sum(self.model.norms().values()) ** 0.5
        if norm > 1:
            self.model.scale_gradients(1 / norm)
        self.optimizer.step()
        self.model.publish()
        self.model.drop_gradients()


class Theirs:
    """transformers' Llama with autocast (bfloat16) or float32, AdamW and clipping, as its Trainer does a step."""

    def __init__(self, config: ModelConfig, precision: str, device: str, batch: Batch) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.device, self.precision = device, precision
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.inner_hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=config.max_sequence_length,
                tie_word_embeddings=True,
            )
        ).to(device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.tokens = batch.tokens.to(device)

    def step(self) -> None:
        """Forward, backward, clip, update."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self.model(self.tokens, labels=self.tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(config: ModelConfig, precision: str, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds a step of each variant, all taking turns."""
    rows, sequence, device = args.batch, args.sequence, args.device
    layouts = blanks(config, rows, sequence)
    masked = Batch.stack(layouts, device=device)
    torch.compiler.reset()
    variants: dict[str, Ours | Theirs] = {
        "blank masks": Ours(config, precision, device, masked),
        "blank masks, compiled": Ours(config, precision, device, masked, compile=True),
    }
    if not args.main_only:
        variants["plain causal"] = Ours(config, precision, device, Batch.stack(causal(config, layouts), device=device))
        halves = blanks(config, 2 * rows, sequence // 2, seed=1)
        paired = list(zip(halves[::2], halves[1::2], strict=True))
        variants["aggregated, two a row"] = Ours(config, precision, device, Batch.aggregate(paired, sequence, device=device))
        variants["recomputation"] = Ours(config, precision, device, masked, recompute=True)
    variants["transformers"] = Theirs(config, precision, device, masked)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(args.rounds + 2):
        for name in sorted(variants, reverse=bool(number % 2)):
            seconds = timed(variants[name].step, torch.device(device))
            if number > 1:  # the first rounds compile and warm up
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["10m", "20m", "30m"])
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--main-only", action="store_true", help="only blank masks, compiled or not, and transformers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/training.py "
        + " ".join(
            f"--{k.replace('_', '-')} {' '.join(v) if isinstance(v, list) else v}" for k, v in vars(args).items() if k != "json"
        ),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} threads",
        "versions": {"openglm": openglm.__version__, "torch": torch.__version__},
    }
    rows = []
    print(f"{'model':6} {'precision':9} {'variant':22} {'tokens/s':>9} {'of peak':>8} {'seconds':>8}")
    for name in args.models:
        config = shape(name, args.sequence)
        p = config.parameter_count
        flops = 6 * p + 12 * config.num_layers * config.hidden_size * args.sequence
        for precision in args.precisions:
            top = product_rate(getattr(torch, precision), torch.device(args.device))
            for variant, seconds in measure(config, precision, args).items():
                tokens = args.batch * args.sequence / seconds
                row = {
                    "model": name,
                    "parameters": p,
                    "precision": precision,
                    "variant": variant,
                    "tokens_per_second": round(tokens, 1),
                    "of_peak": round(tokens * flops / top, 4),
                    "peak_flops": round(top),
                    "seconds": round(seconds, 4),
                }
                rows.append(row)
                print(f"{name:6} {precision:9} {variant:22} {tokens:9.0f} {row['of_peak']:8.1%} {seconds:8.3f}", flush=True)
    result["rows"] = rows
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
