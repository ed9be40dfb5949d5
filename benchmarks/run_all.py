#!/usr/bin/env python3
"""Run all benchmarks, gather what they found, and write the table in ``docs/benchmarks.md``.

    python benchmarks/run_all.py --demo_dir results/demo        (or make bench, after make demo)

Each prints its own figures, with its work, baseline and limit in its ``--help``. Everything goes to
``benchmarks/results/<date>.json``, by benchmark; the table holds the newest figures of each, so that ``--only`` renews
some of its rows. Status 1 if a limit is missed or a benchmark fails. Left out: ``bench_host.py``, which needs a
checkout of LightRFT, and ``soak.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT

ORDER = ("rewards", "features", "sandbox", "startup", "sync", "gather", "rollout", "eval", "train", "decode")
ORDER += ("step", "scaling")  # these two take as long as all others
BUSY = 0.1  # of the CPU time, used by other processes
SETTINGS = {"GOMP_SPINCOUNT": "3000"}  # as the runtime has it: OpenMP threads that wait soon sleep
PAGE = ROOT / "docs" / "benchmarks.md"
START, END = "<!-- results: written by benchmarks/run_all.py -->\n", "<!-- end of results -->\n"


def newest(name: str) -> dict[str, Any] | None:
    """The last results of a benchmark, if there are any.

    :param name: Of the benchmark.
    """
    paths = sorted(RESULTS.glob(f"????-??-??_{name}.json"))
    return json.loads(paths[-1].read_text(encoding="utf-8")) if paths else None


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown of all figures, and of how each was measured.

    :param found: Results by benchmark.
    """
    unsure = [name for name, r in found.items() if r["rounds"] < 5 or r["machine"]["others"] > BUSY]
    note = f"**Preliminary**, in fewer than 5 rounds or on a busy machine: {', '.join(unsure)}.\n"
    lines = [*([note] if unsure else []), "| figure | measured | limit | |", "|---|---|---|---|"]
    for record in found.values():
        for row in record["limits"]:
            verdict = {True: "met", False: "**missed**", None: ""}[row["met"]]
            lines.append(f"| {row['what']} | {row['value']:g} | {row['limit'] or ''} | {verdict} |")
    lines += ["", "| benchmark | date | rounds | threads, cores | used by other processes | took |"]
    lines.append("|---|---|---|---|---|---|")
    for name, record in found.items():
        machine, took = record["machine"], max(1, round(record["seconds"] / 60))
        lines.append(
            f"| {name} | {record['date']} | {record['rounds']} | {machine['threads']}, {machine['cores']} | "
            f"{machine['others']:.0%} | {took} min |"
        )
    return "\n".join(lines) + "\n"


def put_between(text: str, new: str) -> str:
    """Replace what is between the two marks.

    :param text: The page.
    :param new: In place of what is there.
    """
    before, rest = text.split(START)
    return before + START + new + END + rest.split(END)[1]


def main() -> None:
    """Run, gather, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, default=Path("results/demo"), help="where make demo put its files")
    parser.add_argument("--rounds", type=int, help="rounds of each, in place of its own number (at least 5)")
    parser.add_argument(
        "--only", nargs="+", choices=ORDER, default=ORDER, metavar="NAME", help=f"of {', '.join(ORDER)}"
    )
    parser.add_argument("--swift_python", type=Path, help="interpreter with ms-swift 4.6.0 (benchmarks/swift_step.py)")
    args = parser.parse_args()
    if not (args.demo_dir / "model").is_dir():
        raise SystemExit(f"{args.demo_dir}/model: no such folder; run make demo first, or give its --demo_dir")
    failed = []
    for name in [name for name in ORDER if name in args.only]:
        script = ROOT / "benchmarks" / f"bench_{name}.py"
        needs_demo = "--demo_dir" in script.read_text(encoding="utf-8")
        command = [sys.executable, str(script), *(["--demo_dir", str(args.demo_dir)] if needs_demo else [])]
        command += ["--rounds", str(args.rounds)] if args.rounds else []
        command += ["--swift_python", str(args.swift_python)] if args.swift_python and name == "step" else []
        print(f"== {name}, {time.strftime('%H:%M')}", flush=True)
        if subprocess.run(command, env=os.environ | SETTINGS).returncode != 0:
            failed.append(name)
    found = {name: record for name in ORDER if (record := newest(name))}
    path = RESULTS / f"{date.today()}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(put_between(PAGE.read_text(encoding="utf-8"), table(found)), encoding="utf-8")
    print(f"== {path.relative_to(ROOT)}, table in {PAGE.relative_to(ROOT)}")
    if failed:
        raise SystemExit(f"failed, or beyond a limit: {', '.join(failed)}")


if __name__ == "__main__":
    main()
