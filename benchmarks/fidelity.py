"""Print how far openglm is from the recorded original, as the table of docs/fidelity.md.

    python benchmarks/fidelity.py [FOLDER]     FOLDER holds golden/ (default: $OPENGLM_SHARED, else ../shared)

Exit code 1 if a difference is over its limit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from recorded import all_differences  # noqa: E402


def main() -> int:
    """Measure and print."""
    shared = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OPENGLM_SHARED") or ROOT.parent / "shared")
    if not (shared / "golden").is_dir():
        print(f"there is no golden/ in {shared}", file=sys.stderr)
        return 2
    print("| compared with the recordings | cases | largest difference | limit |\n|---|---|---|---|")
    held = True
    for row in all_differences(shared):
        held &= row.holds
        show = f"{row.largest:.0f}" if row.limit == 0 else f"{row.largest:.1e}"
        print(f"| {row.what} | {row.cases} | {show} | {row.limit:g} |{'' if row.holds else ' OVER'}", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
