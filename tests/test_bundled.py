"""The model that ships inside the package, and the documents that speak of it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import command_line
import pytest

import openglm
from openglm.bundled import bundled_models, find_model
from openglm.checkpoints import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh.md")


@pytest.fixture(scope="module")
def nano():
    return openglm.load("nano")


def test_it_ships_whole_and_small():
    assert "nano" in bundled_models()
    folder = find_model("nano")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 42_000_000
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    assert checkpoint.config.learned_masks == ("[MASK]", "[gMASK]")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "bits per byte" in card and "Licence" in card


@pytest.mark.parametrize("text", ["The capital of France is [MASK].", "今天天气很好，我们去[MASK]散步。", "[MASK]是[MASK]。"])
def test_blanks_are_filled_in_both_languages(nano, text):
    result = nano.fill(text)
    pieces = text.split("[MASK]")
    assert result.text.startswith(pieces[0]) and result.text.endswith(pieces[-1])
    assert len(result.spans) == len(pieces) - 1
    for span in result.spans:
        assert result.text[span.start : span.end] == span.text
        assert span.finish_reason in ("end", "length") and all(value <= 0 for value in span.log_probabilities)


def test_it_knows_more_than_chance(nano):
    # Choices of one word each; a model that has learned its languages prefers what fits.
    pairs = [
        ("Once upon a [MASK], there was a king.", "time", "stone"),
        ("He shook his [MASK] and said nothing.", "head", "river"),
        ("They went out of the [MASK] and closed the door.", "room", "word"),
        ("[MASK] said that he was tired.", "He", "Of"),
        ("I do not [MASK] what you mean.", "know", "table"),
        ("今天天气很好，[MASK]去公园散步。", "我们", "但是"),
        ("这是[MASK]？", "什么", "然后"),
        ("好[MASK]，再见。", "的", "被"),
    ]
    right = sum(nano.score(text, [good, bad]).best == 0 for text, good, bad in pairs)
    assert right >= 7


def test_it_streams_and_repeats_itself_with_a_seed(nano):
    first, second = ("".join(nano.stream("从前有一个", temperature=0.9, seed=5, max_tokens=24)) for _ in range(2))
    assert first == second and first
    assert first != "".join(nano.stream("从前有一个", temperature=0.9, seed=6, max_tokens=24))


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)


def test_the_readmes_stay_in_step():
    english, chinese = (blocks(name, "bash") for name in READMES)
    strip = [[re.sub(r"\s+#.*", "", block) for block in found] for found in (english, chinese)]
    assert strip[0] == strip[1]
    assert blocks(READMES[0], "console") == blocks(READMES[1], "console")


def test_readme_python_runs_as_printed(capsys):
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})


def test_readme_examples_still_print_such_answers():
    """Every command of a console block runs; what it prints keeps the words that the user typed."""
    ran = 0
    for block in blocks("README.md", "console"):
        for line in block.splitlines():
            if not line.startswith("$ glm "):
                continue
            words = shlex.split(line[2:])
            if ran:  # the first as a person runs it, the others without the start of a process
                said = command_line.run(*words[1:]).stdout
            else:
                done = subprocess.run(
                    [sys.executable, "-m", "openglm", *words[1:]], capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, (line, done.stderr)
                said = done.stdout
            if "--json" in words:
                json.loads(said)
            else:
                assert re.split(r"\[g?MASK\]", words[2])[0] in said
            ran += 1
    assert ran >= 5


def test_documents_name_no_path_of_any_machine():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/**/*")]:
        if path.is_file() and path.suffix in (".md", ".py", ".json", ".toml"):
            assert not re.search(r"(?<!\w)/(?:root|home/\w+|work)/", path.read_text(encoding="utf-8")), path


def test_links_between_documents_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/openglm/assets/*/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
