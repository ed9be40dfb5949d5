"""``--plan``: parameters and memory against real models and measured bytes, hand-worked states, and its advice."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLE, child_environment
from support.training import FLAGS
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from aqa.common.patch import Patch
from aqa.patches.actor import patch_policy
from aqa.policy import token_log_probs
from aqa.training import planner
from aqa.training.flag_rules import find_problems
from aqa.training.flags import build_parser, finish
from aqa.training.freezing import freeze
from aqa.training.planner import GIB, PARTS, PHASES, SizeError, count, parameters, read_sizes
from lightrft.models.lora import add_adapters
from lightrft.strategy.fsdp_strategy import FSDPStrategy
from lightrft.utils import add_arguments

SEVEN_B = "Qwen/Qwen2-Audio-7B-Instruct"
SIZES = read_sizes(SEVEN_B)
VALUES = count(parameters(SIZES)) - 1500 * 1280  # the sinusoids do not train
RECIPE = ("--bf16", "--zero_stage", "3", "--gradient_checkpointing", "--micro_rollout_batch_size", "4")


def plan(*flags, gpus=8, gib=80.0) -> planner.Plan:
    args = build_parser(add_arguments).parse_args(["--plan", "--pretrain", SEVEN_B, *flags])
    finish(args)
    return planner.Plan(args, SIZES, planner.GPUs(gpus, gib, "as asked"))


def run(*flags, **kwargs):
    command = [sys.executable, str(EXAMPLE / "train_colocate.py"), "--plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=child_environment(), **kwargs)


def on_meta(config):
    """A model of this configuration without memory for its weights."""
    with torch.device("meta"):
        return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**{**config, "model_type": "qwen2_audio"}))


def qwen2_audio(tower, text):
    """Configuration of a small model: layers, heads, width and inner width of both; the vocabulary and key heads."""
    audio = dict(zip(("encoder_layers", "encoder_attention_heads", "d_model", "encoder_ffn_dim"), tower, strict=True))
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")
    decoder = dict(zip((*names, "num_key_value_heads"), text, strict=True))
    audio, decoder = audio | {"model_type": "qwen2_audio_encoder"}, decoder | {"model_type": "qwen2"}
    return {"audio_token_index": AUDIO, "audio_config": audio, "text_config": decoder}


AUDIO, VOCABULARY = 7, 6000
CONFIG = qwen2_audio((3, 4, 192, 768), (4, 5, 320, 864, VOCABULARY, 5))
GROUPED = qwen2_audio((1, 2, 32, 48), (2, 4, 64, 96, 512, 2))


@pytest.mark.parametrize("which", ["7b", "demo", "grouped queries"])
def test_every_parameter(which, request):
    if which == "demo":
        config = json.loads((request.getfixturevalue("tiny_model") / "config.json").read_text())
    else:
        config = planner.KNOWN[SEVEN_B] if which == "7b" else GROUPED
    model, known = on_meta(config), parameters(planner.sizes_of(config))
    shapes = {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
    assert {p.name: (p.shape, not p.fixed) for p in known} == shapes
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {p.name.removesuffix(".weight") for p in known if p.linear} == linear
    for part in PARTS:
        module = model.lm_head if part == "lm_head" else getattr(model.model, part)
        assert count(known, part) == sum(p.numel() for p in module.parameters())
    assert which != "7b" or count(known) == 8_397_094_912


@pytest.mark.parametrize(
    ("frozen", "targets"),
    [
        (["multi_modal_projector", "layers.[01]"], None),
        (["embed_tokens", "lm_head", "*norm"], None),
        (None, ["language_model"]),
        (None, ["q_proj", "fc1"]),
    ],
)
def test_what_trains(frozen, targets):
    model = on_meta(GROUPED)
    if frozen:
        freeze(model, frozen)
    else:
        add_adapters(model, 8, 16, targets, "base")
    real = {n.replace(".default", ""): tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    args = flags(freeze_prefix=frozen, lora_rank=0 if frozen else 8, target_modules=targets)
    assert {p.name: p.shape for p in planner.trained(planner.sizes_of(GROUPED), args)} == real


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(SizeError, match="--freeze_prefix tower"):
        planner.trained(SIZES, flags(freeze_prefix=["tower"]))
    with pytest.raises(SizeError, match="--target_modules lm_head"):
        planner.trained(SIZES, flags(lora_rank=8, target_modules=["lm_head"]))
    with pytest.raises(SizeError, match="--pretrain who/knows"):
        read_sizes("who/knows")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SizeError, match="'llama'"):
        read_sizes(str(tmp_path))


SMALL = planner.sizes_of(CONFIG)
WIDTH = planner.Lengths(clips=1, seconds=6.0, prompt=180, response=40)
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
    """Bytes of the storages that autograd keeps, weights and inputs left out."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *inputs.values()] if torch.is_tensor(t)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).mean()
    total = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in known)
    loss.backward()
    return total


