"""runtime/lightrft/utils/preemption.py: what a signal does to a user's reward, and to the processes that it forks."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_code

from lightrft.strategy.checkpoint import SaveError
from lightrft.trainer import saving
from lightrft.trainer.saving import ResumePoint, RunSaver
from lightrft.trainer.spmd_ppo_trainer import SPMDPPOTrainerVL
from lightrft.utils.console import console
from lightrft.utils.progress import Progress

PROGRAM = """
import multiprocessing, os, signal, sys, threading, time
import torch
from lightrft.utils.preemption import StopError, stop_request

def sleeps():
    try:
        time.sleep(60)
    except Exception:  # as rewards do that score whatever fails as 0
        pass

def in_a_pool():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        while True:  # signals to the whole group, which its workers survive
            pool.map(time.sleep, [0.1] * 4)

def in_many_pools():
    for _ in range(100):  # a worker may be ended before it has begun
        with multiprocessing.get_context("fork").Pool(2) as pool:
            pool.map(abs, [1])
    return 1.0

os.setsid()
stop_request.install()
if len(sys.argv) > 2:
    threading.Timer(1.0, os.killpg, (0, getattr(signal, sys.argv[2]))).start()
print(stop_request.interrupt(globals()[sys.argv[1]]))
try:
    stop_request.check(torch.device("cpu"))
except StopError as stop:
    sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(
    ("reward", "number", "status"),
    [
        ("in_many_pools", None, 0),
        ("in_a_pool", "SIGINT", 130),
        ("in_a_pool", "SIGUSR1", 138),
        ("in_a_pool", "SIGTERM", 143),
        ("sleeps", "SIGTERM", 143),
    ],
)
def test_a_reward_that_forks_or_sleeps_ends_and_obeys(reward, number, status):
    done = run_code(PROGRAM, reward, *filter(None, [number]), check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout == ("None\n" if number else "1.0\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "ranks", "whole", "saves"),
    [
        (OSError("gone"), 1, True, True),
        (OSError("gone"), 1, False, False),  # between optimizer step and resume point, or a loss that is not finite
        (SaveError("disk full"), 1, True, False),  # it would fail again
        (OSError("gone"), 2, True, False),  # the other rank knows nothing and would wait
    ],
)
def test_an_error_saves_what_is_whole_and_stays_the_same(error, ranks, whole, saves):
    trainer, saved = object.__new__(SPMDPPOTrainerVL), []
    trainer.strategy = SimpleNamespace(world_size=ranks)
    save = lambda folder: saved.append(folder) or "saved"  # noqa: E731
    trainer.saver = SimpleNamespace(whole=whole, unevaluated=None, save_before_exit=save)
    assert trainer._end_of(error) is error
    assert saved == [False] * saves


@pytest.mark.parametrize(
    ("step", "saved", "full", "written", "said"),
    [
        (0, 0, "", [], "no step is done yet, so there is nothing to save"),
        (8, 8, "", ["hf_step_000008.part"], "step 8 is .* --load_checkpoint goes .*; /.*/hf_step_000008 is its"),
        (
            9,
            8,
            "",
            ["step_000009", "hf_step_000009.part"],
            "step 9 .* saved; .* --load_checkpoint .*; /.*/hf_step_000009",
        ),
        (9, 8, "step_000009", [], "step 9 is the last one that is done, but could not be saved: full$"),
        (9, 8, "hf_step_000009.part", ["step_000009"], ".* and saved; .* --load_.* on from there; full$"),
    ],
)
def test_a_run_that_ends_early_writes_what_is_new_and_says_so(monkeypatch, tmp_path, step, saved, full, written, said):
    wrote = []

    def write(name):
        if name == full:
            raise SaveError("full")
        wrote.append(name)

    strategy = SimpleNamespace(
        args=SimpleNamespace(save_path=tmp_path, ckpt_path=tmp_path, max_ckpt_num=1, save_hf_on_stop=True),
        save_ckpt=lambda model, folder, tag, keep, state: write(tag),
        save_model=lambda model, tokenizer, folder: write(Path(folder).name),
        together=lambda action, mine: None,
        is_rank_0=lambda: True,
    )
    monkeypatch.setattr(saving, "gather_objects", lambda value: [value])
    point = ResumePoint(step, 4 * step, 0.1, {})
    saver = RunSaver(strategy, SimpleNamespace(model=None), None, False, False, print, point)
    saver.saved = saved
    assert re.match(said, saver.save_before_exit())
    assert wrote == written


def test_an_evaluation_that_a_resumed_run_makes_up(monkeypatch):
    """The checkpoint asks for it until one is written after it; where it always fails, the message names a way on."""
    trainer = object.__new__(SPMDPPOTrainerVL)
    trainer.strategy, trainer.writers, trainer.progress = SimpleNamespace(world_size=1), [], Progress()
    trainer.saver = RunSaver(SimpleNamespace(args=None), None, None, False, False, print, ResumePoint(3, 12, 0.1, {}))
    monkeypatch.setattr(trainer.saver, "save_before_exit", lambda folder: "step 3 is the last one")
    monkeypatch.setattr(console, "stream", shown := io.StringIO())
    trainer.saver.saved, error = 3, ValueError("no judge")

    def fails(step):
        raise error

    with pytest.raises(ValueError, match="no judge"):
        trainer._evaluate_first(fails, 3, {})
    assert trainer._end_of(error) is error and trainer.saver.saved == 3
    way_on = "ends the run: step 3 is the last one; with --eval_steps -1 it goes on without evaluation\n"
    assert shown.getvalue().endswith(way_on)
    trainer._evaluate_first(lambda step: {"eval/reward": 1.0}, 3, {})
    assert trainer.saver.saved == 0 and trainer.saver.unevaluated is None
    trainer._end_of(error)
    assert shown.getvalue().endswith("step 3 is the last one\n")
