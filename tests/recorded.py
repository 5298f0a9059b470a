"""Recordings of the original (``shared/golden``), and how far this package is from them: the tests and
``benchmarks/fidelity.py`` both take their numbers from here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import openglm
from openglm.config import ModelConfig
from openglm.inference.beam import beam_search
from openglm.inference.cache import ColumnPool, Place, PoolView, Run
from openglm.inference.glm import GLM
from openglm.inference.sampling import SamplingSettings, filter_logits
from openglm.infilling import Prompt, blank_prompt, encode_text, generation_prompt

MODELS = ("a", "b")
TABLES = ("float16", "float32")


@dataclass(frozen=True)
class Difference:
    """The largest difference found; for counts of things that must be equal, the number that was not."""

    what: str
    cases: int
    largest: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.cases > 0 and self.largest <= self.limit


class Recorded:
    """The golden folder, read once."""

    def __init__(self, shared: Path) -> None:
        self.folder = Path(shared) / "golden"
        self.cases = json.loads((self.folder / "model/cases.json").read_text())
        self._glms: dict[tuple[str, str, str], GLM] = {}

    def glm(self, model: str, table: str, dtype: str = "float32") -> GLM:
        """One of the two recorded models."""
        if (model, table, dtype) not in self._glms:
            config = ModelConfig.from_dict({**self.cases[model]["config"], "rotary_dtype": table})
            tensors = load_file(self.folder / f"model/{model}.weights.safetensors")
            self._glms[model, table, dtype] = GLM.from_state(config, tensors, dtype)
        return self._glms[model, table, dtype]

    def tensors(self, model: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"model/{model}.cases.safetensors")

    def generation(self, name: str) -> list[dict]:
        return json.loads((self.folder / f"generation/{name}.json").read_text())


def _largest(pairs: Iterator[float]) -> tuple[int, float]:
    values = list(pairs)
    return len(values), max(values, default=0.0)


@torch.inference_mode()
def network_differences(recorded: Recorded, model: str, table: str) -> list[Difference]:
    """Logits (relative to the largest logit) and the output of every layer, over all cases of a model."""
    glm, tensors = recorded.glm(model, table), recorded.tensors(model)
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[2])) for layer in glm.network.layers.values()]
    logits, layers = [], []
    for case in recorded.cases[model]["cases"]:
        outputs.clear()
        seen = ~tensors[f"{case}/attention_mask_true_is_hidden"]
        ids = tensors[f"{case}/input_ids"].long()
        valid = tensors.get(f"{case}/valid", torch.ones_like(ids, dtype=torch.bool))
        found = glm.network(ids, tensors[f"{case}/position_ids"].long(), seen)
        expected = tensors[f"{case}/{table}/logits"][valid]
        logits.append(float((found[valid] - expected).abs().max() / expected.abs().max()))
        expected_layers = tensors[f"{case}/{table}/layers"]
        layers.append(max(float((x - y)[valid].abs().max()) for x, y in zip(outputs, expected_layers, strict=True)))
    for hook in hooks:
        hook.remove()
    name = f"model {model}, {table} tables"
    return [
        Difference(f"logits, {name} (relative)", len(logits), max(logits), 1e-5),
        Difference(f"layer outputs, {name}", len(layers), max(layers), 1e-4),
    ]


@torch.inference_mode()
def half_difference(recorded: Recorded, model: str) -> Difference:
    """The whole network in float16 against the original in float16."""
    glm, tensors = recorded.glm(model, "float16", "float16"), recorded.tensors(model)

    def differences() -> Iterator[float]:
        for name, expected in tensors.items():
            if name.endswith("/half/logits"):
                case = name.split("/")[0]
                seen = ~tensors[f"{case}/attention_mask_true_is_hidden"]
                found = glm.network(tensors[f"{case}/input_ids"].long(), tensors[f"{case}/position_ids"].long(), seen)
                assert found.dtype == torch.float16
                yield float((found.float() - expected.float()).abs().max())

    return Difference(f"logits in float16, model {model}", *_largest(differences()), 0.15)


@torch.inference_mode()
def cache_differences(recorded: Recorded, model: str, table: str) -> list[Difference]:
    """Token by token over the cache: the logits against the recorded ones, and against one piece; the cache itself."""
    glm, tensors = recorded.glm(model, table), recorded.tensors(model)
    steps, pieces, caches = [], [], []
    for name, expected in tensors.items():
        if not name.endswith(f"{table}/incremental_logits"):
            continue
        case = name.split("/")[0]
        context = recorded.cases[model]["cases"][case]["context_length"]
        ids, positions = tensors[f"{case}/input_ids"].long(), tensors[f"{case}/position_ids"].long()
        seen = ~tensors[f"{case}/attention_mask_true_is_hidden"]
        length = ids.shape[1]
        cache = ColumnPool(glm.config, length, dtype=torch.float32)
        found = []
        for start, end in [(0, context), *((i, i + 1) for i in range(context, length))]:
            part = slice(start, end)
            place = Place(Run(0, context), Run(context, length - context), context, start)
            view = PoolView(cache, [place], [end - start])
            logits = glm.network(ids[:, part], positions[:, part], seen[:, :, part, :end], cache=view)
            found.append(logits[:, -1])
        whole = tensors[f"{case}/{table}/logits"]
        incremental = torch.stack(found, dim=1)
        steps.append(float((incremental - expected).abs().max() / whole.abs().max()))
        piece = glm.network(ids, positions, seen)[:, context - 1 :]
        pieces.append(float((incremental - piece).abs().max() / whole.abs().max()))
        memory = tensors.get(f"{case}/{table}/cache")
        if memory is not None:
            own = torch.cat([part[:, None].transpose(2, 3).flatten(3) for part in (cache.keys, cache.values)], dim=-1)
            caches.append(float((own - memory).abs().max()))
    name = f"model {model}, {table} tables"
    rows = [
        Difference(f"logits token by token, {name} (relative)", len(steps), max(steps), 1e-5),
        Difference(f"token by token against one piece, {name} (relative)", len(pieces), max(pieces), 1e-5),
    ]
    return rows + ([Difference(f"cache, {name}", len(caches), max(caches), 1e-4)] if caches else [])


class PlainIds:
    """The tokenizer of the recordings: text is ids, separated by blanks."""

    def __init__(self, special_tokens: dict[str, int]) -> None:
        self.special_tokens = special_tokens

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def _runs(recorded: Recorded, name: str, table: str) -> Iterator[tuple[dict, dict, GLM]]:
    """Cases with the result that holds under a table: one is recorded where both are the same."""
    for case in recorded.generation(name):
        yield case, case.get(table, case["float16"]), recorded.glm(case["model"], table)


def greedy_difference(recorded: Recorded, table: str) -> Difference:
    """Answers of ``fill_ids`` that are not the recorded ones, id for id."""

    def wrong() -> Iterator[float]:
        for case, expected, glm in _runs(recorded, "greedy", table):
            ids = encode_text(case["text"], PlainIds(glm.config.special_tokens))  # pyright: ignore[reportArgumentType]
            yield float(glm.fill_ids(ids, max_length=case["out_seq_length"]) != expected["blanks"])

    cases = list(wrong())
    return Difference(f"greedy answers, {table} tables (wrong)", len(cases), sum(cases), 0)


def beam_differences(recorded: Recorded, table: str) -> list[Difference]:
    """Answers of ``fill_ids`` by beam search, id for id; each round's sequences, scores and way of ending."""
    answers, rounds, scores, live = [], [], [], []
    for case, expected, glm in _runs(recorded, "beam", table):
        special, strategy = glm.config.special_tokens, case["strategy"]
        options = {
            "num_beams": strategy["num_beams"],
            "length_penalty": strategy["length_penalty"],
            "no_repeat_ngram_size": strategy["no_repeat_ngram_size"],
            "min_tokens": strategy["min_gen_length"],
            "consider_end": strategy["consider_end"],
        }
        ids = encode_text(case["text"], PlainIds(special))  # pyright: ignore[reportArgumentType]
        found = glm.fill_ids(ids, search="beam", max_length=case["out_seq_length"], **options)
        answers.append(float(found != expected["blanks"]))
        for step in expected["steps"]:
            prompt = blank_prompt(step["input_ids"][:-1], step["mask_position"], special)
            result = beam_search(
                glm.engine, [prompt], ends=[special["eop"], special["eos"]], rooms=[step["new_tokens_at_most"]], **options
            )[0]
            sequences = [[*step["input_ids"], *answer.tokens] for answer in result.answers]
            outputs = [[token for token in output if token != -1] for output in step["output"]]
            same = (sequences, result.steps, result.ended_early) == (outputs, step["steps"], step["ended_early"])
            rounds.append(float(not same))
            if table in case:  # scores of the other table differ
                scores += [abs(a.score - b) for a, b in zip(result.answers, step["scores"] or [], strict=False)]
                for ours, theirs in zip(result.live_scores, step["live_scores"], strict=True):
                    live += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return [
        Difference(f"beam answers, {table} tables (wrong)", len(answers), sum(answers), 0),
        Difference(f"beam sequences of each round, {table} tables (wrong)", len(rounds), sum(rounds), 0),
        Difference(f"beam scores, {table} tables", len(scores), max(scores), 1e-4),
        Difference(f"raw scores after every step (sums of up to 30), {table} tables", len(live), max(live), 2e-4),
    ]


