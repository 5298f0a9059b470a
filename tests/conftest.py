"""Where golden data is found, and small models made by the tests themselves."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import TEXT
from processes import Workers

from openglm import bundled
from openglm.checkpoints import save_checkpoint
from openglm.config import ModelConfig
from openglm.models.glm130b import GLM130B
from openglm.tokenizers.unigram import UnigramTokenizer, train_unigram

ROOT = Path(__file__).resolve().parent.parent
if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which parts of torch do as well: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # the models here are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden and evaluation data: ``OPENGLM_SHARED``, else ``../shared`` beside the repository."""
    folder = Path(os.environ.get("OPENGLM_SHARED") or ROOT.parent / "shared")
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden data at {folder} (set OPENGLM_SHARED)")
    return folder


def _sentences(language: str, count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    if language == "en":
        who = ["the cat", "a child", "my old friend", "the teacher", "Anna", "the king", "nobody", "a small bird"]
        does = ["sat on", "looked at", "walked past", "wrote about", "dreamed of", "painted", "forgot", "carried"]
        what = ["the mat", "a river", "the garden", "an empty house", "the letter", "his hat", "the mountain", "1984 stars"]
        ends = [".", "!", " again.", ", and then it rained.", " in the morning.", "?"]
    else:
        who = ["小猫", "孩子们", "我的老朋友", "老师", "国王", "没有人", "一只小鸟", "农夫"]
        does = ["坐在", "看着", "走过", "写到", "梦见", "画了", "忘记了", "带走了"]
        what = ["垫子", "一条河", "花园", "空房子", "那封信", "他的帽子", "高山", "一千颗星星"]
        ends = ["。", "！", "，然后下雨了。", "，在早上。", "？", "，又一次。"]
    join = " " if language == "en" else ""
    return [join.join([rng.choice(who), rng.choice(does), rng.choice(what)]) + rng.choice(ends) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JSON lines: running text and instructions in two languages, and validation files."""
    folder = tmp_path_factory.mktemp("corpus")
    for language, seed in (("en", 1), ("zh", 2)):
        lines = _sentences(language, 1500, seed)
        join = " " if language == "en" else ""
        texts = [join.join(lines[k : k + 3 + k % 40]) for k in range(0, len(lines), 20)]
        for name, part in ((language, texts[5:]), (f"validation-{language}", texts[:5])):
            rows = [json.dumps({"id": str(k), "source": "made", "text": text}) for k, text in enumerate(part)]
            (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    chat = [
        {"prompt": f"{a} What next?", "answer": b}
        for a, b in zip(_sentences("en", 50, 3), _sentences("zh", 50, 4), strict=True)
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lossless unigram tokenizer of 600 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "unigram.model"
    texts = [" ".join(_sentences("en", 2000, 5)), "".join(_sentences("zh", 2000, 6))]
    train_unigram(texts, path, vocab_size=600, character_coverage=1.0, threads=1)
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> UnigramTokenizer:
    return train_unigram([TEXT * 20], tmp_path_factory.mktemp("tokenizer") / "unigram.model", vocab_size=320)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: UnigramTokenizer) -> Path:
    """A model folder with random weights; it knows [MASK] and [gMASK], and its context is 64."""
    special = {name: token for name, token in tiny_tokenizer.special_tokens.items() if name != "unk"}
    masks = ("[MASK]", "[gMASK]")
    config = ModelConfig(2, 64, 1, 128, tiny_tokenizer.vocab_size, 64, special_tokens=special, learned_masks=masks)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    network = GLM130B(config).initialize(7)
    save_checkpoint(folder, config, dict(network.named_parameters()), tokenizer=tiny_tokenizer, dtype="float16")
    return folder


@pytest.fixture
def surroundings(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, and the tiny model bundled under the name `nano`."""
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "nano").symlink_to(tiny)
    monkeypatch.setattr(bundled, "ASSETS", assets)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    yield


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Processes for everything that needs a process group (gloo)."""
    pool = Workers()
    yield pool
    pool.close()
