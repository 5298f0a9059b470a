"""What every result file says first: date, command, machine in words, versions."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

from openglm.evaluation.ceilings import machine_name
from openglm.storage import total_memory
from openglm.version import __version__


def header(*packages: str, device: torch.device | str = "cpu", machine: str = "") -> dict[str, object]:
    """``packages``: names whose versions matter beside openglm's and torch's. ``machine``: in other words than `in_words`."""
    versions = {"openglm": __version__, "torch": torch.__version__, **{name: metadata.version(name) for name in packages}}
    return {
        "date": datetime.date.today().isoformat(),
        "command": command(),
        "machine": machine or in_words(torch.device(device)),
        "versions": versions,
    }


def command() -> str:
    """This script's command, to be pasted; of a path from the root, which is one machine's own, the last part."""
    own, *words = sys.argv
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", f"benchmarks/{Path(own).name}", *words])


def in_words(device: torch.device) -> str:
    """Processor, memory and threads, and the GPU where one computes."""
    host = f"{os.cpu_count()} cores, {machine_name(torch.device('cpu'))}, {total_memory() / 2**30:.0f} GiB"
    if device.type != "cuda":
        threads = torch.get_num_threads()
        return f"{host}, {threads} thread{'s' if threads > 1 else ''}"
    size = torch.cuda.get_device_properties(device).total_memory
    return f"{machine_name(device)}, {size / 2**30:.0f} GiB, in a host with {host}"
