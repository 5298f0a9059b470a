"""Run the bundled model's examples of READMEs and docs and write back what they print; fill in the READMEs' speeds.

    python benchmarks/readme.py [--speed benchmarks/results/DATE-inference.json]

Only ```console blocks are touched: lines that begin with `$ ` are commands, everything else is output, what goes to stderr too.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = (ROOT / "README.md", ROOT / "README.zh.md")
DOCS = (ROOT / "docs" / "inference.md",)


def run(command: str) -> str:
    """What a `glm` command prints."""
    words = [sys.executable, "-m", "openglm", *shlex.split(command)[1:]]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode not in (0, 2):  # 2: an example of bad input
        raise SystemExit(f"`{command}` ended with {done.returncode}:\n{done.stdout}")
    return done.stdout.rstrip("\n")


def renew(block: str) -> str:
    """A console block with fresh output."""
    commands = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    return "\n".join(f"$ {command}\n{run(command)}" for command in commands) + "\n"


def speed_table(path: Path) -> str:
    """The rows of a result of benchmarks/inference.py as markdown."""
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| model | | openglm | transformers | ratio |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            f"| `{row['model']}` | {row['measure']} | {row['openglm']:.2f} | {row['transformers']:.2f} | {row['ratio']:.2f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([*lines, "", f"{result['date']}, {result['machine']}, {versions}: `{result['command']}`"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=Path, metavar="FILE")
    args = parser.parse_args()
    fresh: dict[str, str] = {}
    for path in (*READMES, *DOCS):
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```console\n(.*?)^```", text, re.M | re.S):
            commands = "\n".join(line for line in block.splitlines() if line.startswith("$ "))
            fresh[commands] = fresh.get(commands) or renew(block)
            text = text.replace(block, fresh[commands])
        if args.speed and path in READMES:
            before, _, rest = text.partition("<!-- speed -->\n")
            text = f"{before}<!-- speed -->\n{speed_table(args.speed)}\n<!-- /speed -->{rest.partition('<!-- /speed -->')[2]}"
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
