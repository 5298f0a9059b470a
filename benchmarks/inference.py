"""Load time, time to first token and tokens a second, beside transformers' generate on a Llama of the same shape.

    python benchmarks/inference.py [--threads 2] [--rounds 5] [--json FILE]

Both run in one process, in turn, on the same random prompt lengths, in the same dtype, greedily, with no end token;
every figure is the median of the rounds. The Llama has the same layers, hidden width, heads and vocabulary, a tied
head, and an inner width that gives the same number of weights (GeGLU and SwiGLU have three matrices both). The bundled
model is measured as it ships; `335m` has random weights.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import openglm
from openglm.checkpoints import save_checkpoint
from openglm.config import ModelConfig
from openglm.inference.engine import Engine
from openglm.inference.sampling import SamplingSettings
from openglm.infilling import blank_prompt
from openglm.models.glm130b import GLM130B


def llama(config: ModelConfig, folder: Path, dtype: torch.dtype) -> Callable[[], torch.nn.Module]:
    """A Llama of the same shape, saved once; returns how to load it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.inner_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_sequence_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).to(dtype).save_pretrained(folder)
    return lambda: LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


class Ours:
    """The engine, driven as `GLM.generate` drives it."""

    def __init__(self, network: GLM130B) -> None:
        self.engine = Engine(network)
        self.special = network.config.special_tokens

    def write(self, prompts: torch.Tensor, count: int, first: list[float]) -> None:
        requests = []
        for row in prompts.tolist():
            part_a = [*row[:-1], self.special["[gMASK]"]]
            requests.append(blank_prompt(part_a, len(part_a) - 1, self.special))
        settings = SamplingSettings(max_tokens=count)
        began = time.perf_counter()
        for token in self.engine.generate(requests, settings, ends=[], rooms=[count] * len(requests)):
            if not first and token.row == len(requests) - 1:
                first.append(time.perf_counter() - began)


class Theirs:
    """transformers' generate with its default cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def write(self, prompts: torch.Tensor, count: int, first: list[float]) -> None:
        class Clock:
            def put(self, _: object) -> None:
                ticks.append(time.perf_counter())

            def end(self) -> None: ...

        ticks: list[float] = []
        began = time.perf_counter()
        # A streamer is called with the prompt, then with each token; it serves one row only.
        streamer = Clock() if len(prompts) == 1 else None
        with torch.inference_mode():
            self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                streamer=streamer,
                pad_token_id=0,
            )
        if len(ticks) > 1:
            first.append(ticks[1] - began)


def measure(name: str, config: ModelConfig, folder: Path, dtype: torch.dtype, args: argparse.Namespace) -> list[dict]:
    """Rows of the table for one shape."""
    with tempfile.TemporaryDirectory() as temporary:
        load_llama = llama(config, Path(temporary), dtype)

        def load_ours() -> GLM130B:
            return openglm.load(folder, dtype=str(dtype).removeprefix("torch.")).network

        loads: dict[str, list[float]] = {"openglm": [], "transformers": []}
        for _ in range(args.rounds):
            for key, load in (("openglm", load_ours), ("transformers", load_llama)):
                gc.collect()
                began = time.perf_counter()
                model = load()
                sum(float(p.detach().sum()) for p in model.parameters())  # both may map files: every weight is read
                loads[key].append(time.perf_counter() - began)
                del model
        writers = {"openglm": Ours(load_ours()), "transformers": Theirs(load_llama())}
    rows = [
        {
            "model": name,
            "measure": "load and read every weight, s",
            "openglm": statistics.median(loads["openglm"]),
            "transformers": statistics.median(loads["transformers"]),
        }
    ]
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 8):
        prompts = torch.randint(100, config.vocab_size, (batch, args.prompt), generator=generator)
        seconds: dict[str, list[float]] = {key: [] for key in writers}
        starts: dict[str, list[float]] = {key: [] for key in writers}
        for round_number in range(args.rounds + 1):
            for key in sorted(writers, reverse=bool(round_number % 2)):
                first: list[float] = []
                began = time.perf_counter()
                writers[key].write(prompts, args.tokens, first)
                if round_number:  # the first round warms up
                    seconds[key].append(time.perf_counter() - began)
                    starts[key] += first
        speeds = {key: batch * args.tokens / statistics.median(values) for key, values in seconds.items()}
        rows.append({"model": name, "measure": f"batch {batch}: tokens/s, prompt included", **speeds})
        if all(starts.values()):
            medians = {key: 1000 * statistics.median(values) for key, values in starts.items()}
            rows.append({"model": name, "measure": f"batch {batch}: first token of {args.prompt}, ms", **medians})
    for row in rows:
        better = row["openglm"] / row["transformers"]
        row["ratio"] = better if "tokens/s" in row["measure"] else 1 / better
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--models", nargs="*", default=["nano", "335m"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as temporary:
            if name == "nano":
                source = openglm.load("nano")
                config, tensors = source.config, source.network.state_dict()
            else:
                config = ModelConfig.preset(name)
                tensors = GLM130B(config).initialize(0).state_dict()
            # Both sides load a checkpoint stored in the dtype of the run.
            folder = Path(temporary) / "model"
            save_checkpoint(folder, config, tensors, dtype=args.dtype)
            rows += measure(name, config, folder, dtype, args)
    print(f"{'model':7} {'measure':36} {'openglm':>9} {'transformers':>13} {'ratio':>6}")
    for row in rows:
        print(f"{row['model']:7} {row['measure']:36} {row['openglm']:9.2f} {row['transformers']:13.2f} {row['ratio']:6.2f}")
    print("ratio: above 1 = openglm is faster")
    if args.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/inference.py "
            + " ".join(f"--{k} {' '.join(v) if isinstance(v, list) else v}" for k, v in vars(args).items() if k != "json"),
            "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads",
            "versions": {"openglm": openglm.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
