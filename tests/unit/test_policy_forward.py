"""The policy's log-probs and gradients against plain transformers: one unpadded sample, one clip, full logits."""

import copy
import dataclasses
import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.policies import (
    AUDIO,
    PAD,
    as_actor,
    audio_embeddings,
    batch_of,
    build_model,
    check_gradients,
    check_log_probs,
    make_item,
    make_mel,
    mixed_cases,
)
from transformers import Qwen2AudioForConditionalGeneration

from aqa.patches.slots import audio_token_count, pack_clip, unpack_clips
from aqa.policy import forward as policy_forward
from aqa.policy.forward import encode_clips
from aqa.policy.packing import divide_groups
from aqa.policy.tower_cache import share_tower_outputs
from lightrft.models.actor_al import load_model
from lightrft.trainer.fast_exp_maker import forward
from lightrft.trainer.replay_buffer import make_micro_batch


@pytest.fixture(scope="module")
def plain() -> Qwen2AudioForConditionalGeneration:
    return build_model()


@pytest.fixture(scope="module")
def policy(plain) -> Qwen2AudioForConditionalGeneration:
    return copy.deepcopy(plain)


@pytest.mark.parametrize(
    ("temperature", "logit_bias"),
    [(1.0, None), (0.7, None), (1.0, {AUDIO: -100.0, 9: 1.5}), (1.6, {10: -2.0, 14: 3.0})],
    ids=["plain", "temperature", "bias", "both"],
)
def test_log_probs_equal_plain_transformers(plain, policy, temperature, logit_bias):
    cases = mixed_cases()
    mask = batch_of(cases).attention_mask
    assert not mask[:, 0].all() and not mask[:, -1].all()  # there is padding on the left and on the right
    check_log_probs(policy, plain, cases, temperature, logit_bias)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_responses_of_a_single_token(plain, policy, batch_size):
    check_log_probs(policy, plain, [make_item(40, 1, [9]), make_item(40, 1, [10])][:batch_size])


def test_prompts_that_differ_in_a_real_padding_token_alone(plain, policy):
    """The padding token may also be a word: then the same columns are padding in one prompt and read in the other."""
    cases = [make_item(None, 1, [9, 10]), make_item(None, 1, [11, 12])]
    cases[1][0].prompt_ids = torch.cat([torch.tensor([PAD]), cases[0][0].prompt_ids])
    check_log_probs(policy, plain, cases)


@torch.no_grad()
def test_the_model_hears(policy):
    """The comparison above means nothing if audio hardly matters: another clip must change every log-prob."""
    one, other = make_item(200, 1, [9, 10, 11]), make_item(200, 1, [9, 10, 11], clip_seed=99)
    batch = make_micro_batch([one[0], other[0]], PAD, torch.device("cpu"))
    out = forward(as_actor(policy), batch)
    assert ((out[0] - out[1]).abs() > 1e-2).all()


def test_a_batch_of_text_alone(plain, policy):
    cases = [make_item(None, 1, [9, 10]), make_item(None, 2, [11], text=8)]
    assert batch_of(cases).audio_values is None
    check_log_probs(policy, plain, cases)