def batch_difference(recorded: Recorded, table: str) -> Difference:
    """The evaluation's batches: different prompts side by side, padded on the right."""

    def wrong() -> Iterator[float]:
        for case, expected, glm in _runs(recorded, "batch", table):
            special, strategy = glm.config.special_tokens, case["strategy"]
            ends = [special["eop"], special["eos"]]
            prompts: list[Prompt] = [
                generation_prompt(
                    sample["text_ids"],
                    special,
                    kind="[gMASK]" if sample["kind"] in ("gmask", "uni") else "[MASK]",
                    unidirectional=sample["kind"] == "uni",
                )
                for sample in case["samples"]
            ]
            rooms = [case["max_gen_length"]] * len(prompts)
            if strategy["kind"] == "greedy":
                found: list = [[] for _ in prompts]
                for token in glm.engine.generate(prompts, SamplingSettings(), ends=ends, rooms=rooms):
                    if not token.ends:
                        found[token.row].append(token.id)
            else:
                results = beam_search(
                    glm.engine,
                    prompts,
                    ends=ends,
                    rooms=rooms,
                    num_beams=strategy["num_beams"],
                    length_penalty=strategy["length_penalty"],
                    no_repeat_ngram_size=strategy["no_repeat_ngram_size"],
                    min_tokens=strategy["min_gen_length"],
                    consider_end=strategy["consider_end"],
                    multiple=32,
                    count_padding=True,
                )
                beams = [[list(answer.tokens) for answer in result.answers] for result in results]
                found = [[ids[:-1] if ids[-1] in ends else ids for ids in row] for row in beams]
            yield float(found != expected["outputs"])

    cases = list(wrong())
    return Difference(f"batched answers, {table} tables (wrong)", len(cases), sum(cases), 0)


