"""Quantized decoding on a CPU beside llama.cpp and transformers: tokens a second, bytes a second, accuracy.

    pip install llama-cpp-python gguf transformers
    python benchmarks/cpu_decode.py [--models 335m 1.3b] [--threads 2] [--rounds 5] [--json FILE]

Every contestant is a process of its own that waits until it is asked; they are asked in turn, in an order that changes from
round to round. Speeds are medians of the rounds, ratios medians of the rounds' ratios. llama.cpp runs a Llama of the closest
shape (same layers, hidden and inner width, heads, vocabulary, tied head) with random weights, all matrices and the head in one
type: Q4_0 and Q8_0 have groups of 32 with float16 scales, as ours have here. Both keep a float16 cache, and the argmax of the
logits is in the time.
"Wrong by" is the relative root mean square of the logits behind 16 tokens, against float64 over the very same weights, in
four layers of the shape.
Leaner formats and batches have rows of their own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT, TOKENS, PREFILL = 64, 48, 512
LAYERS, ACCURACY = 4, 16
"""Layers and tokens of the networks that are computed in float64 too."""


# ---------------------------------------------------------------------------------------------------------------------
# Contestants: each answers one line of JSON for one line that names a task


class Ours:
    """The engine over a network of random codes."""

    def __init__(self, model: str, bits: int, group: int | None, layers: int | None = None) -> None:
        import torch

        from openglm.config import QuantizationScheme
        from openglm.evaluation.speed import weight_bytes
        from openglm.inference.engine import Engine
        from openglm.quantization.random_weights import random_network

        torch.set_num_threads(int(os.environ["THREADS"]))
        scheme = QuantizationScheme(bits, group, head_bits=bits)
        config = preset(model, layers, quantization=scheme)
        network = random_network(config)
        self._exact = None if layers is None else exact_network(network)
        self._given = (model, bits, group)
        self.engine = Engine(network)
        if self.engine.kernel is None:
            raise SystemExit(f"error: {self.engine.notes}")
        self.bytes = weight_bytes(self.engine.network)

    def _prompt(self, length: int, number: int = 0) -> Any:
        from openglm.infilling import unidirectional_prompt

        special = self.engine.config.special_tokens
        return unidirectional_prompt([20 + (i + number) % 1000 for i in range(length)], special)

    def decode(self, batch: int) -> float:
        decoding = self.engine.prefill([self._prompt(CONTEXT, row) for row in range(batch)], TOKENS + 1)
        start = time.perf_counter()
        for _ in range(TOKENS):
            decoding.append(decoding.logits.argmax(-1))
        return batch * TOKENS / (time.perf_counter() - start)

    def prefill(self) -> float:
        prompt = self._prompt(PREFILL)
        start = time.perf_counter()
        self.engine.prefill([prompt], 1).logits.argmax(-1)
        return PREFILL / (time.perf_counter() - start)

    def accuracy(self) -> dict[str, float]:
        import torch

        from openglm.infilling import Batch

        few = Ours(*self._given, layers=LAYERS)
        prompt = few._prompt(ACCURACY)
        batch = Batch.stack([prompt.layout])
        with torch.inference_mode():
            exact = few._exact(batch.tokens, batch.positions, batch.mask)[0, -1]  # pyright: ignore[reportOptionalCall]
        return difference(few.engine.prefill([prompt], 1).logits[0], exact)


class LlamaCpp:
    """llama.cpp through llama-cpp-python's binding of its C interface."""

    def __init__(self, model: str, kind: str, layers: int | None = None) -> None:
        import ctypes

        import llama_cpp

        self.api, threads = llama_cpp, int(os.environ["THREADS"])
        config = preset(model, layers)
        self._given = (model, kind)
        self.vocabulary = config.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            self.bytes = write_gguf(path, config, kind)
            llama_cpp.llama_log_set(_silent(llama_cpp), ctypes.c_void_p())
            llama_cpp.llama_backend_init()
            parameters = llama_cpp.llama_model_default_params()
            parameters.use_mmap = False  # so that its repacked kernels are used
            self._exact = None if layers is None else exact_llama(path, config)
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 8 * (PREFILL + 64), PREFILL, PREFILL
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = 8, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)

    def _run(self, tokens: list[list[int]], position: int) -> np.ndarray:
        """Tokens of each sequence from a position on; logits of each sequence's last."""
        api, total = self.api, sum(map(len, tokens))
        batch = api.llama_batch_init(total, 0, 1)
        batch.n_tokens = total
        index = 0
        for sequence, own in enumerate(tokens):
            for offset, token in enumerate(own):
                batch.token[index], batch.pos[index] = token, position + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = offset == len(own) - 1
                index += 1
        if api.llama_decode(self.context, batch):
            raise SystemExit("error: llama_decode failed")
        ends = np.cumsum([len(own) for own in tokens]) - 1
        self.logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, int(ends[-1])), (self.vocabulary,)).copy()
        rows = [np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, int(i)), (self.vocabulary,)) for i in ends]
        result = np.stack(rows).argmax(-1)
        api.llama_batch_free(batch)
        return result

    def decode(self, batch: int) -> float:
        self._clear()
        last = self._run([[20 + i % 1000 for i in range(CONTEXT)]] * batch, 0)
        start = time.perf_counter()
        for step in range(TOKENS):
            last = self._run([[int(token)] for token in last], CONTEXT + step)
        return batch * TOKENS / (time.perf_counter() - start)

    def prefill(self) -> float:
        self._clear()
        tokens = [20 + i % 1000 for i in range(PREFILL)]
        start = time.perf_counter()
        self._run([tokens], 0)
        return PREFILL / (time.perf_counter() - start)

    def accuracy(self) -> dict[str, float]:
        import torch

        few, tokens = LlamaCpp(*self._given, layers=LAYERS), [20 + i % 1000 for i in range(ACCURACY)]
        few._run([tokens], 0)
        with torch.inference_mode():
            exact = few._exact(torch.tensor([tokens])).logits[0, -1]  # pyright: ignore[reportOptionalCall]
        return difference(few.logits, exact)

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)


