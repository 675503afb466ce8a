"""`make gpu` and `make gpu-quick`: `python -m benchmarks.gpu [--quick] [--folder DIR]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.gpu.device import Cuda, slug
from benchmarks.gpu.page import markdown
from benchmarks.gpu.sections import QUICK, Plan, cuda_or_exit, prove


def main(arguments: list[str] | None = None) -> None:
    """Prove, write CARD.json and CARD.md, print what fell short; exits with 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the essential, in three minutes")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of the results (benchmarks/gpu)")
    chosen = parser.parse_args(arguments)
    failed = write(cuda_or_exit(), QUICK if chosen.quick else Plan(), chosen.folder, "-quick" if chosen.quick else "")
    raise SystemExit(1 if failed else 0)


def write(device: Cuda, plan: Plan, folder: Path, suffix: str = "") -> bool:
    """Prove and write; whether anything failed."""
    results = prove(device, plan, folder)
    name = slug(results["environment"]["gpu"] or "") + suffix
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(results), encoding="utf-8")
    print("\n".join(["", f"Fell short ({len(results['short'])}):", *results["short"]]))
    print(folder / f"{name}.md")
    return bool(results["failed"]) or any("failed" in row for row in (*results["captured"], *results["steps"]))


if __name__ == "__main__":
    main()
