"""Inference on several processes against one: logits, texts, draws, beams, what each reads and holds; and the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from test_released import CONFIG as RELEASED
from test_released import quantized_shards, random_tensors

import openglm
from openglm.checkpoints import convert_source, empty_network, load_into, load_network, open_model, save_checkpoint, save_released
from openglm.checkpoints.rank import RankSource
from openglm.config import ModelConfig, QuantizationScheme
from openglm.errors import CheckpointError, ConfigError, InputError, OpenGLMError
from openglm.models.glm130b import GLM130B
from openglm.parallel.cut import TensorCut
from openglm.parallel.group import TensorGroup, connect
from openglm.parallel.inference import RankNetwork, cut_network
from openglm.planning.inference import Use, estimate

#: Heads of 24: two or four ranks cut groups of 32 columns in two. 601 tokens: no number of ranks divides them.
SHAPE = {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 4, "inner_hidden_size": 160, "max_sequence_length": 64}
SCHEMES = {
    "plain": None,
    "int8": QuantizationScheme(8),
    "int4 groups": QuantizationScheme(4, 32, head_bits=8),
    "int4 ranks": QuantizationScheme(4, ranks=2),
    "int8 zeros": QuantizationScheme(8, 32, zero_point=True),
}
TEXT = "the cat [MASK] a river, [MASK]."


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer) -> dict[str, Path]:
    """One network in all forms."""
    special = {name: token for name, token in tiny_tokenizer.special_tokens.items() if name != "unk"}
    config = ModelConfig(**SHAPE, vocab_size=tiny_tokenizer.vocab_size + 1, special_tokens=special)
    folder = tmp_path_factory.mktemp("models")
    network = GLM130B(config).initialize(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    save_checkpoint(folder / "plain", config, dict(network.named_parameters()), tokenizer=tiny_tokenizer)
    found = {"plain": folder / "plain"}
    for name, scheme in SCHEMES.items():
        if scheme is not None:
            found[name] = folder / name
            convert_source(open_model(found["plain"]), found[name], dtype="float32", scheme=scheme)
    return found


def inputs(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows, both halves of the vocabulary, a prefix that sees itself."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (2, 17), generator=generator)
    tokens[0, :2] = torch.tensor([0, config.vocab_size - 1])
    mask = torch.ones(2, 17, 17, dtype=torch.bool).tril()
    mask[:, :, :9] = True
    return tokens, torch.arange(17).expand(2, 17).contiguous(), mask


def part_of(folder: Path, dtype: str = "float32") -> RankNetwork:
    """This process's part, without an engine's kernels."""
    source = open_model(folder)
    network = cut_network(empty_network(source.config), TensorGroup(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
    return load_into(network, RankSource(source, network.cut), dtype).eval().requires_grad_(False)


def held(network: torch.nn.Module) -> dict[str, int]:
    """Bytes of matrices, of scales, of the embedding, and of the rest."""
    sizes = dict.fromkeys(("layers", "scales", "embedding and head", "biases and norms"), 0)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        kind = "biases and norms"
        if name.startswith("word_embeddings"):
            kind = "embedding and head"
        elif name.endswith((".scales", ".zeros")):
            kind = "scales"
        elif tensor.dim() == 2:
            kind = "layers"
        sizes[kind] += tensor.numel() * tensor.element_size()
    return sizes


def logits_of(folder: Path, dtype: str) -> tuple[torch.Tensor, dict[str, int], bool]:
    network = part_of(folder, dtype)
    found = network(*inputs(network.config))
    everywhere = [torch.empty_like(found.float()) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, found.float())
    return found, held(network), all(torch.equal(found.float(), other) for other in everywhere)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", SCHEMES)
def test_logits_equal_one_process_and_each_rank_holds_its_part(workers, models, kind: str, ranks: int) -> None:
    whole = load_network(open_model(models[kind]), "float32")
    expected = whole(*inputs(whole.config)).detach()
    planned = {term.name: term.bytes for term in estimate(whole.config, Use("float32", gpus=ranks)).terms}
    results = workers.run(ranks, logits_of, models[kind], "float32")
    for found, _, same in results:
        assert same  # the same bits on every rank: all of them choose the same tokens
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    for name in results[0][1]:
        # `glm estimate` tells of the fullest rank.
        assert planned.get(name, 0) == max(sizes[name] for _, sizes, _ in results), name
    total = held(whole)
    assert sum(sizes["layers"] for _, sizes, _ in results) == total["layers"]
    assert all(sizes["layers"] <= total["layers"] * (1 / ranks + 0.05) for _, sizes, _ in results)


def test_half_precision_is_as_near_as_one_process_is(workers, models) -> None:
    exact = load_network(open_model(models["plain"]), "float32")
    expected = exact(*inputs(exact.config)).detach()
    for dtype, limit in (("float16", 4e-3), ("bfloat16", 3e-2)):
        for found, _, same in workers.run(2, logits_of, models["plain"], dtype):
            assert same and found.dtype == getattr(torch, dtype)
            assert (found.float() - expected).abs().max() <= limit * expected.abs().max()


def answers(folder: Path, parallel: bool, dtype: str = "float32") -> list:
    """Everything that a user may ask for."""
    glm = openglm.load(folder, device="cpu", dtype=dtype, tensor_parallel=parallel, tokenizer=folder.parent / "plain")
    assert isinstance(glm.network, RankNetwork) == parallel
    assert glm.engine.kernel is None or not parallel
    found = [
        glm.fill(TEXT, max_tokens=12),
        *glm.fill_batch([TEXT, "[gMASK]", f"{TEXT} {TEXT}"], max_tokens=8, batch_size=2),
        glm.fill(TEXT, num_beams=3, max_tokens=10, no_repeat_ngram_size=2),
        glm.fill(TEXT, temperature=1.2, top_p=0.9, seed=11, max_tokens=12),
        glm.generate("a child looked at", max_tokens=12),
    ]
    values = [[list(part.token_ids) for part in getattr(result, "spans", [result])] for result in found]
    score = glm.score("the [MASK] sat", ["cat", "king"]).choices
    glm.engine.set_cache_dtype("int8")
    glm.engine.drafter = openglm.inference.speculation.LookupDrafter()
    values.append(list(glm.generate("a child a child a child", max_tokens=12).token_ids))
    return [values, [choice.log_probability for choice in score]]


@pytest.mark.parametrize("kind", ["plain", "int8", "int4 groups"])
def test_texts_draws_and_beams_equal_one_process(workers, models, kind: str) -> None:
    """Quantized models through the compiled kernels where there are any, matrix by matrix."""
    texts, scores = answers(models[kind], False)
    for ranks in (2, 4):
        for found, likely in workers.run(ranks, answers, models[kind], True):
            assert found == texts
            assert likely == pytest.approx(scores, abs=1e-4)


def without_a_seed(folder: Path) -> list:
    glm = openglm.load(folder, tensor_parallel=True, device="cpu")
    return [glm.generate("the king", temperature=2.0, max_tokens=20).token_ids for _ in range(3)]


def test_draws_without_a_seed_are_the_same_on_all_ranks(workers, models) -> None:
    first, second = workers.run(2, without_a_seed, models["plain"])
    assert first == second
    assert len(set(first)) == 3  # and yet they are drawn


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_parts_of_the_released_layout(tmp_path, bits: int | None) -> None:
    """A part of a model in two shards is that of the same model in our format, for more ranks than shards, and for fewer."""
    if bits is None:
        save_released(tmp_path / "released", RELEASED, random_tensors(RELEASED), tensor_parallel=2)
    else:
        quantized_shards(tmp_path / "released", bits, 2)
    released = open_model(tmp_path / "released", RELEASED)
    convert_source(released, tmp_path / "own", dtype=None)
    own = open_model(tmp_path / "own")
    for ranks in (1, 2, 4):
        parts: dict[str, list[torch.Tensor]] = {}
        for rank in range(ranks):
            cut = TensorCut(own.config, rank, ranks)
            network = cut_network(empty_network(own.config), TensorGroup(rank, ranks, torch.device("cpu")))
            for name, empty in [*network.named_parameters(), *network.named_buffers()]:
                part = RankSource(released, cut).tensor(name)
                assert torch.equal(part, RankSource(own, cut).tensor(name)) and part.shape == empty.shape, name
                parts.setdefault(name, []).append(part)
        for name in own.names():
            if name.endswith(("dense.weight", "dense.codes", "4h_to_h.weight", "4h_to_h.codes")):
                assert torch.equal(torch.cat(parts[name], 1), own.tensor(name))
            elif "h_to_4h" in name:
                halves = [part.chunk(2)[half] for half in (0, 1) for part in parts[name]]
                assert torch.equal(torch.cat(halves), own.tensor(name))
