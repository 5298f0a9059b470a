"""The Triton kernels beside their twins: on a GPU where there is one, else on the CPU in Triton's interpreter (conftest.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.errors import InterpreterError

from openglm.config import ModelConfig
from openglm.config import QuantizationScheme as Scheme
from openglm.inference.engine import Engine
from openglm.inference.sampling import SamplingSettings
from openglm.inference.scheduler import Request
from openglm.infilling import blank_prompt
from openglm.kernels.gpu import products
from openglm.kernels.gpu.attention import COLUMNS, attend
from openglm.kernels.gpu.fused import geglu, normalize, rotate
from openglm.kernels.gpu.network import Pass
from openglm.kernels.gpu.products import Matrix, deal, dequantize, linear, partial_products, product
from openglm.kernels.gpu.support import why_not
from openglm.models.glm130b import GLM130B, RotaryTable
from openglm.models.glm130b import rotate as rotate_twin
from openglm.quantization.functional import Quantized, quantize_matrix
from openglm.quantization.layers import QuantizedLinear, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Error of a sum in float32; tensor cores round within one.
SINGLE = 1e-6 if DEVICE.type == "cpu" else 1e-5
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
SCHEMES = [Scheme(bits, group) for bits in (4, 8) for group in (None, 32, 64, 128)] + [Scheme(4, ranks=2), Scheme(8, ranks=2)]
CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=2, inner_hidden_size=96, vocab_size=75)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", autouse=True)
def an_interpreter_that_works() -> None:
    """Triton 3.6's cannot run loops with numpy 2.4, which no longer makes numbers of arrays; 3.9's can."""
    if DEVICE.type == "cpu":
        try:
            product(torch.ones(1, 16, dtype=torch.float16), Matrix(torch.ones(1, 16, dtype=torch.float16), None, None, 16))
        except InterpreterError as error:
            pytest.skip(f"this Triton's interpreter does not run: {error}")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def exact_weights(found: Quantized) -> Tensor:
    """float64, not rounded to float16 as the original's are."""
    return (found.codes.double().unflatten(1, (found.scales.shape[1], -1)) * found.scales.double().unsqueeze(-1)).flatten(1)


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - wanted).norm() / wanted.norm())


