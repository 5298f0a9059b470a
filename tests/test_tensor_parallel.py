"""Inference on several processes against one: logits, texts, draws, beams, what each reads and holds; and the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import processes, run
from test_released import CONFIG as RELEASED
from test_released import quantized_shards, random_tensors

import openglm
from openglm.checkpoints import (
    convert_source,
    empty_network,
    load_into,
    load_network,
    open_model,
    save_checkpoint,
    save_released,
)
from openglm.checkpoints.rank import RankSource
from openglm.config import ModelConfig, QuantizationScheme
from openglm.errors import ConfigError, OpenGLMError
from openglm.inference.speculation import LookupDrafter
from openglm.models.glm130b import GLM130B
from openglm.parallel.cut import TensorCut
from openglm.parallel.group import TensorGroup
from openglm.parallel.inference import RankNetwork, cut_network
from openglm.planning.inference import Use, estimate

#: Heads of 24: two or four ranks cut groups of 32 columns in two; an odd vocabulary; nine groups of inner columns.
SHAPE = ModelConfig(
    num_layers=2, hidden_size=96, num_attention_heads=4, inner_hidden_size=288, vocab_size=20, max_sequence_length=64
)
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
    config = dataclasses.replace(SHAPE, vocab_size=tiny_tokenizer.vocab_size + 1, special_tokens=special)
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
    network = cut_network(
        empty_network(source.config), TensorGroup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    )
    return load_into(network, RankSource(source, network.cut), dtype).eval().requires_grad_(False)


def held(network: torch.nn.Module) -> dict[str, int]:
    """Bytes of matrices, of scales, of the embedding, and of the rest."""
    sizes: dict[str, int] = {"layers": 0, "scales": 0, "embedding and head": 0, "biases and norms": 0}
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
    assert all(sizes["layers"] <= total["layers"] * (1 / ranks + 0.06) for _, sizes, _ in results)


def test_half_precision_is_as_near_as_one_process_is(workers, models) -> None:
    exact = load_network(open_model(models["plain"]), "float32")
    expected = exact(*inputs(exact.config)).detach()
    for dtype, limit in (("float16", 4e-3), ("bfloat16", 3e-2)):
        for found, _, same in workers.run(2, logits_of, models["plain"], dtype):
            assert same and found.dtype == getattr(torch, dtype)
            assert (found.float() - expected).abs().max() <= limit * expected.abs().max()


def answers(folder: Path, parallel: bool) -> tuple[list, list[float]]:
    """Everything that a user may ask for."""
    glm = openglm.load(folder, device="cpu", tensor_parallel=parallel, tokenizer=folder.parent / "plain")
    assert isinstance(glm.network, RankNetwork) == parallel
    assert glm.engine.kernel is None or not parallel
    found = [
        *glm.fill_batch([TEXT, "[gMASK]", f"{TEXT} {TEXT}"], max_tokens=4, batch_size=2),
        glm.fill("the cat [MASK] a river.", num_beams=3, max_tokens=4, no_repeat_ngram_size=2),
        glm.fill("the cat [MASK] a river.", temperature=1.2, top_p=0.9, seed=11, max_tokens=6),
    ]
    values = [[list(part.token_ids) for part in result.spans] for result in found]
    score = glm.score("the [MASK] sat", ["cat", "king"]).choices
    glm.engine.set_cache_dtype("int8")
    glm.engine.drafter = LookupDrafter()
    values.append([list(glm.generate("a child a child a child", max_tokens=6).token_ids)])
    return values, [choice.log_probability for choice in score]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4 groups"])
def test_texts_draws_and_beams_equal_one_process(workers, models, kind: str, ranks: int) -> None:
    """Quantized models through the compiled kernels where there are any, matrix by matrix."""
    texts, scores = answers(models[kind], False)
    for found, likely in workers.run(ranks, answers, models[kind], True):
        assert found == texts
        # The kernels round activations to 16 bits by the largest of some columns, and a rank has other columns.
        assert likely == pytest.approx(scores, rel=1e-6 if kind == "plain" else 5e-5)


def without_a_seed(folder: Path) -> list:
    glm = openglm.load(folder, tensor_parallel=True, device="cpu")
    return [glm.generate("the king", temperature=2.0, max_tokens=8).token_ids for _ in range(3)]


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


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not tell how much was read")
def test_a_rank_reads_its_part_only(models) -> None:
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    source = open_model(models["plain"])
    before = bytes_read()
    source.rows("layers.0.attention.dense.bias", 0, 1)  # the header
    header = bytes_read() - before
    part = RankSource(source, TensorCut(source.config, 1, 4))
    before = bytes_read()
    held = sum(part.tensor(name).nbytes for name in part.names())
    assert bytes_read() - before <= held + header
    assert held < sum(source.tensor(name).nbytes for name in source.names()) / 3


@pytest.mark.parametrize(
    "scheme", [None, QuantizationScheme(4), QuantizationScheme(4, 128), QuantizationScheme(4, ranks=8)], ids=str
)
def test_any_divisor_of_the_heads_cuts_130b(scheme: QuantizationScheme | None) -> None:
    """Three ranks, too, which divide neither the inner columns nor their groups."""
    config = dataclasses.replace(ModelConfig.preset("130b"), quantization=scheme)
    for ranks in (n for n in range(1, 97) if 96 % n == 0):
        cuts = [TensorCut(config, rank, ranks) for rank in range(ranks)]
        for shares, width in (
            ([cut.hidden for cut in cuts], 12288),
            ([cut.inner for cut in cuts], 32768),
            ([cut.vocabulary for cut in cuts], 150528),
        ):
            assert [index for share in shares for index in (share.start, share.stop)][1:-1:2] == [s.start for s in shares[1:]]
            assert (shares[0].start, shares[-1].stop) == (0, width)
            assert max(map(len, shares)) - min(map(len, shares)) <= 128
            assert all(share.start % 2 == 0 for share in shares)  # two codes of 4 bits a byte
        assert len({cut.heads for cut in cuts}) == 1 and cuts[0].heads * ranks == 96
    with pytest.raises(
        ConfigError, match="the 96 heads of this model cannot be divided over 5 processes; possible: 1, 2, 3, 4, 6"
    ):
        TensorCut(config, 0, 5)


def failing_load(folders: list[str], devices: list[str]) -> str:
    rank = dist.get_rank()
    try:
        openglm.load(folders[rank], device=devices[rank], tensor_parallel=True)
    except OpenGLMError as error:
        return str(error)
    return "loaded"


def test_what_fails_on_one_rank_is_told_by_all(workers, models, tmp_path) -> None:
    """Instead of leaving the others waiting for ever."""
    (tmp_path / "empty").mkdir()
    folders = [str(models["plain"]), str(tmp_path / "empty")]
    said = workers.run(2, failing_load, folders, ["cpu", "cpu"])
    assert said[0] == said[1] and "empty" in said[0]
    for device in ("cuda:1", "tpu"):
        said = workers.run(2, failing_load, folders[:1] * 2, [device] * 2)
        assert (
            said
            == [
                f"several processes run on `cpu` or `cuda`, not on `{device}`; with `cuda` each takes the GPU of its own number"
            ]
            * 2
        )


def test_one_process_speaks(models, tmp_path) -> None:
    """It alone reads what comes through a pipe, and writes the output, of which the others know what is done."""
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    texts = ["the cat [MASK].", "a child [MASK] a river.", "nobody [MASK]"]
    command = ("fill", "-m", models["int8"], "--max-tokens", "3", "--temperature", "1.5", "--output", "out.jsonl")
    (tmp_path / "begun").write_text("\n".join(texts[:2]))
    run(*command[:-1], places[0] / "out.jsonl", "--input", tmp_path / "begun")  # by one process
    first, second = processes(2, *command, stdin="\n".join(texts), folders=places)
    assert first[:2] == (0, "") and second == (0, "", "")
    assert "2 of 3 texts are answered already" in first[2] and "3 texts answered" in first[2]
    assert len((places[0] / "out.jsonl").read_text().splitlines()) == 3 and not list(places[1].iterdir())


def test_a_text_is_answered_once(models, tmp_path) -> None:
    expected = openglm.load(models["plain"]).fill(TEXT, max_tokens=3).text
    found = processes(2, "fill", TEXT, "-m", models["plain"], "--max-tokens", "3", folders=[tmp_path])
    assert found == [(0, expected + "\n", ""), (0, "", "")]


def test_heads_that_cannot_be_divided_are_one_sentence(models, tmp_path) -> None:
    first, *others = processes(3, "fill", TEXT, "-m", models["plain"], folders=[tmp_path])
    sentence = "error: the 4 heads of this model cannot be divided over 3 processes\n\nhint: possible: 1, 2, 4\n"
    assert first == (2, "", sentence) and others == [(2, "", "")] * 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to write to")
def test_a_process_that_ends_takes_the_others_along(models, tmp_path) -> None:
    options = ("--max-tokens", "3", "--batch-size", "1", "--output", "/dev/full")
    first, second = processes(2, "fill", "-m", models["plain"], *options, stdin="one\ntwo\nthree", folders=[tmp_path])
    assert first[0] == 2 and first[1] == "" and "error: cannot write `/dev/full`: the disk is full" in first[2]
    assert second == (2, "", "")
