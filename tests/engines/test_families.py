"""The families beside Qwen2-Audio: each place that CONTRIBUTING.md names, against plain transformers."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from audio_dataset import AudioMultimodalProcessor
from conftest import parse_flags, run_script
from safetensors.torch import load_file, save_file
from support.policies import (
    AUDIO,
    DECODER,
    PAD,
    TOWER,
    as_actor,
    audio_embeddings,
    check_gradients,
    check_log_probs,
    make_item,
    make_mel,
    mixed_cases,
    with_large_weights,
)
from support.rollouts import SECONDS, gaps, make_noises, perturbed, prompt_of, rollout
from support.training import answers_of, metrics_of, moved, train
from transformers import AudioFlamingo3Config, Qwen2_5OmniThinkerConfig

from aqa.audio.decode import SAMPLING_RATE
from aqa.data.prompts import render_chat
from aqa.evaluation.asking import make_reader
from aqa.evaluation.checkpoints import Model
from aqa.evaluation.items import EvalError, write_rows
from aqa.families import AudioFlamingo3, Qwen2_5Omni, Qwen2Audio, write_checkpoint
from aqa.families import family_of as forward_family_of
from aqa.families.omni_processor import OmniAudioProcessor
from aqa.hosts.runtime import RuntimeHost
from aqa.patches.slots import GUARD_ROWS, audio_token_count, pack_clip, unpack_clips
from aqa.policy.forward import encode_clips
from lightrft.engines.hf_engine import HFEngine
from lightrft.engines.vllm_engine import VLLMEngine
from lightrft.models.actor_al import ActorAL, load_model
from lightrft.models.lora import adapted_layers
from lightrft.utils.distributed import init_process_group
from lightrft.utils.processor import get_tokenizer_processor_vl

BOS, EOS = 5, 6  # around a clip's placeholders
LENGTHS = (3, 8, 199, 200, 201, 333, 399, 400, 401, 2999, 3000)  # the chunks of Omni's tower have 200 frames
OMNI = Qwen2_5OmniThinkerConfig(
    audio_config=TOWER | {"output_dim": 64},
    text_config=DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
    vision_config={"depth": 1, "hidden_size": 16, "num_heads": 1, "patch_size": 2, "out_hidden_size": 64},
    audio_token_index=AUDIO,
    audio_start_token_id=BOS,
    audio_end_token_id=EOS,
    image_token_index=1,
    video_token_index=2,
    vision_start_token_id=3,
)
FLAMINGO = AudioFlamingo3Config(
    audio_config=TOWER | {"model_type": AudioFlamingo3.tower_type, "max_source_positions": 1500},
    text_config=DECODER | {"model_type": "qwen2"},
    audio_token_id=AUDIO,
)


class Case(NamedTuple):
    """A family, and what its tests expect of it."""

    family: type[Qwen2Audio]
    config: Any
    frozen: tuple[str, ...]  # live names of what does not train
    layers: str  # the decoder's
    projector: tuple[str, str]  # one of its layers, and the name that --target_modules gives it
    files: tuple[str, ...]  # of the processor
    seconds: int  # longest clip of the tests


FILES = ("processor_config.json", "chat_template.jinja")
CASES = {
    "omni": Case(
        *(Qwen2_5Omni, OMNI, ("visual.", "audio_tower.audio_bos_eos_token")),
        *("model.layers.", ("audio_tower.proj", "proj"), FILES, 30),
    ),
    "flamingo": Case(
        *(AudioFlamingo3, FLAMINGO, ("model.audio_tower.embed_positions",)),
        *("model.language_model.layers.", ("model.multi_modal_projector.linear_2", "linear_2"), FILES, 90),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(name) -> Case:
    return CASES[name]


@pytest.fixture(scope="module")
def tiny(name, request) -> Path:
    return request.getfixturevalue(f"tiny_{name}")


@pytest.fixture(scope="module")
def plain(case) -> torch.nn.Module:
    return with_large_weights(case.family.model_class(), case.config)


@pytest.fixture(scope="module")
def policy(plain) -> torch.nn.Module:
    return copy.deepcopy(plain)


@pytest.fixture(scope="module")
def noises() -> list:
    """As for Qwen2-Audio, and further windows: one of no token behind 30 s, two full ones and a rest."""
    return make_noises((*SECONDS, 30.02, 65.0))


# ------------------------------------------------------------------------------------------------------ slot and tower
@pytest.mark.parametrize("frames", LENGTHS)
@torch.no_grad()
def test_a_packed_clip_gives_the_towers_own_output(plain, frames):
    """Omni's exactly: the guard rows are carried along for the others' sake, its tower does not see them."""
    mel = make_mel(frames)
    rows = pack_clip(mel, frames)
    expected = audio_embeddings(plain, mel, frames)
    omni = forward_family_of(plain) is Qwen2_5Omni
    for guard in (rows[frames:], *([torch.full((GUARD_ROWS, 128), 1e3)] if omni else ())):
        clips = unpack_clips(torch.cat([rows[:frames], guard]), torch.tensor([[1, 1, len(rows)]]))
        embeddings, tokens = encode_clips(plain, clips.features, clips.frames)
        assert tokens.tolist() == [audio_token_count(frames)]
        if omni:
            assert torch.equal(embeddings, expected)
        torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)


def test_the_extractor_of_300_seconds_gives_what_that_of_30_gives(tiny_omni):
    """Checkpoints pad to 300 s; ours is cut to 30, and the rows are cut out of a short transform."""
    tokenizer, processor = get_tokenizer_processor_vl(str(tiny_omni), None)
    assert type(processor) is OmniAudioProcessor and processor.feature_extractor.n_samples == 30 * SAMPLING_RATE
    long = copy.deepcopy(processor.feature_extractor)
    long.chunk_length, long.n_samples, long.nb_max_frames = 300, 300 * SAMPLING_RATE, 30_000
    wave = (0.3 * np.random.default_rng(0).standard_normal(40_123)).astype(np.float32)
    full = long(wave, sampling_rate=SAMPLING_RATE, padding="max_length", return_attention_mask=True)
    assert full["input_features"].shape[-1] == 30_000
    (rows,), _ = AudioMultimodalProcessor(tokenizer, processor, 512).extract((wave, SAMPLING_RATE))
    frames = int(np.asarray(full["attention_mask"]).sum())
    assert len(rows) == frames + GUARD_ROWS
    np.testing.assert_array_equal(rows[:frames].T.numpy(), np.asarray(full["input_features"])[0, :, :frames])


# -------------------------------------------------------------------------------------------------------------- forward
def test_text_and_sound_have_the_same_position_on_all_three_axes_of_omnis():
    """What lets the policy, and vLLM, count positions in one row, and responses share their group's prompt."""
    plain = Qwen2_5Omni.model_class()(OMNI)
    sound = [BOS, *[AUDIO] * audio_token_count(333), EOS]
    rows = [[9, 10, *sound, 11, 12], [13, 14, 15], [9, *sound, 10, *sound, 12]]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    lengths = torch.tensor([333] * 3)
    positions, _ = plain.get_rope_index(ids, attention_mask=mask, audio_seqlens=lengths)
    ours = (mask.cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(positions[:, mask.bool()], ours.expand(3, -1, -1)[:, mask.bool()])


def test_log_probs_equal_plain_transformers(plain, policy):
    check_log_probs(policy, plain, mixed_cases())  # shared prompts and clips, text alone, sampled placeholders


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_gradients_equal_the_naive_ones(plain, case, checkpointing):
    model, policy = (copy.deepcopy(plain).double() for _ in range(2))
    actor = as_actor(policy.train())
    if checkpointing:
        actor.gradient_checkpointing_enable({"use_reentrant": False})
    cases = [
        make_item(333, 1, [9, 10, 11]),
        make_item(101, 2, [12, AUDIO], text=2),
        make_item(None, 3, [13, 14]),
        make_item(333, 1, [20, 21, 22, 23]),  # a group with the first
        make_item(333, 5, [19], clip_seed=1),  # its clip, another prompt
    ]
    check_gradients(actor, model, cases, case.frozen)


def test_a_model_of_no_family_is_refused(tmp_path):
    stranger = SimpleNamespace(config=SimpleNamespace(model_type="ultravox"))
    with pytest.raises(ValueError, match=r"model_type 'ultravox'.* none of qwen2_audio, qwen2_5_omni, audioflamingo3"):
        forward_family_of(stranger)


# -------------------------------------------------------------------------------------------------------------- loading
def test_loading_freezes_what_neither_hears_nor_reads_and_leaves_the_talker_out(tiny, case, tmp_path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    stored = load_file(tiny / "model.safetensors")
    talking = stored | {f"{prefix}x.weight": torch.ones(3) for prefix in case.family.foreign}
    save_file(talking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_model(str(tmp_path), dtype=torch.float32)
    named = dict(model.named_parameters())
    assert {case.family.checkpoint_name(name) for name in named} == stored.keys()
    assert torch.equal(model.lm_head.weight, stored[case.family.checkpoint_name("lm_head.weight")])
    assert {n for n, p in named.items() if not p.requires_grad} == {n for n in named if n.startswith(case.frozen)}
    projector = f"{case.projector[0]}.weight"
    del talking[case.family.checkpoint_name(projector)]
    save_file(talking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"not a whole {case.family.name} checkpoint.*missing.*{projector}"):
        load_model(str(tmp_path), dtype=torch.float32)


def test_adapters_are_where_it_hears_and_reads(tiny, case):
    layer, target = case.projector
    actor = ActorAL(str(tiny), bf16=False, lora_rank=4, target_modules=["language_model", "fc1", target])
    adapted = set(adapted_layers(actor.model))
    layers = {name for name in adapted if name.startswith(case.layers)}
    assert {name.rsplit(".", 1)[1] for name in layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    tower = next(name for name, _ in actor.model.named_modules() if name.endswith("audio_tower"))
    assert adapted - layers == {f"{tower}.layers.0.fc1", layer}  # Omni's vision tower has a proj, too
    with pytest.raises(ValueError, match="--target_modules visual: no linear layer"):
        ActorAL(str(tiny), bf16=False, lora_rank=4, target_modules=["visual"])


def test_flags_that_the_family_does_not_know(problems, tmp_path):
    (tmp_path / "model" / "config.json").write_text('{"model_type": "ultravox"}')
    (found,) = problems()
    assert "ultravox" in found and "qwen2_5_omni" in found
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
    assert problems(audio_seconds=60) == ["--audio_seconds 60: Qwen2.5-Omni takes 30 s at most"]
    with pytest.raises(EvalError, match=r"--audio_seconds 60: Qwen2\.5-Omni takes 30 s at most"):
        make_reader(SimpleNamespace(audio_seconds=60, sandbox_audio=False), Model(*[str(tmp_path / "model")] * 2))
    (tmp_path / "model" / "config.json").write_text('{"model_type": "audioflamingo3"}')
    assert problems(audio_seconds=600) == []
    (found,) = problems(limit_mm_image_per_prompt=2)
    assert "one clip a prompt for Audio Flamingo 3" in found


# -------------------------------------------------------------------------------------------------------------- engines
@pytest.fixture(scope="module")
def parts(tiny):
    from aqa.hosts.targets import patch_actor_for_audio

    init_process_group(torch.device("cpu"))
    actor = ActorAL(str(tiny), bf16=False)
    patch_actor_for_audio(actor)
    return actor, *get_tokenizer_processor_vl(str(tiny), actor.model)


def test_vllm_agrees_with_the_trainer_and_follows_its_weights(tiny, case, parts, noises):
    """For all lengths of audio, before and after a sync; prompts token for token (in ``rollout``)."""
    engine = VLLMEngine(str(tiny), torch.float32, max_model_len=2040, seed=0, audio_seconds=case.seconds)
    actor = parts[0]
    before = {name: p.detach().clone() for name, p in actor.model.named_parameters()}
    prompts = [prompt_of(parts[2])] * len(noises)
    try:
        items, bias = rollout(engine, parts, noises, prompts, case.seconds)
        assert max(gaps(parts, items, bias)) < 1e-3
        items[0].clips, items[0].prompt_ids = items[6].clips, items[6].prompt_ids
        assert gaps(parts, items, bias)[0] > 1e-3  # the comparison means something: it hears
        tower = case.family.parts(actor.model).tower
        tower = next(f"{name}." for name, module in actor.model.named_modules() if module is tower)
        for trained in ("", case.layers, tower):  # all, and parts alone
            perturbed(actor, 0.02)
            stale, bias = rollout(engine, parts, noises, prompts, case.seconds)
            assert max(gaps(parts, stale, bias)) > 1e-2
            with torch.no_grad():
                for name, p in actor.model.named_parameters():
                    if not name.startswith(trained):
                        p.copy_(before[name])
            named = [(n, p) for n, p in actor.model.named_parameters() if n.startswith(trained)]
            engine.load_weights((case.family.checkpoint_name(n), p.data) for n, p in named)
            fresh, bias = rollout(engine, parts, noises, prompts, case.seconds)
            assert max(gaps(parts, fresh, bias)) < 1e-3
            with torch.no_grad():
                for name, p in actor.model.named_parameters():
                    p.copy_(before[name])
            everything = [(case.family.checkpoint_name(n), p.data) for n, p in actor.model.named_parameters()]
            engine.load_weights(everything)
    finally:
        with torch.no_grad():
            for name, p in actor.model.named_parameters():
                p.copy_(before[name])


def test_the_hf_engines_log_probs_are_the_trainers(parts, case, noises):
    class Whole:
        def __enter__(self):
            return parts[0].model

        def __exit__(self, *_):
            pass

    engine = HFEngine(parts[2], Whole, batch_size=3)
    text = render_chat(parts[2], [{"role": "user", "content": "What do you hear?"}])
    prompts = [prompt_of(parts[2]), prompt_of(parts[2], "Short?"), text, prompt_of(parts[2])]
    clips = [*noises[:2], None, noises[-1]]
    items, bias = rollout(engine, parts, clips, prompts, case.seconds, n=2, seed=5)
    assert max(gaps(parts, items, bias)) < 1e-4


def test_evaluation_answers_as_plain_generate(tiny, case, noises):
    """Two questions in a batch, one about a clip of several windows, against transformers' generate, alone."""
    from aqa.evaluation import engines

    model = Model(str(tiny), str(tiny))
    processor = engines.load_processor(model)
    settings = engines.Settings(max_new_tokens=8, batch_size=4, dtype="float32", audio_seconds=case.seconds)
    engine, clips = engines.HFEngine(model, processor, settings), [noises[1], noises[-1]]
    perturbed(engine, 0.1)  # a small change of sound or text changes the answers
    texts = [engines.render(processor, question) for question in ("What sound?", "Is it a bell or rain?")]
    slot = engine.inputs.process_multimodal_batch(texts, clips, None, None, 1)
    ids = [torch.tensor(row) for row in slot["all_prompt_token_ids"]]
    width = max(map(len, ids))
    pad = engine.pad_token_id
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in ids]),
        "attention_mask": torch.stack(
            [torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in ids]
        ),
        "clips": unpack_clips(slot["all_images_pixel_values"], slot["all_images_grid_thw"]),
    }
    ours = engine.generate(batch)
    for text, (wave, rate), answer in zip(texts, clips, ours, strict=True):
        one = processor(text=[text], audio=[wave], sampling_rate=rate, return_tensors="pt")
        tokens = engine.model.generate(**one)[0, one["input_ids"].shape[1] :]
        assert [engines.decode(processor, tokens.tolist())] == answer


@pytest.mark.slow
@pytest.mark.parametrize("tiny_of", ["tiny_model", "tiny_omni", "tiny_flamingo"])
def test_mmau_pro_on_vllm(tiny_of, request, noises, tmp_path):
    """Several recordings in a prompt, which vLLM refuses for Audio Flamingo; windows where the family has them; else a
    long one is counted and not asked."""
    model = load_model(str(request.getfixturevalue(tiny_of)), dtype=torch.float32)
    processor = get_tokenizer_processor_vl(str(request.getfixturevalue(tiny_of)), model)[1]
    perturbed(SimpleNamespace(model=model), 0.1)  # a small change of the sound changes the answers
    write_checkpoint(model, tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for number, (wave, rate) in enumerate(noises):
        soundfile.write(tmp_path / f"{number}.wav", wave, rate)
    row = {"question": "Which is longer?", "choices": ["first", "second"], "answer": "first", "category": "sound"}
    windows = ("--audio_seconds", 90) if tiny_of == "tiny_flamingo" else ()
    flags = ("--data_file", tmp_path / "test.parquet", "--audio_dir", tmp_path, "--benchmark", "mmau-pro", *windows)
    flags += ("--model_path", tmp_path / "model", "--max_new_tokens", 8, "--skip_bad_audio", "--overwrite")

    def ask(engine, heard):
        rows = [row | {"id": str(i), "audio_path": [f"{n}.wav" for n in names]} for i, names in enumerate(heard)]
        write_rows(rows, tmp_path / "test.parquet")
        out = ("--out_file", tmp_path / "out.parquet", "--engine", engine)
        return run_script("eval_mmau.py", *flags, *out, check=False)

    heard = ([1, 2], [2, 1], [2], [1, 7, 2], [3, 3, 2, 1, 0])  # 7 has 65 s
    if windows:
        assert ask("hf", heard).returncode == 0
        done = ask("vllm", heard)
        assert done.returncode == 2 and "one recording a question, and there are some about 5" in done.stderr
        heard = ([1], [2], [3], [7], [6])
    said = {}
    for engine in ("hf", "vllm"):
        done = ask(engine, heard)
        assert done.returncode == 0, done.stderr
        assert windows or "item 4 (id 3): 65.00 s of sound, 30 are heard (--audio_seconds)" in done.stderr
        assert windows or "counted as wrong, because of their recordings: 1; of the 4 that were asked" in done.stdout
        said[engine] = [row["raw_output"] for row in pq.read_table(tmp_path / "out.parquet").to_pylist()]
    assert said["vllm"] == said["hf"] and len(set(said["hf"])) >= 4 and (windows or said["hf"][3] == "")


# ------------------------------------------------------------------------------------------------------------- training
def test_grpo_steps_move_all_that_trains_and_leave_a_folder_of_the_same_kind(tiny, case, demo_parquet, tmp_path):
    train(tiny, demo_parquet, tmp_path, "--max_samples", 12)
    records = metrics_of(tmp_path)
    assert len(records) == 3
    assert all(record["rollout/logprob_gap_max"] < 1e-3 for record in records)
    changed, same = moved(tiny, tmp_path)
    assert any("audio_tower." in name for name in changed)
    unheard = tuple(case.family.checkpoint_name(name) for name in case.frozen)
    assert not [name for name in changed if name.startswith(unheard)]
    # a key's bias shifts all scores of a query alike, but for the rotation; the least of them may round away
    assert not [name for name in same if not name.startswith(unheard) and "k_proj.bias" not in name]
    _, info = case.family.model_class().from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (tiny, tmp_path))
    assert new["model_type"] == old["model_type"] == case.family.model_types[0]
    for name in case.files:
        assert (tmp_path / name).read_bytes() == (tiny / name).read_bytes()


@pytest.mark.slow
def test_adapters_train_and_are_evaluated_merged_or_not(tiny, case, demo_parquet, demo_data, tmp_path):
    layer, target = case.projector
    flags = ("--lora_rank", 2, "--lora_alpha", 64, "--target_modules", "language_model", "fc1", target)
    train(tiny, demo_parquet, tmp_path, "--max_samples", 12, *flags)
    records = metrics_of(tmp_path)
    assert len(records) == 3
    assert all(record["rollout/logprob_gap_max"] < 1e-3 for record in records)
    assert records[0]["train/kl"] == pytest.approx(0, abs=1e-6) and records[-1]["train/kl"] > 1e-6
    changed, _ = moved(tiny, tmp_path)
    parts = [case.family.checkpoint_name(part) for part in (case.layers, f"{layer}.")]
    places = [next((p for p in (*parts, "fc1") if name.startswith(p) or f".{p}." in name), name) for name in changed]
    assert set(places) == {*parts, "fc1"}
    models = [(tmp_path,), (tmp_path / "adapter",), (tmp_path / "adapter", "--engine", "vllm"), (tiny,)]
    answers = [answers_of(model, demo_data, tmp_path, *flags) for model, *flags in models]
    assert answers[0] == answers[1] == answers[2] != answers[3]


def test_a_model_that_cannot_be_trained_is_named_without_a_traceback(tmp_path):
    """A hub name's type is known only when it is loaded."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match=r"--pretrain .*model_type 'gpt2' is none of qwen2_audio"):
        RuntimeHost().load_actor(parse_flags(["--pretrain", tmp_path]), None)
