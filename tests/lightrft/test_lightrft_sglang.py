"""sglang rollouts: what the engine is handed, what comes back, and the names of the weights. No sglang is needed."""

import ast
import copy
import importlib.metadata
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist

from aqa.hosts.lightrft.audio import checkpoint_name
from aqa.hosts.lightrft.sglang import SglangOutput, generate_with_audio
from aqa.patches.targets import build_audio_inputs

VERSION = "0.5.23"
# parameters of sglang.srt.entrypoints.engine.Engine.generate in this version
PARAMETERS = [
    "prompt",
    "sampling_params",
    "input_ids",
    "image_data",
    "audio_data",
    "video_data",
    "mm_hashes",
    "mm_content_hashes",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "lora_path",
    "custom_logit_processor",
    "require_reasoning",
    "return_hidden_states",
    "return_routed_experts",
    "routed_experts_start_len",
    "stream",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "kv_hints",
    "data_parallel_rank",
    "external_trace_header",
    "rid",
    "session_params",
    "priority",
    "session_id",
]
KEYWORD_ONLY = ["cache_salt"]
SIGNATURE = inspect.Signature(
    [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in PARAMETERS]
    + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in KEYWORD_ONLY]
)

SAMPLING = {"n": 1, "temperature": 0.7, "max_new_tokens": 8}


def answer(tokens: list[int], log_probs: list[float], prompt_tokens: int = 5) -> dict:
    """A response in the form in which sglang returns it."""
    entries = [(log_prob, token, None) for log_prob, token in zip(log_probs, tokens, strict=False)]
    meta = {"prompt_tokens": prompt_tokens, "finish_reason": {"type": "stop"}, "output_token_logprobs": entries}
    return {"text": "", "output_ids": tokens, "meta_info": meta}


ANSWERS = [answer([7, 8], [-0.5, -0.25], 30), answer([9], [-1.5], 4), answer([7, 7, 2], [-2.0, -3.0, 0.0], 31)]


class Server:
    """What LightRFT's engine holds in ``_engine``: takes sglang's parameters and no others."""

    def __init__(self, answers: list[dict]) -> None:
        self.answers = answers
        self.calls: list[dict] = []

    def generate(self, *args, **kwargs) -> list[dict]:
        self.calls.append(SIGNATURE.bind(*args, **kwargs).arguments)
        return self.answers


def make_engine(answers: list[dict]) -> SimpleNamespace:
    return SimpleNamespace(_engine=Server(answers), _tp_rank=0, _tp_size=1, _leader_rank=0, tp_group_cpu=None)


def make_waveform(seed: int, samples: int = 1600) -> np.ndarray:
    """Noise beyond full scale, with the values that a conversion loses first."""
    waveform = np.random.default_rng(seed).standard_normal(samples).astype(np.float32) * 2
    waveform[:4] = [1e-42, -0.0, np.nextafter(np.float32(1), np.float32(2)), 1 / 3]
    return waveform


def make_requests() -> list[dict]:
    clips = [(make_waveform(0), 16_000), None, (make_waveform(1, 480), 16_000)]
    return build_audio_inputs(["first", "no audio", "third"], clips)


def load_as_sglang(data: bytes) -> np.ndarray:
    """Bytes to samples as sglang's loader does it with soundfile; it resamples what is not at 16 kHz."""
    samples, rate = soundfile.read(io.BytesIO(data))
    assert rate == 16_000
    return samples


# ------------------------------------------------------------------------------------------------- what sglang is given
def sglang_source() -> Path:
    """The package's folder: an unpacked wheel named by SGLANG_SOURCE, or an installed sglang of this version."""
    if folder := os.environ.get("SGLANG_SOURCE"):
        return Path(folder) / "sglang"
    spec = importlib.util.find_spec("sglang")
    if spec is None:
        pytest.skip("sglang is not installed, and SGLANG_SOURCE does not name the folder of an unpacked wheel")
    if (installed := importlib.metadata.version("sglang")) != VERSION:
        pytest.skip(f"sglang {installed} is installed; the record is of {VERSION}")
    return Path(spec.origin).parent


def test_the_recorded_parameters_are_sglangs():
    tree = ast.parse((sglang_source() / "srt" / "entrypoints" / "engine.py").read_text())
    engine = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Engine")
    arguments = next(n for n in engine.body if isinstance(n, ast.FunctionDef) and n.name == "generate").args
    assert [a.arg for a in arguments.args] == ["self", *PARAMETERS]
    assert [a.arg for a in arguments.kwonlyargs] == KEYWORD_ONLY
    assert arguments.vararg is None
    assert arguments.kwarg is None