def layer_of(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> QuantizedLinear:
    found = quantize_matrix(draw(rows, columns, seed=rows).cpu(), scheme)
    return QuantizedLinear(found, scheme, draw(rows, seed=1, dtype=dtype)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_are_the_twins(scheme: Scheme, dtype: torch.dtype) -> None:
    for rows, columns in ((150, 256), (33, 384 if scheme.group else 280)):  # tiles that end within rows and within columns
        layer = layer_of(scheme, rows, columns, dtype)
        matrix = Matrix.of(layer)
        assert Matrix.why_not(layer) == "" and (matrix.rows, matrix.columns) == (rows, columns)
        x = draw(5, columns, seed=2, dtype=dtype)
        x[0, 3], x[1] = 60.0, 0.0
        weights = exact_weights(layer.weight)
        assert layer.bias is not None
        wanted = x.double() @ weights.T + layer.bias.double()
        found = product(x, matrix)
        assert found.dtype == torch.float32 and relative(found, wanted) < SINGLE
        assert torch.equal(found[1], layer.bias.float())
        for units in (16, 64):  # two parts, and groups that are longer or shorter than a tile, or cross its border
            parts = partial_products(deal(x, matrix.planes), matrix, products.Tiling(64, units, 2))
            assert parts.shape == (2, 5, rows) and relative(parts.sum(0), wanted) < SINGLE
        # For many rows: the very weights of the twin, in slices.
        made = dequantize(matrix, 7, rows, torch.empty((rows - 7) * columns + 5, dtype=torch.float16, device=DEVICE))
        assert torch.equal(made, layer.weight.dequantize()[7:])
        many = linear(x, matrix, torch.empty(columns * 20, dtype=dtype, device=DEVICE))
        twin = layer(x)
        assert many.dtype == twin.dtype == dtype and relative(many, twin.double()) < (2e-3 if dtype == torch.float16 else 1e-2)
        x[4, 7] = float("nan")
        broken = product(x, matrix)
        assert broken[4].isnan().all() and broken[:4].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_plain_matrices(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(75, 140).to(dtype).to(DEVICE).requires_grad_(False)
    x = draw(16, 75, dtype=dtype)
    wanted = x.double() @ layer.weight.double().T + layer.bias.double()
    assert relative(product(x, Matrix.of(layer)), wanted) < SINGLE
    assert relative(linear(x, Matrix.of(layer), x), wanted) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(4, 32), Scheme(8, 128)], ids=str)
def test_a_row_does_not_depend_on_the_others(scheme: Scheme) -> None:
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("it is not promised below compute capability 8.0")
    matrix, x = Matrix.of(layer_of(scheme, 150, 256, torch.float16)), draw(16, 256)
    alone = product(x[5:6], matrix)
    for rows in (2, 7, 11):
        assert torch.equal(product(x[5 : 5 + rows], matrix)[0], alone[0])


def run_assembly(text: str, unit: np.ndarray, kind: str) -> np.ndarray:
    """What the few instructions of ``_assembly`` do to 32-bit words, as float64 ``[words, 2]``, low half first."""
    registers: dict[str, np.ndarray] = {"$1": unit}

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full_like(unit, int(name, 0))

    def halves(word: np.ndarray) -> np.ndarray:
        pair = torch.from_numpy(np.stack([word & 0xFFFF, word >> 16], -1).astype(np.uint16).view(np.int16))
        return pair.view(torch.float16 if kind == "f16x2" else torch.bfloat16).double().numpy()

    tables: dict[int, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
        0x6A: lambda a, b, c: (a & b) ^ c,
        0xEA: lambda a, b, c: (a & b) | c,
    }
    result = np.zeros(0)
    for line in filter(None, (line.strip() for line in text.strip("{} ").split(";"))):
        name, _, rest = line.partition(" ")
        target, *sources = [part.strip() for part in rest.split(",")]
        if name == "shr.b32":
            registers[target] = value(sources[0]) >> value(sources[1])
        elif name == "mov.b32":
            registers[target] = value(sources[0])
        elif name == "lop3.b32":
            registers[target] = tables[int(sources[3], 0)](*(value(source) for source in sources[:3]))
        elif name == f"fma.rn.{kind}":
            a, b, c = (halves(value(source)) for source in sources)
            result = a * b + c
        else:
            assert name == ".reg", line
    return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_assembly_makes_the_twins_codes(dtype: torch.dtype) -> None:
    """The interpreter runs no assembly, so its four instructions are read here, for every unit there is."""
    low = np.arange(1 << 16, dtype=np.uint32)
    words = low | (low[::-1] << np.uint32(16))
    units = torch.from_numpy(np.stack([words & 0xFFFF, words >> 16], -1).astype(np.uint16).view(np.int16))
    kind = "f16x2" if dtype == torch.float16 else "bf16x2"
    for bits, shifts in ((4, (4, 0, 12, 8)), (8, (0, 8))):
        codes = [(units << (16 - bits - shift)) >> (16 - bits) for shift in shifts]
        for shift, wanted in zip(shifts, codes, strict=True):
            found = run_assembly(products._assembly(bits, dtype, shift), words, kind)
            assert np.array_equal(found, wanted.double().numpy()), (bits, shift)


@pytest.mark.parametrize("planes", [1, 2, 4])
def test_norms_are_the_twins(planes: int) -> None:
    skip, parts = draw(3, 100, seed=1), draw(2, 3, 100, seed=2, dtype=torch.float32)
    weight, bias = draw(100, seed=3), draw(100, seed=4)
    for branch, x in ((None, skip.double()), (parts, 2.5 * skip.double() + parts.double().sum(0))):
        wanted = F.layer_norm(x, (100,), weight.double(), bias.double(), 1e-5)
        normed, dealt = normalize(skip, branch, 2.5, (weight, bias, 1e-5), planes)
        assert normed.dtype == torch.float16 and relative(normed, wanted) < 5e-4
        assert torch.equal(dealt.view(3, planes, -1), deal(normed, planes))


@pytest.mark.parametrize("planes", [1, 4])
def test_geglu_is_the_twins(planes: int) -> None:
    parts = draw(3, 2, 2 * 1028, dtype=torch.float32)
    linear_half, gate = parts.double().sum(0).chunk(2, dim=-1)
    made = geglu(parts, draw(1), planes)
    assert made.shape == (2, planes, 1028 // planes) and made.dtype == torch.float16
    assert relative(made, deal(linear_half * F.gelu(gate), planes)) < 5e-4


@pytest.mark.parametrize("table_dtype", ["float32", "float16"])
def test_rotary_positions_and_the_write_are_the_twins(table_dtype: str) -> None:
    rows, heads, d = 3, 5, 24
    parts = draw(2, rows, heads * 3 * d, dtype=torch.float32)
    positions = torch.tensor([7, 0, 1500], device=DEVICE)
    rotary = RotaryTable(d, table_dtype)
    table = rotary.table(2000, DEVICE, torch.float32)
    cos, sin = rotary.lookup(positions[None], torch.float64, 2000)
    q, k, v = parts.double().sum(0).view(1, rows, heads, 3 * d).transpose(1, 2).chunk(3, dim=-1)
    keys, values = draw(heads, 40, d, seed=5), draw(heads, 40, d, seed=6)
    wanted_keys, wanted_values = keys.double(), values.double()
    columns = [29, -1, 0]
    for row, column in enumerate(columns):
        if column >= 0:
            wanted_keys[:, column] = rotate_twin(k, cos, sin)[0, :, row]
            wanted_values[:, column] = v[0, :, row]
    queries = rotate(parts, table, positions, integers(columns), keys, values)
    assert relative(queries, rotate_twin(q, cos, sin)[0].transpose(0, 1)) < 5e-4
    assert relative(keys, wanted_keys) < 5e-4 and relative(values, wanted_values) < 5e-4
    assert torch.equal(keys[:, 1:29], draw(heads, 40, d, seed=5)[:, 1:29])  # others are left alone


@pytest.mark.parametrize(("d", "dtype"), [(24, torch.float16), (64, torch.bfloat16)])
def test_attention_is_the_twins(d: int, dtype: torch.dtype) -> None:
    longest, heads = COLUMNS + 44, 2
    keys, values = draw(heads, 4 * longest, d, seed=1, dtype=dtype), draw(heads, 4 * longest, d, seed=2, dtype=dtype)
    for run in range(1, 5):  # behind the end of every row
        keys[:, run * longest - 1], values[:, run * longest - 1] = float("nan"), float("nan")
    queries = draw(5, heads, d, seed=3, dtype=dtype)
    # alone, over two stretches, sharing a prompt within a stretch and over its end, not there
    starts = [3 * longest, 0, 2 * longest + 5, 60, -1]
    lengths = [0, COLUMNS + 40, 37, COLUMNS + 10, 100]
    sources, shared = [0, 0, longest, longest, 0], [0, 0, 20, COLUMNS + 5, 0]
    places = list(map(integers, (starts, lengths, sources, shared)))
    made = attend(queries, keys, values, *places, longest, planes=2)
    assert made.dtype == dtype and made[4].count_nonzero() == 0
    for row in range(4):
        seen = [
            sources[row] + column if column < shared[row] else starts[row] + column - shared[row]
            for column in range(lengths[row] + 1)
        ]
        k, v = (cache[:, integers(seen).long()].double() for cache in (keys, values))
        wanted = F.scaled_dot_product_attention(queries[row].double()[:, None], k, v).reshape(1, -1)
        assert relative(made[row], deal(wanted, 2)[0]) < (1e-3 if dtype == torch.float16 else 8e-3)
    alone = attend(queries[2:3], keys, values, *(own[2:3] for own in places), longest, planes=2)
    assert torch.equal(alone[0], made[2])


def network_of(scheme: Scheme | None, dtype: torch.dtype) -> tuple[GLM130B, GLM130B]:
    """A network for the kernels, and a plain one in float64 with the very same weights."""
    network = GLM130B(CONFIG).initialize(3).to(dtype)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    plain = GLM130B(CONFIG).double()
    plain.load_state_dict(network.state_dict())
    if scheme is not None:
        quantize(network, scheme)
    for name, module in plain.named_modules():
        weight = getattr(network.get_submodule(name), "weight", None) if name else None
        if isinstance(weight, Quantized):
            module.weight.copy_(exact_weights(weight))  # pyright: ignore
    return network.to(DEVICE).requires_grad_(False), plain.to(DEVICE).requires_grad_(False)


def pass_of(network: GLM130B, dtype: torch.dtype, slots: int = 4, capacity: int = 24, graphs: bool = True) -> Pass:
    assert Pass.why_not(network) == ""
    shape = (CONFIG.num_layers, CONFIG.num_attention_heads, slots * capacity, CONFIG.head_size)
    cache = torch.zeros(2, *shape, dtype=dtype, device=DEVICE)
    return Pass(network, cache[0], cache[1], capacity, graphs=graphs, scratch=2 * 96 * 64)


def prompt(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and a mask: six tokens that see each other, then one after the other."""
    tokens = torch.randint(0, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length) + 3 * torch.arange(rows)[:, None]
    mask = torch.ones(rows, length, length, dtype=torch.bool).tril()
    mask[:, :6, :6] = True
    return tokens.to(DEVICE), positions.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (Scheme(4), torch.float16),
        (Scheme(4, 32, head_bits=8), torch.float16),
        (Scheme(8, ranks=2), torch.float16),
        (None, torch.float16),
        (Scheme(8, 32, head_bits=4), torch.bfloat16),
        (None, torch.bfloat16),
    ],
    ids=str,
)
def test_a_pass_is_the_networks_forward(scheme: Scheme | None, dtype: torch.dtype) -> None:
    network, plain = network_of(scheme, dtype)
    near = 1.5e-3 if dtype == torch.float16 else 1.2e-2
    run = pass_of(network, dtype)
    tokens, positions, mask = prompt(2, 10)
    wanted = plain(tokens, positions, mask)
    # Two prompts, the second one token shorter and padded, then tokens one by one: different lengths side by side.
    starts, counts = integers([40, 0]), torch.tensor([8, 7], device=DEVICE)
    found = run.prefill(tokens[:, :8], positions[:, :8], mask[:, :8, :8], starts, counts)
    assert found.dtype == torch.float32 and relative(found, torch.stack([wanted[0, 7], wanted[1, 6]])) < near
    for step in range(2):
        column = torch.tensor([8 + step, 7 + step], device=DEVICE)
        each = torch.arange(2, device=DEVICE)
        found = run.step(tokens[each, column], positions[each, column], starts, column)
        assert relative(found, wanted[each, column]) < near


def test_rows_share_a_prompt() -> None:
    network, plain = network_of(Scheme(4), torch.float16)
    run = pass_of(network, torch.float16)
    tokens, positions, _ = prompt(1, 9)
    wanted = plain(tokens[:, :8], positions[:, :8])  # no mask: all see all
    logits = run.prefill(tokens[:, :8], positions[:, :8], None, integers([10]))
    assert relative(logits, wanted[:, -1]) < 1.5e-3
    # Three rows go on from it, each in columns of its own, the last one right behind the prompt.
    starts, lengths, sources, shared = map(integers, ([0, 60, 18], [8, 8, 8], [10, 10, 10], [8, 8, 8]))
    following = torch.tensor([5, 6, 7], device=DEVICE)
    found = run.step(following, positions[0, 8].expand(3), starts, lengths, sources, shared)
    whole = torch.cat([tokens[:, :8].expand(3, 8), following[:, None]], dim=1)
    mask = torch.ones(3, 9, 9, dtype=torch.bool, device=DEVICE)
    mask[:, :8, 8] = False
    assert relative(found, plain(whole, positions.expand(3, 9), mask)[:, -1]) < 1.5e-3


def test_steps_of_more_rows_than_a_product_takes() -> None:
    network, _ = network_of(Scheme(8), torch.float16)
    run = pass_of(network, torch.float16, slots=18)
    tokens, positions = torch.arange(18, device=DEVICE), torch.zeros(18, dtype=torch.int64, device=DEVICE)
    starts, lengths = torch.arange(18, device=DEVICE), torch.zeros(18, dtype=torch.int64, device=DEVICE)
    many = run.step(tokens, positions, starts, lengths)
    assert many.shape == (18, CONFIG.vocab_size)
    assert torch.equal(run.step(tokens[16:], positions[16:], starts[16:], lengths[16:]), many[16:])


def test_the_engine_writes_in_them_as_in_torch() -> None:
    """Prompts of different lengths, one of them twice, tokens one by one and several at once, and forks."""
    # On a CPU an engine packs quantized layers for kernels of its own.
    network, _ = network_of(Scheme(4, 32, head_bits=8) if DEVICE.type == "cuda" else None, torch.float16)
    fast, slow = Engine(network), Engine(network)
    fast.use_triton()
    slow.uses_triton = False
    assert fast.uses_triton and not fast.notes
    special = {"sop": 1, "[MASK]": 2, "[gMASK]": 3, "eos": 4, "[sMASK]": 5}
    prompts = [blank_prompt([*range(10, 10 + n), 2, 4], n, special) for n in (5, 3, 9, 3)]
    decodings = []
    for engine in (fast, slow):
        decoding = engine.decoding(400)
        decoding.add(prompts, [8] * 4, [1, 1, 1, 2])
        decodings.append(decoding)
    tokens = torch.tensor([20, 21, 22, 23], device=DEVICE)

    def compare(found: list[Tensor]) -> None:
        assert relative(found[0], found[1].double()) < 1.5e-3

    compare([decoding.logits for decoding in decodings])
    compare([decoding.append(tokens) for decoding in decodings])
    for decoding in decodings:
        decoding.select([3, 2, 3, 0])
    compare([decoding.append(tokens) for decoding in decodings])
    several = torch.tensor([[30, 31, 32], [33, 0, 0], [34, 35, 0], [36, 37, 38]], device=DEVICE)
    counts = [3, 1, 2, 3]
    found = [decoding.append(several, counts) for decoding in decodings]
    for row, count in enumerate(counts):
        compare([logits[row, :count] for logits in found])
    settings = SamplingSettings()
    requests = [Request(prompt, settings, [4], 4) for prompt in prompts]
    scheduler = fast.scheduler(300)
    for request in requests:
        scheduler.submit(request)
    assert len(list(scheduler.run())) == sum(len(request.tokens) for request in requests) > 4
    pool = fast.decoding(300).pool
    assert fast.decoding(200).pool is pool  # kept: graphs hold its address


def test_what_they_do_not_serve_is_said(monkeypatch) -> None:
    assert "not in float32" in why_not(DEVICE, torch.float32)
    assert "not for `meta`" in why_not("meta")
    network, _ = network_of(Scheme(8, 32, zero_point=True), torch.float16)
    assert re.search(r"cannot multiply `layers.0.attention.query_key_value`: it has zero points", Pass.why_not(network))
    odd = QuantizedLinear(quantize_matrix(draw(4, 6).cpu(), Scheme(4)), Scheme(4), None)
    assert Matrix.why_not(odd) == "its groups of 6 weights fill no units of 16 bits"
    assert "not in float32" in Pass.why_not(GLM130B(CONFIG))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton, which is not installed" in why_not(DEVICE)


def test_openglm_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import openglm.inference.engine, openglm.kernels.gpu.support as s;"
    code += "print(s.why_not('cpu'))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def compiled(*arguments: str) -> list[dict[str, str]]:
    """What tests/gpu_launches.py prints, in a process where kernels are compiled and not interpreted."""
    script = Path(__file__).parent / "gpu_launches.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pattern = r"sm_(?P<capability>\d+) (?P<kernel>\w+) +registers +(?P<registers>\d+) stack +(?P<stack>\d+)"
    return [match.groupdict() for match in re.finditer(pattern, done.stdout)]


def test_a_step_compiles_for_hopper() -> None:
    kernels = compiled("90", "--first")
    assert {row["kernel"] for row in kernels} == {"_normalize", "_product", "_rotate", "_attend", "_join", "_geglu"}
    assert all(row["stack"] == "0" for row in kernels)  # nothing is spilled


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["75", "80", "90"])
def test_everything_compiles(capability: str) -> None:
    kernels = compiled(capability)
    assert "_dequantize" in {row["kernel"] for row in kernels}
    assert all(int(row["stack"]) <= (32 if capability == "75" else 0) for row in kernels)


@pytest.mark.slow
def test_the_benchmark_runs_at_a_tiny_size(tmp_path: Path) -> None:
    script, target = Path(__file__).parents[1] / "benchmarks" / "gpu.py", tmp_path / "result.json"
    subprocess.run([sys.executable, str(script), "--smoke", "--json", str(target)], check=True, capture_output=True)
    result = json.loads(target.read_text(encoding="utf-8"))
    assert len(result["rows"]) == 3 and all(check["error"] <= check["allowed"] for check in result["checks"])


@needs_gpu
class TestOnAGPU:
    """What the interpreter cannot show."""

    @pytest.mark.parametrize("scheme", [Scheme(4), Scheme(4, 128, head_bits=8), Scheme(8), None], ids=str)
    def test_a_replayed_graph_is_the_eager_step(self, scheme: Scheme | None) -> None:
        config = ModelConfig.preset("nano", quantization=scheme)
        from openglm.quantization.random_weights import random_network

        network = random_network(config, DEVICE, torch.float16)
        cache = [draw(config.num_layers, 6, 20 * 64, 64, seed=seed) for seed in (1, 2)]
        eager, replayed = (Pass(network, *(part.clone() for part in cache), 64, graphs=graphs) for graphs in (False, True))
        generator = torch.Generator().manual_seed(0)
        for rows in (1, 3, 16, 2, 18, 3):
            arguments = [torch.randint(0, 60, (rows,), generator=generator).to(DEVICE) for _ in range(2)]
            arguments += [64 * torch.arange(rows, device=DEVICE), torch.randint(0, 63, (rows,), generator=generator).to(DEVICE)]
            found = replayed.step(*arguments)
            assert torch.equal(found, eager.step(*arguments))
            assert torch.equal(replayed.keys, eager.keys) and torch.equal(replayed.values, eager.values)

    def test_a_row_of_a_step_does_not_depend_on_the_others(self) -> None:
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("it is not promised below compute capability 8.0")
        from openglm.quantization.random_weights import random_network

        for scheme, dtype in ((Scheme(4), torch.float16), (Scheme(8, 64), torch.bfloat16), (None, torch.bfloat16)):
            config = ModelConfig.preset("nano", quantization=scheme)
            network = random_network(config, DEVICE, dtype)
            cache = [draw(config.num_layers, 6, 16 * 64, 64, seed=seed, dtype=dtype) for seed in (1, 2)]
            run = Pass(network, *cache, 64)
            each = torch.arange(16, device=DEVICE)
            together = run.step(each + 30, each, 64 * each, each * 3)
            for rows in (1, 2, 5):
                own = each[7 : 7 + rows]
                assert torch.equal(run.step(own + 30, own, 64 * own, own * 3), together[7 : 7 + rows])

    def test_a_matrix_of_the_130b(self) -> None:
        for scheme in (Scheme(4), Scheme(4, 128), Scheme(8)):
            columns = 12288
            codes = torch.randint(-7, 8, (12288, columns), dtype=torch.int8, device=DEVICE)
            scales = torch.rand(12288, columns // scheme.columns(columns), device=DEVICE).half() / 700
            layer = QuantizedLinear(Quantized(codes, scales), scheme, None).to(DEVICE)
            x = draw(16, columns)
            wanted = x.float() @ exact_weights(layer.weight).float().T
            assert relative(product(x, Matrix.of(layer)), wanted.double()) < 1e-4