def allocated(work):
    """Most bytes beside those before, and bytes that stay."""
    gc.collect()  # else memory of an earlier model that is freed meanwhile counts as negative
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
    {"freeze_prefix": ["audio_tower", "multi_modal_projector", "embed_tokens", "layers.[01]", "lm_head"]},
    {"lora_rank": 8},
    {"lora_rank": 8, "bf16": True, "target_modules": ["q_proj", "v_proj", "fc1"]},
]


@pytest.fixture
def chunks(monkeypatch):
    """100 rows of logits at once: several chunks, as with Qwen2-Audio's vocabulary."""
    assert planner.LOGITS == token_log_probs.LOGITS_AT_ONCE
    monkeypatch.setattr(token_log_probs, "LOGITS_AT_ONCE", 100 * VOCABULARY)
    monkeypatch.setattr(planner, "LOGITS", 100 * VOCABULARY)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_activations(case, chunks):
    args = flags(**case)
    model, inputs = build(args), batch()
    planned, work = planner.micro_batch(SMALL, args, ROWS, planner.trained(SMALL, args), WIDTH)
    saved = saved_bytes(model, inputs)  # the gradients are there from now on, as in a second micro-batch
    most, stays = allocated(lambda: model(**inputs).mean().backward())
    assert stays == 0
    print(f"{case}: kept {planned / saved:.3f}, peak {(planned + work) / most:.3f} of what is measured")
    narrow = case.get("target_modules")  # the plan counts all of a layer in which anything trains
    assert (0.99 if narrow else 0.97) <= planned / saved <= (1.35 if narrow else 1.03)
    assert 0.9 <= (planned + work) / most <= (1.3 if narrow else 1.1)


@pytest.mark.parametrize("case", [{}, {"bf16": True}, {"lora_rank": 8, "bf16": True}], ids=str)
def test_fsdp(case, chunks):
    """Shards, and what FSDP2 gathers and reduces on top of the activations, of one rank."""
    args = flags(**case, fsdp=True, fsdp_cpu_offload=False)
    strategy = FSDPStrategy(argparse.Namespace(**(FLAGS | {"bf16": args.bf16})))
    engine, *_ = strategy.prepare_training(build(args), 10)
    inputs = batch()
    some = planner.trained(SMALL, args)
    (planned, work), states = (
        planner.micro_batch(SMALL, args, ROWS, some, WIDTH),
        planner.states_of(SMALL, args, 1, some),
    )
    shards = [parameter.to_local() for parameter in engine.module.parameters()]
    assert states.weights == pytest.approx(sum(shard.nbytes for shard in shards), rel=1e-3)
    _, gradients = allocated(lambda: engine.backward(engine(**inputs).mean()))
    assert states.gradients == pytest.approx(gradients, rel=0.01)
    most, _ = allocated(lambda: engine.backward(engine(**inputs).mean()))
    gathered, moved = planner.fsdp_units(SMALL, 2 if args.bf16 else 4, some)
    peak = planned + gathered + max(work, moved)
    print(f"{case}: peak {peak / most:.3f} of what is measured")
    assert peak == pytest.approx(most, rel=0.1)


LAYER = 4 * 4096 * 4096 + 3 * 4096 + 3 * 4096 * 11008 + 2 * 4096  # values of a layer of the language model
TOWER = 32 * (4 * 1280**2 + 3 * 1280 + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280)  # of the tower's layers
REST = VALUES + 1500 * 1280 - TOWER - 32 * LAYER - 2 * 156032 * 4096  # outside layers, embedding and head
FIXED = 2 * 1500 * 1280 / 8


