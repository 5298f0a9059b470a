"""What a model is, in numbers: ``ModelConfig``, the presets, parameter and FLOP counts. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openglm.errors import ConfigError

#: Ids of the released vocabulary (SPEC 3.1). "pad" only fills batches; its mask row hides it.
RELEASED_SPECIAL_TOKENS = {
    "pad": 0,
    "eos": 20002,
    "[MASK]": 150000,
    "[gMASK]": 150001,
    "[sMASK]": 150002,
    "eod": 150003,
    "sop": 150004,
    "eop": 150005,
    "ENC": 150006,
    "dBLOCK": 150007,
}
#: Ids of our own vocabulary, the same at every size (`tokenizers/unigram.py`).
OWN_SPECIAL_TOKENS = {
    "pad": 0,
    "eos": 2,
    "[MASK]": 3,
    "[gMASK]": 4,
    "[sMASK]": 5,
    "eod": 6,
    "sop": 7,
    "eop": 8,
    "ENC": 9,
    "dBLOCK": 10,
}
MASK_KINDS = ("[MASK]", "[gMASK]", "[sMASK]")
REQUIRED_SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "eos")


#: The matrices of a layer that are quantized (SPEC 6.1), and those whose columns tensor parallelism splits.
QUANTIZED_MATRICES = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
COLUMN_SPLIT = ("attention.dense", "mlp.dense_4h_to_h")

#: What weights can be quantized to: bits, and columns that share a scale.
QUANTIZED_BITS = (8, 4)
QUANTIZATION_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class QuantizationScheme:
    """How the four matrices of each layer are stored in 8 or 4 bits (SPEC 6); norms and biases never are."""

    bits: int
    group: int | None = None
    """Columns that share a scale; None = one scale a row, as the original."""
    zero_point: bool = False
    """Codes count from the group's own zero and not from 0; for weights that lie to one side."""
    clip: bool = False
    """Search the end of each range for the least squared error of the weights; needs no data."""
    head_bits: int | None = None
    """Of the embedding, which is also the head; None = it stays as it is, as in the original."""
    ranks: int = 1
    """The original quantizes after its tensor-parallel split (SPEC 6.5): matrices whose columns are split then have a scale
    for each row and rank. For models imported from it."""

    def __post_init__(self) -> None:
        for key, bits in (("bits", self.bits), ("head_bits", self.head_bits)):
            if (bits not in QUANTIZED_BITS and (key, bits) != ("head_bits", None)) or isinstance(bits, bool):
                raise ConfigError(f"weights are quantized to 8 or 4 bits, not {bits!r}", key=key)
        if self.group is not None and (self.group not in QUANTIZATION_GROUPS or isinstance(self.group, bool)):
            raise ConfigError(
                f"there are groups of {', '.join(map(str, QUANTIZATION_GROUPS))} columns, not of {self.group!r}",
                hint="leave it out for one scale a row",
                key="group",
            )

        if not isinstance(self.ranks, int) or isinstance(self.ranks, bool) or self.ranks < 1:
            raise ConfigError(f"`ranks` must be at least 1, not {self.ranks!r}", key="ranks")
        if self.ranks > 1 and self.group is not None:
            raise ConfigError("`ranks` belong to one scale a row, not to groups", key="ranks")

    @classmethod
    def of(cls, bits: int | None, group: int | None = None, head_bits: int | None = None) -> QuantizationScheme | None:
        """The scheme that three options name; None without ``bits``. Raises ``ConfigError`` for the others without it."""
        if bits is not None:
            return cls(bits, group, head_bits=head_bits)
        for key, value in (("group", group), ("head_bits", head_bits)):
            if value is not None:
                raise ConfigError(f"`{key}` needs `bits`", hint="it is 8 or 4", key=key)
        return None

    def __str__(self) -> str:
        group = "one scale a row" if self.group is None else f"groups of {self.group}"
        group += f" and rank ({self.ranks})" if self.ranks > 1 else ""
        extras = (", zero points" if self.zero_point else "") + (", clipped" if self.clip else "")
        head = f", head in {self.head_bits} bits" if self.head_bits else ""
        return f"{self.bits} bits, {group}{extras}{head}"

    @property
    def largest(self) -> int:
        """The largest code: 127 or 7; the smallest is its negative."""
        return 2 ** (self.bits - 1) - 1

    def columns(self, width: int) -> int:
        """Columns that share a scale in rows of ``width``. Raises ``ConfigError`` if the groups do not divide them."""
        if self.group is None:
            if width % self.ranks:
                raise ConfigError(f"rows of {width} weights cannot be divided over {self.ranks} ranks", key="ranks")
            return width // self.ranks
        if width % self.group:
            raise ConfigError(
                f"rows of {width} weights cannot be divided into groups of {self.group}",
                hint="take smaller groups, or one scale a row",
                key="group",
            )
        return self.group

    def part_columns(self, width: int, part: range) -> int:
        """Columns that share a scale in a part of such rows: fewer where its ends lie inside of groups."""
        group = self.columns(width)
        if part.start // group == (part.stop - 1) // group:
            return len(part)
        return math.gcd(group, part.start, part.stop)

    def for_matrix(self, name: str) -> QuantizationScheme | None:
        """How one matrix of the network is stored, by its name without ``.weight``; None = not quantized."""
        if name == "word_embeddings":
            bits = self.head_bits
            return None if bits is None else dataclasses.replace(self, bits=bits, head_bits=None, ranks=1)
        if not name.endswith(QUANTIZED_MATRICES):
            return None
        return dataclasses.replace(self, head_bits=None, ranks=self.ranks if name.endswith(COLUMN_SPLIT) else 1)

    @classmethod
    def from_dict(cls, values: Any) -> QuantizationScheme:
        """A scheme from plain values. Raises ``ConfigError`` for what is none."""
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or "bits" not in values:
            raise ConfigError(f"`quantization` must be a table with `bits`, not {values!r}", key="quantization")
        for key in values:
            if key not in names:
                raise ConfigError(
                    f"`quantization` has no key `{key}`", hint=_did_you_mean(key, names), key=f"quantization.{key}"
                )
        return cls(**values)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GLM-130B style network and the ids that its sequences need.

    Raises ``ConfigError`` naming the field and the value when two numbers do not fit each other.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    inner_hidden_size: int
    """Width of each half of the GeGLU; the first linear layer has twice as many rows (SPEC 1.4)."""
    vocab_size: int
    """Rows of the embedding, padding rows included."""
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    rotary_dtype: str = "float32"
    """Precision of the rotary tables: "float32" is exact, "float16" rounds as the original does (SPEC 2.3)."""
    special_tokens: Mapping[str, int] = field(default_factory=lambda: dict(OWN_SPECIAL_TOKENS), hash=False)
    learned_masks: tuple[str, ...] = MASK_KINDS
    """Mask kinds that the training data held; a prompt with another kind is refused."""
    quantization: QuantizationScheme | None = None
    """How the layers' matrices are stored; None: in the checkpoint's floating type."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_tokens", dict(self.special_tokens))
        object.__setattr__(self, "learned_masks", tuple(self.learned_masks))
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "inner_hidden_size",
            "vocab_size",
            "max_sequence_length",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"`{name}` must be a whole number of at least 1, not {value!r}", key=name)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"`hidden_size` ({self.hidden_size}) must be divisible by `num_attention_heads` ({self.num_attention_heads})",
                key="num_attention_heads",
            )
        if self.head_size % 2:
            raise ConfigError(
                f"rotary positions need an even head size, but `hidden_size` / `num_attention_heads` is {self.head_size}",
                key="num_attention_heads",
            )
        if not self.layernorm_epsilon > 0:
            raise ConfigError(f"`layernorm_epsilon` must be above 0, not {self.layernorm_epsilon!r}", key="layernorm_epsilon")
        if self.rotary_dtype not in ("float32", "float16"):
            raise ConfigError(f'`rotary_dtype` must be "float32" or "float16", not {self.rotary_dtype!r}', key="rotary_dtype")
        for name in REQUIRED_SPECIAL_TOKENS:
            if name not in self.special_tokens:
                raise ConfigError(f'`special_tokens` has no "{name}"', key="special_tokens")
        for name, token in self.special_tokens.items():
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f'`special_tokens["{name}"]` is {token!r}, outside the vocabulary of {self.vocab_size}',
                    key="special_tokens",
                )
        for name in self.learned_masks:
            if name not in MASK_KINDS:
                raise ConfigError(f"`learned_masks` may hold {', '.join(MASK_KINDS)}, not {name!r}", key="learned_masks")
        if self.quantization is not None:
            if not isinstance(self.quantization, QuantizationScheme):
                object.__setattr__(self, "quantization", QuantizationScheme.from_dict(self.quantization))
            for width in (self.hidden_size, self.inner_hidden_size):
                self.quantization.columns(width)

    def quantized(self, scheme: QuantizationScheme | None) -> ModelConfig:
        """The same with a scheme; as it is without one. Raises ``ConfigError`` if it has one already."""
        if scheme is None:
            return self
        if self.quantization is not None:
            hint = "leave `bits` out, or take the model that it was made from"
            raise ConfigError("this model is quantized already", hint=hint, key="bits")
        return dataclasses.replace(self, quantization=scheme)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def check_ranks(self, ranks: int) -> None:
        """Raise ``ConfigError`` if so many tensor-parallel ranks cannot share the network: they must divide the heads."""
        heads = self.num_attention_heads
        if ranks < 1 or heads % ranks:
            possible = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ConfigError(
                f"the {heads} heads of this model cannot be divided over {ranks} processes",
                hint=f"possible: {possible}",
                key="num_attention_heads",
            )
        self.inner_share(0, ranks)

    def inner_share(self, rank: int, ranks: int) -> range:
        """The GeGLU's columns that a tensor-parallel rank has.

        As many for each rank where that comes out, else whole groups that share a scale (or 32 columns), as evenly as they go:
        the ranks of 130B may be 3, but its 32,768 columns are no multiple of that. Raises ``ConfigError`` for too many ranks.
        """
        width, group = self.inner_hidden_size, self.quantization and self.quantization.group
        even = width % (ranks * (32 if group else 2)) == 0  # kernels want 32 columns a scale, two codes of 4 bits fill a byte
        unit = width // ranks if even else group or math.gcd(width, 32)
        units = width // unit
        if units < ranks:
            raise ConfigError(
                f"`inner_hidden_size` ({width}) cannot be divided over {ranks} processes", key="inner_hidden_size"
            )
        return range(rank * units // ranks * unit, (rank + 1) * units // ranks * unit)

    def vocabulary_share(self, rank: int, ranks: int) -> range:
        """The rows of the vocabulary matrix that a tensor-parallel rank has; shares differ by one row at most."""
        return range(rank * self.vocab_size // ranks, (rank + 1) * self.vocab_size // ranks)

    @property
    def deepnorm_alpha(self) -> float:
        """Weight of the skip connection, sqrt(2 layers) (SPEC 2.1)."""
        return math.sqrt(2 * self.num_layers)

    @property
    def parameter_count(self) -> int:
        """Number of parameters; the tied head counts once (SPEC 1.2)."""
        h, i = self.hidden_size, self.inner_hidden_size
        return self.num_layers * (4 * h * h + 3 * i * h + 9 * h + 2 * i) + self.vocab_size * h + 2 * h

    def flops_per_token(self, context: int | None = None, *, training: bool = False) -> int:
        """FLOPs of one token that attends to ``context`` tokens (default: the maximum length), head included.

        A multiplication and an addition count as two; ``training`` counts the backward pass as twice the forward
        (SPEC 9.1.2).
        """
        h, i = self.hidden_size, self.inner_hidden_size
        context = self.max_sequence_length if context is None else context
        forward = 2 * self.num_layers * (4 * h * h + 3 * h * i) + 4 * context * h * self.num_layers + 2 * h * self.vocab_size
        return 3 * forward if training else forward

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """A named shape, ``PRESETS``; ``changes`` replace single fields. An unknown name gets the nearest right one."""
        if name not in PRESETS:
            raise ConfigError(f"there is no preset `{name}`", hint=_did_you_mean(name, PRESETS), key=name)
        return cls.from_dict({**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """A configuration from plain values. Unknown or missing keys raise ``ConfigError`` with the nearest right name."""
        names = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in names:
                raise ConfigError(f"a model configuration has no key `{key}`", hint=_did_you_mean(key, names), key=key)
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            raise ConfigError(f"the model configuration lacks `{missing[0]}`", key=missing[0])
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path, ignore: Sequence[str] = ()) -> ModelConfig:
        """Read a ``config.json``; keys that describe the file rather than the network are skipped, as are those to ignore."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read `{path}`: {error.strerror}", path=path) from error
        except ValueError as error:
            raise ConfigError(f"`{path}` is not valid JSON: {error}", path=path) from error
        if not isinstance(values, dict):
            raise ConfigError(f"`{path}` holds no JSON object", path=path)
        values = {key: value for key, value in values.items() if key not in (*FILE_KEYS, *ignore)}
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"`{path}`: {error.message}", hint=error.hint, path=path, key=error.key) from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = dataclasses.asdict(self)
        values["learned_masks"] = list(self.learned_masks)
        if self.quantization is None:
            del values["quantization"]
        else:  # what is not used is not named
            values["quantization"] = {
                key: value for key, value in values["quantization"].items() if (key, value) not in _UNUSED_IN_FILES
            }
        return values


