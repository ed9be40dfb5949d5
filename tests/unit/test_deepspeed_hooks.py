"""Steps that are not made, files that cannot be written, checkpoints that would run code: on real DeepSpeed engines."""

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_code
from support.training import FLAGS

from lightrft.strategy.deepspeed_hooks import Storage, is_usable
from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy

SCRIPT = """
import json, math, sys
from types import SimpleNamespace
import torch
from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy
from lightrft.strategy.deepspeed_hooks import is_usable

FLAGS = json.loads(sys.argv[1])

def make(stage, bf16, offload=False, micro_batches=2, lora=False, fused=True):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 64, bias=False), torch.nn.Linear(64, 3, bias=False))
    model[0].requires_grad_(not lora)
    changes = {"zero_stage": stage, "bf16": bf16, "adam_offload": offload, "train_batch_size": micro_batches}
    strategy = DeepspeedStrategy(SimpleNamespace(**FLAGS | changes))
    fused = {"lr": 0.1, "fused": fused}  # the runtime's is
    strategy.optimizer_and_schedule = lambda named, _: (torch.optim.AdamW([p for _, p in named], **fused), None)
    engine, *_ = strategy.prepare_training(model, 10)
    return engine, strategy.step_guard(engine)

def loss(model, i, dtype, factor=1):
    x = torch.arange(4.0).add(i).cos().to(dtype)
    return (model(x) * factor).float().square().sum()

def step(engine, guard, factors, discard=False):
    for i, factor in enumerate(factors):
        engine.backward(loss(engine, i, torch.bfloat16 if engine.bfloat16_enabled() else torch.float32, factor))
        norm = guard.step(discard) if i == 1 else engine.step()
    assert is_usable(norm) == math.isfinite(sum(factors))
    return guard.applied

def weights(engine, stage):
    import deepspeed
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
        engine, folder = plain[0], f"{sys.argv[2]}/{stage}{bf16}"
        DeepspeedStrategy.write_ckpt(None, engine, folder, "step", {})
        resumed = make(stage, bf16)
        reader = SimpleNamespace(args=SimpleNamespace(zero_stage=stage), world_size=1)
        DeepspeedStrategy.read_ckpt(reader, resumed[0], folder, "step")
        assert step(*plain, (1, 2)) and step(*resumed, (1, 2))
        print("RESUMED", json.dumps(weights(resumed[0], stage) == weights(engine, stage) != end))

for stage, offload in ((0, False), (2, False), (2, True), (3, False), (3, True)):
    fused, plain, resumed = (make(stage, False, offload, fused=fused) for fused in (True, False, True))
    assert step(*fused, (1, 1)) and step(*plain, (1, 1))
    folder = f"{sys.argv[2]}/plain{stage}{offload}"
    DeepspeedStrategy.write_ckpt(None, plain[0], folder, "step", {})  # as of an earlier version, which was not fused
    reader = SimpleNamespace(args=SimpleNamespace(zero_stage=stage), world_size=1)
    DeepspeedStrategy.read_ckpt(reader, resumed[0], folder, "step")
    assert step(*fused, (3, 1)) and step(*plain, (3, 1)) and step(*resumed, (3, 1))
    ends = [torch.tensor(sum(weights(one[0], stage), [])) for one in (fused, plain, resumed)]
    print("FUSED", json.dumps([float((end - ends[1]).abs().max()) for end in (ends[0], ends[2])]))

def accumulated(stage, offload, lora, count=32):
    engine, guard = make(stage, True, offload, count, lora)
    seen, inner, group = [], guard._step, guard._inner.param_groups[0]
    guard._step = lambda *_: seen.extend(p.grad.flatten().double() for p in group["params"]) or inner()
    for i in range(count):
        engine.backward(loss(engine, i, torch.bfloat16))
        norm = guard.step(False) if i == count - 1 else engine.step()
    return torch.cat(seen), float(norm)

def expected(lora, count=32):
    model = make(0, True, lora=lora)[0].module
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters() if p.requires_grad]
    for i in range(count):
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss(model, i, torch.bfloat16) / count, trained)
        for total, gradient in zip(sums, gradients):
            total += gradient.double()
    return torch.cat([total.flatten() for total in sums])

for stage, offload, lora in CASES:
    (got, norm), want = accumulated(stage, offload, lora), expected(lora)
    clipped = want * min(1, FLAGS["max_norm"] / norm)
    error = (got[:len(want)] - clipped).norm() / clipped.norm()  # ZeRO-2 pads
    print("ERROR", json.dumps([float(error), abs(norm - float(want.norm())) / float(want.norm())]))
"""
ACCUMULATION = [(0, False, False), (2, False, False), (2, True, False), (3, False, False), (3, True, False)]
ACCUMULATION += [(stage, False, True) for stage in (0, 2, 3)]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    flags = json.dumps(FLAGS | {"param_offload": False, "max_norm": 0.5})
    script = SCRIPT.replace("CASES", repr(ACCUMULATION))
    done = run_code(script, flags, tmp_path_factory.mktemp("checkpoints"))
    return [
        (kind, json.loads(rest))
        for kind, _, rest in (line.partition(" ") for line in done.stdout.splitlines())
        if kind in ("RESULT", "RESUMED", "ERROR", "FUSED")
    ]