BY_HAND = [
    ("--bf16 --zero_stage 2", "backward/weights", 2 * (VALUES + 1500 * 1280)),
    ("--bf16 --zero_stage 2", "backward/optimizer states", 12 * VALUES / 8),
    ("--bf16 --zero_stage 2", "backward/gradients", 2 * VALUES / 8),
    ("--bf16 --zero_stage 2", "optimizer/gradients", 4 * VALUES / 8),  # in float32
    ("--bf16 --zero_stage 2", "rollout/gradients", 0),
    ("--bf16 --zero_stage 2", "backward/sharding buffers", 2 * 2 * 5e8),
    ("--bf16 --zero_stage 2", "backward/reference model", 0),  # it is in the machine's memory
    ("--bf16 --zero_stage 3", "rollout/weights", 2 * VALUES / 8),
    ("--bf16 --zero_stage 3", "rollout/gradients", 2 * VALUES / 8),
    ("--bf16 --zero_stage 3 --param_offload", "sync/weights", 0),
    ("--bf16 --zero_stage 3 --param_offload", "machine/training", 2 * VALUES / 8),
    ("--no-bf16 --zero_stage 0", "rollout/optimizer states", 8 * VALUES),  # no second copy of the weights
    ("--bf16 --adam_offload", "optimizer/optimizer states", 0),
    ("--bf16 --adam_offload", "optimizer/gradients", 0),
    ("--bf16 --fsdp", "rollout/weights", 4 * VALUES / 8 + FIXED),  # those that train are float32
    ("--bf16 --fsdp", "backward/gradients", 4 * VALUES / 8),
    ("--bf16 --fsdp", "optimizer/gradients", 4 * VALUES / 8),
    ("--bf16 --fsdp", "optimizer/optimizer states", 8 * VALUES / 8),
    ("--bf16 --fsdp", "sync/reference model", 2 * VALUES / 8 + FIXED),
    ("--bf16 --fsdp", "backward/sharding buffers", 2 * (REST + 156032 * 4096 + LAYER)),
    *[
        ("--bf16 --fsdp --fsdp_cpu_offload", f"backward/{name}", 0)
        for name in ("weights", "gradients", "optimizer states", "reference model")
    ],
    ("--bf16 --fsdp --fsdp_cpu_offload", "machine/training", 16 * VALUES / 8 + FIXED),
    ("--bf16 --fsdp --fsdp_cpu_offload", "machine/reference model", 2 * VALUES / 8 + FIXED),
]


def test_states_by_hand():
    for given, place, value in BY_HAND:
        planned, (phase, component) = plan(*given.split()), place.split("/")
        found = (planned.memory | {"machine": planner.host_memory(planned)})[phase][component]
        small = "zero_stage 3" in given  # small weights, which stay whole
        assert found == pytest.approx(value, rel=0.01 if small else 1e-9, abs=0.01 * GIB if small else 0), (
            given,
            place,
        )


def test_the_engines_share_and_what_is_left_for_its_cache():
    engine, split = plan(*RECIPE).engine, plan(*RECIPE, "--engine_tp_size", "2").engine
    assert (engine.share, engine.weights) == (40 * GIB, 2 * count(parameters(SIZES)))
    assert engine.cache == engine.share - engine.weights - 2 * GIB
    sequence = 2 * 32 * 4096 * 2 * (512 - 1 + 750 + 256)  # keys and values of 32 layers, two bytes each, and tokens
    assert engine.sequences == pytest.approx(engine.cache / sequence)
    assert engine.least == engine.weights + 2 * GIB + sequence
    assert (split.weights, split.least) == (engine.weights / 2, engine.least / 2 + GIB)


LORA_4BIT = "--lora_rank 8 --load_in_4bit"
FROZEN_4BIT = {"micro_train_batch_size": 2, "lora_rank": 16, "freeze_prefix": None, "load_in_4bit": True}
LONG = "--micro_train_batch_size 16 --generate_max_len 8192 --bf16 --zero_stage 3 --gradient_checkpointing"
ADVICE = [
    ("--bf16 --zero_stage 2", 8, 80, {"engine_mem_util": 0.4}),
    ("--bf16 --zero_stage 2", 2, 80, {"adam_offload": True}),
    ("--zero_stage 0", 4, 80, {"bf16": True, "zero_stage": 3}),
    (LONG + " --micro_rollout_batch_size 4", 8, 80, {"micro_train_batch_size": 8}),
    ("--bf16 --fsdp", 2, 80, {"fsdp_cpu_offload": True}),
    (LORA_4BIT, 1, 24, {"bf16": True, "micro_train_batch_size": 2, "engine_type": "hf"}),
    ("--bf16 --freeze_prefix --engine_type hf", 1, 24, FROZEN_4BIT),
    ("--bf16 --engine_mem_util 0.2", 8, 80, {"engine_mem_util": 0.4}),
]


