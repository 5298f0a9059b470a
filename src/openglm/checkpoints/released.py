"""Import of the released layout of GLM-130B (SPEC 4): any tensor-parallel degree, joined tensor by tensor.

Quantized shards (SPEC 6.5) keep their codes and scales: each rank's part was quantized by itself, so a matrix whose columns
are split has a scale for each row and rank.

latest                                   the iteration, "49300" in the release
49300/mp_rank_00_model_states.pt, ...    one file per tensor-parallel rank
config.json                              our addition, optional: the configuration
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openglm.checkpoints.format import CONFIG_FILE, read_json
from openglm.checkpoints.layout import PREFIX, dtype_name, expected_shapes, expected_tensors, plain_name
from openglm.checkpoints.pickle_reader import Placeholder
from openglm.checkpoints.torch_file import StoredTensor, read_module
from openglm.config import OWN_SPECIAL_TOKENS, RELEASED_SPECIAL_TOKENS, ModelConfig, QuantizationScheme
from openglm.errors import CheckpointError, ConfigError, InputError
from openglm.storage import atomic_folder

RELEASED_VOCAB_SIZE = 150_528
RELEASED_HEAD_SIZE = 128
TOKENIZER_FILES = ("ice_text.model", "unigram.model")
_SHARD = re.compile(r"mp_rank_(\d{2,})_model_states\.pt")
_LAYER = re.compile(r"layers\.(\d+)\.")
#: How the tensors of a layer are split over ranks; all others are copies (SPEC 4.3, 4.4).
_SPLITS = {
    "word_embeddings.weight": "rows",
    "attention.query_key_value.weight": "rows",
    "attention.query_key_value.bias": "rows",
    "attention.dense.weight": "columns",
    "mlp.dense_h_to_4h.weight": "halves",
    "mlp.dense_h_to_4h.bias": "halves",
    "mlp.dense_4h_to_h.weight": "columns",
}
#: Copies of one model may differ a little after training on several devices; those of two models differ by their size.
_FOREIGN_DIFFERENCE = 0.25

Module = Mapping[str, StoredTensor | Placeholder]


class ReleasedCheckpoint:
    """A released folder, opened and checked; ``tensor`` joins the parts of one tensor."""

    def __init__(
        self, folder: Path, config: ModelConfig, paths: list[Path], modules: list[dict[str, StoredTensor]], notes: list[str]
    ) -> None:
        self.folder = folder
        self.config = config
        #: What was deduced or ignored, one sentence each.
        self.notes = notes
        self.paths = paths
        self.tokenizer_path = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
        self.dtype = dtype_name(modules[0]["word_embeddings.weight"].dtype)
        self._modules = modules
        self._expected = expected_tensors(config)

    @property
    def tensor_parallel(self) -> int:
        """Number of shards that each tensor is split into."""
        return len(self.paths)

    def names(self) -> list[str]:
        """Names of the tensors, without ``transformer.``, in the network's order."""
        return list(self._expected)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its stored dtype, in memory of its own. Raises ``CheckpointError`` for an unknown name."""
        return self.rows(name, 0, self._shape(name)[0])

    def rows(self, name: str, start: int, stop: int, columns: range | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, or some columns of them, joined from the ranks that have a part of them."""
        shape, stored = self._shape(name), _stored_name(name)
        split = _split(stored)
        if self.tensor_parallel == 1 or split is None:
            if name.endswith(".scales"):
                return self._modules[0][stored].read_rows(start, stop).unsqueeze(1)
            return self._modules[0][stored].read_rows(start, stop, columns)
        rest = shape[1:] if columns is None else (len(columns),)
        whole = torch.empty((stop - start, *rest), dtype=self._modules[0][stored].dtype)
        for rank, module in enumerate(self._modules):
            dim, places, length = _pieces(stored, shape, self.tensor_parallel, rank)
            for number, place in enumerate(places):
                if dim == 1:
                    wanted = columns or range(shape[1])
                    left, right = max(wanted.start, place), min(wanted.stop, place + length)
                    if left < right:
                        target = whole[:, left - wanted.start : right - wanted.start]
                        if len(module[stored].shape) == 1:  # scales: one a row, of this rank
                            target.copy_(module[stored].read_rows(start, stop).unsqueeze(1))
                        else:
                            target.copy_(module[stored].read_rows(start, stop, range(left - place, right - place)))
                    continue
                first, last = max(start, place), min(stop, place + length)
                if first < last:
                    own = number * length - place
                    part = module[stored].read_rows(first + own, last + own, columns)
                    whole[first - start : last - start] = part.view(last - first, *rest)
        return whole

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._expected:
            raise CheckpointError(f"`{self.folder}` has no tensor `{name}`", path=self.folder, key=name)
        return self._expected[name].shape


