"""The planner's memory against what is measured: forward, backward and optimizer on the CPU, to the byte that torch
allocates."""

from __future__ import annotations

import argparse

import pytest
import torch
from support.training import FLAGS
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from aqa.common.patch import Patch
from aqa.patches.actor import patch_policy
from aqa.policy import token_log_probs
from aqa.training import plan_memory
from aqa.training.freezing import freeze
from aqa.training.model_sizes import sizes_of, trained
from aqa.training.plan_memory import Lengths, fsdp_units, micro_batch, states_of
from lightrft.models.lora import add_adapters
from lightrft.strategy.fsdp_strategy import FSDPStrategy

AUDIO, VOCABULARY = 7, 6000
CONFIG = {
    "audio_token_index": AUDIO,
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 768,
        "d_model": 192,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": 320,
        "intermediate_size": 864,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
}
SIZES = sizes_of(CONFIG)
WIDTH = Lengths(clips=1, seconds=6.0, prompt=180, response=40)
ROWS = 4  # responses to one prompt


def flags(**changes):
    values = {"bf16": False, "gradient_checkpointing": False, "lora_rank": 0, "n_samples_per_prompt": ROWS}
    values |= {"freeze_prefix": None, "target_modules": ["language_model"], "zero_stage": 0, "adam_offload": False}
    return argparse.Namespace(**(values | {"load_in_4bit": False, "fsdp": False} | changes))


def build(args):
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**CONFIG)).to(
        torch.bfloat16 if args.bf16 else torch.float32
    )
    model.config.use_cache = False
    if args.freeze_prefix:
        freeze(model, args.freeze_prefix)
    if args.lora_rank:
        add_adapters(model, args.lora_rank, 16, args.target_modules, "base")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    patch_policy(Patch(), model)
    return model.train()


def batch():
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(8, VOCABULARY, (WIDTH.prompt,), generator=generator)
    prompt[4:154] = AUDIO
    sequences = torch.cat([prompt.expand(ROWS, -1), torch.randint(8, VOCABULARY, (ROWS, 40), generator=generator)], 1)
    mask = torch.ones_like(sequences)
    mask[0, -3:] = 0  # responses differ in length
    return {
        "sequences": sequences,
        "attention_mask": mask,
        "response_mask": mask[:, WIDTH.prompt :],
        "features": torch.randn(1, 128, 3000, generator=generator),
        "frames": torch.tensor([600]),
        "clip_index": torch.zeros(ROWS, dtype=torch.long),
        "logit_bias": {AUDIO: -100.0},
    }


def saved_bytes(model, inputs):
    """Different memory that autograd keeps, weights and inputs left out."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *inputs.values()] if torch.is_tensor(t)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).mean()
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


def allocated(work):
    """Most bytes beside those before, and bytes that stay."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most, now


CASES = [
    {},
    {"bf16": True},
    {"bf16": True, "gradient_checkpointing": True},
    {"gradient_checkpointing": True},
    {"freeze_prefix": ["audio_tower"]},
    {"freeze_prefix": ["audio_tower", "multi_modal_projector", "embed_tokens", "layers.[01]", "lm_head"]},
    {"lora_rank": 8},
    {"lora_rank": 8, "bf16": True, "target_modules": ["q_proj", "v_proj", "fc1"]},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_activations(case, monkeypatch):
    rows = 100  # in several chunks, as Qwen2-Audio's vocabulary
    monkeypatch.setattr(token_log_probs, "LOGITS_AT_ONCE", rows * VOCABULARY)
    monkeypatch.setattr(plan_memory, "LOGITS", rows * VOCABULARY)
    args = flags(**case)
    model, inputs = build(args), batch()
    some = trained(SIZES, args.freeze_prefix or (), args.lora_rank, args.target_modules)
    planned = micro_batch(SIZES, args, ROWS, some, WIDTH)
    saved = saved_bytes(model, inputs)  # the gradients are there from now on, as in a second micro-batch
    assert planned.saved == pytest.approx(saved, rel=0.03), (planned, saved)
    most, stays = allocated(lambda: model(**inputs).mean().backward())
    assert stays == 0
    peak = planned.saved + max(planned.layer, planned.head)
    print(f"{case}: kept {planned.saved / saved:.3f}, peak {peak / most:.3f} of what is measured")
    assert peak == pytest.approx(most, rel=0.1)


@pytest.mark.parametrize("case", [{}, {"bf16": True}, {"lora_rank": 8, "bf16": True}], ids=str)
def test_fsdp(case, monkeypatch):
    """Shards, and what FSDP2 gathers and reduces on top of the activations, of one rank."""
    rows = 100
    monkeypatch.setattr(token_log_probs, "LOGITS_AT_ONCE", rows * VOCABULARY)
    monkeypatch.setattr(plan_memory, "LOGITS", rows * VOCABULARY)
    args = flags(**case, fsdp=True, fsdp_cpu_offload=False)
    strategy = FSDPStrategy(argparse.Namespace(**(FLAGS | {"bf16": args.bf16})))
    engine, *_ = strategy.prepare_training(build(args), 10)
    inputs = batch()
    some = trained(SIZES, (), args.lora_rank, args.target_modules)
    planned, states = micro_batch(SIZES, args, ROWS, some, WIDTH), states_of(SIZES, args, 1, some)
    shards = [parameter.to_local() for parameter in engine.module.parameters()]
    assert states.weights == pytest.approx(sum(shard.nbytes for shard in shards), rel=1e-3)
    _, gradients = allocated(lambda: engine.backward(engine(**inputs).mean()))
    assert states.gradients == pytest.approx(gradients, rel=0.01)
    most, _ = allocated(lambda: engine.backward(engine(**inputs).mean()))
    units = fsdp_units(SIZES, 2 if args.bf16 else 4, some)
    peak = planned.saved + units.gathered + max(planned.layer, planned.head, units.moved)
    print(f"{case}: peak {peak / most:.3f} of what is measured; {units}, {planned}, {most}")
    assert peak == pytest.approx(most, rel=0.1)