@pytest.mark.parametrize(("given", "gpus", "gib", "changed"), ADVICE)
def test_what_it_would_change_fits_and_nothing_less_does(given, gpus, gib, changed):
    before = plan(*given.split(), gpus=gpus, gib=float(gib))
    taken, after = planner.suggest(before)
    advice = planner.new_flags(before, taken)
    assert before.missing and advice == changed
    assert not after.missing and not before.changed(**advice).missing
    assert find_problems(after.args, gpus, paths=False) == []
    for name in advice:
        fewer = before.changed(**{other: value for other, value in advice.items() if other != name})
        assert fewer.missing or find_problems(fewer.args, gpus, paths=False)


@pytest.mark.parametrize("given", ["--bf16", LORA_4BIT, "--bf16 --fsdp", " ".join(RECIPE) + " --engine_type hf"])
def test_headline_table_and_advice_agree(given):
    """On one GPU nothing is split among GPUs, and what is said not to fit is above a limit that is named."""
    for gpus, gib in itertools.product((1, 8), (8.0, 24.0, 48.0, 80.0)):
        planned = plan(*given.split(), gpus=gpus, gib=gib)
        over = max(planned.totals.values()) > gib * GIB
        starves = planned.engine.share < planned.engine.least
        text = " ".join(planner.describe(planned).split())
        assert ("It fits:" in text) == (not over and not starves) == ("It does not fit:" not in text)
        assert (" over" in text, "and to start it takes" in text) == (over, starves)
        assert gpus > 1 or "among the GPUs" not in text
        if "it takes 1 x" in text:  # the smallest GPU is one that does, and 1 GiB less does not
            least, after = int(text.split("it takes 1 x ")[1].split()[0]), planner.suggest(planned)[1]
            smaller = [planner.Plan(after.args, SIZES, planned.gpus._replace(gib=least - i)) for i in (0, 1)]
            assert [bool(planner.fit_engine(one).missing) for one in smaller] == [False, True]


def test_the_recipe_fits_and_the_batch_is_the_trainers(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n" * 1000)
    whole = plan(*RECIPE, "--prompt_data", str(tmp_path), "--num_episodes", "3", gpus=8)
    assert not whole.missing
    numbers = planner.batch(whole)
    expected = {"responses_a_rollout": 128, "micro_batches_a_gpu": 4, "steps_an_episode": 62, "steps": 186}
    assert numbers | expected == numbers  # 1000 rows, 125 a rank, 2 a rollout: 62 rollouts
    # 16 prompts of 512 - 1 + 750 tokens, 128 responses of 256
    assert numbers["most_tokens_a_rollout"] == 16 * 1261 + 128 * 256


def test_from_the_command_line(tmp_path):
    fits = run("--pretrain", SEVEN_B, *RECIPE, "--plan_gpus", "8", "--plan_gpu_gib", "80", cwd=tmp_path)
    assert fits.returncode == 0, fits.stderr
    assert "It fits" in fits.stdout
    assert "8,397,094,912 parameters" in fits.stdout
    assert max(map(len, fits.stdout.splitlines())) <= 80
    command = ("json", "--pretrain", SEVEN_B, "--bf16", "--plan_gpus", "1", "--plan_gpu_gib", "24")
    too_much = run(*command, cwd=tmp_path)
    assert too_much.returncode == planner.DOES_NOT_FIT
    document = json.loads(too_much.stdout)
    assert not document["fits"] and document["fits_changed"]
    assert set(document["bytes_a_gpu"]) == set(PHASES)
    wrong = run("--pretrain", SEVEN_B, "--plan_gpus", "3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "do not divide among 3 ranks" in wrong.stderr
