"""The house itself: floors that hold, a light import, presets, errors, and no traces of any one machine."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import openglm
from openglm import errors
from openglm.config import PRESETS, ModelConfig
from openglm.errors import ConfigError, OpenGLMError

PACKAGE = Path(openglm.__file__).parent
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

#: A room imports only from rooms on lower floors, or from itself (docs/architecture.md).
FLOORS = {
    "errors": 0,
    "version": 0,
    "bundled": 1,
    "config": 1,
    "storage": 1,
    "tokenizers": 2,
    "models": 2,
    "kernels": 2,
    "planning": 2,
    "infilling": 3,
    "quantization": 3,
    "adapters": 3,
    "parallel": 4,
    "checkpoints": 5,
    "inference": 6,
    "data": 6,
    "training": 7,
    "evaluation": 8,
    "serving": 8,
    "tuning": 9,
    "cli": 10,
    "__main__": 11,
}
#: Two wings that never meet, whatever their floors.
APART = [("training", "inference"), ("inference", "data"), ("training", "serving")]


def imports_of(path: Path) -> set[str]:
    """Rooms of openglm that a file imports, at any depth of the file."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "openglm":
                rooms |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("openglm."):
                rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("openglm.")}
    return rooms & FLOORS.keys()


FILES = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_imports_only_from_floors_below(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOORS, f"{room} has no floor: give it one in docs/architecture.md and here"
    for other in imports_of(path) - {room}:
        assert FLOORS[other] < FLOORS[room], f"{path.name} ({room}) must not import {other}"
        assert (room, other) not in APART and (other, room) not in APART, f"{room} and {other} are apart"


def test_rooms_have_names_and_files_are_short():
    for path in FILES:
        assert path.stem not in ("utils", "common", "misc", "helpers")
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def test_importing_openglm_imports_no_torch():
    code = "import sys, openglm, openglm.config, openglm.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_face_is_complete():
    for name in openglm.__all__:
        assert getattr(openglm, name) is not None
    assert {"load", "load_tokenizer", "GLM", "ModelConfig"} <= set(openglm.__all__)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = openglm.no_such_thing


def test_130b_is_the_released_model():
    config = ModelConfig.preset("130b")
    assert config.parameter_count == 128_697_794_560
    assert config.head_size == 128
    assert config.deepnorm_alpha == 11.832159566199232
    # SPEC 9.1.2: forward FLOPs of a token at 2,048, three times that in training.
    matrices = 70 * (4 * 12288**2 + 3 * 12288 * 32768)
    assert config.flops_per_token() == 2 * matrices + 4 * 2048 * 12288 * 70 + 2 * 12288 * 150528
    assert config.flops_per_token(training=True) == 3 * config.flops_per_token()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound(name):
    config = ModelConfig.preset(name)
    assert config.hidden_size % 128 == 0 and config.inner_hidden_size % 128 == 0
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"rotary_dtype": "float64"}, "rotary_dtype"),
        ({"special_tokens": {}}, "special_tokens"),
        ({"vocab_size": 5}, "outside the vocabulary of 5"),
        ({"learned_masks": ["[XMASK]"]}, "learned_masks"),
        ({"hiden_size": 5}, "did you mean `hidden_size`"),
    ],
)
def test_impossible_configurations_name_the_field(changes, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        ModelConfig.preset("nano", **changes)


def test_unknown_presets_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean `130b`"):
        ModelConfig.preset("130B")


def test_every_error_is_documented_and_exits_with_2():
    for name in dir(errors):
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, OpenGLMError):
            assert kind.exit_code == 2 and kind.__doc__ and name in (errors.__doc__ or "")
    error = OpenGLMError("x is wrong", hint="do y", path="f", key="k")
    assert str(error) == "x is wrong; do y" and error.path == Path("f") and error.key == "k"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.stem)
def test_every_result_says_when_how_and_where_it_was_measured(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.name.startswith(result["date"]) and result["machine"]
    commands = result["command"] if isinstance(result["command"], list) else [result["command"]]
    for command in commands:
        program, *words = shlex.split(command)
        if program == "python":
            assert (BENCHMARKS.parent / words[0]).is_file()
            own = (BENCHMARKS.parent / words[0]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in own for word in words if word.startswith("--"))
        else:
            assert program == "glm"
