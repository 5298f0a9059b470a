"""Memory of a model that only writes: whether it fits, and what would. Arithmetic only, nothing is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from openglm.config import QUANTIZED_MATRICES, ModelConfig, QuantizationScheme
from openglm.errors import ConfigError, InputError
from openglm.planning.memory import Term

GB = 1e9
#: Bytes a number.
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Assumed: driver and context of a GPU; interpreter and libraries of a process.
RESERVE = {"gpu": 1.0 * GB, "cpu": 0.4 * GB}


@dataclass(frozen=True)
class Use:
    """How a model is to be run."""

    dtype: str = "float16"
    """Of what is not quantized."""
    cache: str = "float16"
    gpus: int = 1
    """GPUs that share each matrix (tensor parallel); their number divides the heads."""
    context: int = 2048
    batch: int = 1
    device: str = "gpu"
    """"gpu" or "cpu"."""


@dataclass(frozen=True)
class Estimate:
    """What one GPU (or the process) holds at its fullest moment."""

    config: ModelConfig
    use: Use
    terms: tuple[Term, ...]

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(term.bytes for term in self.terms)

    @property
    def form(self) -> str:
        """The weights' form in words."""
        scheme = self.config.quantization
        return self.use.dtype if scheme is None else str(scheme)


def estimate(config: ModelConfig, use: Use) -> Estimate:
    """Bytes by term. Raises ``InputError`` for GPUs that do not divide the heads, and numbers that are none."""
    for name in ("gpus", "context", "batch"):
        if getattr(use, name) < 1:
            raise InputError(f"`{name}` must be at least 1, not {getattr(use, name)}", key=name)
    # A cache of 8 bits has a float32 scale for each vector of a head.
    cache_widths = {**WIDTHS, "int8": 1 + 4 / config.head_size}
    for name, known in (("dtype", WIDTHS), ("cache", cache_widths)):
        if getattr(use, name) not in known:
            raise InputError(f"`{name}` must be {', '.join(known)}, not {getattr(use, name)!r}", key=name)
    if config.num_attention_heads % use.gpus:
        raise InputError(
            f"{use.gpus} GPUs do not divide the {config.num_attention_heads} heads of this model",
            hint=f"possible: {', '.join(map(str, _divisors(config.num_attention_heads)))}",
            key="gpus",
        )
    h, i, v, layers, t = (
        config.hidden_size,
        config.inner_hidden_size,
        config.vocab_size,
        config.num_layers,
        use.gpus,
    )
    width, scheme = WIDTHS[use.dtype], config.quantization
    parts = [_part(config, width, rank, t) for rank in range(t)]
    codes, scales, head, rest = (max(sizes) for sizes in zip(*parts, strict=True))
    form = f"{scheme.bits} bits" if scheme else use.dtype
    terms = [Term("layers", codes, f"{layers} x {4 * h * h + 3 * i * h:,} weights in {form} / {t}")]
    if scales:
        terms.append(Term("scales", scales, "float16"))
    terms.append(Term("embedding and head", head, f"{v:,} x {h:,} / {t}"))
    terms.append(Term("biases and norms", rest, use.dtype))
    cache = 2 * layers * h * use.context * use.batch * cache_widths[use.cache] / t
    terms.append(
        Term("keys and values", cache, f"2 x {layers} x {h:,} x {use.context:,} tokens x {use.batch} in {use.cache} / {t}")
    )
    prompt = use.context * use.batch * (6 * h + 3 * i / t) * max(width, 2) + use.batch * v * 4 * 2
    terms.append(Term("activations of a prompt", prompt, f"{use.context:,} tokens x {use.batch}"))
    terms.append(Term("reserve", RESERVE[use.device], "driver, libraries", "assumed"))
    return Estimate(config, use, tuple(terms))


