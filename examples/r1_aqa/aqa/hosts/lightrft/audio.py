"""The audio patches for LightRFT's own classes, where they differ from those for this project's runtime.

``patch_*_for_audio`` (``hosts/targets.py``) call the ``patch_*`` functions here when the host is LightRFT itself. They
patch the instance that is in use, and record each replacement in a :class:`~aqa.common.patch.Patch`, which can undo it.
Written for commit 49e62cb; ``contract.py`` lists what the patches rely on.
"""

from __future__ import annotations

import functools
import importlib
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from aqa.common.constants import MAX_AUDIO_TOKENS
from aqa.common.patch import Patch, is_patched
from aqa.families import family_named, family_of, write_configuration
from aqa.hosts.lightrft.fixes import at_least
from aqa.patches.actor import patch_policy
from aqa.patches.slots import unpack_clips
from aqa.patches.strategy import write_processor

_MARKED = re.compile(re.escape("<|audio_bos|>") + r"(<\|AUDIO\|>)" + re.escape("<|audio_eos|>"))


class EngineOutput(dict):
    """One response. Its keys are attributes too, because LightRFT reads it both ways.

    Keys: ``prompt_token_ids`` (placeholders expanded), ``output_token_ids``, ``output_log_probs`` (of each token, under
    the distribution it was sampled from), ``truncated`` (the response reached the token limit), and ``prompt_tokens``,
    the engine's count of prompt tokens, if the engine does not report their ids.
    """

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


# ---------------------------------------------------------------------------------------------------------------- actor
def find_actor(model: Any) -> Any:
    """Unwrap LightRFT's ``ActorAL``: DeepSpeed wraps the whole reference model."""
    while not hasattr(model, "process_sequences"):
        model = model.module
    return model


def patch_actor(patch: Patch, actor: Any) -> None:
    """Make LightRFT's ``ActorAL`` hear the clips in the image slot.

    :param actor: Actor or reference model, as prepared by the strategy.
    """
    actor = find_actor(actor)
    if not patch.put(actor, "forward", functools.partial(audio_forward, actor)):
        return
    patch_policy(patch, getattr(actor.model, "module", actor.model))  # DeepSpeed's engine wraps the policy


def audio_forward(
    actor: Any,
    sequences: torch.Tensor,
    num_actions: int,
    attention_mask: torch.Tensor,
    pixel_values: None = None,
    image_grid_thw: torch.Tensor | None = None,
    pixel_values_videos: None = None,
    video_grid_thw: None = None,
    return_output: bool = False,
    packed_seq_lens: None = None,
    audio_values: torch.Tensor | None = None,
) -> Any:
    """Replaces ``ActorAL.forward``: log-probs of the responses, computed from the clips' exact frames.

    LightRFT's own forward treats every frame as valid. It silently ignores the audio if ``model.config`` has no id of
    the placeholder, and under DeepSpeed ``model.config`` is DeepSpeed's. It normalises over the vocabulary in bfloat16.

    The parameters that are not described are unused; packing is refused.

    :param actor: ``ActorAL``, with the ``temperature`` and ``logit_bias`` of the sampling, if these are set.
    :param sequences: ``(batch, length)``; the last ``num_actions`` columns are the response region.
    :param attention_mask: ``(batch, length)``, 1 at tokens.
    :param image_grid_thw: ``(clips, 3)``: the grid of the clips in the image slot.
    :param return_output: Return a second, empty value, which LightRFT's trainer expects.
    :param audio_values: Rows of the image slot ``(sum of rows, n_mels)``.
    :return: ``(batch, num_actions)`` float32, 0 at padding.
    :raises ValueError: if the placeholders of a sequence do not fit its clip.
    """
    audio = {}
    if audio_values is not None:
        clips = unpack_clips(audio_values, image_grid_thw)
        audio = {"features": clips.features, "frames": clips.frames, "clip_index": clips.index}
    log_probs = actor.model(
        sequences=sequences,
        attention_mask=attention_mask.long(),
        response_mask=attention_mask[:, -num_actions:],
        temperature=getattr(actor, "temperature", 1.0),
        logit_bias=getattr(actor, "logit_bias", {}),
        **{name: value.to(sequences.device) for name, value in audio.items()},
    )
    return (log_probs, {}) if return_output else log_probs


