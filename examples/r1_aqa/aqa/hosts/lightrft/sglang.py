"""Rollouts with audio from sglang, for LightRFT's ``RLGenerationEngine``, whose own ``generate`` passes images only.

The calls were checked against the signatures of sglang 0.5.23 and of 0.5.6.post2, the oldest version that LightRFT
accepts; they have never run on a GPU. LightRFT 0.1.1 cannot import its engine beside sglang 0.5.23, which moved
``LocalSerializedTensor`` out of ``sglang.srt.model_executor.model_runner``: it needs an older sglang.

Both versions of sglang let the audio tower attend to the padding of a clip shorter than 30 s, which transformers and
vLLM mask. Responses and log-probabilities are therefore not those of the policy being trained, even with equal
weights; by how much has not been measured.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import torch.distributed as dist

from aqa.audio.decode import SAMPLING_RATE


@dataclass
class SglangOutput:
    """One response. LightRFT's length statistics read its fields as items, so both ways work.

    :param prompt_token_ids: None; LightRFT's ``gather_and_generate`` puts the processor's expanded prompt here.
    :param output_token_ids: Sampled tokens, the end-of-turn token included if it was sampled.
    :param output_log_probs: Natural-log probability of each sampled token, after logit bias and temperature (greedy:
        temperature 1), before top-p and top-k.
    :param prompt_tokens: Prompt length in tokens as sglang expanded it, to compare with the processor's.
    """

    prompt_token_ids: list[int] | None
    output_token_ids: list[int]
    output_log_probs: list[float]
    prompt_tokens: int

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def generate_with_audio(
    engine: Any, sampling_params: dict[str, Any], requests: list[dict[str, Any]], logit_bias: dict[int, float]
) -> list[SglangOutput]:
    """One response a request. With tensor parallelism, every rank of the group calls this with the same requests.

    :param engine: LightRFT's ``RLGenerationEngine``.
    :param sampling_params: sglang's sampling parameters, with ``n`` 1 or absent; not changed.
    :param requests: ``{"prompt": text}``, with ``"multi_modal_data": {"audio": [(waveform, rate), ...]}`` where there
        is audio; waveforms ``(samples,)`` float32 at 16 kHz. The text has one unexpanded placeholder a clip.
    :param logit_bias: Added to the logits of these token ids. A bias that ``sampling_params`` has stays for the other
        tokens.
    :return: In the order of the requests, the same on every rank.
    :raises ValueError: if a clip is not a float32 mono waveform at 16 kHz.
    :raises RuntimeError: if a request has no output, an empty one, or not one log-probability a token.
    """
    params = dict(sampling_params)
    if logit_bias:
        own = {str(token): float(bias) for token, bias in logit_bias.items()}  # sglang's keys are strings
        params["logit_bias"] = {**(params.get("logit_bias") or {}), **own}
    # Every rank encodes the clips, so that a bad one raises on all of them and no rank waits for the leader.
    audio = [_encode_clips(i, request) for i, request in enumerate(requests)]
    outputs = None
    if engine._tp_rank == 0:
        outputs = engine._engine.generate(
            prompt=[request["prompt"] for request in requests],
            sampling_params=params,
            audio_data=audio,
            return_logprob=True,
        )
    if engine._tp_size > 1:
        box = [outputs]
        dist.broadcast_object_list(box, src=engine._leader_rank, group=engine.tp_group_cpu)
        outputs = box[0]
    if len(outputs) != len(requests):
        i = min(len(outputs), len(requests))
        raise RuntimeError(f"request {i}: sglang returned {len(outputs)} outputs for {len(requests)} requests")
    return [_read_output(i, output) for i, output in enumerate(outputs)]


def _encode_clips(index: int, request: dict[str, Any]) -> list[bytes] | None:
    """A request's clips as WAV files of 32-bit floats, which sglang decodes to the same samples; None without audio."""
    clips = request.get("multi_modal_data", {}).get("audio")
    if not clips:
        return None  # the list needs one entry a prompt, and None marks a request without audio
    files = []
    for waveform, rate in clips:
        if waveform.dtype != np.float32 or waveform.ndim != 1 or rate != SAMPLING_RATE:
            found = f"{waveform.dtype} of shape {waveform.shape} at {rate} Hz"
            raise ValueError(f"request {index}: expected float32 mono at {SAMPLING_RATE} Hz, got {found}")
        file = io.BytesIO()
        soundfile.write(file, waveform, rate, format="WAV", subtype="FLOAT")
        files.append(file.getvalue())
    return files


def _read_output(index: int, output: dict[str, Any]) -> SglangOutput:
    """The output in LightRFT's form, after a check that every token has its log-probability."""
    tokens, meta = list(output.get("output_ids") or []), output["meta_info"]
    log_probs = [entry[0] for entry in meta.get("output_token_logprobs") or []]  # (log-prob, token id, text)
    if not tokens or len(log_probs) != len(tokens):
        reason = meta.get("finish_reason")
        raise RuntimeError(
            f"request {index}: sglang returned {len(tokens)} tokens and {len(log_probs)} log-probs, ending by {reason}"
        )
    return SglangOutput(None, tokens, log_probs, meta["prompt_tokens"])
