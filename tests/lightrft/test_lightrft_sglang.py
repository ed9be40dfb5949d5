"""sglang rollouts: what the engine is handed, what comes back, and the names of the weights. No sglang is needed."""

import copy
import inspect
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch.distributed as dist

from aqa.families import Qwen2Audio
from aqa.hosts.lightrft.sglang import SglangOutput, generate_with_audio
from aqa.patches.strategy import build_audio_inputs

SAMPLING = {"n": 1, "temperature": 0.7, "max_new_tokens": 8, "logit_bias": {"3": 1.0, "4": 2.0}}


def answer(tokens, log_probs, prompt_tokens=5, reason="stop") -> dict:
    """A response in the form in which sglang returns it."""
    entries = [(log_prob, token, None) for log_prob, token in zip(log_probs, tokens or [0], strict=False)]
    meta = {"prompt_tokens": prompt_tokens, "finish_reason": {"type": reason}, "output_token_logprobs": entries}
    return {"text": "", "output_ids": tokens, "meta_info": meta}


ANSWERS = [answer([7, 8], [-0.5, -0.25], 30), answer([9], [-1.5], 4), answer([7, 7, 2], [-2.0, -3.0, 0.0], 31)]


class Engine:
    """What LightRFT's engine holds in ``_engine``: records its calls and gives the same answers."""

    def __init__(self, answers: list[dict]) -> None:
        self.answers = answers
        self.calls: list[dict] = []

    def generate(self, prompt, sampling_params, audio_data, return_logprob) -> list[dict]:
        self.calls.append(locals())
        return self.answers


