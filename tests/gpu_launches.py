"""Compiles what a GPU would run, on any machine: launches are recorded on the meta device and go through Triton and ptxas.

    python tests/gpu_launches.py [CAPABILITY ...] [--first]

prints registers, spilled bytes and shared memory of every kernel of the 130B, and for products the instructions a weight in the
inner loop, read from the disassembly. ``--first``: each kernel once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from openglm.config import ModelConfig, QuantizationScheme
from openglm.kernels.gpu import products
from openglm.kernels.gpu.network import Pass
from openglm.models.glm130b import GLM130B
from openglm.quantization.layers import place_quantized

TOOLS = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
#: Multiprocessors of an RTX 2080 Ti, an A100 and an H200.
GPUS = {75: 68, 80: 108, 90: 132}
SCHEMES = [
    (QuantizationScheme(4), torch.float16),
    (QuantizationScheme(4, 128, head_bits=8), torch.float16),
    (QuantizationScheme(4, 32), torch.float16),
    (QuantizationScheme(8), torch.float16),
    (QuantizationScheme(8, 128, head_bits=4), torch.float16),
    (None, torch.float16),
    (QuantizationScheme(4, 128), torch.bfloat16),
    (QuantizationScheme(8), torch.bfloat16),
    (None, torch.bfloat16),
]


@dataclass
class Launch:
    """A kernel as it was called: the compiler's view of its arguments."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[str]
    options: dict[str, int]

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.divisible} {self.options}"


@dataclass
class Compiled:
    """What came out of the compiler for one launch."""

    launch: Launch
    registers: int
    spilled: int
    shared: int
    body: list[str] = field(repr=False)
    """Instructions of the largest loop."""


class Recorder:
    """In the place of ``JITFunction.run``."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
        signature, constants, divisible = {}, {}, []
        for parameter in kernel.params:
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr or (
                value is not None and type(value) is int and value == 1 and not parameter.do_not_specialize
            ):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                divisible.append(name)
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                    divisible.append(name)
        launch = Launch(kernel, signature, constants, divisible, kwargs)
        self.launches.setdefault(launch.key, launch)


def meta_network(config: ModelConfig, dtype: torch.dtype) -> GLM130B:
    with torch.device("meta"):
        network = GLM130B(config).to(dtype)
        if config.quantization is not None:
            place_quantized(network, config.quantization)
    return network.requires_grad_(False)


def launches(capability: int, scheme: QuantizationScheme | None, dtype: torch.dtype, *, prompts: bool = True) -> list[Launch]:
    """All launches of a step of the 130B, and of a prompt, one layer of it, without running anything."""
    recorder, run, gpu = Recorder(), triton.JITFunction.run, products.gpu
    triton.JITFunction.run = lambda kernel, *args, **kwargs: recorder(kernel, *args, **kwargs)  # pyright: ignore
    products.gpu = lambda device: (divmod(capability, 10), GPUS[capability])
    products.tiling.cache_clear()
    try:
        network = meta_network(ModelConfig.preset("130b", num_layers=1, quantization=scheme), dtype)
        cache = torch.empty(1, 96, 16 * 2048, 128, dtype=dtype, device="meta")
        run_pass = Pass(network, cache, cache, 2048)
        for rows in (1, 4) if capability < 80 else (1,):
            run_pass.step(*torch.zeros(6, rows, dtype=torch.int64, device="meta"))
        if prompts:
            tokens = torch.zeros(1, 128, dtype=torch.int64, device="meta")
            run_pass.prefill(tokens, tokens, None, tokens[:, 0])
    finally:
        triton.JITFunction.run, products.gpu = run, gpu
        products.tiling.cache_clear()
    return list(recorder.launches.values())


def compile_launch(launch: Launch, capability: int) -> Compiled:
    names = [parameter.name for parameter in launch.kernel.params]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        text = _tool("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Compiled(launch, int(found[1]), int(found[2]), made.metadata.shared, _largest_loop(text))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _largest_loop(text: str) -> list[str]:
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    best: list[str] = []
    for end, instruction in enumerate(instructions):
        jump = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if jump and labels.get(jump[1], end + 1) <= end:
            best = max(best, instructions[labels[jump[1]] : end + 1], key=len)
    return best


def everything(capability: int, first: bool) -> Iterator[Compiled]:
    """Every kernel for one capability, each once."""
    seen = set()
    for scheme, dtype in SCHEMES[:1] if first else SCHEMES:
        if dtype == torch.bfloat16 and capability < 80:
            continue
        for launch in launches(capability, scheme, dtype, prompts=not first and scheme is not None):
            key = launch.kernel.__name__ if first else launch.key
            if key not in seen:
                seen.add(key)
                yield compile_launch(launch, capability)


def weights(launch: Launch) -> int:
    """Weights that one thread of a product takes in a round of the loop."""
    constants = launch.constants
    return constants["ROWS"] * constants["UNITS"] * 16 // constants["BITS"] // 32 // launch.options["num_warps"]


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels are not compiled"
    first = "--first" in sys.argv
    for capability in [int(argument) for argument in sys.argv[1:] if argument.isdigit()] or GPUS:
        for made in everything(capability, first):
            constants = made.launch.constants
            line = f"sm_{capability} {made.launch.kernel.__name__:14} registers {made.registers:3} stack {made.spilled:3}"
            line += f" shared {made.shared:6} loop {len(made.body):4}"
            if "UNITS" in constants and "ROWS" in constants and "num_warps" in made.launch.options:
                line += f"  {len(made.body) / weights(made.launch):.2f} a weight:"
            shown = {k: v for k, v in constants.items() if k not in ("ASSEMBLY", "INTERPRETED", "HAS_BIAS")}
            types = [kind for kind in made.launch.signature.values() if kind.startswith("*")]
            print(line, types[0], " ".join(f"{k}={v}" for k, v in shown.items()), flush=True)


if __name__ == "__main__":
    main()
