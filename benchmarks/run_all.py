#!/usr/bin/env python3
"""Run the benchmarks one after another; their figures go to ``benchmarks/results/<date>.json``.

    python benchmarks/run_all.py --demo_dir results/demo        (or make bench, after make demo)

Each benchmark prints its figures; its ``--help`` states its work, its baseline and its limits. Status 1 if a limit is
missed or a benchmark fails. Not among them: ``soak.py`` (make soak) and ``gpu/``.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from harness import ROOT, make_parser, parse

BENCHMARKS = ("rewards", "features", "sync", "rollout", "eval", "train", "step")
WITHOUT_DEMO = {"rewards", "train"}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, help="rounds of each, in place of its own number (at least 5)")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="run only these")
    parser.add_argument("--swift_python", type=Path, help="see bench_step.py")
    parser.add_argument("--lightrft_home", type=Path, help="see bench_step.py")
    args = parse(parser)
    failed = []
    for name in args.only:
        command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py")]
        command += [] if name in WITHOUT_DEMO else ["--demo_dir", str(args.demo_dir)]
        command += ["--rounds", str(args.rounds)] if args.rounds else []
        for flag in ("swift_python", "lightrft_home") if name == "step" else ():
            command += [f"--{flag}", str(getattr(args, flag))] if getattr(args, flag) else []
        print(f"== {name}, {time.strftime('%H:%M')}", flush=True)
        # spinning OpenMP threads slow everything down beside other work; the runtime sets the same
        if subprocess.run(command, env=os.environ | {"GOMP_SPINCOUNT": "3000"}).returncode != 0:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed, or beyond a limit: {', '.join(failed)}")


if __name__ == "__main__":
    main()
