"""``--plan``: parameters and memory against real models and measured bytes, states by hand, and its advice."""

import copy
import itertools

import pytest
import torch
from conftest import parse_flags, run_script
from harness import allocated
from support.training import FLAGS
from transformers import CONFIG_MAPPING

from aqa.common.patch import Patch
from aqa.families import BY_TYPE
from aqa.patches.actor import patch_policy
from aqa.policy import token_log_probs
from aqa.training import planner
from aqa.training.flag_rules import find_problems
from aqa.training.freezing import freeze
from aqa.training.planner import GIB, PHASES, Plan, SizeError, count, parameters, read_sizes, sizes_of
from lightrft.models.lora import add_adapters
from lightrft.strategy.fsdp_strategy import FSDPStrategy

SEVEN_B = "Qwen/Qwen2-Audio-7B-Instruct"
SIZES = read_sizes(SEVEN_B)
RECIPE = "--bf16 --zero_stage 3 --gradient_checkpointing --micro_rollout_batch_size 4"
AUDIO, VOCABULARY, ROWS = 7, 6000, 4  # ROWS responses to one prompt


def plan(given: str, gpus=8, gib=80.0, sizes=SIZES) -> Plan:
    return Plan(parse_flags(["--plan", "--pretrain", SEVEN_B, *given.split()]), sizes, gpus, gib)


def cell(planned: Plan, phase: str, row: str) -> float:
    return planned.rows[row][[*PHASES, "machine"].index(phase)]


def qwen2_audio(tower, text):
    """Configuration of a small model: layers, heads, width and inner width of both; the vocabulary and key heads."""
    audio = dict(zip(("encoder_layers", "encoder_attention_heads", "d_model", "encoder_ffn_dim"), tower, strict=True))
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")
    decoder = dict(zip((*names, "num_key_value_heads"), text, strict=True))
    audio, decoder = audio | {"model_type": "qwen2_audio_encoder"}, decoder | {"model_type": "qwen2"}
    return {"audio_token_index": AUDIO, "audio_config": audio, "text_config": decoder}


CONFIG = qwen2_audio((3, 4, 192, 768), (4, 5, 320, 864, VOCABULARY, 5))
GROUPED = qwen2_audio((1, 2, 32, 48), (2, 4, 64, 96, 512, 2))


def build(config, args=None, device="cpu"):
    """A model of this configuration, with what the flags freeze and the adapters that they ask for."""
    torch.manual_seed(0)
    with torch.device(device):
        family = BY_TYPE[config.get("model_type", "qwen2_audio")]
        parts = {name: part for name, part in copy.deepcopy(config).items() if name != "model_type"}
        model = family.model_class()(CONFIG_MAPPING[family.model_types[-1]](**parts))  # the live model's type
    model = model.to(torch.bfloat16 if args and args.bf16 else torch.float32)
    for part in (*family.unheard, *family.fixed):
        model.get_submodule(part).requires_grad_(False)
    if args and args.freeze_prefix:
        freeze(model, args.freeze_prefix, family.checkpoint_name)
    if args and args.lora_rank:
        add_adapters(model, args.lora_rank, 16, args.target_modules, "base")
    return model


