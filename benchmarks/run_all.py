#!/usr/bin/env python3
"""Run all benchmarks that need nothing but this repository and the demo's files, and gather what they found.

    python benchmarks/run_all.py --demo_dir results/demo        (or make bench, after make demo)

Each prints its own figures, with its work, baseline and limit in its ``--help``. Everything goes to
``benchmarks/results/<date>.json``, by benchmark. Left out: ``bench_host.py``, which needs a LightRFT checkout, and
``soak.py``, which takes ten minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEFT_OUT = ("host",)


def main() -> None:
    """Run, gather, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, default=Path("results/demo"), help="where make demo put its files")
    args = parser.parse_args()
    if not (args.demo_dir / "model").is_dir():
        raise SystemExit(f"{args.demo_dir}/model: no such folder; run make demo first, or give its --demo_dir")
    found, failed = {}, []
    for script in sorted(HERE.glob("bench_*.py")):
        name = script.stem.removeprefix("bench_")
        if name in LEFT_OUT:
            continue
        needs_demo = "--demo_dir" in script.read_text(encoding="utf-8")
        print(f"== {name}", flush=True)
        started = time.time()
        command = [sys.executable, str(script), *(["--demo_dir", str(args.demo_dir)] if needs_demo else [])]
        if subprocess.run(command).returncode != 0:
            failed.append(name)
        for path in (HERE / "results").glob(f"*_{name}.json"):
            if path.stat().st_mtime >= started:
                found[name] = json.loads(path.read_text(encoding="utf-8"))
    path = HERE / "results" / f"{date.today()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"== {path.relative_to(HERE.parent)}")
    if failed:
        raise SystemExit(f"failed, or beyond a limit: {', '.join(failed)}")


if __name__ == "__main__":
    main()