#: Keys of a scheme that stand in no file while they have these values.
_UNUSED_IN_FILES = (("head_bits", None), ("ranks", 1))

#: Keys of a model folder's config.json that are not the network's.
FILE_KEYS = ("format_version", "model_type", "dtype", "tokenizer")


def _did_you_mean(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}"


def _shape(
    layers: int, hidden: int, heads: int, inner: int, vocab: int, context: int, special: Mapping[str, int] = OWN_SPECIAL_TOKENS
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "inner_hidden_size": inner,
        "vocab_size": vocab,
        "max_sequence_length": context,
        "special_tokens": dict(special),
    }


#: Hidden and inner widths are multiples of 128, so that every quantization group fits.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": _shape(8, 384, 6, 1_024, 16_384, 1_024),
    "110m": _shape(12, 768, 12, 2_048, 32_768, 2_048),
    "335m": _shape(24, 1_024, 16, 2_816, 32_768, 2_048),
    "1.3b": _shape(24, 2_048, 16, 5_504, 50_304, 2_048),
    "2b": _shape(36, 2_048, 32, 5_504, 50_304, 2_048),
    "10b": _shape(48, 4_096, 64, 11_008, 50_304, 2_048),
    "130b": _shape(70, 12_288, 96, 32_768, 150_528, 2_048, RELEASED_SPECIAL_TOKENS),
}