def test_a_step_left_out_is_one_that_never_was(printed):
    """Weights and Adam's moments after good, NaN, infinite, discarded, good are those after good, good."""
    results = [values for kind, values in printed if kind == "RESULT"]
    made = [True, False, False, False, True]
    assert results == [[stage, bf16, made, True, True] for stage in (0, 2, 3) for bf16 in (False, True)]


def test_a_resumed_run_goes_on_bit_for_bit(printed):
    assert [same for kind, same in printed if kind == "RESUMED"] == [True] * 6


def test_the_fused_optimizer_makes_the_plain_ones_steps(printed):
    """Within rounding, of weights around 0.5; and it goes on from a checkpoint of the plain one."""
    differences = [values for kind, values in printed if kind == "FUSED"]
    assert len(differences) == 5 and max(map(max, differences)) < 1e-6


def test_bf16_gradients_add_up_in_float32(printed):
    """The optimizer gets the sum of 32 micro-batches' bfloat16 gradients, clipped: bfloat16 sums are 6e-3 off."""
    errors = [values for kind, values in printed if kind == "ERROR"]
    assert len(errors) == len(ACCUMULATION)
    for case, (gradient, norm) in zip(ACCUMULATION, errors, strict=True):
        assert gradient < 2e-6, case
        assert norm < (1e-4 if case[0] == 0 else 1e-6), case  # stage 0's norm is that of gradients rounded to bfloat16


@pytest.mark.parametrize(("norm", "usable"), [(0.0, True), (2.5, True), (-1.0, False), (float("nan"), False)])
def test_a_norm_of_minus_one_means_none(norm, usable):
    assert is_usable(norm) is usable
    assert is_usable(torch.tensor(norm)) is usable
    assert not is_usable(float("inf"))


@pytest.mark.parametrize(
    ("files", "stage", "ranks", "problem"),
    [
        ("{0}_optim {1}_optim mp_rank_00_model", 2, 1, "2 ranks wrote it, these are 1: use as many"),
        ("bf16_{0}_optim bf16_{1}_optim {0}_model {1}_model", 3, 4, "2 ranks wrote it, these are 4: use as many"),
        ("{0}_optim {0}_model", 2, 1, "ZeRO-3 wrote it: go on with --zero_stage 3"),
        ("mp_rank_00_model", 2, 1, "ZeRO-0 wrote it: go on with --zero_stage 0"),
        ("rank0", 2, 1, "DeepSpeed cannot load it; if --fsdp wrote it, go on with --fsdp"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_remedy(tmp_path, files, stage, ranks, problem):
    """The files are those that DeepSpeed 0.19.8 writes; an older run has no record that would say it earlier."""
    (tmp_path / "step_000002").mkdir()
    for name in files.format("zero_pp_rank_0_mp_rank_00", "zero_pp_rank_1_mp_rank_00").split():
        (tmp_path / "step_000002" / f"{name}{'' if name == 'rank0' else '_states'}.pt").touch()
    strategy = object.__new__(DeepspeedStrategy)
    strategy.args, strategy.world_size = SimpleNamespace(zero_stage=stage), ranks
    with pytest.raises(SystemExit) as refused:
        strategy.read_ckpt(None, str(tmp_path), "step_000002")
    assert str(refused.value) == f"--load_checkpoint: {tmp_path}/step_000002: {problem}"


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