def make_engine(answers: list[dict], rank: int = 0, size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(_engine=Engine(answers), _tp_rank=rank, _tp_size=size, _leader_rank=4, tp_group_cpu="group")


def make_requests() -> list[dict]:
    """Noise beyond full scale, with the values that a conversion loses first; no audio; two clips."""
    noise = np.random.default_rng(0).standard_normal((3, 480)).astype(np.float32) * 2
    noise[:, :4] = [1e-42, -0.0, np.nextafter(np.float32(1), np.float32(2)), 1 / 3]
    requests = build_audio_inputs(["first", "no audio", "third"], [(noise[0], 16_000), None, (noise[1], 16_000)])
    requests[2]["multi_modal_data"]["audio"].append((noise[2], 16_000))
    return requests


def test_the_parameters_are_sglangs():
    """Of the sglang that is installed; recorded from 0.5.23: prompt, sampling_params, input_ids, image_data, ..."""
    engine = pytest.importorskip("sglang.srt.entrypoints.engine").Engine
    inspect.signature(engine.generate).bind(None, prompt=[], sampling_params={}, audio_data=[], return_logprob=True)


def test_a_mixed_batch_in_one_call():
    """Clips arrive bit by bit, the placeholder's bias joins the caller's, and the arguments stay as they are."""
    engine, requests, bias = make_engine(ANSWERS), make_requests(), {4: -100, 151646: -100}
    before = copy.deepcopy((SAMPLING, requests, bias))
    outputs = generate_with_audio(engine, SAMPLING, requests, bias)
    np.testing.assert_equal((SAMPLING, requests, bias), before)
    [call] = engine._engine.calls
    assert call["prompt"] == ["first", "no audio", "third"] and call["return_logprob"] is True
    assert call["sampling_params"] == SAMPLING | {"logit_bias": {"3": 1.0, "4": -100.0, "151646": -100.0}}
    assert [None if files is None else len(files) for files in call["audio_data"]] == [1, None, 2]
    for request, files in zip(requests, call["audio_data"], strict=True):
        for (clip, _), data in zip(request.get("multi_modal_data", {}).get("audio", ()), files or (), strict=True):
            assert (data[:4], data[8:12]) == (b"RIFF", b"WAVE")  # how sglang tells sound files from video containers
            loaded, rate = soundfile.read(io.BytesIO(data))  # as sglang's loader does it
            assert rate == 16_000
            assert (loaded.astype(np.float32).view(np.uint32) == clip.view(np.uint32)).all()
    assert outputs == [
        SglangOutput(None, [7, 8], [-0.5, -0.25], 30),
        SglangOutput(None, [9], [-1.5], 4),
        SglangOutput(None, [7, 7, 2], [-2.0, -3.0, 0.0], 31),
    ]
    outputs[0].prompt_token_ids = [1, 2]  # which LightRFT fills in and reads as an item
    assert outputs[0]["prompt_token_ids"] == [1, 2]


def test_without_audio_or_bias_the_call_is_plain():
    engine = make_engine(ANSWERS[:2])
    generate_with_audio(engine, SAMPLING, [{"prompt": "a"}, {"prompt": "b", "multi_modal_data": {"audio": []}}], {})
    assert engine._engine.calls[0]["audio_data"] == [None, None]  # one entry a prompt
    assert engine._engine.calls[0]["sampling_params"] == SAMPLING


@pytest.mark.parametrize(
    "clip",
    [(np.zeros(160), 16_000), (np.zeros((160, 2), np.float32), 16_000), (np.zeros(160, np.float32), 48_000)],
    ids=["float64", "stereo", "48 kHz"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_clip_that_would_change_on_the_way_is_refused_on_every_rank(clip, rank):
    engine = make_engine(ANSWERS[:2], rank, 2)
    with pytest.raises(ValueError, match="request 1: expected float32 mono at 16000 Hz"):
        generate_with_audio(engine, SAMPLING, build_audio_inputs(["a", "b"], [None, clip]), {})
    assert engine._engine.calls == []


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([ANSWERS[0]], "request 1: sglang returned 1 outputs for 2 requests"),
        (ANSWERS, "request 2: sglang returned 3 outputs for 2 requests"),
        ([ANSWERS[0], answer([], [])], "request 1: sglang returned 0 tokens and 0 log-probs"),
        ([answer([7, 8], [-0.5]), ANSWERS[1]], "request 0: sglang returned 2 tokens and 1 log-probs"),
        ([ANSWERS[0], answer(None, [-0.5])], "request 1: sglang returned 0 tokens and 1 log-probs"),
        ([ANSWERS[0], {"output_ids": [7], "meta_info": {}}], "request 1: sglang returned 1 tokens and 0 log-probs"),
        ([answer([], [], reason="out of memory"), ANSWERS[1]], "ending by {'type': 'out of memory'}"),
    ],
)
def test_incomplete_outputs_are_refused(answers, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        generate_with_audio(make_engine(answers), SAMPLING, [{"prompt": "a"}, {"prompt": "b"}], {})


def test_the_leader_generates_and_its_group_gets_the_answer(monkeypatch):
    """A recording broadcast: from the group's leader, as the rank of the world that it is."""
    sent = []

    def broadcast(box, src, group):
        assert (src, group) == (4, "group")
        sent.append(list(box))
        box[0] = ANSWERS

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    engines = [make_engine(ANSWERS, rank, 2) for rank in (0, 1)]
    leader, follower = (generate_with_audio(engine, SAMPLING, make_requests(), {}) for engine in engines)
    assert leader == follower and len(leader) == 3
    assert sent == [[ANSWERS], [None]]
    assert [len(engine._engine.calls) for engine in engines] == [1, 0]


@pytest.mark.parametrize(
    ("live", "checkpoint"),
    [
        ("model.audio_tower.layers.3.fc1.bias", "audio_tower.layers.3.fc1.bias"),
        ("model.multi_modal_projector.linear.weight", "multi_modal_projector.linear.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_weights_are_sent_by_the_checkpoints_names(live, checkpoint):
    """Which sglang's Qwen2-Audio loads; under transformers 4.57 they are the live model's names already."""
    assert Qwen2Audio.checkpoint_name(live) == checkpoint
    assert Qwen2Audio.checkpoint_name(checkpoint) == checkpoint
