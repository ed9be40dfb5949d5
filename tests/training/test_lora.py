"""LoRA: what is computed, what is sent to the engine, what is written."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.training import answers_of, metrics_of, moved, train

from aqa.families import Qwen2Audio
from lightrft.models.actor_al import ActorAL, load_model
from lightrft.models.lora import WithoutAdapters, write_adapter
from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy
from lightrft.utils.weight_names import is_adapter, plain_name

IDS = torch.arange(20, 32)[None]

checkpoint_name = Qwen2Audio.checkpoint_name


@pytest.fixture
def actor(tiny_model):
    """With adapters beside the language model's q, v and the tower's fc1, whose B is not zero as after some steps."""
    actor = ActorAL(str(tiny_model), bf16=False, lora_rank=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "fc1"])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in actor.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return actor.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def named_weights(actor, **kwargs):
    strategy = object.__new__(DeepspeedStrategy)  # without a process group
    strategy.args = SimpleNamespace(zero_stage=0, lora_rank=2, bf16=False, sync_bucket_mb=1)
    return [(name, tensor.clone()) for name, tensor in strategy.named_weights(actor.model, **kwargs)]


def test_adapters_alone_train(actor):
    trained = {name for name, parameter in actor.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in actor.model.named_parameters() if is_adapter(name)}
    kinds = {name.rsplit(".", 4)[1] for name in trained}
    assert kinds == {"q_proj", "v_proj", "fc1"}


def test_what_is_sent_is_a_plain_model_that_does_the_same(actor, tiny_model):
    sent = named_weights(actor)
    plain = load_model(str(tiny_model), dtype=torch.float32).eval()
    assert sorted(name for name, _ in sent) == sorted(checkpoint_name(name) for name, _ in plain.named_parameters())
    before = logits(plain)
    own = {checkpoint_name(name): parameter for name, parameter in plain.named_parameters()}
    for name, tensor in sent:
        own[name].data.copy_(tensor)
    torch.testing.assert_close(logits(plain), logits(actor.model), rtol=1e-4, atol=1e-5)
    assert (logits(plain) - before).abs().max() > 1e-2


def test_later_only_adapted_layers_are_sent(actor):
    names = {name for name, _ in named_weights(actor, trained_only=True)}
    layers = {checkpoint_name(plain_name(name)) for name, p in actor.model.named_parameters() if p.requires_grad}
    assert layers <= names
    # q and v go with their k and o: an engine may keep them in one layer
    assert {name.rsplit(".", 2)[1] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1"}


def test_the_reference_model_is_the_actor_without_adapters(actor, tiny_model):
    base = load_model(str(tiny_model), dtype=torch.float32).eval()
    reference = WithoutAdapters(_Caller(actor.model, actor.modality))
    with_adapters = logits(actor.model)
    assert torch.equal(reference(), logits(base))
    assert torch.equal(logits(actor.model), with_adapters)
    assert all(p.requires_grad == is_adapter(name) for name, p in actor.model.named_parameters())
    assert not torch.equal(with_adapters, logits(base))


class _Caller:
    def __init__(self, model, modality):
        self.model, self.modality = model, modality

    def __call__(self):
        return logits(self.model)


def test_peft_loads_what_is_written(actor, tiny_model, tmp_path):
    adapters = {name: p.data for name, p in actor.model.named_parameters() if is_adapter(name)}
    write_adapter(actor.lora_config, adapters, tmp_path)
    base = load_model(str(tiny_model), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(loaded), logits(actor.model))
    assert loaded.peft_config["default"].base_model_name_or_path == str(tiny_model)


def test_an_unknown_target_is_refused(tiny_model):
    with pytest.raises(ValueError, match="--target_modules qproj: no linear layer"):
        ActorAL(str(tiny_model), bf16=False, lora_rank=2, target_modules=["q_proj", "qproj"])
    with pytest.raises(ValueError, match="lm_head"):
        ActorAL(str(tiny_model), bf16=False, lora_rank=2, target_modules=["lm_head"])


@pytest.mark.parametrize(
    ("sharding", "processes"),
    [
        (("--zero_stage", 2), 1),
        pytest.param(("--zero_stage", 3), 2, marks=pytest.mark.slow),
        pytest.param(("--fsdp",), 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training(tiny_model, demo_parquet, demo_data, tmp_path, sharding, processes):
    """Engine and trainer agree, only what was adapted has moved, and the folder holds model and adapter."""
    lora = ("--lora_rank", 2, "--target_modules", "language_model", "fc1", *sharding)
    done = train(tiny_model, demo_parquet, tmp_path, "--max_samples", 12, *lora, processes=processes)
    assert "LoRA of rank 2: 0." in done.stdout
    records = metrics_of(tmp_path)
    assert len(records) == 3
    assert all(record["rollout/logprob_gap_max"] < 1e-3 for record in records)
    assert records[0]["train/kl"] == pytest.approx(0, abs=1e-6) and records[-1]["train/kl"] > 1e-6
    changed, _ = moved(tiny_model, tmp_path)
    adapted = {name.rsplit(".", 2)[1] for name in changed}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1"}
    assert all(name.endswith("_proj.weight") or name.endswith("fc1.weight") for name in changed)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = load_model(str(tiny_model), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().eval()
    torch.testing.assert_close(logits(loaded), logits(load_model(str(tmp_path), dtype=torch.float32).eval()))
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
    if processes == 1:
        answers = [answers_of(folder, demo_data, tmp_path) for folder in (tmp_path, tmp_path / "adapter", tiny_model)]
        assert answers[0] == answers[1] != answers[2]
