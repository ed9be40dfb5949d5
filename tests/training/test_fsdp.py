"""FSDP2 in the runtime: the engine's steps against plain PyTorch, checkpoints, what is refused."""

import copy
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.training import FLAGS, metrics_of, train
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from aqa.families import Qwen2Audio
from lightrft.strategy.checkpoint import read_state, write_state
from lightrft.strategy.fsdp_strategy import FSDPStrategy
from lightrft.utils.families import FAMILIES

IDS = torch.arange(8)[None]


def make_model(layers=2, tied=False):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))


def make_engine(model=None, **flags):
    strategy = FSDPStrategy(SimpleNamespace(**FLAGS | flags))
    engine, *_ = strategy.prepare_training(model or make_model(), 10)
    return strategy, engine


def loss_of(model, shift=0, factor=1.0):
    return factor * model(input_ids=IDS + shift, labels=IDS + shift).loss


def step(engine, shift=0, factor=1.0, discard=False):
    """Two micro-batches, the factor in the second."""
    for i, scale in enumerate((1.0, factor)):
        assert engine.is_gradient_accumulation_boundary() is (i == 1)
        engine.backward(loss_of(engine, shift + i, scale))
        norm = engine.step(discard)
        assert math.isnan(norm) or i == 1
    return norm


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """The small model here names its weights as Qwen2-Audio does; and FSDP2 does without DeepSpeed."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(FAMILIES, "qwen2", Qwen2Audio)


def weights(strategy, engine):
    return {name: tensor.detach().clone() for name, tensor in strategy.named_weights(engine)}


@pytest.mark.parametrize("tied", [False, True])
def test_steps_are_those_of_plain_pytorch(tied):
    """Gradients are averaged, clipped by their global norm, and AdamW decays what it should."""
    strategy, engine = make_engine(make_model(tied=tied))
    plain = make_model(tied=tied)
    optimizer, scheduler = strategy.optimizer_and_schedule(plain.named_parameters(), 10)
    assert all(group["fused"] for group in optimizer.param_groups + engine.optimizer.param_groups)
    for group in optimizer.param_groups:
        group["fused"] = False  # torch's plain loop
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for shift in (0, 3):
        (0.5 * (loss_of(plain, shift) + loss_of(plain, shift + 1))).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        assert expected > 0.5  # there was something to clip
        assert step(engine, shift) == pytest.approx(expected.item(), rel=1e-5)
    own = dict(plain.named_parameters())
    for name, parameter in engine.module.named_parameters():
        # Adam divides by the size of a gradient, and so magnifies what rounding leaves of a very small one
        torch.testing.assert_close(parameter.full_tensor(), own[name].data, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_left_out_is_one_that_never_was(bf16):
    """Good, NaN, infinite, discarded, good: weights and moments are those of good, good; only the schedule goes on."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    (strategy, odd), (_, plain) = (make_engine(make_model().to(dtype), bf16=bf16) for _ in range(2))
    made = []
    for factor, discard in ((1.0, False), (math.nan, False), (math.inf, False), (2.0, True)):
        assert math.isfinite(step(odd, 0, factor, discard)) is (made == [] or discard)
        made.append(odd.applied)
    assert made == [True, False, False, False]
    step(plain)
    for _ in range(3):
        plain.scheduler.step()
    for engine in (odd, plain):
        step(engine, 1)
        assert engine.applied
    first, second = weights(strategy, odd), weights(strategy, plain)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {dtype}
    assert {parameter.dtype for parameter in odd.module.parameters()} == {torch.float32}  # what the optimizer updates


def test_all_is_sharded_whenever_nothing_runs():
    strategy, engine = make_engine()

    def sharded():
        return all(isinstance(parameter, DTensor) for parameter in engine.module.parameters())

    assert sharded()
    engine.backward(loss_of(engine))
    assert sharded()
    with torch.no_grad():
        expected = loss_of(engine)
    assert sharded()
    with strategy.gathered(engine) as model, torch.no_grad():
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        hidden = model.model(input_ids=IDS).last_hidden_state  # parts of it, as the hf engine runs them
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        logits = model.lm_head(hidden)[0, :-1]
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, IDS[0, 1:]), expected)
    assert sharded()


