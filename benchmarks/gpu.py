"""The GPU kernels on one GPU: that they are right, and how near they come to its memory and its tensor cores.

    python benchmarks/gpu.py --model 130b --json FILE       # about ten minutes on an H200
    python benchmarks/gpu.py --model 130b --tune            # tiles of the products, each beside the default
    python benchmarks/gpu.py --smoke                        # the code path at a tiny size; without a GPU interpreted

Weights are random, of the model's real shape, drawn on the GPU. Ceilings are measured in the same run: a copy within the
GPU's memory, counting bytes read and bytes written, and a float16 product of 8192 x 8192 x 8192. Times are medians, by the
GPU's own clock; a decode step is one replay of a CUDA graph and the choice of the next token. Bytes of a step: all weights,
scales, biases and norms once, and the keys and values of its context.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

from header import header
from torch import Tensor

from openglm.config import ModelConfig, QuantizationScheme
from openglm.kernels.gpu.attention import attend
from openglm.kernels.gpu.network import Pass
from openglm.kernels.gpu.products import Matrix, Tiling, deal, partial_products, product
from openglm.models.glm130b import GLM130B
from openglm.quantization.functional import Quantized
from openglm.quantization.layers import QuantizedLinear
from openglm.quantization.random_weights import random_network

SCHEMES = [QuantizationScheme(4), QuantizationScheme(4, 128), QuantizationScheme(8)]
SMOKE = {"num_layers": 1, "hidden_size": 128, "num_attention_heads": 2, "inner_hidden_size": 128, "vocab_size": 80}
#: Rows of the tile, units, warps and stages; each is tried with several splits.
TILES = [(128, 64, 4, 4), (128, 64, 2, 4), (128, 32, 4, 4), (128, 32, 2, 5), (256, 32, 4, 4), (256, 64, 8, 3), (64, 64, 4, 5)]
TILES += [(64, 64, 2, 4), (256, 64, 4, 3), (256, 32, 4, 5)]


class Clock:
    """Seconds of a function: medians, by events on a GPU, else by the wall."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.on_gpu, self.rounds = device.type == "cuda", rounds

    def __call__(self, function: Callable[[], object], repeat: int = 1) -> float:
        function()
        times, repeat = [], repeat if self.on_gpu else 1
        for _ in range(self.rounds):
            if self.on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(repeat):
                    function()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3 / repeat)
            else:
                begin = time.perf_counter()
                for _ in range(repeat):
                    function()
                times.append((time.perf_counter() - begin) / repeat)
        return statistics.median(times)


def ceilings(device: torch.device, clock: Clock) -> dict[str, float]:
    """Bytes and floating-point operations a second that torch gets out of the GPU."""
    size, side = (1 << 32, 8192) if clock.on_gpu else (1 << 20, 64)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = 2 * size / clock(lambda: target.copy_(source), 5)
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    return {"copy_bytes_per_second": copy, "matmul_flops_per_second": 2 * side**3 / clock(lambda: a @ b, 10)}


