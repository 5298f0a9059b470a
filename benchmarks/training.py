"""Tokens a second of the training step, and its share of the machine's own matrix-product peak, in one run.

    python benchmarks/training.py [--threads 2] [--rounds 5] [--models 10m 20m 30m] [--json FILE]
    python benchmarks/training.py --batch 1 --sequence 2048 --models 20m      # the cost of masks in long rows
    python benchmarks/training.py --device cuda --models 1.3b --batch 8 --sequence 2048 --rounds 10      # one H200

Model FLOPs are 6 P + 12 N h s a token. The peak is measured with the same threads before and after the steps: the fastest
product of each library that the step uses (float32 on a CPU: MKL and oneDNN), over large squares and the step's own shapes.
Plain causal attention has no mask, and a kernel that skips what lies ahead; it has as many tokens and targets as the blanks.
Aggregated rows hold several samples, each with a prefix mask of its own. Beside each shape stands transformers' own step of
a causal Llama of the same widths, dtype, tokens and optimizer.

Variants take turns, and ratios are medians over the rounds. With ``--alone``, the default on a GPU, one variant is in memory
at a time; one that does not fit is left out and named. On a GPU all is bfloat16, and the share of the datasheet's peak and
the memory stand beside.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from header import header
from torch import Tensor

from openglm.config import PRESETS, ModelConfig
from openglm.evaluation.ceilings import timed
from openglm.infilling import Batch, Layout, generation_sample, language_model_windows
from openglm.kernels import onednn
from openglm.models.glm130b import GLM130B, Attention, Layer, rotate
from openglm.planning import Workload, process_memory
from openglm.planning.hardware import gpu_of_device
from openglm.training.model import MasterWeights
from openglm.training.optimizer import make_optimizer
from openglm.training.recipe import Recipe

#: Shapes that fit a laptop: hidden, heads, inner, layers, vocabulary.
SMALL = {
    "tiny": (64, 1, 128, 2, 512),  # to try the script
    "10m": (256, 4, 704, 9, 8_192),
    "20m": (384, 6, 1_024, 10, 8_192),
    "30m": (448, 7, 1_216, 11, 16_384),
}
SHORT = {"bfloat16": "bf16", "float32": "fp32"}
REPEATS = 4


def shape(name: str, sequence: int) -> ModelConfig:
    """A small shape or a preset."""
    if name in PRESETS:
        return ModelConfig.preset(name)
    hidden, heads, inner, layers, vocabulary = SMALL[name]
    return ModelConfig(layers, hidden, heads, inner, vocabulary, max_sequence_length=max(sequence, 1024))


# ---------------------------------------------------------------------------------------------------------------------
# The peak


def roads(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Libraries that compute the step's products, by name."""
    if device.type != "cpu":
        return {"cuBLAS": F.linear}
    if dtype != torch.float32:
        return {"oneDNN": F.linear}
    found = {"MKL" if torch.backends.mkl.is_available() else "torch": F.linear}
    return {**found, "oneDNN": onednn.linear} if onednn.available() else found