def test_a_mixed_batch_in_one_call():
    engine = make_engine(ANSWERS)
    requests = make_requests()
    outputs = generate_with_audio(engine, SAMPLING, requests, {})
    [call] = engine._engine.calls
    assert set(call) == {"prompt", "sampling_params", "audio_data", "return_logprob"}
    assert call["prompt"] == ["first", "no audio", "third"]
    assert call["return_logprob"] is True
    assert call["audio_data"][1] is None
    for row in (0, 2):
        [data] = call["audio_data"][row]
        assert type(data) is bytes
        sent = requests[row]["multi_modal_data"]["audio"][0][0]
        assert load_as_sglang(data).shape == sent.shape
    assert outputs == [
        SglangOutput(None, [7, 8], [-0.5, -0.25], 30),
        SglangOutput(None, [9], [-1.5], 4),
        SglangOutput(None, [7, 7, 2], [-2.0, -3.0, 0.0], 31),
    ]


def test_text_only_batch_has_one_entry_a_prompt():
    engine = make_engine(ANSWERS[:2])
    generate_with_audio(engine, SAMPLING, [{"prompt": "a"}, {"prompt": "b", "multi_modal_data": {"audio": []}}], {})
    assert engine._engine.calls[0]["audio_data"] == [None, None]


def test_waveforms_arrive_bit_by_bit():
    engine = make_engine(ANSWERS[:1])
    clips = [make_waveform(2), make_waveform(3, 481)]
    request = {"prompt": "two clips", "multi_modal_data": {"audio": [(clip, 16_000) for clip in clips]}}
    generate_with_audio(engine, SAMPLING, [request], {})
    [files] = engine._engine.calls[0]["audio_data"]
    for data, clip in zip(files, clips, strict=True):
        loaded = load_as_sglang(data)
        assert (loaded == clip).all()  # in float64, before any rounding
        assert (loaded.astype(np.float32).view(np.uint32) == clip.view(np.uint32)).all()
        # sglang tells sound files from video containers by these bytes
        assert (data[:4], data[8:12]) == (b"RIFF", b"WAVE")


@pytest.mark.parametrize(
    "clip",
    [(np.zeros(160), 16_000), (np.zeros((160, 2), np.float32), 16_000), (np.zeros(160, np.float32), 48_000)],
    ids=["float64", "stereo", "48 kHz"],
)
def test_clips_that_would_change_on_the_way_are_refused(clip):
    engine = make_engine(ANSWERS[:2])
    with pytest.raises(ValueError, match="request 1: expected float32 mono at 16000 Hz"):
        generate_with_audio(engine, SAMPLING, build_audio_inputs(["a", "b"], [None, clip]), {})
    assert engine._engine.calls == []


def test_logit_bias_has_string_keys_and_float_values():
    engine = make_engine(ANSWERS[:1])
    generate_with_audio(engine, SAMPLING, [{"prompt": "a"}], {151646: -100, 3: 1.5})
    sent = engine._engine.calls[0]["sampling_params"]
    assert sent == {**SAMPLING, "logit_bias": {"151646": -100.0, "3": 1.5}}
    assert all(type(value) is float for value in sent["logit_bias"].values())
    json.dumps(sent)


def test_a_bias_of_the_caller_stays():
    engine = make_engine(ANSWERS[:1])
    own = {**SAMPLING, "logit_bias": {"3": 1.0, "4": 2.0}}
    generate_with_audio(engine, own, [{"prompt": "a"}], {4: -100.0})
    assert engine._engine.calls[0]["sampling_params"]["logit_bias"] == {"3": 1.0, "4": -100.0}


def test_no_bias_leaves_the_sampling_parameters_alone():
    engine = make_engine(ANSWERS[:1])
    generate_with_audio(engine, SAMPLING, [{"prompt": "a"}], {})
    assert engine._engine.calls[0]["sampling_params"] == SAMPLING


def test_the_callers_arguments_are_unchanged():
    engine = make_engine(ANSWERS)
    sampling, bias, requests = {**SAMPLING, "logit_bias": {"3": 1.0}}, {4: -100.0}, make_requests()
    before = copy.deepcopy((sampling, bias, [r["prompt"] for r in requests]))
    waveforms = [r["multi_modal_data"]["audio"][0][0].copy() for r in requests if "multi_modal_data" in r]
    generate_with_audio(engine, sampling, requests, bias)
    assert (sampling, bias, [r["prompt"] for r in requests]) == before
    assert engine._engine.calls[0]["sampling_params"] is not sampling
    kept = [r["multi_modal_data"]["audio"][0][0] for r in requests if "multi_modal_data" in r]
    assert all((a == b).all() for a, b in zip(waveforms, kept, strict=True))


