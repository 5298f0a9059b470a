"""How fast a model reads prompts and writes answers, beside what the machine can do at best."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from openglm.config import ModelConfig
from openglm.errors import InputError
from openglm.evaluation.ceilings import peak_memory, product_rate, read_rate, synchronize
from openglm.inference.engine import Engine
from openglm.inference.loading import load
from openglm.infilling import Prompt, blank_prompt
from openglm.kernels.cpu.panels import PanelEmbedding, PanelLinear
from openglm.quantization.random_weights import random_network

#: [gMASK], sop, and a token for them to see.
SHORTEST_PROMPT = 3
PAGE = 4096


@dataclass(frozen=True)
class Spread:
    """One figure as some rounds found it."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"median": self.median, "min": min(self.values), "max": max(self.values)}


@dataclass(frozen=True)
class Case:
    """What is measured."""

    batch: int
    """Rows side by side."""
    prompt: int
    """Tokens of each prompt, [gMASK] and sop included."""


@dataclass(frozen=True)
class Row:
    """The speed of one case, in tokens a second of all rows together."""

    case: Case
    prefill: Spread
    decode: Spread
    prefill_flops: float
    """Of a token, on average."""
    decode_bytes: float
    """That a step must read: all weights, and the keys and values of all rows, on average over the answer."""
    decode_flops: float
    """Of a token."""

    @property
    def prefill_rate(self) -> float:
        """FLOP/s."""
        return self.prefill.median * self.prefill_flops

    @property
    def decode_rate(self) -> float:
        """Bytes a second."""
        return self.decode.median / self.case.batch * self.decode_bytes


@dataclass(frozen=True)
class Ceilings:
    """What the machine did at best, measured in turn with the rows."""

    read: Spread
    """Bytes a second."""
    read_by: str
    product: Spread
    """FLOP/s."""
    product_dtype: str

    def prefill(self, row: Row) -> float:
        """Tokens a second at most: the products alone, without waiting for memory."""
        return self.product.median / row.prefill_flops

    def decode(self, row: Row) -> float:
        """Tokens a second at most: the reading or the products of a step, whichever takes longer."""
        return min(row.case.batch * self.read.median / row.decode_bytes, self.product.median / row.decode_flops)


