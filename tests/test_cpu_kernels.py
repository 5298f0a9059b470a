"""The compiled CPU kernels beside their twins: integer sums exactly, products and whole networks within rounding."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import openglm
from openglm.checkpoints import open_model
from openglm.checkpoints.loading import convert_source
from openglm.config import ModelConfig
from openglm.config import QuantizationScheme as Scheme
from openglm.errors import InputError
from openglm.inference.cache import ColumnPool, Place
from openglm.inference.engine import Engine
from openglm.infilling import blank_prompt, generation_prompt
from openglm.kernels.cpu import build as builder
from openglm.kernels.cpu.library import VARIANT, library, variants, why_not
from openglm.kernels.cpu.network import Pass
from openglm.kernels.cpu.panels import PanelMatrix, integer_sums, product, quantize_activations
from openglm.models.glm130b import GLM130B
from openglm.quantization.functional import Quantized, quantize_matrix
from openglm.quantization.layers import quantize, use_panels

needs_kernels = pytest.mark.skipif(not variants(), reason="the CPU kernels are not compiled")
SCHEMES = [Scheme(bits, group) for bits in (8, 4) for group in (None, 32, 64, 128)] + [Scheme(8, ranks=2), Scheme(4, ranks=2)]
CONFIG = ModelConfig(num_layers=3, hidden_size=128, num_attention_heads=2, inner_hidden_size=160, vocab_size=75)


def packed(found: Quantized, scheme: Scheme, bias: Tensor | None = None, halves: int = 1) -> PanelMatrix:
    rows, columns = found.codes.shape
    group = columns // found.scales.shape[1] if found.scales.shape[1] > 1 else None
    matrix = PanelMatrix(rows, columns, scheme.bits, group, bias, halves)
    for first in range(0, rows, rows // halves):
        part = slice(first, first + rows // halves)
        matrix.pack(first, found.codes[part], found.scales[part])
    return matrix


def exact_weights(found: Quantized) -> Tensor:
    """float64, not rounded to float16 as the original's are."""
    return (found.codes.double().unflatten(1, (found.scales.shape[1], -1)) * found.scales.double().unsqueeze(-1)).flatten(1)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@needs_kernels
@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_are_the_twins(monkeypatch, variant: str, scheme: Scheme) -> None:
    monkeypatch.setenv(VARIANT, variant)
    generator = torch.Generator().manual_seed(scheme.bits + (scheme.group or 0))
    shapes = [
        (96, 384, 1),
        (100, 256, 2),
        (33, 128, 1),
        *([(70, 100, 1)] if scheme.group is None and scheme.ranks == 1 else []),
    ]
    for rows, columns, halves in shapes:  # whole panels, panels that end in each half, columns that fill no block
        found = quantize_matrix(torch.randn(rows, columns, generator=generator), scheme)
        bias = torch.randn(rows, generator=generator)
        matrix = packed(found, scheme, bias, halves)
        x = torch.randn(6, columns, generator=generator)
        x[0, 3], x[1], x[2, :32] = 60.0, 0.0, -1e-20  # an outlier, zeros, and next to nothing
        chunk, padding = matrix.structure.chunk, (0, matrix.structure.columns - columns)
        codes, wide = torch.nn.functional.pad(found.codes, padding), torch.nn.functional.pad(x, padding)
        for row in range(3):
            values, scales = quantize_activations(wide[row], chunk)
            assert values.abs().max() <= 32512
            sums, own = matrix.integer_sums(x[row])
            assert torch.equal(sums.long(), integer_sums(codes, values, chunk)) and torch.equal(own, scales)
        wanted = product(codes, found.scales, wide, chunk) + bias
        assert relative(matrix.linear(x), wanted) < 2e-7
        assert relative(wanted, x.double() @ exact_weights(found).T + bias) < 1e-4
        assert torch.equal(matrix.linear(x[1]), bias)
        assert matrix.linear(x.half()).dtype == torch.float16
        x[4, 7] = float("nan")
        x[5, 7] = float("inf")
        broken = matrix.linear(x)
        assert broken[4:].isnan().all() and broken[:4].isfinite().all()


@needs_kernels
def test_rows_come_back_from_panels() -> None:
    for scheme in SCHEMES:
        found = quantize_matrix(torch.randn(75, 128, generator=torch.Generator().manual_seed(1)), scheme)
        rows = torch.tensor([0, 74, 33, 33, 5])
        assert torch.equal(packed(found, scheme).unpack_rows(rows).double(), exact_weights(found)[rows])
    with pytest.raises(ValueError, match="rows 0 to 40 are no whole panels"):
        PanelMatrix(75, 128, 8, None).pack(0, torch.zeros(40, 128, dtype=torch.int8), torch.zeros(40, 1, dtype=torch.float16))