def test_a_state_goes_on_bit_for_bit(tmp_path):
    (strategy, first), (_, second) = make_engine(), make_engine()
    step(first)
    write_state(first.state(), tmp_path / "rank0.pt")
    step(first, 5)
    state = read_state(tmp_path / "rank0.pt")
    second.load_state(copy.deepcopy(state))
    step(second, 5)
    one, two = weights(strategy, first), weights(strategy, second)
    assert all(torch.equal(one[name], two[name]) for name in one)
    _, other = make_engine(make_model(layers=1))
    with pytest.raises(ValueError, match="not this model's"):
        other.load_state(state)
    with pytest.raises(ValueError, match="2 ranks wrote it, these are 1"):
        second.load_state(state | {"world_size": 2})


def test_the_checkpoint_that_is_loaded_is_the_newest_whole_one(tmp_path):
    strategy, engine = make_engine()
    said = []
    strategy.print = said.append

    def flip(name):
        path = tmp_path / name / "rank0.pt"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def load():
        said.clear()
        folder, state = strategy.load_ckpt(engine, str(tmp_path))
        return folder.rpartition("/")[2], state["consumed_samples"], said

    for number, prompts in ((9, 36), (10, 40), (8, 64)):  # the last one after a larger --rollout_batch_size
        strategy.save_ckpt(engine, str(tmp_path), f"step_{number:06d}", client_state={"consumed_samples": prompts})
    assert load() == ("step_000008", 64, [])
    for wrong in ("is missing", "names step_000012, which is not there"):
        (tmp_path / "latest").unlink() if "missing" in wrong else (tmp_path / "latest").write_text("step_000012")
        note = f"note: {tmp_path}/latest {wrong}: step_000008 is the newest whole checkpoint"
        assert load() == ("step_000008", 64, [note])
    (tmp_path / "latest").write_text("step_000009")
    assert load() == ("step_000009", 36, [])
    flip("step_000009")
    flip("step_000008")
    assert load()[0] == "step_000010"
    damaged = "note: passed over a damaged checkpoint: {}/step_00000{}: rank0.pt is not what was written"
    assert [line.split(": its hash")[0] for line in said] == [damaged.format(tmp_path, n) for n in (9, 8)]
    flip("step_000010")
    with pytest.raises(SystemExit, match="no whole checkpoint in"):
        load()


def test_two_processes_resume_to_the_same_weights(tiny_model, demo_parquet, tmp_path):
    out = tmp_path / "run"
    flags = ("--fsdp", "--engine_type", "hf", "--max_samples", 16, "--save_steps", 2)
    train(tiny_model, demo_parquet, out, *flags, processes=2)
    expected, records = load_file(out / "model.safetensors"), metrics_of(out)
    saved = sorted(path.name for path in (out / "_actor" / "step_000004").iterdir())
    assert saved == ["manifest.json", "rank0.pt", "rank1.pt"]
    shutil.rmtree(out / "_actor" / "step_000004")
    (out / "r1_aqa.json").unlink()  # as if it had been killed before it had written the model
    done = train(tiny_model, demo_parquet, out, *flags, "--load_checkpoint", processes=2)
    assert "step_000002: 8 prompts were already used" in done.stdout
    assert [record["step"] for record in metrics_of(out)] == [1, 2, 3, 4]
    again = load_file(out / "model.safetensors")
    assert [name for name in expected if not torch.equal(expected[name], again[name])] == []
    assert metrics_of(out)[3]["train/grad_norm"] == records[3]["train/grad_norm"]
    refused = train(tiny_model, demo_parquet, out, *flags, "--load_checkpoint", check=False)
    assert refused.returncode == 2 and "ranks: 2, now 1" in refused.stderr
    refused = train(tiny_model, demo_parquet, out, *flags, "--no-fsdp", "--load_checkpoint", check=False)
    assert refused.returncode == 2 and "fsdp: True, now False" in refused.stderr