def _silent(api: Any) -> Any:
    LlamaCpp.log = api.llama_log_callback(lambda level, text, data: None)  # kept: C holds only its address
    return LlamaCpp.log


def write_gguf(path: Path, config: Any, kind: str) -> int:
    """A Llama of the shape with random weights of one type; returns the bytes of its matrices."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.inner_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    quantization = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    draw = np.random.default_rng(0)
    total = 0

    def matrix(name: str, rows: int, columns: int) -> None:
        nonlocal total
        data = draw.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        data[:, :, :2] = np.frombuffer(np.float16(0.02 / 8 if kind == "Q4_0" else 0.02 / 70).tobytes(), np.uint8)
        total += data.nbytes
        writer.add_tensor(name, data.reshape(rows, -1), raw_dtype=quantization)

    hidden, inner = config.hidden_size, config.inner_hidden_size
    matrix("token_embd.weight", config.vocab_size, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for n in range(config.num_layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{n}.{name}.weight", hidden, hidden)
        matrix(f"blk.{n}.ffn_gate.weight", inner, hidden)
        matrix(f"blk.{n}.ffn_up.weight", inner, hidden)
        matrix(f"blk.{n}.ffn_down.weight", hidden, inner)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{n}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def preset(model: str, layers: int | None, **changes: Any) -> Any:
    """The shape, with all of its layers or some."""
    from openglm.config import ModelConfig

    return ModelConfig.preset(model, **({} if layers is None else {"num_layers": layers}), **changes)


def llama(config: Any) -> Any:
    """transformers' Llama of a shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.inner_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_sequence_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(shape)