def network_of(scheme: Scheme, config: ModelConfig = CONFIG) -> tuple[GLM130B, GLM130B]:
    """A quantized network for the kernels, and a plain one in float64 with the very same weights."""
    network = GLM130B(config).initialize(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    plain = GLM130B(config).double()
    plain.load_state_dict(network.state_dict())
    quantize(network, scheme)
    with torch.no_grad():
        for name, module in plain.named_modules():
            weight = getattr(network.get_submodule(name), "weight", None) if name else None
            if isinstance(weight, Quantized):
                module.weight.copy_(exact_weights(weight))
    return network.requires_grad_(False), plain.requires_grad_(False)


@needs_kernels
@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("scheme", [Scheme(8, 32), Scheme(4, 32, head_bits=8), Scheme(4), Scheme(8, head_bits=4)], ids=str)
def test_a_pass_is_the_networks_forward(monkeypatch, variant: str, scheme: Scheme) -> None:
    monkeypatch.setenv(VARIANT, variant)
    check_pass(scheme, CONFIG)


@needs_kernels
@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("heads", [16, 6, 1], ids=lambda heads: f"of {96 // heads}")
def test_heads_of_any_size(monkeypatch, variant: str, heads: int) -> None:
    monkeypatch.setenv(VARIANT, variant)
    check_pass(Scheme(8, 32), dataclasses.replace(CONFIG, hidden_size=96, num_attention_heads=heads))


def check_pass(scheme: Scheme, config: ModelConfig) -> None:
    """A prompt and steps of some sequences in the kernels and in float64."""
    network, plain = network_of(scheme, config)
    assert use_panels(network) == ""
    run = Pass(network)
    assert Pass.serves(network) and run.has_head == (scheme.head_bits is not None)
    generator = torch.Generator().manual_seed(0)
    for rows, threads, dtype in ((1, 1, torch.float32), (5, 2, torch.float32), (3, 3, torch.float16), (3, 1, torch.int8)):
        tokens = torch.randint(0, config.vocab_size, (rows, 22), generator=generator)
        positions = torch.arange(22) + torch.arange(rows)[:, None]
        mask = torch.ones(rows, 22, 22, dtype=torch.bool).tril()
        mask[:, :6, :6] = True  # part A
        mask[1:2, 8:16, 1:3] = False  # one row of a prompt sees less
        wanted = plain(tokens, positions, mask)
        pool = ColumnPool(config, 22 * rows + 5, dtype=dtype)
        hole = pool.take(5)
        runs = [(pool.take(16), pool.take(6)) for _ in range(rows)]
        pool.give_back(hole)
        run.threads = threads
        limit = {torch.float32: 1e-4, torch.float16: 2e-3, torch.int8: 4e-2}[dtype]

        def pass_of(start: int, end: int, picked=None):
            places = [Place(prompt, own, 16, start) for prompt, own in runs]  # noqa: B023
            part = (tokens[:, start:end], positions[:, start:end], pool, places, [end - start] * rows)  # noqa: B023
            found = run(*part, None if start else mask[:, :end, :end], picked)  # noqa: B023
            return found if run.has_head else network.vocabulary_product(found, network.word_embeddings.weight)

        # A prompt, three tokens at once, then one by one.
        for start, end in ((0, 16), (16, 19), (19, 20), (20, 21), (21, 22)):
            assert relative(pass_of(start, end), wanted[:, start:end].flatten(0, 1)) < limit
        picked = torch.tensor([rows * 16 - 1, 3, 3])
        assert relative(pass_of(0, 16, picked), wanted[:, :16].flatten(0, 1)[picked]) < limit


@needs_kernels
@pytest.mark.parametrize("variant", variants())
def test_no_bit_depends_on_the_company(monkeypatch, variant: str) -> None:
    """Alone, in a batch of prompts of other lengths, with a token or several at once: the same numbers."""
    monkeypatch.setenv(VARIANT, variant)
    network, _ = network_of(Scheme(4, 32))
    engine = Engine(network)
    special = {"sop": 1, "[MASK]": 2, "[gMASK]": 3, "eos": 4, "[sMASK]": 5}
    rng = np.random.default_rng(0)
    prompts = [
        blank_prompt([*rng.integers(9, CONFIG.vocab_size, size=size - 1).tolist(), 2], size - 1, special)
        for size in (5, 21, 12, 17, 9, 40, 3, 11, 30, 8, 4)
    ]
    answers = torch.from_numpy(rng.integers(9, CONFIG.vocab_size, size=(len(prompts), 4)))
    together = engine.decoding(1000)
    together.add(prompts, [4] * len(prompts), [1] * len(prompts), [True] * len(prompts))
    ahead = engine.decoding(1000)
    ahead.add(prompts[3:6], [4] * 3, [1] * 3, [True] * 3)
    steps = [together.logits]
    steps += [together.append(answers[:, step]) for step in range(4)]
    first = ahead.logits
    at_once = ahead.append(answers[3:6])
    for row, prompt in enumerate(prompts):
        alone = engine.decoding(1000)
        alone.add([prompt], [4], [1], [True])
        assert torch.equal(alone.logits[0], steps[0][row])
        for step in range(4):
            assert torch.equal(alone.append(answers[row : row + 1, step])[0], steps[step + 1][row])
    for row in range(3):
        assert torch.equal(first[row], steps[0][3 + row])
        for step in range(4):
            assert torch.equal(at_once[row, step], steps[step + 1][3 + row])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "int8"
    convert_source(
        open_model(Path(openglm.__file__).parent / "assets" / "nano"), folder, dtype=None, scheme=Scheme(8, 64, head_bits=8)
    )
    return folder


@needs_kernels
def test_the_engine_writes_as_its_twin(small: Path, monkeypatch) -> None:
    fast = openglm.load(small)
    assert fast.engine.kernel is not None and not fast.notes
    monkeypatch.setenv(VARIANT, "none")
    slow = openglm.load(small)
    assert slow.engine.kernel is None and "switched off" in slow.notes[-1]
    special = fast.config.special_tokens
    ids = [fast.tokenizer.encode(text) for text in ("The old man walked to the", "天")]  # pyright: ignore[reportOptionalMemberAccess]
    prompts = [
        blank_prompt([*ids[0], special["[MASK]"], *ids[1]], len(ids[0]), special),
        generation_prompt(ids[1], special, kind="[gMASK]"),
    ]
    decodings = [glm.engine.prefill(prompts, 8, copies=2) for glm in (fast, slow)]
    for step in range(6):
        one, other = (decoding.logits for decoding in decodings)
        assert relative(one, other.double()) < 2e-3
        if step == 1:
            for decoding in decodings:  # two beams of each
                decoding.select([0, 0, 1, 1])
        if step == 4:
            for decoding in decodings:
                decoding.select([3, 1])
        tokens = decodings[1].logits.topk(2).indices[:, step % 2]
        for decoding in decodings:
            decoding.append(tokens)
    before = torch.get_num_threads()
    for options in ({}, {"num_beams": 3}, {"temperature": 0.8, "seed": 3}):
        assert all(result.spans for result in fast.fill_batch(["One [MASK] three.", "他[MASK]了。"], max_tokens=6, **options))
    assert torch.get_num_threads() == before
    long = "Once upon a time there was a king. " * 4
    one, other = (glm.score(long + "[MASK]", ["He was old.", "他老了。"]) for glm in (fast, slow))
    for mine, twin in zip(one.choices, other.choices, strict=True):
        assert mine.log_probability == pytest.approx(twin.log_probability, abs=0.02)


def test_a_variant_that_does_not_run_is_refused(monkeypatch) -> None:
    if not variants():
        pytest.skip("the CPU kernels are not compiled")
    monkeypatch.setenv(VARIANT, "avx1024")
    with pytest.raises(InputError, match=r"asks for `avx1024`, but this machine runs .*portable"):
        library()


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path) -> None:
    with pytest.raises(builder.BuildError, match="there is no C compiler"):
        builder.build(tmp_path / "x.so", compiler="no-such-compiler")
    with pytest.raises(builder.BuildError, match="`false` failed"):
        builder.build(tmp_path / "x.so", compiler="false")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("openglm.kernels.cpu.library.LIBRARY", "not-there.so")
    network, _ = network_of(Scheme(8))
    engine = Engine(network)
    assert engine.notes == [why_not()] and "python -m openglm.kernels.cpu.build" in engine.notes[0]
    assert engine.kernel is None


