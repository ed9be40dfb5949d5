"""Shared fixtures: a tiny warm-started model, and the demo's data processed as a user would."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from aqa.families import FAMILIES
from lightrft.utils.families import register

register(FAMILIES)  # as the host does it, for tests that use parts of the runtime

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE, RUNTIME = ROOT / "examples" / "r1_aqa", ROOT / "runtime"
LAUNCH_SCRIPT = EXAMPLE / "run_grpo_r1_aqa_qwen2_audio_7b.sh"
NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a whole safetensors file without tensors

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the environment of `make setup` is for the CPU, also beside a GPU
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that Ctrl-C is ignored


def child_environment() -> dict[str, str]:
    """The environment, without a process group that a test has made in this process."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in group}


def run_command(
    *command: object, check: bool = True, timeout: float = 600, cwd: Path | None = None, **variables: object
) -> subprocess.CompletedProcess:
    """Run a command to its end.

    :param check: Fail the test, with the end of the output, if the command fails.
    :param variables: Changes of the environment; None removes a variable.
    """
    env = {name: str(value) for name, value in (child_environment() | variables).items() if value is not None}
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=env, cwd=cwd)
    if check and done.returncode != 0:
        ended = f"{' '.join(words)[:300]} ended with {done.returncode}"
        pytest.fail(f"{ended}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return done


def run_script(script: str, *args: object, **kwargs) -> subprocess.CompletedProcess:
    """Run one of the example's scripts, which is named by its path below examples/r1_aqa."""
    return run_command(sys.executable, EXAMPLE / script, *args, **kwargs)


def run_code(
    code: str, *args: object, path: Sequence[Path] = (EXAMPLE, RUNTIME), **kwargs
) -> subprocess.CompletedProcess:
    """Run Python code that imports from the folders of ``path``."""
    return run_command(sys.executable, "-c", code, *args, PYTHONPATH=os.pathsep.join(map(str, path)), **kwargs)


def python_on(processes: int) -> list[object]:
    """The first words of a command: Python, under torchrun for several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def parse_flags(words: Iterable[object] = ()) -> argparse.Namespace:
    """The flags of training, completed as train_colocate.py does."""
    from aqa.training.flags import build_parser, finish
    from lightrft.utils import add_arguments

    args = build_parser(add_arguments).parse_args(list(map(str, words)))
    finish(args)
    return args


def wait_for(condition: Callable[[], object], *processes: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until something is true. The test fails where it takes longer, or where one of the processes ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        assert all(process.poll() is None for process in processes), "a process ended before"
        time.sleep(0.005)


def wait_until_gone(pid: int) -> None:
    """Wait until a process has ended. A zombie has: whoever inherited it has not looked yet."""
    stat = Path(f"/proc/{pid}/stat")
    wait_for(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z", seconds=10)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that all workers of ``pytest -n`` use and the first that needs it makes."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The demo's model, warm-started to answer in the right format."""
    command = ("demo/make_model.py", "--warm_start_steps", 60, "--out_dir")
    return made_once(tmp_path_factory, "tiny_model", lambda folder: run_script(*command, folder))


@pytest.fixture(scope="session")
def tiny_omni(tmp_path_factory) -> Path:
    """The same of Qwen2.5-Omni's thinker."""
    command = ("demo/make_model.py", "--family", "qwen2_5_omni", "--warm_start_steps", 60, "--out_dir")
    return made_once(tmp_path_factory, "tiny_omni", lambda folder: run_script(*command, folder))


@pytest.fixture(scope="session")
def tiny_flamingo(tmp_path_factory) -> Path:
    """The same of Audio Flamingo 3."""
    command = ("demo/make_model.py", "--family", "audioflamingo3", "--warm_start_steps", 60, "--out_dir")
    return made_once(tmp_path_factory, "tiny_flamingo", lambda folder: run_script(*command, folder))


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    """A small set of the demo's data: train_qa.data, audios/, demo-test.json, test-audios/."""
    questions = ("--train_questions", 96, "--train_clips", 40, "--test_questions", 24)
    command = ("demo/make_data.py", *questions, "--out_dir")
    return made_once(tmp_path_factory, "demo_data", lambda folder: run_script(*command, folder))


@pytest.fixture(scope="session")
def demo_parquet(demo_data, tmp_path_factory) -> Path:
    """The demo's training rows through avqa.py, with a validation split."""
    source = ("--input_jsonl", demo_data / "train_qa.data", "--audio_dir", demo_data)
    command = ("data_preprocess/avqa.py", *source, "--val_ratio", 0.2, "--local_save_dir")
    return made_once(tmp_path_factory, "demo_parquet", lambda folder: run_script(*command, folder))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark files beside the checkout; tests that need them are skipped where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real benchmark files (../shared/data) are not here")
    return folder


@pytest.fixture
def problems(tmp_path):
    """``problems(world_size, flag=value, ...)``: what the flags' check says of an otherwise valid run."""
    from aqa.hosts.runtime import RuntimeHost
    from aqa.training.flag_rules import find_problems

    model, data = tmp_path / "model", tmp_path / "data"
    names = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
    for path in (*(model / name for name in names), data / "train.parquet"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (model / "model.safetensors").write_bytes(NO_WEIGHTS)

    def find(world_size: int = 1, local_world_size: int | None = None, **flags) -> list[str]:
        flags = {"pretrain": str(model), "prompt_data": str(data)} | flags
        command = []
        for name, value in flags.items():
            if isinstance(value, bool):
                command.append(f"--{name}" if value else f"--no-{name}")
            elif value is not None:
                command.append(f"--{name}={value}")
        args = parse_flags(command)
        return find_problems(args, world_size, local_world_size) + RuntimeHost().find_problems(args)

    return find


@pytest.fixture(scope="session")
def sampling_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with Qwen2-Audio-7B-Instruct's generation config and what others add to theirs; of its end tokens
    all but the first are words that the model often says.
    """
    folder = tmp_path_factory.mktemp("sampling_model")
    for file in tiny_model.iterdir():
        (folder / file.name).symlink_to(file)
    words = json.loads((tiny_model / "tokenizer.json").read_text())["model"]["vocab"]
    config = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.5}
    config |= {"eos_token_id": [2, words["bell"], words["beep"]], "pad_token_id": 0, "min_new_tokens": 3}
    config |= {"suppress_tokens": [5, 6], "no_repeat_ngram_size": 2, "max_new_tokens": 5}
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def parts(sampling_model) -> tuple:
    """Actor with the audio patch, tokenizer and processor of the tiny model; in a process group of one."""
    import torch

    from aqa.hosts.targets import patch_actor_for_audio
    from lightrft.models.actor_al import ActorAL
    from lightrft.utils.distributed import init_process_group
    from lightrft.utils.processor import get_tokenizer_processor_vl

    init_process_group(torch.device("cpu"))
    actor = ActorAL(str(sampling_model), bf16=False)
    patch_actor_for_audio(actor)
    return actor, *get_tokenizer_processor_vl(str(sampling_model), actor.model)


@pytest.fixture(scope="module")
def vllm_engine(sampling_model, parts):
    """vLLM with the tiny model's weights, in this process."""
    import torch

    from lightrft.engines.vllm_engine import VLLMEngine

    return VLLMEngine(str(sampling_model), torch.float32, max_model_len=1400, seed=0)


@pytest.fixture(scope="module")
def noises() -> list:
    """Clips of noise: ``(waveform, 16000)`` of each length in ``support.rollouts.SECONDS``."""
    from support.rollouts import make_noises

    return make_noises()