# ------------------------------------------------------------------------------------------------------ what comes back
@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([ANSWERS[0]], "request 1: sglang returned 1 outputs for 2 requests"),
        ([*ANSWERS], "request 2: sglang returned 3 outputs for 2 requests"),
        ([ANSWERS[0], answer([], [])], "request 1: sglang returned 0 tokens and 0 log-probs"),
        ([answer([7, 8], [-0.5]), ANSWERS[1]], "request 0: sglang returned 2 tokens and 1 log-probs"),
        ([ANSWERS[0], {**ANSWERS[1], "output_ids": None}], "request 1: sglang returned 0 tokens and 1 log-probs"),
        ([ANSWERS[0], {"output_ids": [7], "meta_info": {}}], "request 1: sglang returned 1 tokens and 0 log-probs"),
    ],
    ids=["too few", "too many", "empty", "log-prob missing", "no tokens", "no log-probs"],
)
def test_incomplete_outputs_are_refused(answers, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        generate_with_audio(make_engine(answers), SAMPLING, [{"prompt": "a"}, {"prompt": "b"}], {})


def test_the_reason_of_an_abort_is_named():
    aborted = answer([], [])
    aborted["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory"}
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_with_audio(make_engine([aborted]), SAMPLING, [{"prompt": "a"}], {})


def test_outputs_are_used_as_lightrft_uses_them():
    [output] = generate_with_audio(make_engine(ANSWERS[:1]), SAMPLING, [{"prompt": "a"}], {})
    assert output.prompt_token_ids is None
    output.prompt_token_ids = [1, 2]
    assert output["prompt_token_ids"] == [1, 2]
    assert len(output["output_token_ids"]) == 2


# ------------------------------------------------------------------------------------------------------ tensor parallel
def run_rank(rank: int, folder: str) -> None:
    """Ranks 1 and 2 share an engine, whose leader is therefore not the world's rank 0; rank 0 takes no part."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3, timeout=timedelta(seconds=10))
    group = dist.new_group([1, 2])
    seen: dict = {}
    if rank > 0:
        server = Server(ANSWERS) if rank == 1 else None
        engine = SimpleNamespace(_engine=server, _tp_rank=rank - 1, _tp_size=2, _leader_rank=1, tp_group_cpu=group)
        seen["outputs"] = [vars(o) for o in generate_with_audio(engine, SAMPLING, make_requests(), {3: 1.0})]
        seen["calls"] = len(server.calls) if server else None
        stereo = build_audio_inputs(["a"], [(np.zeros((160, 2), np.float32), 16_000)])
        for name, requests in (("bad output", make_requests()[:2]), ("bad clip", stereo)):
            try:
                generate_with_audio(engine, SAMPLING, requests, {})
            except (RuntimeError, ValueError) as error:
                seen[name] = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(folder: str) -> None:
    torch.multiprocessing.start_processes(run_rank, (folder,), nprocs=3, start_method="fork")


def test_the_leader_generates_and_all_ranks_see_it(tmp_path):
    # a process of its own, so that the ranks are forked from one that has no threads yet
    code = f"import test_lightrft_sglang; test_lightrft_sglang.run_ranks({str(tmp_path)!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    leader, follower = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (1, 2))
    assert leader.pop("calls") == 1
    assert follower.pop("calls") is None
    assert [o["output_token_ids"] for o in leader["outputs"]] == [[7, 8], [9], [7, 7, 2]]
    assert leader["bad output"] == "RuntimeError: request 2: sglang returned 3 outputs for 2 requests"
    assert leader["bad clip"].startswith("ValueError: request 0: expected float32 mono")
    assert leader == follower


# -------------------------------------------------------------------------------------------------------------- weights
# what load_weights of sglang's Qwen2AudioForConditionalGeneration takes: transformers' own tower and projector, and a
# Qwen2 whose q/k/v and gate/up it fuses itself
ACCEPTED = (
    r"audio_tower\.(conv1|conv2|layer_norm)\.(weight|bias)",
    r"audio_tower\.embed_positions\.weight",
    r"audio_tower\.layers\.\d+\.(self_attn_layer_norm|final_layer_norm|fc1|fc2)\.(weight|bias)",
    r"audio_tower\.layers\.\d+\.self_attn\.(q_proj|v_proj|out_proj)\.(weight|bias)",
    r"audio_tower\.layers\.\d+\.self_attn\.k_proj\.weight",
    r"multi_modal_projector\.linear\.(weight|bias)",
    r"language_model\.model\.embed_tokens\.weight",
    r"language_model\.model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)\.(weight|bias)",
    r"language_model\.model\.layers\.\d+\.self_attn\.o_proj\.weight",
    r"language_model\.model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)\.weight",
    r"language_model\.model\.layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight",
    r"language_model\.model\.norm\.weight",
    r"language_model\.lm_head\.weight",
)


@pytest.mark.parametrize(
    ("version_5", "sglang"),
    [
        ("model.audio_tower.layers.3.fc1.bias", "audio_tower.layers.3.fc1.bias"),
        ("model.multi_modal_projector.linear.weight", "multi_modal_projector.linear.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_weight_names(version_5, sglang):
    assert checkpoint_name(version_5) == sglang
    assert checkpoint_name(sglang) == sglang  # which is also transformers 4.57's name


def test_every_parameter_has_a_name_in_sglang():
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    tower = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96, "d_model": 64}
    text = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **tower},
        text_config={"model_type": "qwen2", **text, **heads},
    )
    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(config)
    names = [checkpoint_name(name) for name, _ in model.named_parameters()]
    assert [name for name in names if not any(re.fullmatch(p, name) for p in ACCEPTED)] == []
    assert [p for p in ACCEPTED if not any(re.fullmatch(p, name) for name in names)] == []
    assert len(set(names)) == len(names)
    assert [checkpoint_name(name) for name in names] == names