@pytest.mark.parametrize("name", [*planner.KNOWN, "grouped queries"])
def test_every_parameter(name):
    """Of the published models of all families, by transformers' classes."""
    config = planner.KNOWN.get(name, GROUPED)
    model, known = build(config, device="meta"), parameters(sizes_of(config))
    assert {p.name: p.shape for p in known} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    linear = {n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {p.name.removesuffix(".weight") for p in known if p.is_linear} == linear
    assert count(known) == {SEVEN_B: 8_397_094_912, "nvidia/audio-flamingo-3-hf": 8_267_215_360}.get(name, count(known))


@pytest.mark.parametrize(
    "given",
    [
        "",
        "--freeze_prefix multi_modal_projector layers.[01]",
        "--freeze_prefix embed_tokens lm_head *norm",
        "--freeze_prefix audio_tower.layers language_model",
        "--lora_rank 8",
        "--lora_rank 8 --target_modules q_proj fc1",
    ],
)
@pytest.mark.parametrize("name", ["grouped queries", "Qwen/Qwen2.5-Omni-7B", "nvidia/audio-flamingo-3-hf"])
def test_what_trains(given, name):
    if "freeze" in given and "Omni" in name:
        given = given.replace("multi_modal_projector", "audio_tower.proj").replace("language_model", "model lm_head")
    config = planner.KNOWN.get(name, GROUPED)
    planned = plan(given, sizes=sizes_of(config))
    model = build(config, planned.args, "meta")
    real = {n.replace(".default", ""): tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert {p.name: p.shape for p in planned.trained} == real


def test_unknown_names_are_refused(tmp_path):
    for given in ("--freeze_prefix tower", "--lora_rank 8 --target_modules lm_head"):
        with pytest.raises(SizeError, match=" ".join(given.split()[-2:])):
            plan(given)
    for text, said in ((None, "no config.json"), ("{", "no config.json"), ('{"model_type": "llama"}', "'llama'")):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(SizeError, match=said):
            read_sizes(str(tmp_path))


# ---- activations and FSDP2, against measured bytes

WORK = f"--n_samples_per_prompt {ROWS} --prompt_max_len 31 --plan_clip_seconds 6 --generate_max_len 40"  # 180 of prompt


@pytest.fixture
def chunks(monkeypatch):
    """100 rows of logits at once: several chunks, as with Qwen2-Audio's vocabulary."""
    assert planner.LOGITS == token_log_probs.LOGITS_AT_ONCE
    monkeypatch.setattr(token_log_probs, "LOGITS_AT_ONCE", 100 * VOCABULARY)
    monkeypatch.setattr(planner, "LOGITS", 100 * VOCABULARY)


def policy(planned: Plan):
    """The planned model as training has it, and a micro-batch of the longest sequences."""
    model = build(CONFIG, planned.args)
    model.config.use_cache = False
    if planned.args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    patch_policy(Patch(), model)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(8, VOCABULARY, (planned.prompt,), generator=generator)
    prompt[4:154] = AUDIO
    sequences = torch.cat([prompt.expand(ROWS, -1), torch.randint(8, VOCABULARY, (ROWS, 40), generator=generator)], 1)
    mask = torch.ones_like(sequences)
    mask[0, -3:] = 0  # responses differ in length
    return model.train(), {
        "sequences": sequences,
        "attention_mask": mask,
        "response_mask": mask[:, planned.prompt :],
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


@pytest.mark.parametrize(
    "given",
    [
        "",
        "--bf16",
        "--bf16 --gradient_checkpointing",
        "--freeze_prefix audio_tower multi_modal_projector embed_tokens layers.[01] lm_head",
        "--lora_rank 8",
        "--lora_rank 8 --bf16 --target_modules q_proj v_proj fc1",
    ],
)
def test_activations(given, chunks):
    planned = plan(f"{WORK} {given}", sizes=sizes_of(CONFIG))
    model, inputs = policy(planned)
    kept, work = planned.micro_batch(ROWS)
    saved = saved_bytes(model, inputs)  # the gradients are there from now on, as in a second micro-batch
    most, stays = allocated(lambda: model(**inputs).mean().backward())
    assert stays == 0
    print(f"{given}: kept {kept / saved:.3f}, peak {(kept + work) / most:.3f} of what is measured")
    narrow = "--target_modules" in given  # the plan counts all of a layer in which anything trains
    assert (0.99 if narrow else 0.97) <= kept / saved <= (1.35 if narrow else 1.05)
    assert 0.9 <= (kept + work) / most <= (1.3 if narrow else 1.1)


@pytest.mark.parametrize("given", ["", "--lora_rank 8 --bf16"])
def test_fsdp(given, chunks):
    """Shards, and what FSDP2 gathers and reduces on top of the activations, of one rank."""
    planned = plan(f"{WORK} --fsdp {given}", gpus=1, sizes=sizes_of(CONFIG))
    model, inputs = policy(planned)
    args = type(planned.args)(**(FLAGS | {"bf16": planned.args.bf16}))
    engine, *_ = FSDPStrategy(args).prepare_training(model, 10)
    shards = sum(parameter.to_local().nbytes for parameter in engine.module.parameters())
    assert cell(planned, "backward", "weights") == pytest.approx(shards, rel=1e-3)
    _, gradients = allocated(lambda: engine.backward(engine(**inputs).mean()))
    assert cell(planned, "backward", "gradients") == pytest.approx(gradients, rel=0.01)
    most, _ = allocated(lambda: engine.backward(engine(**inputs).mean()))
    peak = sum(cell(planned, "backward", row) for row in ("activations", "work space", "buffers"))
    print(f"{given}: peak {peak / most:.3f} of what is measured")
    assert peak == pytest.approx(most, rel=0.1)


# ---- states and engine, by hand

ALL = count(parameters(SIZES))
VALUES = ALL - 1500 * 1280  # the sinusoids do not train
LAYER = 4 * 4096 * 4096 + 3 * 4096 + 3 * 4096 * 11008 + 2 * 4096  # values of a layer of the language model
TOWER = 32 * (4 * 1280**2 + 3 * 1280 + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280)  # of the tower's layers
EMBEDDING = 156032 * 4096
REST = ALL - TOWER - 32 * LAYER - 2 * EMBEDDING  # outside layers, embedding and head
FIXED = 2 * 1500 * 1280 / 8
# Bytes of all weights in bfloat16, each rounded up to a power of two, as torch does with pinned memory: of a layer of
# the language model 4 matrices of 2 * 4096^2 bytes and 3 of 2 * 4096 * 11008, 3 biases and 2 norms; embedding and head;
# of a layer of the tower 4 matrices of 2 * 1280^2 and 2 of 2 * 1280 * 5120, a bias of 2 * 5120, 8 other vectors
PINNED = 32 * (4 * 2**25 + 3 * 2**27 + 5 * 2**13) + 2 * 2**31 + 32 * (4 * 2**22 + 2 * 2**24 + 2**14 + 8 * 2**12)
PINNED += 2**20 + 2**24 + 2**22 + 4 * 2**12 + 2**24 + 2 * 2**13  # convolutions, sinusoids, vectors; projector, norm
BY_HAND = {  # under 8 GPUs; bf16 gradients are added up in float32, but only within FSDP2 from the start
    "--bf16 --zero_stage 2": {
        "weights": {"backward": 2 * ALL},
        "optimizer states": {"backward": 12 * VALUES / 8},
        "gradients": {"rollout": 0, "backward": 4 * VALUES / 8, "optimizer": 4 * VALUES / 8},
        "buffers": {"backward": 2 * 2 * 5e8},
        "reference model": {"rollout": 0, "log-probs": 2 * ALL, "backward": 0, "machine": PINNED},
        "work space": {"optimizer": 0},  # the fused AdamW has no temporaries
    },
    "--bf16 --zero_stage 2 --train_batch_size 256": {"gradients": {"rollout": 4 * VALUES / 8}},
    "--bf16 --zero_stage 0": {
        "gradients": {"rollout": 0, "backward": 4 * VALUES, "optimizer": 4 * VALUES},
        "optimizer states": {"backward": 12 * VALUES},
        "buffers": {"backward": 4 * EMBEDDING, "optimizer": 4 * 5e8},  # a gradient's cast; the sum over ranks
    },
    "--no-bf16 --zero_stage 0": {"optimizer states": {"rollout": 8 * VALUES}, "gradients": {"backward": 4 * VALUES}},
    "--bf16 --zero_stage 3": {
        "weights": {"rollout": 2 * VALUES / 8},
        "gradients": {"rollout": 4 * VALUES / 8, "optimizer": 4 * VALUES / 8 + 4 * 1e9},
    },
    "--bf16 --zero_stage 3 --param_offload": {"weights": {"sync": 0, "machine": 2**31}},
    "--bf16 --zero_stage 3 --adam_offload": {
        # all of 4 * VALUES / 8 bytes; and the step's, of 1e9 values and of what is left of VALUES / 8
        "gradients": {"backward": 0, "optimizer": 0, "machine": 2**32 + 2**32 + 2**28},
        "optimizer states": {"optimizer": 0, "machine": 12 * VALUES / 8},
    },
    "--bf16 --adam_offload": {
        "gradients": {"rollout": 0, "backward": 4 * VALUES / 8, "machine": 2**32 + 2**31},  # 4 and 2 * VALUES / 8
        "optimizer states": {"optimizer": 0, "machine": 2**32 + 8 * VALUES / 8},
    },
    "--no-bf16 --adam_offload": {"gradients": {"backward": 0, "machine": 3 * 2**32}},
    "--bf16 --fsdp": {  # what trains is float32
        "weights": {"rollout": 4 * VALUES / 8 + FIXED},
        "gradients": {"backward": 4 * VALUES / 8, "optimizer": 4 * VALUES / 8},
        "optimizer states": {"optimizer": 8 * VALUES / 8},
        "reference model": {"sync": 2 * ALL / 8},
        "buffers": {"backward": 2 * (REST + EMBEDDING + LAYER)},
    },
    "--bf16 --fsdp --fsdp_cpu_offload": {
        "weights": {"backward": 0, "machine": PINNED / 4 - 2**20 + 2**19},  # the sinusoids do not train
        "gradients": {"backward": 0, "machine": PINNED / 4 - 2**20},
        "optimizer states": {"backward": 0, "machine": 8 * VALUES / 8},
        "reference model": {"backward": 0, "machine": PINNED / 8},
    },
}


@pytest.mark.parametrize("given", BY_HAND)
def test_states_by_hand(given):
    planned = plan(given)
    small = 0.01 if "zero_stage 3" in given else 1e-9  # small weights, which stay whole
    for row, phases in BY_HAND[given].items():
        found = {phase: cell(planned, phase, row) for phase in phases}
        assert found == pytest.approx(phases, rel=small, abs=small * GIB), row


def test_the_engines_share_and_the_batch():
    engine, split = plan(RECIPE), plan(f"{RECIPE} --engine_tp_size 2")
    # keys and values of 32 layers, two bytes each; a prompt of 512 tokens of which 750 in place of one are audio
    sequence = 2 * 32 * 4096 * 2 * (512 - 1 + 750 + 256)
    assert (engine.engine, engine.least) == (40 * GIB, 2 * ALL + 2 * GIB + sequence)
    assert engine.at_once == pytest.approx((40 * GIB - 2 * ALL - 2 * GIB) / sequence)
    assert split.least == engine.least / 2 + GIB
    text = planner.describe(engine, "as asked")
    assert "16 prompts x 8 = 128 responses a rollout, 16 a GPU, in 2 micro-" in text
    assert "vllm: 30 sequences of full length at once, 16 in a rollout" in text


def test_where_vllms_weights_are_while_the_policy_trains():
    """On the GPU, if a tenth of it is free then; else nowhere, because the next sync sends them. LightRFT always drops
    them."""
    roomy = plan(RECIPE)
    dropped = max(roomy.totals[1:4]) - 2 * ALL
    least = (dropped + 2 * ALL) / 0.9 / GIB
    for gib, stay in ((80.0, True), (least + 0.01, True), (least - 0.01, False)):
        planned = plan(RECIPE, gib=gib)
        assert planned.engine_weights_stay is stay
        assert cell(planned, "backward", "engine") == GIB + 2 * ALL * stay
        assert max(planned.totals[1:4]) == dropped + 2 * ALL * stay
        assert cell(planned, "machine", "engine") == 0
    del roomy.args.sync_bucket_mb  # LightRFT has no such flag
    theirs = roomy.changed({})
    assert (theirs.engine_weights_stay, cell(theirs, "machine", "engine")) == (False, 0)
    awake = plan(f"{RECIPE} --no-enable_engine_sleep")
    assert not awake.engine_weights_stay and cell(awake, "backward", "engine") == awake.engine


# ---- advice

LORA_4BIT = "--lora_rank 8 --load_in_4bit"
FROZEN_4BIT = {"micro_train_batch_size": 4, "lora_rank": 16, "freeze_prefix": None, "load_in_4bit": True}
LONG = f"{RECIPE} --micro_train_batch_size 16 --generate_max_len 8192"
ADVICE = [
    ("--bf16 --zero_stage 2 --engine_mem_util 0.7", 8, 80, {"engine_mem_util": 0.6}),
    ("--bf16 --zero_stage 2", 2, 80, {"adam_offload": True}),
    ("--zero_stage 0", 4, 80, {"bf16": True, "zero_stage": 3, "engine_mem_util": 0.45}),
    (LONG, 8, 80, {"micro_train_batch_size": 8}),
    ("--bf16 --fsdp", 2, 80, {"fsdp_cpu_offload": True}),
    (LORA_4BIT, 1, 24, {"bf16": True, "micro_train_batch_size": 4, "engine_type": "hf"}),
    ("--bf16 --freeze_prefix --engine_type hf", 1, 24, FROZEN_4BIT),
    ("--bf16 --engine_mem_util 0.2", 8, 80, {"engine_mem_util": 0.6}),
]


@pytest.mark.parametrize(("given", "gpus", "gib", "changed"), ADVICE)
def test_what_it_would_change_fits_and_nothing_less_does(given, gpus, gib, changed):
    before = plan(given, gpus, gib)
    advice, after = planner.suggest(before)
    assert before.missing and advice == changed
    assert not after.missing and not before.changed(advice).missing
    assert find_problems(after.args, gpus, paths=False) == []
    for name in advice:
        fewer = before.changed({other: value for other, value in advice.items() if other != name})
        assert fewer.missing or find_problems(fewer.args, gpus, paths=False)


@pytest.mark.parametrize("given", [LORA_4BIT, "--bf16 --fsdp", f"{RECIPE} --engine_type hf"])
def test_headline_table_and_advice_agree(given):
    """On one GPU nothing is split among GPUs, and what is said not to fit is above a limit that is named."""
    for gpus, gib in itertools.product((1, 8), (24.0, 80.0)):
        planned = plan(given, gpus, gib)
        over, starves = max(planned.totals[:-1]) > gib * GIB, planned.engine < planned.least
        text = " ".join(planner.describe(planned, "as asked").split())
        assert ("It fits:" in text, "It does not fit:" in text) == (not over and not starves, over or starves)
        assert (" over" in text, "and to start it takes" in text) == (over, starves and not over)
        assert gpus > 1 or "--zero_stage 3" not in text
        advice, after = planner.suggest(planned)
        assert ("It fits with --" in text) == (bool(advice) and not after.missing)


def test_from_the_command_line(tmp_path):
    for given, status, said in (
        (f"{RECIPE} --plan_gpus 8 --plan_gpu_gib 80", 0, ("It fits: ", "8,397,094,912 parameters")),
        ("--bf16 --plan_gpus 1 --plan_gpu_gib 24", planner.DOES_NOT_FIT, ("It does not fit: ", "It fits with --")),
        ("--plan_gpus 3", 2, ("do not divide among 3 ranks",)),
    ):
        command = ("train_colocate.py", "--plan", "--pretrain", SEVEN_B, *given.split())
        done = run_script(*command, check=False, cwd=tmp_path)
        text = done.stderr if status == 2 else done.stdout
        assert done.returncode == status, text
        assert all(words in text for words in said)
        assert status == 2 or max(map(len, text.splitlines())) <= 80