def measure_peaks(config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """FLOP/s of each library at its best product: large squares, and the step's own of ``rows`` tokens."""
    h, i = config.hidden_size, config.inner_hidden_size
    sides = (512, 1_024, 2_048) if device.type == "cpu" else (4_096, 8_192)
    shapes = [(n, n, n) for n in sides] + [(rows, h, 3 * h), (rows, h, 2 * i), (rows, i, h), (rows, h, config.vocab_size)]
    calls = 1 if device.type == "cpu" else 10  # in a row, so that a launch costs nothing
    found = dict.fromkeys(roads(dtype, device), 0.0)
    with torch.inference_mode():
        for m, k, n in shapes:
            x, weight = (torch.randn(size, k, device=device).to(dtype) for size in (m, n))
            for name, road in roads(dtype, device).items():

                def products(road=road, x=x, weight=weight) -> None:
                    for _ in range(calls):
                        road(x, weight)

                products()
                seconds = min(timed(products, device) for _ in range(REPEATS))
                found[name] = max(found[name], 2 * m * k * n * calls / seconds)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Batches of as many tokens and targets


def blanks(config: ModelConfig, rows: int, sequence: int, seed: int = 0) -> list[Layout]:
    """[gMASK] samples whose prefix is uniform, as in training: every length of part A."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        tokens = rng.integers(100, config.vocab_size, sequence - 1)
        made.append(generation_sample(tokens, int(rng.integers(int(0.2 * sequence), sequence)), config.special_tokens))
    return made


def causal(config: ModelConfig, like: list[Layout], seed: int = 0) -> list[Layout]:
    """Rows without a part A, with targets where those of ``like`` are."""
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


def aggregated(config: ModelConfig, like: list[Layout], parts: int, seed: int = 0) -> list[list[Layout]]:
    """Rows of ``parts`` samples side by side, which share the targets of the row of ``like``."""
    rng = np.random.default_rng(seed)
    made = []
    for layout in like:
        assert layout.targets is not None
        size, masked = len(layout) // parts, int((layout.targets >= 0).sum())
        shares = [min(masked // parts + (part < masked % parts), size - 1) for part in range(parts)]
        row = [generation_sample(rng.integers(100, config.vocab_size, size - 1), n, config.special_tokens) for n in shares]
        made.append(row)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Steps


class CausalAttention(Attention):
    """As a causal model has it: no mask, and a kernel that knows what lies ahead."""

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        """As ``Attention``, but for the mask."""
        b, s, _ = x.shape
        qkv = self.query_key_value(x).view(b, s, -1, 3 * self.head_size).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(rotate(query, *rotary), rotate(key, *rotary), value, is_causal=True)
        return self.dense(out.transpose(1, 2).reshape(b, s, -1))


@dataclass(frozen=True)
class Variant:
    """One way to take the step."""

    name: str
    rows: str = "blanks"
    """"blanks", "causal" or "aggregated"."""
    compile: bool = False
    recompute: bool = False


def variants(parts: int, main_only: bool) -> list[Variant]:
    """All of them, but transformers'."""
    packed = f"aggregated, {parts} a row"
    main = [Variant("blank masks"), Variant("blank masks, compiled", compile=True)]
    more = [
        Variant("plain causal", "causal"),
        Variant("plain causal, compiled", "causal", compile=True),
        Variant(packed, "aggregated"),
        Variant(f"{packed}, compiled", "aggregated", compile=True),
        Variant("recomputation", recompute=True),
    ]
    return main if main_only else main + more


class Ours:
    """The package's step on one process."""

    def __init__(self, network: GLM130B, precision: str, batch: Batch, variant: Variant) -> None:
        for layer in network.layers.values():
            assert isinstance(layer, Layer)
            if variant.rows == "causal":
                layer.attention.__class__ = CausalAttention
        self.model = MasterWeights(network, precision, compile=variant.compile, recompute=variant.recompute)
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

    def __init__(self, config: ModelConfig, precision: str, tokens: Tensor) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.precision, self.tokens = precision, tokens
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
        ).to(tokens.device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def step(self) -> None:
        """Forward, backward, clip, update."""
        with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self.model(self.tokens, labels=self.tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Comparison:
    """One shape in one precision: all variants on batches of one size."""

    def __init__(self, config: ModelConfig, precision: str, args: argparse.Namespace) -> None:
        self.config, self.precision, self.args = config, precision, args
        self.device = torch.device(args.device)
        self.parts = max(args.sequence // 512, 2)
        layouts = blanks(config, args.batch, args.sequence)
        self.batches = {
            "blanks": Batch.stack(layouts, device=self.device),
            "causal": Batch.stack(causal(config, layouts), device=self.device),
            "aggregated": Batch.aggregate(aggregated(config, layouts, self.parts), args.sequence, device=self.device),
        }
        self.loss_share = sum(int((x.targets >= 0).sum()) for x in layouts if x.targets is not None) / self.tokens
        self.plain = GLM130B(config).initialize(0)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.args.batch * self.args.sequence

    def makers(self) -> dict[str, Callable[[], Ours | Theirs]]:
        """What builds each variant."""

        def ours(variant: Variant) -> Ours:
            return Ours(copy.deepcopy(self.plain).to(self.device), self.precision, self.batches[variant.rows], variant)

        made: dict[str, Callable[[], Ours | Theirs]] = {
            variant.name: lambda variant=variant: ours(variant) for variant in variants(self.parts, self.args.main_only)
        }
        if importlib.util.find_spec("transformers"):
            made["transformers"] = lambda: Theirs(self.config, self.precision, self.batches["blanks"].tokens)
        return made

    def times(self) -> Iterator[tuple[dict[str, list[float]], int | None]]:
        """Seconds of the rounds of variants that were in memory together, and the bytes that a GPU held at most."""
        makers = self.makers()
        for names in [[name] for name in makers] if self.args.alone else [list(makers)]:
            on_gpu = self.device.type == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            try:
                found = self._rounds({name: makers[name] for name in names})
            except torch.OutOfMemoryError:
                print(f"{'':16} {names[0]:30} does not fit", flush=True)
                found = {}
            yield found, torch.cuda.max_memory_allocated() if on_gpu else None
            gc.collect()  # what the last variant held, before the next one is built
            if on_gpu:
                torch.cuda.empty_cache()

    def _rounds(self, makers: dict[str, Callable[[], Ours | Theirs]]) -> dict[str, list[float]]:
        torch.compiler.reset()
        steps = {name: make() for name, make in makers.items()}
        found: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(self.args.rounds + 2):
            for name in sorted(steps, reverse=bool(number % 2)):
                seconds = timed(steps[name].step, self.device)
                if number > 1:  # the first rounds compile and warm up
                    found[name].append(seconds)
        return found

    def bytes_on_paper(self) -> float:
        """What `glm plan --cpu` counts for the step, without what is malloc's and without a snapshot."""
        workload = Workload(self.config, self.args.batch, self.args.sequence, SHORT[self.precision])
        memory = process_memory(workload, self.args.batch, loss_share=self.loss_share, snapshots=False)
        return max(sum(t.bytes for t in terms if t.basis == "computed") for terms in (memory.backward, memory.update))

    def measure(self, model: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of all variants, and the ratios between them; printed as they come."""
        dtype, config = getattr(torch, self.precision), self.config
        flops = 6 * config.parameter_count + 12 * config.num_layers * config.hidden_size * self.args.sequence
        peaks = measure_peaks(config, self.tokens, dtype, self.device)
        gpu = gpu_of_device(torch.cuda.get_device_name()) if self.device.type == "cuda" else None
        rows, times = [], {}
        for found, held in self.times():
            times |= found
            again = measure_peaks(config, self.tokens, dtype, self.device)
            peaks = {name: max(value, again[name]) for name, value in peaks.items()}
            for name, values in found.items():
                tokens = self.tokens / statistics.median(values)
                row = {"model": model, "parameters": config.parameter_count, "precision": self.precision, "variant": name}
                row |= {"tokens_per_second": round(tokens, 1), "seconds": round(self.tokens / tokens, 4)}
                if gpu is not None:
                    row["of_datasheet"] = round(tokens * flops / (gpu.peak_tflops(SHORT[self.precision]) * 1e12), 4)
                if held is not None:
                    row |= {"bytes": held, "bytes_on_paper": round(self.bytes_on_paper())}
                rows.append(row)
        for row in rows:  # the peak is the best of all that was seen
            row["of_peak"] = round(row["tokens_per_second"] * flops / max(peaks.values()), 4)
            row |= {"peak_flops": round(max(peaks.values())), "peaks": {name: round(value) for name, value in peaks.items()}}
            print(
                f"{model:6} {self.precision:9} {row['variant']:30} {row['tokens_per_second']:9.0f} {row['of_peak']:8.1%} "
                f"{row['seconds']:8.3f}"
                + (f"  {row['of_datasheet']:.1%} of the datasheet" if "of_datasheet" in row else "")
                + (f"  {row['bytes'] / 2**30:.1f} GiB, on paper {row['bytes_on_paper'] / 2**30:.1f}" if "bytes" in row else ""),
                flush=True,
            )
        print(f"{'':16} peak in GFLOP/s: " + ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in peaks.items()))
        return rows, [{"model": model, "precision": self.precision, **ratio} for ratio in self.ratios(times)]

    def ratios(self, times: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
        """Seconds of one variant over those of another, round by round; of transformers over ours."""
        packed = f"aggregated, {self.parts} a row"
        pairs = [(f"{name}{how}", f"plain causal{how}") for name in ("blank masks", packed) for how in ("", ", compiled")]
        pairs += [("recomputation", "blank masks"), ("transformers", "blank masks"), ("transformers", "blank masks, compiled")]
        for one, other in pairs:
            if times.get(one) and times.get(other):
                value = statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
                print(f"{'':16} {one} takes {value:.3f} times as long as {other}", flush=True)
                yield {"seconds of": one, "over those of": other, "ratio": round(value, 4)}


def halves(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Tokens a second in bfloat16 over those in float32."""
    speed = {(row["model"], row["variant"], row["precision"]): row["tokens_per_second"] for row in rows}
    for (model, variant, precision), tokens in speed.items():
        if precision == "bfloat16" and (model, variant, "float32") in speed:
            ratio = tokens / speed[model, variant, "float32"]
            print(f"{model:6} {variant:30} bfloat16 has {ratio:.2f} times float32's tokens/s")
            yield {"model": model, "variant": variant, "ratio": round(ratio, 4)}


def main() -> None:
    """Measure, print, and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["10m", "20m", "30m"])
    parser.add_argument("--precisions", nargs="*", choices=list(SHORT), help="default: both; on a GPU bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--main-only", action="store_true", help="only blank masks, compiled or not, and transformers")
    parser.add_argument("--alone", action="store_true", help="one variant in memory at a time, as always on a GPU")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = torch.device(args.device).type == "cuda"
    args.alone |= on_gpu
    packages = ["transformers"] if importlib.util.find_spec("transformers") else []
    result = header(*packages, device=args.device, machine=args.machine)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    print(f"{'model':6} {'precision':9} {'variant':30} {'tokens/s':>9} {'of peak':>8} {'seconds':>8}")
    for name in args.models:
        for precision in args.precisions or (["bfloat16"] if on_gpu else ["float32", "bfloat16"]):
            found, compared = Comparison(shape(name, args.sequence), precision, args).measure(name)
            rows += found
            ratios += compared
    result |= {"rows": rows, "ratios": ratios, "bfloat16 over float32": list(halves(rows))}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