@torch.no_grad()
def test_two_clips_in_one_prompt(policy):
    """Their audio lands in order: as two prompts' worth of embeddings put there by hand. Two prompts that differ in the
    second clip alone share nothing."""
    ids = [9, *[AUDIO] * audio_token_count(40), 10, *[AUDIO] * audio_token_count(100), 11]
    items = [make_item(None, 0, [12, 13])[0] for _ in range(2)]
    for item, second in zip(items, (2, 3), strict=True):
        item.prompt_ids = torch.tensor(ids)
        item.clips = [pack_clip(make_mel(1), 40), pack_clip(make_mel(second), 100)]
    out = forward(as_actor(policy), make_micro_batch(items, PAD, torch.device("cpu")))
    sequence = torch.cat([items[0].prompt_ids, items[0].response_ids])[None]
    for row, second in zip(out, (2, 3), strict=True):
        embeds = policy.get_input_embeddings()(sequence)
        embeds[0, 1:11] = audio_embeddings(policy, make_mel(1), 40)
        embeds[0, 12:37] = audio_embeddings(policy, make_mel(second), 100)
        logits = policy.lm_head(policy.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state)
        expected = logits[0, len(ids) - 1 : -1].log_softmax(-1).gather(-1, items[0].response_ids[:, None])[:, 0]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_each_different_clip_is_encoded_once(policy, monkeypatch):
    seen = []
    encode = policy_forward.encode_clips
    monkeypatch.setattr(
        policy_forward, "encode_clips", lambda model, x, frames: seen.append(len(x)) or encode(model, x, frames)
    )
    items = [make_item(50, seed, [9, 10], clip_seed=seed // 4)[0] for seed in range(8)]
    forward(as_actor(policy), make_micro_batch(items, PAD, torch.device("cpu")))
    assert seen == [2]


@pytest.mark.parametrize(
    ("attention", "checkpointing"), [("sdpa", False), ("sdpa", True), ("eager", True)], ids=["plain", "gc", "eager gc"]
)
def test_gradients_of_shared_clips_equal_the_naive_ones(plain, attention, checkpointing):
    model = copy.deepcopy(plain).double()
    policy = copy.deepcopy(plain).double().train()
    policy.set_attn_implementation(attention)
    actor = as_actor(policy, temperature=0.9)
    if checkpointing:
        actor.gradient_checkpointing_enable({"use_reentrant": False})
    cases = [
        make_item(101, 1, [9, 10, 11]),
        make_item(101, 2, [12, AUDIO], clip_seed=1, text=2),
        make_item(None, 3, [13, 14]),
        make_item(40, 4, [15, 16, 17, 18]),
        make_item(101, 5, [19], clip_seed=1),
        make_item(101, 1, [20, 21, 22, 23]),  # a group with the first, of another length
        make_item(101, 1, [24, 25], clip_seed=7),  # its prompt, another clip
        make_item(None, 3, [26]),  # a group with the third
    ]
    frozen = ("model.audio_tower.embed_positions.weight",)  # by transformers
    check_gradients(actor, model, cases, frozen, temperature=0.9)


def test_the_decoder_gets_each_prompt_once_and_each_response_once(policy):
    prompts = [make_item(101, 1, [9])[0], make_item(None, 2, [9])[0]]
    items = [
        dataclasses.replace(prompt, response_ids=torch.arange(8, 8 + length))
        for prompt, lengths in zip(prompts, [(5, 3, 5, 1), (4, 5)], strict=True)
        for length in lengths
    ]
    shapes = []
    hook = policy.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        forward(as_actor(policy), make_micro_batch(items, PAD, torch.device("cpu")))
    finally:
        hook.remove()
    # the last token of a response predicts nothing; two rows, the second padded to the first's width
    first, second = len(prompts[0].prompt_ids) + 4 + 2 + 4 + 0, len(prompts[1].prompt_ids) + 3 + 4
    assert shapes == [(2, max(first, second))]


def rows_of(prompt: int, lengths: list[int], hidden: int = 4096) -> list[list[int]]:
    config = SimpleNamespace(
        hidden_size=hidden, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008
    )
    valid = torch.zeros(len(lengths), prompt + max(lengths), dtype=torch.bool)
    for row, length in enumerate(lengths):
        valid[row, : prompt + length] = True
    return divide_groups([list(range(len(lengths)))], valid, prompt, config)


def test_long_responses_get_rows_of_their_own():
    """With the sizes of the 7B model a prompt costs 340 tokens; pairs of tokens count at several thousands."""
    assert rows_of(340, [24] * 8) == [list(range(8))]
    assert rows_of(340, [256] * 8) == [list(range(8))]
    assert len(rows_of(340, [16_000] * 8)) == 8


@pytest.mark.parametrize("frames", [*range(3, 16), 100, 101, 102, 103, 2996, 2997, 2998, 2999, 3000])
@torch.no_grad()
def test_the_narrow_tower_equals_the_tower_on_3000_frames(policy, frames):
    mel = make_mel(frames)
    rows = pack_clip(mel, frames)
    clips = unpack_clips(rows, torch.tensor([[1, 1, len(rows)]]))
    embeddings, tokens = encode_clips(policy, clips.features, clips.frames)
    assert tokens.tolist() == [audio_token_count(frames)]
    torch.testing.assert_close(embeddings, audio_embeddings(policy, mel, frames), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_short_clip_beside_a_long_one_is_encoded_as_alone(policy):
    lengths = [301, 6, 43]
    parts = [pack_clip(make_mel(frames), frames) for frames in lengths]
    clips = unpack_clips(parts, torch.tensor([[1, 1, len(part)] for part in parts]))
    embeddings, tokens = encode_clips(policy, clips.features, clips.frames)
    expected = [audio_embeddings(policy, make_mel(frames), frames) for frames in lengths]
    assert tokens.tolist() == [len(part) for part in expected]
    torch.testing.assert_close(embeddings, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_wrong_number_of_placeholders_is_refused(policy):
    items = [make_item(100, 1, [9])[0], make_item(40, 2, [10])[0]]
    items[0].prompt_ids = items[0].prompt_ids[items[0].prompt_ids != AUDIO]
    batch = make_micro_batch(items, PAD, torch.device("cpu"))
    # the first prompt takes none of the 25 tokens of its clip, so that they fall to the second
    with pytest.raises(ValueError, match=r"sequence 1 .* 10 audio placeholders.* \[25\]"):
        forward(as_actor(policy), batch)


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        # the placeholders add up, but the first prompt would get a part of the second one's audio
        (([1], [0]), r"sequence 0 .* 25 audio placeholders"),
        (([0], []), r"sequence 1 .* 10 audio placeholders"),
        (([], []), "placeholders, but there is no clip"),
        (([0], [1, 0]), r"3 clips, but the prompts' placeholders \[25, 10\] take fewer"),
    ],
)
def test_clips_that_do_not_fit_the_placeholders_are_refused(policy, clips, message):
    items = [make_item(100, 1, [9])[0], make_item(40, 2, [10])[0]]
    there = [item.clips[0] for item in items]
    for item, mine in zip(items, clips, strict=True):
        item.clips = [there[i] for i in mine]
    with pytest.raises(ValueError, match=message):
        forward(as_actor(policy), make_micro_batch(items, PAD, torch.device("cpu")))


@torch.no_grad()
def test_a_patched_model_that_is_deleted_is_freed_at_once(plain):
    """Not when the garbage collector runs: at 7B these are 15 GB. And a copy does not refer to the original."""
    actor = as_actor(copy.deepcopy(plain).requires_grad_(False))
    share_tower_outputs(actor.model)
    copied = copy.deepcopy(actor)
    batch = make_micro_batch([make_item(40, 1, [9, 10])[0]], PAD, torch.device("cpu"))
    expected = forward(actor, batch)
    left = [weakref.ref(thing) for thing in (actor.model, actor.model.lm_head, actor.model.lm_head.weight)]
    gc.disable()
    try:
        del actor
        assert [reference() for reference in left] == [None] * 3
    finally:
        gc.enable()
    assert torch.equal(forward(copied, batch), expected)
    assert type(copied.model).__name__ == "Qwen2AudioForConditionalGeneration"  # what a saved model is called


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_a_checkpoint_that_is_not_whole_is_refused(tiny_model, tmp_path, kind):
    stored = load_file(tiny_model / "model.safetensors")
    name = "audio_tower.conv1.weight"
    weights = {"audio_tower.conv9.weight" if k == name and kind == "unexpected" else k: v for k, v in stored.items()}
    if kind == "missing":
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tiny_model / "config.json").read_text())))
    with pytest.raises(ValueError, match=rf"not a whole Qwen2-Audio checkpoint.*{kind}.*audio_tower\.conv"):
        load_model(str(tmp_path), dtype=torch.float32)