def exact_network(network: Any) -> Any:
    """A plain network in float64 with exactly the weights of a quantized one."""
    import dataclasses

    import torch

    from openglm.models.glm130b import GLM130B
    from openglm.quantization.layers import QuantizedEmbedding, QuantizedLinear

    plain = GLM130B(dataclasses.replace(network.config, quantization=None)).double().eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            owner, _, leaf = name.rpartition(".")
            module = network.get_submodule(owner)
            if leaf == "weight" and isinstance(module, QuantizedLinear | QuantizedEmbedding):
                weight = module.weight
                grouped = weight.codes.double().unflatten(1, (weight.scales.shape[1], -1))
                parameter.copy_((grouped * weight.scales.double()[..., None]).flatten(1))
            else:
                parameter.copy_(getattr(module, leaf))
    return plain


def exact_llama(path: Path, config: Any) -> Any:
    """transformers' Llama in float64 with exactly the weights of a GGUF file."""
    import gguf
    import torch

    network, heads = llama(config).double().eval(), config.num_attention_heads
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            tensor = stored[names.get_name(name, (".weight",))]
            weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).double()
            if "q_proj" in name or "k_proj" in name:  # llama.cpp turns neighbours, transformers halves
                weight = weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2)
            parameter.copy_(weight.reshape(parameter.shape))
    return network


def difference(found: Any, exact: Any) -> dict[str, float]:
    """Root mean square and largest, relative to those of the exact logits."""
    found, exact = (np.asarray(logits, dtype=np.float64).ravel() for logits in (found, exact))
    wrong = found - exact
    rms = np.sqrt(np.mean(wrong**2) / np.mean(exact**2))
    return {"relative_rms": float(f"{rms:.3g}"), "relative_largest": float(f"{np.abs(wrong).max() / np.abs(exact).max():.3g}")}


class Transformers:
    """transformers' own generate on a Llama of the shape, bfloat16."""

    def __init__(self, model: str, layers: int | None = None) -> None:
        import copy

        import torch

        torch.set_num_threads(int(os.environ["THREADS"]))
        self.network = llama(preset(model, layers)).to(torch.bfloat16).eval()
        self._given = (model,)
        self._exact = None if layers is None else copy.deepcopy(self.network).double()
        self.bytes = sum(p.numel() * 2 for p in self.network.parameters())

    def decode(self, batch: int) -> float:
        import torch

        ids = torch.arange(20, 20 + CONTEXT).repeat(batch, 1)
        times = []
        for count in (1, TOKENS + 1):
            start = time.perf_counter()
            self.network.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            times.append(time.perf_counter() - start)
        return batch * TOKENS / (times[1] - times[0])

    def prefill(self) -> float:
        import torch

        ids = torch.arange(20, 20 + PREFILL)[None]
        start = time.perf_counter()
        with torch.inference_mode():
            self.network(ids, logits_to_keep=1)
        return PREFILL / (time.perf_counter() - start)

    def accuracy(self) -> dict[str, float]:
        import torch

        few = Transformers(*self._given, layers=LAYERS)
        ids = torch.arange(20, 20 + ACCURACY)[None]
        with torch.inference_mode():
            found, exact = few.network(ids).logits[0, -1], few._exact(ids).logits[0, -1]  # pyright: ignore[reportOptionalCall]
        return difference(found.float(), exact)


class Bandwidth:
    """How fast the memory is read, by as many threads."""

    bytes = 0

    def decode(self, batch: int) -> float:
        from openglm.kernels.cpu.library import read_bandwidth

        return read_bandwidth(threads=int(os.environ["THREADS"]))


def serve(name: str, arguments: list[str]) -> None:
    """One contestant: build it, then answer."""
    kinds = {"ours": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers, "bandwidth": Bandwidth}
    values = [None if a == "None" else int(a) if a.isdigit() else a for a in arguments]
    contestant = kinds[name](*values)  # pyright: ignore[reportArgumentType]
    print(json.dumps(contestant.bytes), flush=True)
    for line in sys.stdin:
        task, *given = line.split()
        print(json.dumps(getattr(contestant, task)(*map(int, given))), flush=True)


# ---------------------------------------------------------------------------------------------------------------------


