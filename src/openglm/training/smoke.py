"""Any recipe's code path at a tiny size: a minute on a laptop says whether a recipe for a cluster runs at all."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

from openglm.config import OWN_SPECIAL_TOKENS
from openglm.data.schedule import Schedule
from openglm.data.shards import INDEX, write_shards
from openglm.storage import atomic_write
from openglm.tokenizers.unigram import train_unigram
from openglm.training.recipe import Recipe

STEPS = 8
_WORDS = {
    "en": ["the", "a", "small", "old", "red", "river", "house", "garden", "king", "child", "walked", "wrote", "saw", "and"],
    "zh": list("小老红山河家园王子信人看见走写了和的在天下雨夜里有一个很大声说"),
}


def smoke_recipe(recipe: Recipe, folder: Path, processes: int) -> Recipe:
    """The recipe with a tiny network, made-up text and ``STEPS`` steps; its schedules and policies pressed into them.

    ``processes``: on fewer than the recipe's layout needs, the layout is left out. Writes text and a tokenizer to
    ``folder``.
    """
    corpus, tokenizer = _made_up_text(folder)
    p = dataclasses.replace(recipe.parallel, data=0)
    if p.tensor * p.pipeline > processes:
        p = dataclasses.replace(p, tensor=1, pipeline=1)
    changes = {
        "num_layers": max(2, p.pipeline),
        "hidden_size": 16 * max(2, p.tensor),
        "num_attention_heads": max(2, p.tensor),
        "inner_hidden_size": 16 * max(2, p.tensor),
        "vocab_size": 384,
        "max_sequence_length": 128,
        "special_tokens": dict(OWN_SPECIAL_TOKENS),
    }
    batch = max(8, p.pipeline) * max(processes // (p.tensor * p.pipeline), 1)
    samples = STEPS * batch
    ratio = samples / recipe.run.samples
    o = recipe.optimizer
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, changes=changes, initial=""),
        data=dataclasses.replace(recipe.data, corpus=str(corpus), tokenizer=str(tokenizer), weights={}, skip=()),
        objectives=dataclasses.replace(
            recipe.objectives,
            window=64,
            long_window=128,
            instruction_share=_pressed(recipe.objectives.instruction_share, ratio),
        ),
        optimizer=dataclasses.replace(
            o,
            warmup_samples=max(round(o.warmup_samples * ratio), 1),
            decay_samples=round(o.decay_samples * ratio),
            rewarm=tuple((round(a * ratio), max(round(b * ratio), 1)) for a, b in o.rewarm),
            input_gradient_factor=_pressed(o.input_gradient_factor, ratio),
            output_gradient_factor=_pressed(o.output_gradient_factor, ratio),
            hidden_dropout=_pressed(o.hidden_dropout, ratio),
            attention_dropout=_pressed(o.attention_dropout, ratio),
        ),
        run=dataclasses.replace(
            recipe.run,
            samples=samples,
            batch_size=batch,
            batch_ramp=(batch // 2, batch // 4, 2 * batch) if recipe.run.batch_ramp else (),
            micro_tokens=128,
            device="cpu",
            threads=1,
            log_every=1,
            snapshot_every=4,
            validate_every=4,
            validation_windows=2,
        ),
        parallel=p,
    )


def _pressed(schedule: Schedule, ratio: float) -> Schedule:
    if not isinstance(schedule, tuple):
        return schedule
    # Samples stay apart, however near they come.
    return tuple((sample * ratio + number * 1e-6, value) for number, (sample, value) in enumerate(schedule))


def _made_up_text(folder: Path) -> tuple[Path, Path]:
    corpus, tokenizer, shards = folder / "text", folder / "unigram.model", folder / "tokens"
    if (shards / INDEX).is_file():
        return shards, tokenizer
    rng = random.Random(0)

    def sentence(language: str) -> str:
        words = [rng.choice(_WORDS[language]) for _ in range(rng.randint(5, 12))]
        return (" ".join(words) + ". ") if language == "en" else "".join(words) + "。"

    texts = {language: ["".join(sentence(language) for _ in range(12)) for _ in range(120)] for language in _WORDS}
    corpus.mkdir(parents=True, exist_ok=True)
    for language, found in texts.items():
        for name, part in ((language, found[10:]), (f"validation-{language}", found[:10])):
            with atomic_write(corpus / f"{name}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text, "lang": language}, ensure_ascii=False) + "\n" for text in part)
    with atomic_write(corpus / "chat.jsonl", "w", encoding="utf-8") as file:
        for _ in range(60):
            file.write(
                json.dumps({"prompt": sentence("en"), "answer": sentence("zh"), "lang": "en"}, ensure_ascii=False) + "\n"
            )
    train_unigram([text for found in texts.values() for text in found], tokenizer, vocab_size=340, threads=1)
    write_shards([corpus], shards, tokenizer, workers=1)
    return shards, tokenizer
