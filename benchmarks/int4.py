"""What 4 and 8 bits cost models of several sizes, and how their weights are distributed (paper, section 3.2 and appendix B).

    python benchmarks/int4.py --model "nano: nano" --model "other: FOLDER" --text FILE [--text FILE] [--json FILE] [--plot FILE]

Each model is stored anew in every format, loaded, and measured on the same windows of the texts. Distributions are those
of the layers' matrices, every weight over the root mean square of its row: a tail far out is what makes a scale coarse.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from header import header

import openglm
from openglm.bundled import find_model
from openglm.checkpoints import convert_source, open_model
from openglm.config import QUANTIZED_MATRICES, QuantizationScheme
from openglm.data.readers import read_documents
from openglm.errors import ConfigError
from openglm.storage import atomic_write
from openglm.training.report.lines import LIGHT, drawing, figure
from openglm.training.validation import bits_per_byte, network_losses

SCHEMES = {
    "8 bits, rows": QuantizationScheme(8),
    "8 bits, groups of 128": QuantizationScheme(8, 128),
    "4 bits, rows": QuantizationScheme(4),
    "4 bits, groups of 128": QuantizationScheme(4, 128),
    "4 bits, groups of 64": QuantizationScheme(4, 64),
    "4 bits, groups of 32": QuantizationScheme(4, 32),
}
EDGES = np.linspace(-10, 10, 101)


def measure(folder: Path, texts: list[str]) -> float:
    """Bits per byte."""
    glm = openglm.load(folder)
    assert glm.tokenizer is not None
    ids = (np.asarray(glm.tokenizer.encode(text)[:512], dtype=np.int64) for text in texts)
    return bits_per_byte(network_losses(glm.network, glm.engine.device), ids, glm.tokenizer)


def distribution(folder: Path) -> dict[str, Any]:
    """Shares of weights by size, and how heavy the tails are, of each kind of matrix and of all."""
    source = open_model(folder)
    found: dict[str, Any] = {}
    total = np.zeros(len(EDGES) - 1)
    for matrix in QUANTIZED_MATRICES:
        fourth, largest, count = 0.0, [], 0
        for layer in range(source.config.num_layers):
            weight = source.tensor(f"layers.{layer}.{matrix}.weight").float()
            ratio = weight / weight.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
            total += np.histogram(ratio.numpy(), EDGES)[0]
            fourth += float(ratio.double().pow(4).sum())
            count += ratio.numel()
            largest.append(ratio.abs().amax(1))
        name = matrix.rpartition(".")[2] if "mlp" in matrix else matrix
        found[name] = {
            "kurtosis": round(fourth / count, 3),  # 3 for a normal distribution
            "largest over rms of a row, median": round(float(torch.cat(largest).median()), 2),
            "largest over rms of a row, most": round(float(torch.cat(largest).max()), 2),
        }
    return {"matrices": found, "shares": (total / total.sum()).tolist()}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Weights on the left, bits per byte on the right."""
    with drawing(LIGHT):
        made, (left, right) = figure(2, shared=False)
        middles = (EDGES[1:] + EDGES[:-1]) / 2
        for row, colour in zip(rows, itertools.cycle(LIGHT.lines)):
            shares = np.asarray(row["distribution"]["shares"]) / np.diff(EDGES)
            left.semilogy(middles, np.where(shares > 0, shares, np.nan), color=colour, label=row["model"], linewidth=1.2)
        left.semilogy(middles, np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi), color=LIGHT.faint, linestyle=":", label="normal")
        left.set(xlabel="weight over the root mean square of its row", ylabel="density", ylim=(1e-8, 1))
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.legend(fontsize=7)
        names = list(SCHEMES)
        width = 0.8 / len(rows)
        for number, (row, colour) in enumerate(zip(rows, itertools.cycle(LIGHT.lines))):
            bits = row["bits_per_byte"]
            heights = [100 * (bits.get(name, np.nan) / bits["float16"] - 1) for name in names]
            right.bar(np.arange(len(names)) + number * width, heights, width, color=colour, label=row["model"])
        right.set_xticks(np.arange(len(names)) + 0.4 - width / 2, [name.replace(", ", ",\n") for name in names], fontsize=8)
        right.set(ylabel="more bits per byte than in float16, %")
        right.legend(fontsize=7)
        with atomic_write(path) as file:
            made.savefig(file, format="png")


def main() -> None:
    """Quantize, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME: FOLDER")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--texts", type=int, default=40, help="of each file")
    parser.add_argument("--machine", default="", help="what the machine is, in words, for the JSON file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    texts = [document.text for path in args.text for document in itertools.islice(read_documents([path]), args.texts)]
    rows: list[dict[str, Any]] = []
    for given in args.model:
        name, _, place = given.partition(":")
        folder = find_model(place.strip())
        found = {"float16": measure(folder, texts)}
        with tempfile.TemporaryDirectory() as scratch:
            for number, (scheme_name, scheme) in enumerate(SCHEMES.items()):
                target = Path(scratch) / str(number)
                try:
                    convert_source(open_model(folder), target, dtype="float16", scheme=scheme)
                except ConfigError:  # its groups do not divide the rows
                    continue
                found[scheme_name] = measure(target, texts)
        parameters = open_model(folder).config.parameter_count
        rows.append(
            {"model": name.strip(), "parameters": parameters, "bits_per_byte": found, "distribution": distribution(folder)}
        )
        for scheme_name, value in found.items():
            print(f"{name:24} {parameters:12,} {scheme_name:24} {value:.4f} {value / found['float16'] - 1:+8.2%}", flush=True)
    if args.plot:
        draw(rows, args.plot)
    if args.json:
        result = {**header(machine=args.machine), "texts": len(texts), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