# ------------------------------------------------------------------------------------------------------------- strategy
def patch_strategy(patch: Patch, strategy: Any, processor: Any, files: dict[str, str] | None = None) -> None:
    """Make a LightRFT strategy roll out with audio, name the weights as the engine does, and save a complete folder.

    :param strategy: ``DeepspeedStrategy`` or ``FSDPV2Strategy``.
    :param processor: Saved with the model; None leaves saving unpatched.
    :param files: Further files to save with it, text by name.
    """
    if is_patched(strategy, "engine_generate_local"):
        return
    vllm_utils = importlib.import_module("lightrft.strategy.vllm_utils")
    make_engine = vllm_utils.get_vllm_engine
    args = strategy.args

    @functools.wraps(make_engine)
    def get_vllm_engine(*positional: Any, **kwargs: Any) -> Any:
        kwargs["limit_mm_per_prompt"] = {"audio": args.limit_mm_image_per_prompt}
        # prompt_max_len counts a clip as one token, but the engine counts all its audio tokens
        kwargs["max_model_len"] += args.limit_mm_image_per_prompt * (MAX_AUDIO_TOKENS - 1)
        kwargs["logprobs_mode"] = "processed_logprobs"  # log-probs of the distribution sampled from
        if not args.bf16:
            kwargs["dtype"] = "float32"  # LightRFT would roll out in float16
        return make_engine(*positional, **kwargs, **family_named(args.pretrain).vllm_options(30))

    patch.replace(vllm_utils, "get_vllm_engine", get_vllm_engine)
    patch.put(strategy, "engine_generate_local", functools.partial(generate_with_audio, strategy))
    patch.replace(strategy, "gather_and_generate", _with_checked_prompts(strategy.gather_and_generate))
    _patch_weight_sync(patch, strategy)
    _patch_sleep(patch, strategy)
    if processor is not None:
        _patch_save(patch, strategy, processor, files)


