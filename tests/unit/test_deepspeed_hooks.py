"""Steps that are not made, files that cannot be written, checkpoints that would run code: on real DeepSpeed engines."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, child_environment

from lightrft.strategy.deepspeed_hooks import Storage, is_usable

SCRIPT = """
import json, math
import torch
from lightrft.utils.distributed import init_process_group
from lightrft.strategy.deepspeed_hooks import StepGuard, is_usable

init_process_group(torch.device("cpu"))
import deepspeed

def make(stage, bf16):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    config |= {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}, "steps_per_print": 10**9}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, StepGuard(engine)

def step(engine, guard, factors, discard=False):
    for i, factor in enumerate(factors):
        x = torch.arange(4.0).add(i).to(torch.bfloat16 if engine.bfloat16_enabled() else torch.float32)
        engine.backward((engine(x) * factor).square().sum())
        norm = guard.step(discard) if i == 1 else engine.step()
    assert is_usable(norm) == math.isfinite(sum(factors))
    return guard.applied

def weights(engine, stage):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return [p.detach().float().flatten().tolist() for p in engine.module.parameters()]

for stage in (0, 2, 3):
    for bf16 in (False, True):
        plain, odd = make(stage, bf16), make(stage, bf16)
        made = [step(*odd, (1, 1)), step(*odd, (1, float("nan"))), step(*odd, (1, float("inf")))]
        made += [step(*odd, (2, 3), discard=True), step(*odd, (3, 1))]
        start = weights(plain[0], stage)
        assert step(*plain, (1, 1)) and step(*plain, (3, 1))
        end = weights(plain[0], stage)
        print("RESULT", json.dumps([stage, bf16, made, start != end, weights(odd[0], stage) == end]))
"""


def test_a_step_left_out_is_one_that_never_was():
    """Weights and Adam's moments after good, NaN, infinite, discarded, good are those after good, good."""
    environment = child_environment() | {"PYTHONPATH": str(ROOT / "runtime")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    made = [True, False, False, False, True]
    assert results == [[stage, bf16, made, True, True] for stage in (0, 2, 3) for bf16 in (False, True)]


@pytest.mark.parametrize(("norm", "usable"), [(0.0, True), (2.5, True), (-1.0, False), (float("nan"), False)])
def test_a_norm_of_minus_one_means_none(norm, usable):
    assert is_usable(norm) is usable
    assert is_usable(torch.tensor(norm)) is usable
    assert not is_usable(float("inf"))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def make_storage() -> Storage:
    return Storage(SimpleNamespace(_copy_recovery_script=lambda path: None))


def test_a_checkpoint_runs_no_code(tmp_path):
    file = tmp_path / "states.pt"
    torch.save({"weights": torch.ones(2), "more": Payload(tmp_path / "made")}, file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make_storage().load(str(file))
    assert not (tmp_path / "made").exists()
    torch.load(file, weights_only=False)  # what it is kept from
    assert (tmp_path / "made").is_dir()


def test_a_failure_to_write_is_remembered(tmp_path):
    storage = make_storage()
    storage.save({"weights": torch.ones(2)}, str(tmp_path / "states.pt"))
    assert storage.failure is None
    assert torch.equal(storage.load(str(tmp_path / "states.pt"))["weights"], torch.ones(2))
    storage.save({"weights": torch.ones(2)}, str(tmp_path / "none" / "states.pt"))
    assert "none" in storage.failure
