"""GPUs by name, with the figures of their datasheets, and clusters of them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from openglm.errors import InputError

#: More than anybody has; a search tries every divisor of their number.
MOST_GPUS = 1_000_000


@dataclass(frozen=True)
class Gpu:
    """One GPU. Speeds are peaks of the datasheet, without sparsity; bandwidths count one direction."""

    name: str
    memory: float
    """GiB. Makers write GB and build GiB; a program sees up to 1 GiB less, which the reserve of `memory.py` covers."""
    half_tflops: float
    """TFLOP/s in float16 and bfloat16 with float32 accumulation: dense tensor cores."""
    single_tflops: float
    """TFLOP/s in float32, without TF32."""
    memory_bandwidth: float
    """GB/s between the GPU and its memory."""
    link: float
    """GB/s from this GPU to others of its server, one direction (half of the figure that NVLink is sold with)."""
    network: float
    """GB/s from this GPU to other servers, one direction: an assumption about the server, not a figure of the GPU."""
    watts: float
    """Power limit of the board."""
    source: str
    bfloat16: bool = True

    def peak_tflops(self, precision: str) -> float:
        """TFLOP/s in "bf16", "fp16" or "fp32". Raises ``InputError`` where the GPU cannot compute so."""
        if precision == "bf16" and not self.bfloat16:
            raise InputError(f"`{self.name}` cannot compute in bf16", hint="use --precision fp16", key="precision")
        return self.single_tflops if precision == "fp32" else self.half_tflops


_DGX_V100 = "NVIDIA V100 SXM2 32 GB datasheet; network assumed, one 100 Gb/s port a GPU"
_DGX_A100 = "network as in a DGX A100, one 200 Gb/s port a GPU"
_DGX_H100 = "network as in a DGX of that time, one 400 Gb/s port a GPU"
_CARD = "without NVLink: PCIe 4.0 x16; network assumed, one 25 Gb/s port a GPU"

#: GPU, memory GiB, half and single TFLOP/s, memory GB/s, link GB/s, network GB/s, watts, source.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100-32", 32, 125, 15.7, 900, 150, 12.5, 300, _DGX_V100, bfloat16=False),
        Gpu("a100-40", 40, 312, 19.5, 1_555, 300, 25, 400, f"NVIDIA A100 SXM4 40 GB datasheet; {_DGX_A100}"),
        Gpu("a100-80", 80, 312, 19.5, 2_039, 300, 25, 400, f"NVIDIA A100 SXM4 80 GB datasheet; {_DGX_A100}"),
        Gpu("h100", 80, 989, 67, 3_350, 450, 50, 700, f"NVIDIA H100 SXM5 80 GB datasheet; {_DGX_H100}"),
        Gpu("h200", 141, 989, 67, 4_800, 450, 50, 700, f"NVIDIA H200 SXM5 141 GB datasheet; {_DGX_H100}"),
        Gpu("b200", 180, 2_250, 75, 8_000, 900, 50, 1_000, f"NVIDIA HGX B200 datasheet, an eighth of a board; {_DGX_H100}"),
        Gpu("rtx3090", 24, 71, 35.6, 936, 32, 3, 350, f"NVIDIA GA102 whitepaper, RTX 3090; {_CARD}"),
        Gpu("rtx4090", 24, 165, 82.6, 1_008, 32, 3, 450, f"NVIDIA Ada whitepaper, RTX 4090; {_CARD}"),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU of ``GPUS``. Raises ``InputError`` with the nearest name."""
    if name in GPUS:
        return GPUS[name]
    low = name.lower()
    near = [known for known in GPUS if known.startswith(low)] or difflib.get_close_matches(low, GPUS, n=1, cutoff=0.4)
    hint = f"did you mean {' or '.join(f'`{known}`' for known in near)}?" if near else f"known: {', '.join(GPUS)}"
    raise InputError(f"there are no figures for a GPU `{name}`", hint=hint, key="gpu")


def gpu_of_device(name: str) -> Gpu | None:
    """The GPU of ``GPUS`` that a driver calls ``name``, "NVIDIA A100-SXM4-40GB" for one; None if it is none of them."""
    plain = re.sub("[^a-z0-9]", "", name.lower())
    return next((gpu for key, gpu in GPUS.items() if all(part in plain for part in key.split("-"))), None)


@dataclass(frozen=True)
class Cluster:
    """Servers with equal GPUs."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node


def parse_gpus(text: str) -> tuple[int, int]:
    """Servers and GPUs a server of "96x8", or of "8": one server. Raises ``InputError``."""
    found = re.fullmatch(r"(?:(\d{1,6})\s*[x×*])?\s*(\d{1,6})", text.strip().lower())
    nodes, per_node = (int(found[1] or 1), int(found[2])) if found else (0, 0)
    if nodes < 1 or per_node < 1:
        raise InputError(f"`--gpus {text}` is not of the form SERVERSxGPUS", hint="96x8 is 96 servers of 8 GPUs", key="gpus")
    if nodes * per_node > MOST_GPUS:
        raise InputError(f"`--gpus {text}` are more than {MOST_GPUS:,} GPUs", key="gpus")
    return nodes, per_node