# ---------------------------------------------------------------------------------------------------------------------
# Right first


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def random_layer(rows: int, columns: int, scheme: QuantizationScheme, device: torch.device) -> QuantizedLinear:
    codes = torch.randint(-scheme.largest, scheme.largest + 1, (rows, columns), dtype=torch.int8, device=device)
    scales = (torch.rand(rows, columns // scheme.columns(columns), device=device) / scheme.largest / columns**0.5).half()
    return QuantizedLinear(Quantized(codes, scales), scheme, torch.randn(rows, device=device).half()).to(device)


@torch.inference_mode()
def checks(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, float, float]]:
    """What was compared, the relative error or the number of wrong results, and the most that is allowed."""
    generator = torch.Generator(device).manual_seed(0)
    h = config.hidden_size
    for scheme in (*SCHEMES, QuantizationScheme(4, 32), QuantizationScheme(8, 32)):
        for dtype in (torch.float16, torch.bfloat16):
            if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
                continue
            layer = random_layer(h + 33, h, scheme, device)
            x = torch.randn(16, h, device=device, generator=generator).to(dtype)
            codes = layer.weight.codes.unflatten(1, (layer.scales.shape[1], -1)).float()
            assert layer.bias is not None
            wanted = x.float() @ (codes * layer.scales.float().unsqueeze(-1)).flatten(1).T + layer.bias.float()
            found = product(x, Matrix.of(layer))
            yield f"product of {dtype}, {scheme}", relative(found, wanted), 5e-5
            alone = torch.cat([product(row, Matrix.of(layer)) for row in x[:4].split(1)])
            yield "    rows that depend on the batch", float((alone != found[:4]).any(1).sum()), 0
    heads, d, capacity = config.num_attention_heads, config.head_size, 600
    keys, values = (torch.randn(heads, 3 * capacity, d, device=device, generator=generator).half() for _ in range(2))
    queries = torch.randn(2, heads, d, device=device, generator=generator).half()
    placed = ([0, capacity], [511, 599], [2 * capacity, 0], [300, 0])
    arguments = [torch.tensor(pair, dtype=torch.int32, device=device) for pair in placed]
    own = [torch.cat([cache[:, 2 * capacity : 2 * capacity + 300], cache[:, :212]], 1) for cache in (keys, values)]
    other = [cache[:, capacity : capacity + 600] for cache in (keys, values)]
    wanted = torch.stack(
        [
            torch.nn.functional.scaled_dot_product_attention(query.float()[:, None], key.float(), value.float())[:, 0]
            for query, key, value in ((queries[0], *own), (queries[1], *other))
        ]
    )
    yield "attention", relative(attend(queries, keys, values, *arguments, capacity).view_as(wanted), wanted), 1e-3
    small = ModelConfig.preset("nano") if device.type == "cuda" else config
    for scheme in (*SCHEMES[:2], None):
        own_config = ModelConfig.from_dict({**small.to_dict(), "quantization": scheme})
        network = random_network(own_config, device, torch.float16)
        shape = (small.num_layers, small.num_attention_heads, 4 * 32, small.head_size)
        tokens = torch.randint(0, small.vocab_size, (2, 13), device=device, generator=generator)
        positions = torch.arange(13, device=device).expand(2, 13)
        mask = torch.ones(2, 13, 13, dtype=torch.bool, device=device).tril()
        wanted = network(tokens, positions, mask)
        outcomes = []
        for graphs in (False, True):
            cache = torch.zeros(2, *shape, dtype=torch.float16, device=device)
            run, starts = Pass(network, cache[0], cache[1], 32, graphs=graphs), torch.tensor([64, 0], device=device)
            prefill = run.prefill(tokens[:, :12], positions[:, :12], mask[:, :12, :12], starts)
            outcomes.append(run.step(tokens[:, 12], positions[:, 12], starts, torch.full_like(starts, 12)))
        yield f"prefill, {scheme}", relative(prefill, wanted[:, 11]), 5e-3
        yield f"step, {scheme}", relative(outcomes[0], wanted[:, 12]), 5e-3
        yield "    replayed and eager differ", float((outcomes[0] != outcomes[1]).sum()), 0


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks


def step_bytes(network: GLM130B, rows: int, context: int) -> int:
    """What a step must read: everything but the rows of the embedding that are looked up, and the columns in use."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
    config = network.config
    return weights + rows * context * config.num_layers * config.hidden_size * 4


class Steps:
    """Decode steps of some rows near a context; a row's next token is the likeliest."""

    def __init__(self, run: Pass, rows: int, context: int) -> None:
        self.run, device = run, run.device
        self.tokens = torch.randint(0, run.config.vocab_size, (rows,), device=device)
        self.starts = context * torch.arange(rows, dtype=torch.int32, device=device)
        self.lengths = torch.full((rows,), context - 1, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self.tokens.copy_(self.run.step(self.tokens, self.lengths, self.starts, self.lengths).argmax(-1))


@torch.inference_mode()
def measure(
    config: ModelConfig, device: torch.device, clock: Clock, limits: dict[str, float], context: int, short: int, profile: bool
) -> dict[str, Any]:
    """Memory, decoding at batch 1 and 16, and a prompt, of one network."""
    if clock.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    network = random_network(config, device, torch.float16)

    def cache(rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        shape = (config.num_layers, config.num_attention_heads, rows * capacity, config.head_size)
        keys, values = (torch.empty(shape, dtype=torch.float16, device=device).normal_() for _ in range(2))
        return keys, values

    run = Pass(network, *cache(1, context), context)
    prompt = torch.randint(0, config.vocab_size, (1, context), device=device)
    positions, start = torch.arange(context, device=device)[None], torch.zeros(1, dtype=torch.int64, device=device)
    seconds = clock(lambda: run.prefill(prompt, positions, None, start))
    h, layers = config.hidden_size, config.num_layers
    matrices = layers * (4 * h * h + 3 * h * config.inner_hidden_size)
    flops = 2 * matrices * context + 4 * context**2 * h * layers
    result: dict[str, Any] = {
        "scheme": str(config.quantization),
        "prefill_tokens": context,
        "prefill_seconds": round(seconds, 4),
        "prefill_of_matmul_rate": round(flops / seconds / limits["matmul_flops_per_second"], 3),
    }
    decode = clock(Steps(run, 1, context), 20)
    size = step_bytes(network, 1, context)
    result |= {
        "decode_context": context,
        "decode_tokens_per_second": round(1 / decode, 2),
        "decode_bytes": size,
        "decode_of_copy_bandwidth": round(size / decode / limits["copy_bytes_per_second"], 3),
    }
    if clock.on_gpu:
        result["peak_bytes_allocated"] = torch.cuda.max_memory_allocated(device)
        result["peak_bytes_reserved"] = torch.cuda.max_memory_reserved(device)
    if profile:
        print_profile(run, context)
    del run
    gc.collect()
    if clock.on_gpu:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if free < 16 * short * layers * h * 4 + (2 << 30):
            return result
    run = Pass(network, *cache(16, short), short)
    alone, together = (clock(Steps(run, rows, short), 10) for rows in (1, 16))
    return result | {
        "batch_context": short,
        "batch_1_tokens_per_second": round(1 / alone, 2),
        "batch_16_tokens_per_second": round(16 / together, 2),
        "batch_16_over_1": round(16 * alone / together, 2),
    }


def print_profile(run: Pass, context: int) -> None:
    """Where an eager step's time on the GPU goes, by kernel."""
    steps = Steps(Pass(run._network, run.keys, run.values, context, graphs=False), 1, context)
    steps()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        steps()
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=40))


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


def tune(config: ModelConfig, device: torch.device, clock: Clock, limits: dict[str, float]) -> None:
    """Bytes a second of every matrix's product in many tiles, the default first and then the best."""
    h, i = config.hidden_size, config.inner_hidden_size
    for scheme in SCHEMES:
        for rows, columns in ((3 * h, h), (h, h), (2 * i, h), (h, i)):
            # Together far larger than the cache of the GPU, which would else deliver them.
            count = 1 if not clock.on_gpu else max(2, (1 << 29) * 8 // (rows * columns * scheme.bits))
            matrices = [Matrix.of(random_layer(rows, columns, scheme, device)) for _ in range(count)]
            x = deal(torch.randn(1, columns, device=device).half(), matrices[0].planes)
            size = rows * columns * scheme.bits / 8 + matrices[0].groups * rows * 2
            default, found = matrices[0].tiling, []
            group = matrices[0].group
            for tile in TILES:
                if group and group % tile[1] and tile[1] > 16:
                    continue
                for splits in (1, 2, 3, 4, 6, 8):
                    tiles = Tiling(tile[0], tile[1], splits, tile[2], tile[3])
                    if tiles != default and splits * 8 * tile[1] <= matrices[0].weight.shape[1]:
                        found.append((rate(matrices, x, tiles, clock, size), tiles))
            print(f"{scheme}: {rows} x {columns}, share of the copy bandwidth", flush=True)
            best = sorted(found, key=lambda pair: pair[0], reverse=True)[:5]
            for speed, tiles in [(rate(matrices, x, default, clock, size), default), *best]:
                print(f"    {speed / limits['copy_bytes_per_second']:6.1%}  {tiles}", flush=True)


def rate(matrices: list[Matrix], x: Tensor, tiles: Tiling, clock: Clock, size: float) -> float:
    """Bytes a second of products with one matrix after the other; 0 if the tiles are too large for the GPU."""

    def all_of_them() -> None:
        for matrix in matrices:
            partial_products(x, matrix, tiles)

    try:
        all_of_them()
        if not clock.on_gpu:
            return size * len(matrices) / clock(all_of_them)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        return size * len(matrices) / clock(graph.replay, 3)
    except Exception as error:  # out of shared memory, say: whatever the compiler or the driver refuse
        print(f"    {tiles}: {str(error).splitlines()[0][:80]}")
        return 0.0


def main() -> int:
    """Run what was asked for; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="130b")
    parser.add_argument("--smoke", action="store_true", help="the code path at a tiny size")
    parser.add_argument("--tune", action="store_true", help="tiles of the products instead")
    parser.add_argument("--profile", action="store_true", help="also print a step's kernels and their times")
    parser.add_argument("--schemes", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="0: INT4, 1: in groups, 2: INT8")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.smoke:
        parser.error("there is no GPU; --smoke shows the code path without one")
    clock = Clock(device, 1 if args.smoke else args.rounds)
    config = ModelConfig.preset("nano", **SMOKE) if args.smoke else ModelConfig.preset(args.model)
    context, short = (20, 16) if args.smoke else (args.context, 256)
    result: dict[str, Any] = {
        **header("triton", device=device),
        "gpu": torch.cuda.get_device_name(device) if clock.on_gpu else "none: interpreted on a CPU",
        "model": "smoke" if args.smoke else args.model,
        **ceilings(device, clock),
    }
    print(f"{result['gpu']}, torch {result['versions']['torch']}, Triton {result['versions']['triton']}")
    copy, matmul = result["copy_bytes_per_second"], result["matmul_flops_per_second"]
    print(f"copy {copy / 1e12:.3f} TB/s, product {matmul / 1e12:.1f} TFLOP/s", flush=True)
    if args.tune:
        tune(config, device, clock, result)
        return 0
    result["checks"], wrong = [], 0
    for what, error, most in checks(config if args.smoke else ModelConfig.preset("10b"), device):
        right = error <= most
        wrong += not right
        result["checks"].append({"what": what.strip(), "error": error, "allowed": most})
        print(f"{'right' if right else 'WRONG'}  {error:9.2e}  {what}", flush=True)
    result["rows"] = []
    for number in args.schemes:
        own = ModelConfig.from_dict({**config.to_dict(), "quantization": SCHEMES[number]})
        start = time.perf_counter()
        try:
            row = measure(own, device, clock, result, context, short, args.profile)
        except torch.cuda.OutOfMemoryError:
            row = {"scheme": str(own.quantization), "failed": "out of memory"}
        result["rows"].append(row)
        print("\n".join(f"    {key}: {value}" for key, value in row.items()))
        print(f"    ({time.perf_counter() - start:.0f} s)", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