def _stored_name(name: str) -> str:
    """The shards' own name of a tensor: codes lie there as the weight, scales as ``weight_scale``."""
    matrix, _, part = name.rpartition(".")
    return {"codes": f"{matrix}.weight", "scales": f"{matrix}.weight_scale"}.get(part, name)


def _split(name: str) -> str | None:
    return _SPLITS.get(_LAYER.sub("", name, count=1).removesuffix("_scale"))


def _pieces(name: str, shape: tuple[int, ...], ranks: int, rank: int) -> tuple[int, list[int], int]:
    """Where the pieces of a rank's tensor lie in the whole one: the axis, the first index of each, their length."""
    split = _split(name)
    dim = 1 if split == "columns" else 0
    if split == "halves":  # [u_r ; v_r] of [u ; v]: each half of the GeGLU is split by itself
        half = shape[0] // 2
        length = half // ranks
        return dim, [rank * length, half + rank * length], length
    length = shape[dim] // ranks
    return dim, [rank * length], length


def _shard_shape(name: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    split = _split(name)
    if name.endswith("_scale"):  # one a row, also where the columns are split
        return (shape[0],) if split == "columns" else (shape[0] // ranks,)
    if split is None:
        return shape
    return (shape[0], shape[1] // ranks) if split == "columns" else (shape[0] // ranks, *shape[1:])


def open_released(folder: str | Path, config: ModelConfig | Mapping[str, Any] | None = None) -> ReleasedCheckpoint:
    """Open a released folder and check every shard's names and shapes; no weight is read yet, but a few small ones.

    The configuration is ``config``, else config.json beside ``latest``, else deduced from the shapes (``notes`` says
    how). Where it does not say, ``rotary_dtype`` becomes "float16": the tables that released weights were trained
    with (SPEC 2.3). Raises ``CheckpointError``, one sentence that names the file, for a missing, truncated or foreign
    shard, and ``ConfigError`` for an impossible configuration.
    """
    folder = Path(folder)
    states = folder / _read_latest(folder)
    if not states.is_dir():
        raise CheckpointError(
            f"`{folder / 'latest'}` names `{states.name}`, but there is no folder `{states}`",
            hint="download or copy this folder again",
            path=states,
        )
    paths = _find_shards(states)
    modules: list[dict[str, StoredTensor]] = []
    notes: list[str] = []
    for path in paths:
        known, ignored = _known_tensors(path, read_module(path))
        modules.append(known)
        if ignored and path == paths[0]:
            more = f" and {len(ignored) - 3} more" if len(ignored) > 3 else ""
            notes.append(f"unknown tensors are ignored: {', '.join(ignored[:3])}{more}")
    _check_count(paths, modules[0])
    config = _configuration(folder, config, paths[0], modules[0], len(paths), notes)
    _check_shards(paths, modules, config)
    _check_same_model(paths, modules, config, notes)
    return ReleasedCheckpoint(folder, config, paths, modules, notes)


def _read_latest(folder: Path) -> str:
    path = folder / "latest"
    try:
        text = path.read_bytes()[:100].decode("utf-8", "replace").strip()
    except OSError as error:
        raise CheckpointError(f"cannot read `{path}`: {error.strerror}", path=path) from error
    if text != "release" and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise CheckpointError(f"`{path}` holds {text!r}, expected a number of iterations or the word release", path=path)
    return text


def _find_shards(states: Path) -> list[Path]:
    found = {int(match[1]): path for path in states.iterdir() if (match := _SHARD.fullmatch(path.name))}
    for rank in range(max(found, default=0) + 1):
        if rank not in found:
            raise _missing_shard(states, rank)
    return [found[rank] for rank in sorted(found)]


def _missing_shard(states: Path, rank: int) -> CheckpointError:
    path = states / f"mp_rank_{rank:02d}_model_states.pt"
    return CheckpointError(f"the shard `{path}` is missing", hint="download or copy it again", path=path)


def _known_tensors(path: Path, module: Module) -> tuple[dict[str, StoredTensor], list[str]]:
    """The model's tensors by plain name, and the names of unknown ones."""
    known: dict[str, StoredTensor] = {}
    ignored: list[str] = []
    for full_name, tensor in module.items():
        name = plain_name(full_name)
        base = _LAYER.sub("", name, count=1)
        if base.endswith("inv_freq"):
            continue  # recomputed
        if base.removesuffix("_scale") in _KNOWN:
            if not isinstance(tensor, StoredTensor):
                raise CheckpointError(
                    f"`{path}`: `{full_name}` is of `{tensor.what}`, expected floating point", path=path, key=full_name
                )
            known[name] = tensor
        else:
            ignored.append(full_name)
    return known, ignored


_KNOWN = {
    _LAYER.sub("", name, count=1)
    for name in expected_shapes(ModelConfig(1, 2, 1, 1, len(OWN_SPECIAL_TOKENS) + 1, special_tokens=OWN_SPECIAL_TOKENS))
}


def _require(path: Path, module: Mapping[str, StoredTensor], name: str) -> StoredTensor:
    if name not in module:
        raise CheckpointError(
            f"`{path}` lacks the tensor `{PREFIX}{name}`", hint="it is no shard of this model", path=path, key=PREFIX + name
        )
    return module[name]


def _check_count(paths: list[Path], first: Mapping[str, StoredTensor]) -> None:
    """The output projection of rank 0 tells how many ranks there were."""
    hidden = _require(paths[0], first, "final_layernorm.weight").shape
    dense = _require(paths[0], first, "layers.0.attention.dense.weight").shape
    if len(dense) == 2 and _bits(first) == 4:
        dense = (dense[0], 2 * dense[1])
    if len(hidden) != 1 or len(dense) != 2 or not dense[1] or hidden[0] % dense[1]:
        raise CheckpointError(
            f"`{paths[0]}`: `{PREFIX}layers.0.attention.dense.weight` has the shape {list(dense)}, "
            f"expected {list(hidden)} rows split over ranks",
            path=paths[0],
            key=PREFIX + "layers.0.attention.dense.weight",
        )
    ranks = hidden[0] // dense[1]
    if len(paths) < ranks:
        raise _missing_shard(paths[0].parent, len(paths))
    if len(paths) > ranks:
        raise CheckpointError(
            f"`{paths[0]}` is one of {ranks} shards by its shapes, but the folder holds {len(paths)}",
            hint="it mixes two checkpoints",
            path=paths[0],
        )


def _bits(first: Mapping[str, StoredTensor]) -> int | None:
    """Of quantized shards: two codes of 4 bits lie in a byte, so a row of the projection has half as many as it has inputs."""
    weight, norm = first.get("layers.0.attention.query_key_value.weight"), first.get("final_layernorm.weight")
    if weight is None or norm is None or weight.dtype != torch.int8 or len(weight.shape) != 2:
        return None
    return 4 if 2 * weight.shape[1] == norm.shape[0] else 8


def _configuration(
    folder: Path,
    given: ModelConfig | Mapping[str, Any] | None,
    path: Path,
    first: Mapping[str, StoredTensor],
    ranks: int,
    notes: list[str],
) -> ModelConfig:
    bits = _bits(first)
    scheme = None if bits is None else QuantizationScheme(bits, ranks=ranks)
    if isinstance(given, ModelConfig):
        return dataclasses.replace(given, quantization=scheme)
    beside = folder / CONFIG_FILE
    if given is not None:
        said, config = set(given), ModelConfig.from_dict(given)
    elif beside.is_file():
        values = read_json(beside)
        said, config = set(values), ModelConfig.from_json(beside, ignore=("quantization_bits",))
        named = values.get("quantization_bits") or (config.quantization.bits if config.quantization else None)
        if named and named != bits:
            raise CheckpointError(
                f"`{beside}` says {named} bits, but the shards hold {f'{bits} bits' if bits else 'floating point'}", path=beside
            )
    else:
        said, config = set[str](), _deduce(path, first, ranks, notes)
    if "rotary_dtype" not in said:
        config = dataclasses.replace(config, rotary_dtype="float16")
    if "special_tokens" not in said and config.vocab_size == RELEASED_VOCAB_SIZE:
        config = dataclasses.replace(config, special_tokens=RELEASED_SPECIAL_TOKENS)
    return dataclasses.replace(config, quantization=scheme)


def _deduce(path: Path, first: Mapping[str, StoredTensor], ranks: int, notes: list[str]) -> ModelConfig:
    def size(name: str, axis: int) -> int:
        shape = _require(path, first, name).shape
        if axis >= len(shape):
            raise CheckpointError(f"`{path}`: `{PREFIX}{name}` has the shape {list(shape)}", path=path, key=PREFIX + name)
        return shape[axis]

    hidden = size("final_layernorm.weight", 0)
    if hidden % RELEASED_HEAD_SIZE:
        raise CheckpointError(
            f"`{path}` has the hidden size {hidden}, no multiple of {RELEASED_HEAD_SIZE}, so the heads cannot be deduced",
            hint=f"put a {CONFIG_FILE} beside `latest` or give the configuration",
            path=path,
        )
    values = {
        "num_layers": 1 + max(int(match[1]) for name in first if (match := _LAYER.match(name))),
        "hidden_size": hidden,
        "num_attention_heads": hidden // RELEASED_HEAD_SIZE,
        "inner_hidden_size": size("layers.0.mlp.dense_4h_to_h.weight", 1) * ranks * (2 if _bits(first) == 4 else 1),
        "vocab_size": size("word_embeddings.weight", 0) * ranks,
    }
    try:
        config = ModelConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(
            f"the configuration cannot be deduced from `{path}`: {error.message}",
            hint=f"put a {CONFIG_FILE} beside `latest`",
            path=path,
        ) from error
    shape = ", ".join(f"{name} {value:,}" for name, value in values.items())
    notes.append(
        f"deduced from the shapes: {shape} (heads of {RELEASED_HEAD_SIZE}), maximum length {config.max_sequence_length:,}"
    )
    if config.vocab_size != RELEASED_VOCAB_SIZE:
        notes.append("the ids of the special tokens are assumed to be those of openglm's own vocabulary")
    return config


def _check_shards(paths: list[Path], modules: list[dict[str, StoredTensor]], config: ModelConfig) -> None:
    ranks = len(paths)
    sizes = (("vocab_size", config.vocab_size), ("num_attention_heads", config.num_attention_heads))
    for key, value in (*sizes, ("inner_hidden_size", config.inner_hidden_size)):
        if value % ranks:
            raise CheckpointError(
                f"`{paths[0].parent}` holds {ranks} shards, which do not divide `{key}` {value}", path=paths[0].parent, key=key
            )
    wanted = {_stored_name(name): expected for name, expected in expected_tensors(config).items()}
    dtype = modules[0]["final_layernorm.weight"].dtype
    for path, module in zip(paths, modules, strict=True):
        for name, (shape, own) in wanted.items():
            found = _require(path, module, name)
            expected = _shard_shape(name, shape, ranks)
            if found.shape != expected:
                vocabulary = (
                    f"; `vocab_size` is {config.vocab_size} over {ranks} ranks" if name == "word_embeddings.weight" else ""
                )
                raise CheckpointError(
                    f"`{path}`: `{PREFIX}{name}` has the shape {list(found.shape)}, expected {list(expected)}{vocabulary}",
                    hint="it belongs to another model, or the configuration does not fit",
                    path=path,
                    key=PREFIX + name,
                )
            if found.dtype != (own or dtype) or dtype == torch.int8:
                raise CheckpointError(
                    f"`{path}`: `{PREFIX}{name}` is {dtype_name(found.dtype)}, "
                    f"expected {'floating point' if dtype == torch.int8 else dtype_name(own or dtype)}",
                    path=path,
                    key=PREFIX + name,
                )
        extra = [name for name in module if name not in wanted]
        if extra:
            raise CheckpointError(
                f"`{path}` holds `{PREFIX}{extra[0]}`, beyond the {config.num_layers} layers of the configuration",
                path=path,
                key=PREFIX + extra[0],
            )


def _check_same_model(paths: list[Path], modules: list[dict[str, StoredTensor]], config: ModelConfig, notes: list[str]) -> None:
    """Shards of two models, or one shard twice, have fitting shapes: the copies and the first rows tell."""
    copies = [
        name for name in expected_shapes(config) if _split(name) is None and (_LAYER.match(name) is None or "layers.0." in name)
    ]
    drifted: set[str] = set()
    for name in copies:
        first = modules[0][name].read().float()
        for path, module in zip(paths[1:], modules[1:], strict=True):
            difference = (module[name].read().float() - first).abs().max()
            if difference > _FOREIGN_DIFFERENCE * first.abs().max():
                raise CheckpointError(
                    f"`{path}` is a shard of another model than `{paths[0].name}`: their copies of `{PREFIX}{name}` differ",
                    hint="download or copy it again",
                    path=path,
                    key=PREFIX + name,
                )
            if difference:
                drifted.add(name)
    if drifted:
        notes.append(f"copies differ a little between the shards (`{min(drifted)}` for one); those of rank 0 are taken")
    rows = [module["word_embeddings.weight"].read_first_row() for module in modules]
    for rank, row in enumerate(rows):
        for earlier in range(rank):
            if torch.equal(row, rows[earlier]) and row.unique().numel() > 1:
                raise CheckpointError(
                    f"`{paths[rank]}` is a copy of `{paths[earlier].name}`", hint="download or copy it again", path=paths[rank]
                )


def save_released(
    folder: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor], *, tensor_parallel: int = 1, iteration: int = 1
) -> None:
    """Write the released layout, split over ``tensor_parallel`` ranks, and config.json beside it: for other programs.

    Raises ``InputError`` if the ranks do not divide the heads, the vocabulary and the inner size.
    """
    for key in ("num_attention_heads", "vocab_size", "inner_hidden_size"):
        if tensor_parallel < 1 or getattr(config, key) % tensor_parallel:
            raise InputError(f"{tensor_parallel} ranks do not divide `{key}` {getattr(config, key)}", key=key)
    by_name = {plain_name(name): tensor for name, tensor in tensors.items()}
    with atomic_folder(folder) as part:
        (part / str(iteration)).mkdir()
        for rank in range(tensor_parallel):
            module = dict(_shard(config, by_name, tensor_parallel, rank))
            torch.save({"module": module}, part / str(iteration) / f"mp_rank_{rank:02d}_model_states.pt")
        (part / "latest").write_text(str(iteration), encoding="utf-8")
        (part / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")


def _shard(config: ModelConfig, tensors: Mapping[str, Tensor], ranks: int, rank: int) -> Iterator[tuple[str, Tensor]]:
    for name, shape in expected_shapes(config).items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"the tensor `{name}` is missing or not of the shape {list(shape)}", key=name)
        whole = tensors[name].detach().cpu()
        if _split(name) is not None:
            dim, starts, length = _pieces(name, shape, ranks, rank)
            whole = torch.cat([whole.narrow(dim, start, length) for start in starts], dim)
        yield PREFIX + name, whole.clone()  # a view would be saved with its whole storage
