"""Memory and speed of `glm convert` on a checkpoint of GLM-130B's widths.

    python benchmarks/convert.py FOLDER [--layers 5] [--limit 1000000000] [--json FILE]

Writes a synthetic released checkpoint (8 tensor-parallel shards, float16, random numbers) of a few layers into FOLDER, then
times a synced `cp -r` of it, `glm convert`, and `glm convert --bits 4`, one after the other and each with one copy on the disk.
The conversions run with RLIMIT_DATA at the limit: the kernel refuses them any private memory beyond it. Needs twice the
checkpoint's size of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from header import header

from openglm.checkpoints.layout import expected_shapes
from openglm.checkpoints.released import _shard_shape
from openglm.config import ModelConfig

RANKS = 8


def write(folder: Path, layers: int) -> int:
    """The released layout with random numbers; returns its bytes."""
    config = ModelConfig.preset("130b", num_layers=layers)
    (folder / "1").mkdir(parents=True)
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).half() * 0.02
    for rank in range(RANKS):
        module = {}
        for number, (name, shape) in enumerate(expected_shapes(config).items()):
            own = torch.Size(_shard_shape(name, shape, RANKS))
            copies = noise.roll(997 * number + (rank if own != shape else 0))
            module["transformer." + name] = copies.repeat(-(-own.numel() // len(noise)))[: own.numel()].view(own).clone()
        torch.save({"module": module}, folder / "1" / f"mp_rank_{rank:02d}_model_states.pt")
        print(f"shard {rank + 1} of {RANKS}", flush=True)
    (folder / "latest").write_text("1")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def timed(command: list[str], target: Path, limit: int | None) -> tuple[float, int]:
    """Seconds until it is on the disk, and the most anonymous memory that was seen on the way."""
    os.sync()
    start = time.perf_counter()
    set_limit = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    process = subprocess.Popen(command, preexec_fn=set_limit)
    most = 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, *(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)
        except OSError:
            pass
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"error: `{' '.join(command)}` ended with {process.returncode}")
    subprocess.run(["sync", "-f", str(target)], check=True)
    return time.perf_counter() - start, most


def main() -> None:
    """Write, copy, convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--limit", type=int, default=1_000_000_000)
    parser.add_argument("--machine", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source, target = args.folder / "released", args.folder / "target"
    size = write(source, args.layers)
    print(f"{size / 1e9:.2f} GB")
    glm = [sys.executable, "-m", "openglm", "convert", str(source), str(target)]
    rows = []
    for name, command, limit in (
        ("cp -r", ["cp", "-r", str(source), str(target)], None),
        ("glm convert", glm, args.limit),
        ("glm convert --bits 4", [*glm, "--bits", "4"], args.limit),
    ):
        seconds, most = timed(command, args.folder, limit)
        rows.append(
            {"what": name, "seconds": round(seconds, 1), "MB_per_second": round(size / seconds / 1e6, 1), "RssAnon": most}
        )
        print(
            f"{name:22} {seconds:7.1f} s  {size / seconds / 1e6:7.1f} MB/s of the source  {most / 1e6:6.0f} MB anonymous",
            flush=True,
        )
        shutil.rmtree(target)
    shutil.rmtree(source)
    if args.json:
        result = {
            **header(machine=args.machine),
            "bytes": size,
            "RLIMIT_DATA": args.limit,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