@needs_kernels
def test_networks_with_zero_points_stay_with_the_twin() -> None:
    network, _ = network_of(Scheme(8, 32, zero_point=True, head_bits=8))
    assert "zero points" in use_panels(network)
    assert not Pass.serves(network)


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_computes_too() -> None:
    script = """
import os, torch
from openglm.kernels.cpu.panels import PanelMatrix
torch.set_num_threads(3)
matrix = PanelMatrix(256, 128, 8, None)
matrix.pack(0, torch.ones(256, 128, dtype=torch.int8), torch.ones(256, 1, dtype=torch.float16))
assert abs(float(matrix.linear(torch.ones(128))[200]) - 128) < 1e-2
child = os.fork()
if child == 0:
    os._exit(0 if abs(float(matrix.linear(torch.ones(128))[200]) - 128) < 1e-2 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="limits on memory")
def test_fewer_threads_than_asked_for_do_all_the_work() -> None:
    script = """
import os, resource, torch
from openglm.kernels.cpu.library import library
from test_cpu_kernels import CONFIG, ColumnPool, Pass, Place, Scheme, network_of, use_panels
network, _ = network_of(Scheme(8, head_bits=8))
use_panels(network)
run, found = Pass(network), []
count = lambda: len(os.listdir("/proc/self/task"))
for threads in (1, 3):
    run.threads, pool = threads, ColumnPool(CONFIG, 8, dtype=torch.float16)
    whole = pool.take(8)
    if threads == 3:  # no room for the stack of another thread
        before = count()
        held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 1_500_000,) * 2)
    place = Place(whole, whole, 8, 0)
    found.append(run(torch.tensor([[5, 6, 7]]), torch.arange(3)[None], pool, [place], [3]))
    place.length = 3
    found.append(run(torch.tensor([[8]]), torch.tensor([[3]]), pool, [place], [1]))
assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
ones = torch.ones(1000, dtype=torch.int64)
assert library().glm_read(ones.data_ptr(), ones.nbytes, 3) == 1000
assert count() == before, "another thread was started after all"
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60, env=environment)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["neon", "portable"])
def test_an_emulated_arm_adds_up_the_same_integers(tmp_path, variant: str) -> None:
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    if not shutil.which(compiler) or not shutil.which(emulator):
        pytest.skip(f"needs {compiler} and {emulator} (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user)")
    built = tmp_path / "libpanels.so"
    builder.build(built, compiler=compiler, machine="aarch64")
    program = tmp_path / "products"
    source = Path(__file__).parent / "products.c"
    subprocess.run(
        [compiler, f"-I{builder.HERE}", str(source), str(built), f"-Wl,-rpath,{tmp_path}", "-o", str(program)], check=True
    )
    generator = torch.Generator().manual_seed(0)
    for scheme in SCHEMES:
        found = quantize_matrix(torch.randn(96, 256, generator=generator), scheme)
        matrix, x = packed(found, scheme), torch.randn(256, generator=generator)
        structure = matrix.structure
        data = ctypes.string_at(ctypes.addressof(structure), ctypes.sizeof(structure))
        data += ctypes.string_at(structure.panels, matrix.nbytes) + x.numpy().tobytes()
        command = [emulator, "-cpu", "max", "-L", "/usr/aarch64-linux-gnu", str(program), variant]
        out = bytearray(subprocess.run(command, input=data, capture_output=True, check=True, timeout=60).stdout)
        chunks = structure.columns // structure.chunk
        sums = torch.frombuffer(out, dtype=torch.int32, count=96 * chunks).view(3, chunks, 32).transpose(1, 2).flatten(0, 1)
        values, scales = quantize_activations(x, structure.chunk)
        assert torch.equal(sums.long(), integer_sums(found.codes, values, structure.chunk))
        assert torch.equal(torch.frombuffer(out, dtype=torch.float32, count=chunks, offset=4 * 96 * chunks), scales)
        y = torch.frombuffer(out, dtype=torch.float32, offset=4 * 97 * chunks)
        assert relative(y, product(found.codes, found.scales, x, structure.chunk)) < 2e-7


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["cc", "no-such-compiler"])
def test_the_package_installs_with_and_without_a_compiler(tmp_path, compiler: str) -> None:
    root = Path(__file__).parents[1]
    if compiler == "cc" and not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(root)]
    # From a copy, so that the tree's own library stays as it is.
    copy = tmp_path / "tree"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.so", "__pycache__"))
    command[-1] = str(copy)
    environment = {**os.environ, "CC": compiler}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    assert (target / "openglm/kernels/cpu/libpanels.so").exists() == (compiler == "cc")
    assert wheel.name.endswith("-none-any.whl") == (compiler != "cc")
    script = "from openglm.kernels.cpu.library import variants, why_not; print(variants(), why_not())"
    out = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    assert ("portable" in out) == (compiler == "cc") and ("not compiled" in out or "without compiled" in out) == (
        compiler != "cc"
    )