class Process:
    """A contestant in a process of its own."""

    def __init__(self, name: str, *arguments: Any, threads: int) -> None:
        command = [sys.executable, __file__, "--serve", name, *map(str, arguments)]
        environment = {**os.environ, "THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "0"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.bytes = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: `{' '.join(map(str, self.process.args))}` ended")  # pyright: ignore[reportArgumentType]
        return line

    def ask(self, task: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def contest(contestants: dict[str, Process], task: str, rounds: int) -> dict[str, list[float]]:
    """What each did in each round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds + 1):
        random.Random(number).shuffle(names)
        for name in names:
            value = contestants[name].ask(task if name != "bandwidth" else "decode 1")
            if number:
                found[name].append(value)
    return found


def pairwise(some: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios: what changes from round to round changes both."""
    return statistics.median(one / other for one, other in zip(some, others, strict=True))


def measure(model: str, threads: int, rounds: int, only: str = "") -> list[dict[str, Any]]:
    """All comparisons of one model, or those whose title holds some words."""
    rows = []

    def compare(title: str, ours: tuple[int, int | None], other: tuple[str, ...], tasks: list[str]) -> None:
        if only not in f"{title} {' '.join(other)}":
            return
        contestants = {
            "ours": Process("ours", model, *ours, threads=threads),
            other[0]: Process(other[0], model, *other[1:], threads=threads),
            "bandwidth": Process("bandwidth", threads=threads),
        }
        accuracy = {name: contestants[name].ask("accuracy") for name in ("ours", other[0])}
        for task in tasks:
            found = contest(contestants, task, rounds)
            median = {name: statistics.median(values) for name, values in found.items()}
            row = {
                "model": model,
                "ours": title,
                "against": " ".join(other),
                "task": task,
                "ours_tokens_per_second": round(median["ours"], 2),
                "other_tokens_per_second": round(median[other[0]], 2),
                "ratio": round(pairwise(found["ours"], found[other[0]]), 3),
                "ours_bytes": contestants["ours"].bytes,
                "other_bytes": contestants[other[0]].bytes,
                "read_bandwidth": round(median["bandwidth"] / 1e9, 2),
            }
            if task == "decode 1":
                row["of_bandwidth"] = round(median["ours"] * row["ours_bytes"] / median["bandwidth"], 3)
            row["accuracy"] = accuracy
            rows.append(row)
            print(
                f"{model:5} {title:22} against {row['against']:15} {task:9} {row['ours_tokens_per_second']:8.1f} "
                f"{row['other_tokens_per_second']:8.1f}  {row['ratio']:5.2f}x"
                + (f"  {row['of_bandwidth']:.0%} of {row['read_bandwidth']:.1f} GB/s" if "of_bandwidth" in row else "")
                + f"  wrong by {accuracy['ours']['relative_rms']:.0e}, {accuracy[other[0]]['relative_rms']:.0e}",
                flush=True,
            )
        for process in contestants.values():
            process.close()

    small = model == "335m"
    compare("INT4, groups of 32", (4, 32), ("llama.cpp", "Q4_0"), ["decode 1"])
    compare("INT8, groups of 32", (8, 32), ("llama.cpp", "Q8_0"), ["decode 1", "prefill"])
    compare("INT4, groups of 128", (4, 128), ("llama.cpp", "Q4_0"), ["decode 1", "decode 8", "prefill"])
    if small:
        compare("INT8, groups of 128", (8, 128), ("llama.cpp", "Q8_0"), ["decode 1", "decode 8", "prefill"])
        compare("INT4, one scale a row", (4, None), ("llama.cpp", "Q4_0"), ["decode 1"])
        compare("INT8, one scale a row", (8, None), ("llama.cpp", "Q8_0"), ["decode 1"])
        compare("INT4, groups of 128", (4, 128), ("transformers",), ["decode 1", "prefill"])
    return rows


def main() -> None:
    """Run what was asked for."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["335m", "1.3b"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="WORDS", help='comparisons whose title holds them: "groups of 128"')
    parser.add_argument("--machine", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for model in args.models for row in measure(model, args.threads, args.rounds, args.only)]
    if args.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "machine": args.machine,
            "threads": args.threads,
            "rounds": args.rounds,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
