"""Whether the Triton kernels run on a device. Imports Triton only when asked."""

from __future__ import annotations

import importlib.util
import os

import torch

#: Below it there are no float16 products worth having; Triton itself promises nothing below 8.0.
LEAST_CAPABILITY = (7, 0)


def why_not(device: torch.device | str, dtype: torch.dtype = torch.float16) -> str:
    """One sentence that says why the kernels do not run on a device with activations of a type; empty if they do."""
    device = torch.device(device)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the GPU kernels compute in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "the GPU kernels need Triton, which is not installed: pip install triton"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda" or torch.version.hip:
        return f"the GPU kernels are for NVIDIA's GPUs, not for `{device.type if device.type != 'cuda' else 'ROCm'}`"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the GPU kernels need compute capability 7.0, and this GPU has {capability[0]}.{capability[1]}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return f"bfloat16 needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}: load it in float16"
    return ""
