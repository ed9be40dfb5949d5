"""LoRA on a base of 4 bits, with the real bitsandbytes where it is installed (it runs on a CPU, too)."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from support.training import metrics_of, train

from aqa.families import family_of
from lightrft.models.actor_al import ActorAL, load_model
from lightrft.models.four_bit import unpacked
from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy

IDS = torch.arange(20, 60)[None]
INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
real = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")


@pytest.fixture(params=["tiny_model", "tiny_omni", "tiny_flamingo"])
def tiny(request):
    """A model of each family."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def actor(tiny):
    """With adapters beside q and v, whose B is not zero as after some steps."""
    torch.manual_seed(0)
    adapters = {"lora_rank": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    actor = ActorAL(str(tiny), bf16=False, load_in_4bit=True, **adapters)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in actor.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return actor


def logits(model):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def decoder(model):
    return family_of(model).parts(model).decoder


def sent(actor, tiny):
    """A plain model with the weights that an engine gets."""
    strategy = object.__new__(DeepspeedStrategy)  # without a process group
    strategy.args = SimpleNamespace(zero_stage=0, lora_rank=2, bf16=False, sync_bucket_mb=512)
    plain = load_model(str(tiny), dtype=torch.float32).eval()
    own = {family_of(plain).checkpoint_name(name): parameter for name, parameter in plain.named_parameters()}
    for name, tensor in strategy.named_weights(actor.model):
        own.pop(name).data.copy_(tensor)
    assert not own
    return plain


@real
def test_the_language_models_linear_layers_are_packed_and_no_others(actor):
    packed = {name for name, p in actor.model.named_parameters() if p.dtype == torch.uint8}
    layers = [name for name, each in decoder(actor.model).named_modules() if isinstance(each, torch.nn.Linear)]
    linear = {f"{name}.weight" for name in layers if "lora_" not in name}
    assert all(any(name.endswith(f".{one}") for one in linear) for name in packed)
    assert not [name for name in packed if "audio" in name or "visual" in name or "lm_head" in name]
    assert len(packed) == 2 * 7


@real
def test_an_engine_gets_what_the_trainer_computes_with(actor, tiny):
    actor.eval()
    with torch.no_grad():
        plain = sent(actor, tiny)
        torch.testing.assert_close(logits(plain), logits(actor.model), rtol=1e-4, atol=1e-4)
        whole = load_model(str(tiny), dtype=torch.float32).eval()
        assert (logits(plain) - logits(whole)).abs().max() > 1e-2  # 4 bits and adapters are not nothing


@real
def test_adapters_train_after_the_model_was_evaluated(actor, tiny):
    with torch.no_grad():
        logits(actor.model.eval())
    logits(actor.model.train()).square().mean().backward()
    layer = decoder(actor.model).layers[0].self_attn.q_proj
    plain = sent(actor, tiny)
    logits(plain).square().mean().backward()
    grad = decoder(plain).layers[0].self_attn.q_proj.weight.grad
    b = layer.lora_B["default"].weight
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, 3.0 * b.T @ grad, rtol=1e-3, atol=1e-6)


@real
def test_a_checkpoint_is_loaded_again_and_another_base_refused(actor):
    state = {name: value.clone() for name, value in actor.model.state_dict().items()}
    before = logits(actor.model).detach()
    for name, parameter in actor.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    actor.model.load_state_dict(dict(state))
    torch.testing.assert_close(logits(actor.model), before)
    name = next(name for name in state if name.endswith("weight.absmax"))
    with pytest.raises(RuntimeError, match=r"absmax\) are not those of --pretrain"):
        actor.model.load_state_dict(state | {name: state[name] + 1})


@real
def test_plain_parameters_are_not_copied(actor):
    head = actor.model.lm_head.weight
    assert unpacked(head).data_ptr() == head.data_ptr()


def test_it_needs_adapters_and_whole_parameters(tiny_model):
    config = {"zero_optimization": {"stage": 3}}
    for wrong in ({"lora_rank": 0}, {"lora_rank": 2, "ds_config": config}):
        with pytest.raises(ValueError, match="load_in_4bit needs adapters"):
            ActorAL(str(tiny_model), load_in_4bit=True, **wrong)


def test_without_bitsandbytes_the_remedy_is_named(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        ActorAL(str(tiny_model), lora_rank=2, load_in_4bit=True)


@real
@pytest.mark.slow  # two minutes
@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_training_and_resuming(tiny_model, demo_parquet, tmp_path, engine):
    more = ("--lora_rank", 4, "--load_in_4bit", "--max_samples", 12, "--save_steps", 2, "--engine_type", engine)
    train(tiny_model, demo_parquet, tmp_path / "run", *more)
    resume = ("--num_episodes", 2, "--load_checkpoint", "--allow_changes", "num_episodes")
    train(tiny_model, demo_parquet, tmp_path / "run", *more, *resume)
    rows = metrics_of(tmp_path / "run")
    assert len(rows) >= 6
    assert max(row["rollout/logprob_gap_max"] for row in rows) < 1e-4
    model = load_model(str(tmp_path / "run"), dtype=torch.float32)  # whole weights, as any other run's
    assert "quantization_config" not in model.config.to_dict()