@dataclass(frozen=True)
class Speed:
    """All that was measured of a model."""

    rows: tuple[Row, ...]
    ceilings: Ceilings
    peak_memory: int | None
    """Bytes, from the start to the end of the first, untimed round."""
    peak_memory_of: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        read, product = self.ceilings.read, self.ceilings.product
        return {
            "peak_memory": {"bytes": self.peak_memory, "of": self.peak_memory_of},
            "ceilings": {
                "read_bytes_per_second": read.to_dict(),
                "read_by": self.ceilings.read_by,
                "product_flops_per_second": product.to_dict(),
                "product_dtype": self.ceilings.product_dtype,
            },
            "rows": [
                {
                    "batch": row.case.batch,
                    "prompt": row.case.prompt,
                    "prefill_tokens_per_second": row.prefill.to_dict(),
                    "prefill_flops_per_second": row.prefill_rate,
                    "of_products": row.prefill_rate / product.median,
                    "prefill_ceiling": self.ceilings.prefill(row),
                    "decode_tokens_per_second": row.decode.to_dict(),
                    "decode_bytes_per_second": row.decode_rate,
                    "of_bandwidth": row.decode_rate / read.median,
                    "decode_ceiling": self.ceilings.decode(row),
                }
                for row in self.rows
            ],
        }


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load_engine(model: Path, device: torch.device, **options: Any) -> tuple[Engine, list[str], float]:
    """A model ready to run, what is to be said of it, and the seconds that loading it took, until every weight was read.

    options: of ``openglm.load``: dtype, bits, group, head_bits.

    Imports are not in that time, nor is the start of a GPU. Files that the system holds in memory load faster than others.
    """
    torch.empty(0, device=device)
    began = time.perf_counter()
    glm = load(model, device=device, **options)
    for tensor in [*glm.network.parameters(), *glm.network.buffers()]:
        if tensor.device.type == "cpu":  # perhaps only mapped so far: one number of each page brings it in
            tensor.detach().flatten()[:: PAGE // tensor.itemsize].sum()
    synchronize(device)
    return glm.engine, glm.notes, time.perf_counter() - began


def random_engine(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Engine, list[str], float]:
    """The same of random weights, drawn where they are and in the scheme that the configuration names."""
    torch.empty(0, device=device)
    began = time.perf_counter()
    engine = Engine(random_network(config, device, dtype))
    synchronize(device)
    return engine, engine.notes, time.perf_counter() - began


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all that a network holds: parameters, codes, scales; the tied embedding counts once."""
    size = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
    for module in network.modules():
        if isinstance(module, PanelLinear | PanelEmbedding):
            matrix = module.matrix if isinstance(module, PanelLinear) else module.weight
            size += matrix.nbytes + (0 if matrix.bias is None else matrix.bias.nbytes)
    return size


def step_bytes(engine: Engine, case: Case, new: int) -> float:
    """Bytes that a step of ``case`` must read, on average over ``new`` of them."""
    config = engine.config
    width = engine.cache_dtype.itemsize
    seen = case.prompt + (new + 1) / 2
    return weight_bytes(engine.network) + 2 * config.num_layers * config.hidden_size * seen * case.batch * width


def prompt_flops(config: ModelConfig, length: int) -> int:
    """FLOPs of a prompt: every token sees all, and only the last meets the head."""
    head = 2 * config.hidden_size * config.vocab_size
    return length * (config.flops_per_token(length) - head) + head


def random_prompts(config: ModelConfig, case: Case, seed: int = 0) -> list[Prompt]:
    """Prompts of random tokens with a [gMASK] at their end, all different."""
    special = config.special_tokens
    ordinary = np.setdiff1d(np.arange(config.vocab_size), list(special.values()))
    drawn = np.random.default_rng(seed).choice(ordinary, (case.batch, case.prompt - 2))
    return [blank_prompt([*row, special["[gMASK]"]], case.prompt - 2, special) for row in drawn.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(
    engine: Engine, cases: Sequence[Case], new: int, rounds: int, advance: Callable[[], object] = lambda: None
) -> Speed:
    """Measure all cases and the ceilings ``rounds`` times, in turn, after a round that is not timed.

    Greedy, as an answer is written: the ids of a step reach Python before the next. ``advance`` is called after each case of
    each round, the untimed one included. Raises ``InputError`` where memory runs out, and for a prompt that is too short.
    """
    device = engine.device
    short = next((case for case in cases if case.prompt < SHORTEST_PROMPT), None)
    if short is not None:
        raise InputError(f"a prompt needs at least {SHORTEST_PROMPT} tokens, not {short.prompt}", key="prompt")
    for case in cases:
        _once(engine, case, random_prompts(engine.config, case), new)
        advance()
    peak, held_by = peak_memory(device)  # before the ceilings take memory of their own
    reads: list[float] = []
    products: list[float] = []
    found: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    dtype, read_by = _product_dtype(engine), ""
    for number in range(1, rounds + 1):
        with _enough_memory("the ceilings"):
            rate, read_by = read_rate(device)
            reads.append(rate)
            products.append(product_rate(dtype, device))
        for case in cases:
            prompts = random_prompts(engine.config, case, number)  # new ones, which no cache can know
            found[case].append(_once(engine, case, prompts, new))
            advance()
    rows = tuple(
        Row(
            case,
            Spread(tuple(case.batch * case.prompt / seconds for seconds, _ in times)),
            Spread(tuple(case.batch * new / seconds for _, seconds in times)),
            prompt_flops(engine.config, case.prompt) / case.prompt,
            step_bytes(engine, case, new),
            engine.config.flops_per_token(case.prompt),
        )
        for case, times in found.items()
    )
    name = str(dtype).removeprefix("torch.")
    return Speed(rows, Ceilings(Spread(tuple(reads)), read_by, Spread(tuple(products)), name), peak, held_by)


def _product_dtype(engine: Engine) -> torch.dtype:
    """The type whose products are the ceiling of a prefill: the network's own.

    The CPU kernels multiply integers, at twice the speed of float32 where the processor has instructions for them, as it
    then often has for bfloat16: the faster of both types is their ceiling.
    """
    if engine.kernel is None or engine.device.type != "cpu":
        return engine.dtype
    return max((torch.float32, torch.bfloat16), key=lambda dtype: product_rate(dtype, engine.device))


def _once(engine: Engine, case: Case, prompts: Sequence[Prompt], new: int) -> tuple[float, float]:
    """Seconds of the prompts, and of ``new`` steps behind them."""
    device = engine.device
    tokens = torch.full((case.batch,), int(prompts[0].layout.tokens[0]), device=device)
    with _enough_memory(f"batch {case.batch}, prompts of {case.prompt} tokens"):
        synchronize(device)
        began = time.perf_counter()
        decoding = engine.prefill(prompts, new)
        synchronize(device)
        read = time.perf_counter()
        for _ in range(new):
            tokens = decoding.append(tokens).argmax(-1)
            tokens.tolist()
        took = read - began, time.perf_counter() - read
        decoding.release()  # a GPU's cache and its graphs serve the next round too
        return took


@contextlib.contextmanager
def _enough_memory(what: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InputError(f"memory ran out at {what}", hint="measure smaller batches or shorter prompts", key="batch") from error