def _with_checked_prompts(original: Callable) -> Callable:
    """Check that the engine answered, token for token, the prompts that the trainer will score."""

    @functools.wraps(original)
    def gather_and_generate(*args: Any, all_prompt_token_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[Any]:
        outputs = original(*args, all_prompt_token_ids=all_prompt_token_ids, **kwargs)
        for i, (output, ids) in enumerate(zip(outputs, all_prompt_token_ids, strict=True)):
            count = output.get("prompt_tokens", len(output.prompt_token_ids))
            if list(output.prompt_token_ids) != list(ids) or count != len(ids):
                raise ValueError(
                    f"prompt {i} differs between engine ({count} tokens) and trainer ({len(ids)} tokens): "
                    f"{list(output.prompt_token_ids)[:40]} ... and {list(ids)[:40]} ..."
                )
        return outputs

    return gather_and_generate


def generate_with_audio(
    strategy: Any,
    sampling_params: Any,
    prompt_token_ids: Sequence[Sequence[int]] | None = None,
    multi_modal_inputs: Sequence[dict[str, Any]] | None = None,
) -> list[EngineOutput]:
    """Replaces ``engine_generate_local``: rollouts, with the log-prob of every sampled token.

    :param strategy: LightRFT strategy; its ``logit_bias``, if set, is added at sampling, and each of its
        ``end_token_ids`` ends a response.
    :param sampling_params: vLLM's object or SGLang's dictionary; it is not changed.
    :param prompt_token_ids: Prompts of a batch without any audio.
    :param multi_modal_inputs: Requests of a batch with audio.
    :return: One output per request, in order.
    :raises RuntimeError: if the engine returns too few responses, or an empty one.
    """
    if getattr(strategy, "actor_to_send", None) is not None:
        strategy.update_engine_weights(strategy.actor_to_send)
    logit_bias, ends = getattr(strategy, "logit_bias", {}), list(getattr(strategy, "end_token_ids", ()))
    requests = multi_modal_inputs
    if requests is None:
        requests = [{"prompt_token_ids": list(ids)} for ids in prompt_token_ids]
    if strategy.inference_engine_type == "sglang":
        params = sampling_params | {"stop_token_ids": ends}
        return _ask_sglang(strategy.inference_engine, params, requests, logit_bias)
    if multi_modal_inputs is not None and not at_least("vllm", 0, 17):
        # vLLM up to 0.16 adds the clip's markers itself, so those of the prompt are removed
        requests = [{**request, "prompt": _MARKED.sub(r"\1", request["prompt"])} for request in requests]
    params = sampling_params.clone()
    params.stop_token_ids = ends
    params.logprobs = 0  # the sampled token's log-prob and no others
    params.logit_bias = {**(params.logit_bias or {}), **logit_bias}
    return _ask_vllm(strategy.inference_engine, params, requests)


def _ask_sglang(
    engine: Any, params: dict[str, Any], requests: Sequence[dict[str, Any]], logit_bias: dict[int, float]
) -> list[EngineOutput]:
    from aqa.hosts.lightrft.sglang import generate_with_audio as sglang_generate

    outputs = sglang_generate(engine, params, requests, logit_bias)
    limit = params["max_new_tokens"]
    return [
        EngineOutput(
            prompt_token_ids=requests[i].get("prompt_token_ids"),  # if None, LightRFT fills in the expanded ones
            output_token_ids=output.output_token_ids,
            output_log_probs=output.output_log_probs,
            truncated=len(output.output_token_ids) >= limit,
            prompt_tokens=output.prompt_tokens,
        )
        for i, output in enumerate(outputs)
    ]


def _ask_vllm(engine: Any, params: Any, requests: Sequence[dict[str, Any]]) -> list[EngineOutput]:
    outputs = engine.generate(requests, params, use_tqdm=False)
    if len(outputs) != len(requests):
        raise RuntimeError(f"vLLM answered {len(outputs)} of {len(requests)} requests")
    results = []
    for i, output in enumerate(outputs):
        response = output.outputs[0]
        tokens = list(response.token_ids)
        if not tokens:
            raise RuntimeError(f"vLLM's response to request {i} is empty ({response.finish_reason}): {requests[i]}")
        results.append(
            EngineOutput(
                prompt_token_ids=list(output.prompt_token_ids),
                output_token_ids=tokens,
                output_log_probs=[entry[t].logprob for entry, t in zip(response.logprobs, tokens, strict=True)],
                truncated=response.finish_reason == "length",
            )
        )
    return results


def _patch_weight_sync(patch: Patch, strategy: Any) -> None:
    """Send weights under the names that the engine knows, and then empty the caches of the old weights."""
    original = strategy.update_engine_weights

    @functools.wraps(original)
    def update_engine_weights(actor: Any) -> None:
        if strategy.broadcast_manager is None:
            checkpoint_name = family_of(getattr(actor.model, "module", actor.model)).checkpoint_name
            broadcast = importlib.import_module("lightrft.strategy.utils.broadcast_utils")
            engine = strategy.inference_engine
            if strategy.inference_engine_type == "vllm":
                engine = _renaming(engine, checkpoint_name)
            strategy.broadcast_manager = broadcast.BroadcastManager(actor, strategy, engine)
            if strategy.inference_engine_type == "sglang":  # LightRFT's own mapping is that of Qwen2.5-VL
                strategy.broadcast_manager._map_weight_name_for_sglang = checkpoint_name
        original(actor)
        if strategy.inference_engine_type == "vllm":  # SGLang empties its cache with the last weight
            reset_caches(strategy.inference_engine)

    patch.replace(strategy, "update_engine_weights", update_engine_weights)


def _patch_sleep(patch: Patch, strategy: Any) -> None:
    """Let vLLM drop its weights when it sleeps, instead of copying them to the machine's memory and back in each step.

    At 7B the copy takes 22.7 GB of pinned memory a rank. Each sync sends all weights anyway, and
    :func:`generate_with_audio` asks for one where a sleep came after the last.
    """
    sync, sleep = strategy.update_engine_weights, strategy.maybe_sleep_inference_engine
    patch.replace(strategy, "actor_to_send", None)  # the engine has lost its weights, and takes this actor's

    @functools.wraps(sync)
    def update_engine_weights(actor: Any) -> None:
        sync(actor)
        strategy.actor_of_engine, strategy.actor_to_send = actor, None

    @functools.wraps(sleep)
    def maybe_sleep_inference_engine() -> None:
        engine = strategy.inference_engine
        if strategy.inference_engine_type != "vllm" or not strategy.args.enable_engine_sleep:
            return sleep()
        with Patch() as during_the_call:
            during_the_call.replace(engine, "sleep", functools.partial(engine.sleep, level=2))
            sleep()
        strategy.actor_to_send = strategy.actor_of_engine

    patch.replace(strategy, "update_engine_weights", update_engine_weights)
    patch.replace(strategy, "maybe_sleep_inference_engine", maybe_sleep_inference_engine)


def _renaming(engine: Any, checkpoint_name: Callable[[str], str]) -> Any:
    """A view of a vLLM engine for LightRFT's ``BroadcastManager`` that renames the weights it passes on."""
    executor = engine.llm_engine.model_executor

    def collective_rpc(method: str, kwargs: dict[str, Any]) -> Any:
        return executor.collective_rpc(method, kwargs={**kwargs, "name": checkpoint_name(kwargs["name"])})

    view = types.SimpleNamespace(collective_rpc=collective_rpc)
    return types.SimpleNamespace(llm_engine=types.SimpleNamespace(model_executor=view))


def reset_caches(engine: Any) -> None:
    """Drop what vLLM computed with the old weights: KV blocks, outputs of the audio tower, processed clips."""
    engine.reset_prefix_cache()
    core = engine.llm_engine.engine_core
    if hasattr(core, "reset_encoder_cache"):
        core.reset_encoder_cache()
    else:  # vLLM up to 0.14 has no method that empties the caches of the scheduler and the worker
        scheduler = core.engine_core.scheduler
        scheduler.encoder_cache_manager.__init__(scheduler.encoder_cache_manager.cache_size)
        engine.llm_engine.model_executor.collective_rpc(_clear_encoder_cache)
    engine.reset_mm_cache()


def _clear_encoder_cache(worker: Any) -> None:
    worker.model_runner.encoder_cache.clear()


def _patch_save(patch: Patch, strategy: Any, processor: Any, files: dict[str, str] | None) -> None:
    """Save a Hugging Face folder with the processor.

    LightRFT saves no such folder under FSDP2. Under DeepSpeed its folder lacks the processor, and with transformers 5
    and ZeRO-3 some weights have wrong names.
    """

    @functools.wraps(strategy.save_model)
    def save_model(model: Any, tokenizer: Any, output_dir: str, **_: Any) -> None:
        inner = getattr(model.model, "module", model.model)
        weights = _gather_fsdp(inner) if strategy.args.fsdp else _gather_deepspeed(inner, strategy.is_rank_0())
        if strategy.is_rank_0():
            write_model(inner, weights, output_dir)
            tokenizer.save_pretrained(output_dir)
            write_processor(processor, files, output_dir)
        dist.barrier()

    patch.wrap(strategy, "save_model", lambda original: save_model)


def _gather_fsdp(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather the full weights in rank 0's CPU memory. All ranks must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _gather_deepspeed(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """Gather the full weights in the CPU memory of the ranks that ``keep`` them. All ranks must call it."""
    import deepspeed

    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if keep:
                weights[name] = parameter.data.cpu().clone()  # ZeRO's parameters are views of one buffer
    return weights


def write_model(model: nn.Module, weights: dict[str, torch.Tensor], output_dir: str) -> None:
    """Write the weights (safetensors, under the names of the family's checkpoints) and the configuration.

    ``save_pretrained()`` would not do: it renames weights by the model's class, which FSDP2 changes.

    :param model: The transformers model, for its configurations.
    :param weights: Tensors in CPU memory by their names in the model.
    """
    from huggingface_hub import save_torch_state_dict

    Path(output_dir).mkdir(parents=True, exist_ok=True)
    family = family_of(model)
    named = {family.checkpoint_name(name): weight.to(model.config.dtype) for name, weight in weights.items()}
    save_torch_state_dict(named, output_dir, max_shard_size="5GB")
    write_configuration(model, Path(output_dir))


# ----------------------------------------------------------------------------------------------------- experience maker
def patch_experience_maker(
    patch: Patch, exp_maker: Any, logit_bias: dict[int, float], end_token_ids: Sequence[int]
) -> None:
    """Make LightRFT's ``FastExperienceMaker`` keep the engine's log-probs and not repair image tokens.

    Actor and reference model get the sampling's logit bias and temperature, so that their log-probs are those of the
    distribution sampled from.

    :param logit_bias: Bias by token id, for the engine and both models.
    :param end_token_ids: Any of them ends a response.
    """
    if is_patched(exp_maker, "_build_unpacked_sample"):
        return
    patch.replace(exp_maker.strategy, "logit_bias", logit_bias)
    patch.replace(exp_maker.strategy, "end_token_ids", end_token_ids)
    for model in filter(None, (exp_maker.actor, exp_maker.initial_model)):
        actor = find_actor(model)
        patch.replace(actor, "logit_bias", logit_bias)
        patch.replace(actor, "temperature", exp_maker.strategy.args.temperature)

    def process_sequences(
        sequences: torch.Tensor, input_len: int, eos_token_id: int, pad_token_id: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks of prompt and response, and of the response ``(batch, length - input_len)``, up to its end token.

        The original knows one end token: behind another it counts a token of padding, and it overwrites the last token
        of a response that was cut off.
        """
        is_end = torch.isin(sequences[:, input_len:], torch.tensor(end_token_ids))
        action_mask = is_end.cumsum(1) - is_end.long() == 0
        prompt_mask = sequences[:, :input_len].ne(pad_token_id).cumsum(1) > 0  # padded on the left
        return sequences, torch.cat([prompt_mask, action_mask], 1).long(), action_mask

    patch.replace(find_actor(exp_maker.actor), "process_sequences", process_sequences)

    def _fix_qwen_vl_image_tokens(sequences: torch.Tensor, sample: Any, vlm: bool) -> None:
        """Do nothing: there are no image tokens, and :func:`audio_forward` checks the audio tokens."""

    patch.replace(exp_maker, "_fix_qwen_vl_image_tokens", _fix_qwen_vl_image_tokens)

    def make(original: Callable) -> Callable:
        @functools.wraps(original)
        def _build_unpacked_sample(outputs: list[EngineOutput], **kwargs: Any) -> tuple[Any, Any, Any]:
            sample, *indices = original(outputs=outputs, **kwargs)
            sample.engine_log_probs = [output.output_log_probs for output in outputs]
            sample.truncated = [output.truncated for output in outputs]
            return sample, *indices

        return _build_unpacked_sample

    patch.wrap(exp_maker, "_build_unpacked_sample", make)


# -------------------------------------------------------------------------------------------------------------- trainer
def keep_every_batch(patch: Patch, trainer: Any) -> None:
    """Make LightRFT's ``PPOTrainerVL`` not count image tokens.

    Where the model's configuration has such a token, as Qwen2.5-Omni's has, it compares their number with the rows of
    the image slot, and drops the batch; every batch, that is. :func:`audio_forward` checks the audio tokens.
    """
    patch.put(trainer, "_validate_qwen_vl_tensors", lambda sequences, pixel_values, context: True)


# --------------------------------------------------------------------------------------------------------- trajectories
def patch_trajectory_saver(patch: Patch, saver: Any) -> None:
    """Make LightRFT's ``TrajectorySaver`` save clips as WAV files; it would call methods of images on them."""

    original = saver._unpack_experience_to_dicts

    @functools.wraps(original)
    def _unpack_experience_to_dicts(exp: Any, *args: Any, **kwargs: Any) -> Any:
        clips = exp.raw_images
        of_rows = [clips] if isinstance(clips, tuple) else clips or []  # the replay buffer's items are single rows
        exp.raw_images = [None if clip is None else [clip] for clip in of_rows] or None
        try:
            return original(exp, *args, **kwargs)
        finally:
            exp.raw_images = clips

    def _save_images(imgs: Sequence[Any], step: int, exp_idx: int, sample_idx: int) -> list[str]:
        import soundfile

        names = []
        for number, (waveform, rate) in enumerate(imgs):
            names.append(f"audios/step{step}_exp{exp_idx}_sample{sample_idx}_{number}.wav")
            path = Path(saver.save_dir) / names[-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, waveform, rate)
        return names

    patch.replace(saver, "_unpack_experience_to_dicts", _unpack_experience_to_dicts)
    patch.replace(saver, "_save_images", _save_images)


def resume_with_optimizer(patch: Patch, strategy: Any, optimizer: Any, scheduler: Any) -> None:
    """Add the actor's optimizer and schedule to checkpoints of ``FSDPV2Strategy``: LightRFT's trainer omits them."""
    original: Callable[..., None] = strategy.save_ckpt
    save = functools.partial(original, optimizer=optimizer, scheduler=scheduler)
    patch.replace(strategy, "save_ckpt", functools.wraps(original)(save))
