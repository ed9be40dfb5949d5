#!/usr/bin/env python3
"""What a GPU does with this project, in 12 minutes; all.sh prepares the environment and starts this.

    bash benchmarks/gpu/all.sh                                     # results under $OUT, or results/gpu
    bash benchmarks/gpu/all.sh --minutes 9 --out results/gpu       # again: goes on where the first call ended
    bash benchmarks/gpu/all.sh --only training:FSDP2 sync          # a section, or cases of one by parts of their names
    bash benchmarks/gpu/all.sh --small --out results/gpu_small     # tiny sizes, also on a CPU, to see that all runs

Each section is a process of its own with a limit of time; results.json is written after every case, so that what is
done is kept whatever comes. A case that fails, or runs out of memory, ends neither its section nor the others. At the
end comes a table, also in summary.txt; all.log has what libraries print. Exit status 1: something failed or missed its
limit.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from harness import make_parser

from gpu.record import Results, Section, describe

# Seconds that a section may take of the 12 minutes, and those that it should take on an H200 (reckoned, not measured).
SECTIONS = {
    "environment": (60, 25),  # the first imports, from the disk; versions, GPU, a bf16 matrix product's peak, copies
    "training": (210, 120),  # train_colocate.py on the demo's model: ZeRO-3, ZeRO-2, LoRA, FSDP2, resume, offload
    "steps": (170, 110),  # steps of the 7B shape: MFU, memory, what each measure saves, the hf engine
    "planner": (90, 60),  # the memory that --plan computes, against what torch allocates
    "sync": (80, 50),  # checksums and gathering against a copy
    "adamw": (40, 20),  # fused against foreach
    "picture": (60, 35),  # where the time of a step goes
}
MINUTES = 12.0
UNKNOWN = 3  # exit status of a section that has no such case, and has said so in its record
LEAST = 10.0  # seconds; with less left a section is not started


def main() -> None:
    parser = make_parser(__doc__)
    default, said = Path(os.environ.get("OUT", "results/gpu")), "folder of the results (default: $OUT or results/gpu)"
    parser.add_argument("--out", type=Path, default=default, help=said)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of the whole call (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION[:CASE]", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--small", action="store_true", help="tiny sizes; without a GPU needed")
    parser.add_argument("--of_section", help=argparse.SUPPRESS)  # marks the process that runs one section
    args = parser.parse_args()
    wanted = {name: [] for name in SECTIONS} if not args.only else {}
    for word in args.only:
        name, _, case = word.partition(":")
        if name not in SECTIONS:
            parser.error(f"--only {word}: there are {', '.join(SECTIONS)}")
        wanted.setdefault(name, []).extend([case] if case else [])
    results = Results(args.out / "results.json", args.small)
    if args.of_section:
        name = args.of_section
        section = Section(results, name, args, wanted[name])
        importlib.import_module(f"gpu.{name}").run(section)
        unknown = [word for word in wanted[name] if not any(word.lower() in case.lower() for case in section.names)]
        if unknown:
            results.section(name)["status"] = f"no case {', '.join(unknown)}: there are {', '.join(section.names)}"
            results.write()
            raise SystemExit(UNKNOWN)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that finally ends the section
    results.write()
    ends = time.monotonic() + 60 * args.minutes
    try:
        for name in wanted:
            if not results.is_whole(name):
                limit = min(SECTIONS[name][0] * max(1.0, args.minutes / MINUTES), ends - time.monotonic())
                run_section(args, name, limit, wanted[name])
    finally:
        results = Results(results.path, args.small)
        table = describe_all(results)
        (args.out / "summary.txt").write_text(table + "\n", encoding="utf-8")
        print(table)
    raise SystemExit(int(any(results.is_wrong(name) for name in wanted)))


def run_section(args: argparse.Namespace, name: str, limit: float, cases: list[str]) -> None:
    """Run a section in a process of its own, and end that with all its children when its time is over.

    :param limit: Seconds.
    :param cases: Parts of the names of the cases to run; empty: all.
    """
    path, started, status, code = args.out / "results.json", time.monotonic(), "no time left", None
    if limit >= LEAST:
        print(f"{name}: at most {limit:.0f} s ...", flush=True)
        command = [sys.executable, __file__, "--of_section", name, "--out", str(args.out), *["--small"] * args.small]
        command += ["--demo_dir", str(args.demo_dir)]
        command += ["--only", *args.only] * bool(args.only)
        with (args.out / "all.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                code = process.wait(limit)
                status = f"ended with {code}" if code else "in part" if cases else "ok"
            except subprocess.TimeoutExpired:
                status = f"over {limit:.0f} s"
            finally:
                end_group(process)
    results = Results(path, args.small)
    section = results.section(name)
    section["status"] = section["status"] if code == UNKNOWN else status
    section["seconds"] = round(time.monotonic() - started, 1)
    for case in section["cases"].values():
        if case["status"] == "running":
            case["status"] = "not ended"
    results.write()


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):  # all its processes have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe_all(results: Results) -> str:
    """The table of all sections and their cases."""
    lines = []
    for name in SECTIONS:
        section = results.section(name)
        status = "not all well" if section["status"] == "ok" and results.is_wrong(name) else section["status"]
        lines += ["", f"{name}: {status}, {section['seconds']:.0f} s"]
        lines += [describe(*case) for case in section["cases"].items()]
    note = ["", "--small: these figures show that the code runs, and nothing else"] if results.all["small"] else []
    return "\n".join(lines + note)


if __name__ == "__main__":
    main()