def _part(config: ModelConfig, width: int, rank: int, ranks: int) -> tuple[float, float, float, float]:
    """Bytes that one of some tensor-parallel ranks holds: weights or codes of the layers, their scales, embedding, the rest."""
    h, i, scheme = config.hidden_size, config.inner_hidden_size, config.quantization
    hidden, inner = range(rank * h // ranks, (rank + 1) * h // ranks), config.inner_share(rank, ranks)
    held = ((3 * len(hidden), h, range(h)), (h, h, hidden), (2 * len(inner), h, range(h)), (h, i, inner))
    codes = scales = 0.0
    for name, (rows, columns, part) in zip(QUANTIZED_MATRICES, held, strict=True):
        one = _matrix(rows, columns, part, scheme.for_matrix(name) if scheme else None, width)
        codes, scales = codes + config.num_layers * one[0], scales + config.num_layers * one[1]
    rows = len(config.vocabulary_share(rank, ranks))
    head = _matrix(rows, h, range(h), scheme.for_matrix("word_embeddings") if scheme else None, width)
    rest = config.num_layers * (3 * len(hidden) + 2 * len(inner) + 6 * h) + 2 * h
    return codes, scales, sum(head), rest * width


def _matrix(rows: int, columns: int, part: range, scheme: QuantizationScheme | None, width: int) -> tuple[float, float]:
    """Bytes of weights or codes, and of scales (and zeros), of some of the columns of a matrix."""
    if scheme is None:
        return rows * len(part) * width, 0.0
    groups = rows * len(part) // scheme.part_columns(columns, part)
    return rows * len(part) * scheme.bits / 8, groups * (3 if scheme.zero_point else 2)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def alternatives(config: ModelConfig, use: Use, memory: float) -> Iterator[Estimate]:
    """What would fit where this does not: fewer bits, then more GPUs, then a shorter context; one of each kind."""
    schemes = [QuantizationScheme(8), QuantizationScheme(4, 128), QuantizationScheme(4)]
    now = config.quantization
    for scheme in schemes:
        leaner = now is None or scheme.bits < now.bits or (scheme.bits == now.bits and now.group and not scheme.group)
        if not leaner:
            continue
        try:
            found = estimate(dataclasses.replace(config, quantization=scheme), use)
        except ConfigError:  # its groups do not divide the rows
            continue
        if found.total <= memory:
            yield found
            break
    if use.device == "gpu":
        for count in _divisors(config.num_attention_heads):
            if count > use.gpus and (found := estimate(config, dataclasses.replace(use, gpus=count))).total <= memory:
                yield found
                break
    context = use.context // 2
    while context >= 128:
        if (found := estimate(config, dataclasses.replace(use, context=context))).total <= memory:
            yield found
            return
        context //= 2


def verdict(found: Estimate, memory: float) -> tuple[bool, str]:
    """Whether it fits, and one sentence that says so and, if not, what would."""
    use = found.use
    machine = "this process" if use.device == "cpu" else "one GPU" if use.gpus == 1 else f"each of {use.gpus} GPUs"
    need = f"{found.form}, context {use.context:,}: {machine} needs {_gb(found.total)} and has {_gb(memory)}"
    if found.total <= memory:
        return True, f"it fits: {need}"
    ways = []
    for other in alternatives(found.config, use, memory):
        if other.config is not found.config:
            ways.append(f"{other.form} ({_gb(other.total)})")
        elif other.use.gpus != use.gpus:
            ways.append(f"{other.use.gpus} GPUs ({_gb(other.total)} each)")
        else:
            ways.append(f"a context of {other.use.context:,} ({_gb(other.total)})")
    would = f"; what would fit: {', or '.join(ways)}" if ways else "; nothing that is known here would fit"
    return False, f"it does not fit: {need}{would}"


def layers_that_fit(found: Estimate, memory: float, slots: int, kept: float = 0.0) -> int:
    """How many layers of a model may stay in ``memory`` bytes, while the others come and go through so many slots.

    ``kept``: bytes that a layer which comes and goes takes in the same memory all the same. All layers, where none needs to go.
    Raises ``InputError`` where not even the slots fit beside what must stay.
    """
    layers = found.config.num_layers
    if found.total <= memory:
        return layers
    slots, own = min(slots, layers), layer_bytes(found)
    least = found.total - (layers - slots) * own + layers * kept
    if least > memory:
        raise InputError(
            f"embedding, keys and values, activations and {slots} layers at a time need {least / GB:,.2f} GB, "
            f"and there are {memory / GB:,.2f} GB",
            hint="give it more memory, leave the layers on disk, or take fewer bits",
            key="memory",
        )
    return int((memory - least) // (own - kept))


def layer_bytes(found: Estimate) -> float:
    """Of the weights of one layer."""
    return (
        sum(term.bytes for term in found.terms if term.name in ("layers", "scales", "biases and norms"))
        / found.config.num_layers
    )


def _gb(size: float) -> str:
    return f"{math.ceil(size / GB * 10) / 10:,.1f} GB"