def filter_differences(recorded: Recorded) -> list[Difference]:
    """Temperature, forbidden ids, top-k and top-p in float32: which ids stay, and with what probability."""
    tensors = load_file(recorded.folder / "generation/filters.safetensors")
    kept, probabilities = [], []
    for case in recorded.generation("filters"):
        logits = tensors[f"logits/{case['logits']}"].float()
        forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool)
        forbidden[case["invalid_ids"]] = True
        found = filter_logits(
            logits, temperature=case["temperature"], forbidden=forbidden, top_k=case["top_k"], top_p=case["top_p"]
        ).softmax(-1)
        expected = tensors[f"{case['id']}/float32"]
        found = found.view_as(expected)
        if case["logits"] in ("ties", "flat") and case["top_p"]:
            # Which of several equal logits stays is the sort's business: compare how many, and how much.
            found, expected = found.sort(-1).values, expected.sort(-1).values
        kept.append(float(not torch.equal(found > 0, expected > 0)))
        probabilities.append(float((found - expected).abs().max()))
    return [
        Difference("filters: ids kept (wrong)", len(kept), sum(kept), 0),
        Difference("filters: probabilities", len(probabilities), max(probabilities), 1e-6),
    ]


@torch.inference_mode()
def checkpoint_difference(recorded: Recorded, folder: str, table: str) -> Difference:
    """A recorded checkpoint, loaded from its files."""
    tensors = load_file(recorded.folder / "checkpoint/logits.safetensors")
    glm = openglm.load(recorded.folder / "checkpoint" / folder, dtype="float32", device="cpu", rotary_dtype=table)
    seen = ~tensors["attention_mask_true_is_hidden"]
    found = glm.network(tensors["input_ids"].long(), tensors["position_ids"].long(), seen)
    expected = tensors[f"{folder}/{table}/logits"]
    largest = float((found - expected).abs().max() / expected.abs().max())
    return Difference(f"checkpoint {folder}, {table} tables (relative)", 1, largest, 1e-5)


def all_differences(shared: Path) -> Iterator[Difference]:
    """Every comparison, in the order of docs/fidelity.md."""
    recorded = Recorded(shared)
    for table in TABLES:
        for model in MODELS:
            yield from network_differences(recorded, model, table)
    for table in TABLES:
        for model in MODELS:
            yield from cache_differences(recorded, model, table)
    for model in MODELS:
        yield half_difference(recorded, model)
    for folder in ("tp1", "tp4", "tp8"):
        for table in TABLES:
            yield checkpoint_difference(recorded, folder, table)
    for table in TABLES:
        yield greedy_difference(recorded, table)
        yield from beam_differences(recorded, table)
        yield batch_difference(recorded, table)
    yield from filter_differences(recorded)
