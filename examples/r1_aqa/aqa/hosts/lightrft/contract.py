"""What this example needs of LightRFT: a table of names and parameters, compared with the LightRFT that was imported.

Without this check a difference would come up in the middle of a training run, or train on the wrong thing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import types
from collections.abc import Sequence
from inspect import Parameter
from typing import Any, NamedTuple

TESTED = "0.1.1 at commit 49e62cb"
_FORWARD = """sequences, num_actions, attention_mask, /, pixel_values=None, image_grid_thw=None,
        pixel_values_videos=None, video_grid_thw=None, return_output=False, packed_seq_lens=None, audio_values=None"""

# A module or module:class, and below it one entry for each of its names that this example calls, replaces or reads:
#   f(a, /, b) | why         The example calls f(a, b=b), or replaces f by a function with these parameters. What stands
#                            before "/" keeps its place; LightRFT must spell out the others, because its **kwargs would
#                            swallow a renamed one, and may have further optional parameters. With "**_" in the list
#                            the example passes on whatever else it is given.
#   f(a, b=None) < g | why   Besides, LightRFT's g calls f, and passes nothing that our replacement does not take.
#   g -> f(a, b=None) | why  The same where f is defined elsewhere.
#   x, y | why               These names exist; a class may also set them as self.x.
_TABLE = f"""
lightrft.utils
    add_arguments(parser, /) | LightRFT's flags
    blending_datasets(datasets, probabilities, strategy, seed, /, return_eval, train_split) | reads the data
    get_tokenizer_processor_vl(pretrain, model, padding_side, /) | loads tokenizer and processor

lightrft.strategy
    get_strategy(args, /) | makes the strategy

lightrft.strategy.strategy_base:StrategyBase
    setup_dataloader(replay_buffer, batch_size, pin_memory, shuffle, /, collate_fn, drop_last) | loads the prompts
    prepare_models_and_optimizers(actor, critic, reward_models, initial_model, args, max_steps, /) | shards the models
    setup_inference_engine(args, /, engine_type, actor) | starts the rollout engine
    report_memory(prefix, /) | prints one line after set-up
    unwrap_model(model, /) | finds the model in DeepSpeed's or FSDP's wrapper
    print, is_rank_0 | shortens lines that hold a waveform; one rank saves the processor
    inference_engine, inference_engine_type, broadcast_manager | rollouts and weight sync
    _build_multimodal_inputs(all_prompts, all_images, images_num=None, all_videos=None, videos_num=None, **further)
        < gather_and_generate | replaced: requests with audio
    engine_generate_local(sampling_params, prompt_token_ids=None, multi_modal_inputs=None)
        < gather_and_generate | replaced: rollouts with audio and log-probs
    gather_and_generate(*, all_prompt_token_ids, **_) | wrapped: compares the engine's prompts with the trainer's
    update_engine_weights(actor, /) < setup_inference_engine | wrapped: weight names, caches
    maybe_sleep_inference_engine() < gather_and_generate | wrapped: vLLM drops its weights, and does not copy them

lightrft.strategy.deepspeed.deepspeed:DeepspeedStrategy
    get_ds_train_config(is_actor) | configures the actor
    get_ds_eval_config(offload) | configures the reference model
    init_model_context() | makes the models
    save_model(model, tokenizer, output_dir, /, **_) | replaced: saves the processor too
    save_ckpt(model, save_dir, tag, max_num, max_mem, client_state, /) | saves checkpoints
    load_ckpt(model, load_dir, /) | resumes

lightrft.strategy.fsdp.fsdpv2:FSDPV2Strategy
    init_model_context() | makes the models
    offload_model(models, /) | keeps the reference model outside the GPU
    save_model(model, tokenizer, output_dir, /, **_) | replaced: LightRFT saves nothing
    save_ckpt(model, save_dir, tag, max_num, max_mem, client_state, /, optimizer, scheduler)
        | wrapped: saves optimizer and schedule too
    load_ckpt(model, load_dir, /, optimizer, scheduler) | resumes

lightrft.strategy.vllm_utils
    get_vllm_engine(*, dtype, max_model_len, **_) < get_vllm_engine_for_rollout | wrapped: audio in prompts, log-probs

lightrft.strategy.sglang_utils.sglang_engine:RLGenerationEngine
    _engine, _tp_rank, _tp_size, _leader_rank, tp_group_cpu | asks SGLang on one rank and broadcasts the answer

lightrft.strategy.utils.data_utils
    DistributedSampler | made known to the trainer, so that a resumed run skips what was used

lightrft.strategy.utils.broadcast_utils
    BroadcastManager(actor, strategy, inference_engine, /) | made with our view of the engine

lightrft.strategy.utils.broadcast_utils:BroadcastManager
    _map_weight_name_for_sglang(name, /) < _fsdp_v2_broadcast | replaced: the audio model's weight names
    _deepspeed_broadcast -> collective_rpc(method, kwargs) | replaced: the audio model's weight names
    _fsdp_v2_broadcast -> collective_rpc(method, kwargs) | replaced: the audio model's weight names

lightrft.models.actor_modality
    MODALITY_PARAMETERS | lists the inputs that an audio actor gets
    get_supported_parameters(modality, /) | lists the inputs that an audio actor gets

lightrft.models.actor_al
    _AudioEmbedPositions | keeps the audio tower's positions whole under FSDP2
    ActorAL(pretrain_or_model, /, use_flash_attention_2, bf16, ds_config, packing_samples) | loads the models

lightrft.models.actor_al:ActorAL
    gradient_checkpointing_enable(gradient_checkpointing_kwargs, /) | saves memory
    forward({_FORWARD}) | replaced: exact audio masks
    process_sequences(sequences, input_len, eos_token_id, pad_token_id, /, **_) | replaced: masks

lightrft.trainer.fast_exp_maker
    normalize_images(raw_images, /) | replaced: clips are decoded already
    get_images_num(all_images, /) | replaced: counts clips

lightrft.trainer.fast_exp_maker:MultimodalDataProcessor
    process_multimodal_batch(all_prompts, all_images, all_references, images_num, n_samples_per_prompt,
        all_videos=None, videos_num=None) | replaced: token ids and mel frames

lightrft.trainer.fast_exp_maker:RewardComputationEngine
    _aggregate_rewards -> reward_fn(model_reward_list, labels, queries, refs, label_map) | our rewards

lightrft.trainer.fast_exp_maker:FastExperienceMaker
    multimodal_processor | replaced: token ids and mel frames
    make_experience_list -> normalize_images(raw_images) | checks clips
    make_experience_list -> get_images_num(all_images) | counts clips
    generate_samples -> process_multimodal_batch(all_prompts, all_images, all_references, images_num,
        n_samples_per_prompt, all_videos=None, videos_num=None) | token ids and mel frames
    generate_samples -> gather_and_generate(*, all_prompt_token_ids, **_) | compares prompts
    _build_unpacked_sample(*, outputs, **_) < generate_samples | wrapped: keeps the engine's log-probs
    _build_unpacked_sample -> process_sequences(sequences, *_, **__) | masks
    _make_experience_list_by_model(all_samples, /) < make_experience_list | wrapped: metrics
    _make_experience_list_by_model -> actor({_FORWARD}) | log-probs of the actor
    _make_experience_list_by_model -> initial_model({_FORWARD}) | log-probs of the reference model
    _fix_qwen_vl_image_tokens(sequences, sample, vlm, /) < _preprocess_sample | replaced: there are no image tokens

lightrft.trainer.ppo_trainer_vl
    DistributedSampler | replaced: also the class that the strategy makes
    PPOTrainerVL(strategy, actor, critic, reward_model, initial_model, ema_model, actor_optim, critic_optim,
        actor_scheduler, critic_scheduler, /, tokenizer, processor, prompt_max_len, reward_fn, reward_fn_label_map,
        max_epochs, micro_train_batch_size, micro_rollout_batch_size, eps_clip, init_kl_coef, kl_target, save_hf_ckpt,
        disable_ds_ckpt) | the trainer; it takes unknown keywords for sampling parameters

lightrft.trainer.ppo_trainer_vl:PPOTrainerVL
    fit(args, /, prompts_dataloader, pretrain_dataloader, eval_dataloader, consumed_samples,
        num_update_steps_per_episodes) | trains
    training_step_actor -> actor({_FORWARD}) | log-probs to train on
    _validate_qwen_vl_tensors(sequences, pixel_values, /, context) < training_step_actor
        | replaced: there are no image tokens
    evaluate(eval_dataloader, global_step, /) | wrapped: metrics
    save_logs_and_checkpoints(args, global_step, step_bar, logs_dict, /, **_) < fit | wrapped: metrics
    _save_checkpoint -> save_model(model, tokenizer, output_dir, **_) | saves the processor too

lightrft.trainer.spmd_ppo_trainer
    SPMDPPOTrainerBase(*, loss_agg_mode) | the trainer
    SPMDPPOTrainerVL | the trainer

lightrft.trainer.spmd_ppo_trainer:SPMDPPOTrainerBase
    ppo_train(global_steps, /) | timed
    ppo_train -> update_engine_weights(actor) | weight names, caches
    experience_maker, trajectory_saver | patched for audio

lightrft.utils.trajectory_saver:TrajectorySaver
    _unpack_experience_to_dicts(exp, step, exp_idx, /, **_) < save_trajectories | wrapped: clips instead of images
    _save_images(imgs, step, exp_idx, sample_idx, /) < _unpack_experience_to_dicts | replaced: saves clips
"""


class Spot(NamedTuple):
    """An entry of the table.

    :param owner: ``module`` or ``module:class``.
    :param parameters: Of the example's call or replacement; None: the name must only exist.
    :param caller: Function of the owner that calls the example's replacement.
    :param defined: False where the name is defined elsewhere, so that only the caller is looked at.
    """

    owner: str
    name: str
    parameters: str | None
    caller: str | None
    defined: bool
    purpose: str


def read_table(table: str) -> list[Spot]:
    """The entries of a table in the form described above."""
    form = re.compile(r"\s*(?:(\w+) -> )?([\w, ]+?)(?:\(([^)]*)\))?(?:\s+< (\w+))?\s+\| (.+)\n?")
    spots = []
    for block in table.strip().split("\n\n"):
        owner, _, rows = block.partition("\n")
        for outer, names, parameters, caller, purpose in form.findall(rows):
            signature = " ".join(parameters.split()) if f"{names}(" in rows else None
            spots += [Spot(owner, n, signature, outer or caller or None, not outer, purpose) for n in names.split(", ")]
    return spots


CONTRACT = read_table(_TABLE)


def check_contract(package: str = "lightrft") -> None:
    """Make sure that this example fits the LightRFT in use. Imports what it checks.

    :param package: Only what is in this package has to fit; if it does not, everything is checked and listed.
    :raises SystemExit: if something differs; one message with every difference.
    """
    if not find_violations([spot for spot in CONTRACT if spot.owner.startswith(package)]):
        return
    violations = find_violations(CONTRACT)
    raise SystemExit(
        f"LightRFT differs from the one tested, {TESTED}, in {len(violations)} places that this example relies on:"
        + "".join(f"\n  - {violation}" for violation in violations)
        + "\ncheck out LightRFT's commit 49e62cb, or report this list to the maintainers of this example"
    )


def find_violations(contract: Sequence[Spot]) -> list[str]:
    """Compare the LightRFT that can be imported with the contract.

    :return: One entry a violation: dotted path, what was expected, what was found, what this example does with it.
    """
    violations = []
    for owner, spots in itertools.groupby(contract, key=lambda spot: spot.owner):
        try:
            place = _find(owner)
        except _ViolationError as violation:
            violations.append(str(violation))
            continue
        for spot in spots:
            try:
                if spot.defined:
                    _check_definition(place, spot)
                if spot.caller:
                    _check_calls(place, spot)
            except _ViolationError as violation:
                violations.append(f"{violation}; here: {spot.purpose}")
    return list(dict.fromkeys(violations))  # a module that cannot be imported is named once


class _ViolationError(Exception):
    def __init__(self, path: str, expected: str, found: str) -> None:
        super().__init__(f"{path.replace(':', '.')}: expected {expected}; found {found}")


def _find(owner: str) -> Any:
    """The module or class of a block of the table."""
    module, _, class_name = owner.partition(":")
    try:
        place = importlib.import_module(module)
    except Exception as error:  # whatever an import raises is shown, not handled
        foreign = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != "lightrft"
        remedy = "; install what LightRFT's requirements.txt lists" if foreign else ""
        found = f"{type(error).__name__}: {error}{remedy}"
        raise _ViolationError(module, "to be importable", found) from error
    if class_name and not inspect.isclass(getattr(place, class_name, None)):
        raise _ViolationError(owner, "a class", "none")
    return getattr(place, class_name) if class_name else place


def _check_definition(place: Any, spot: Spot) -> None:
    """Compare the parameters of a function or constructor with the table's."""
    path = f"{spot.owner}.{spot.name}"
    if not hasattr(place, spot.name):
        on_self = inspect.isclass(place) and rf"\bself\.{spot.name}\b[^=\n]*=[^=]"
        if not on_self or spot.parameters is not None or not re.search(on_self, inspect.getsource(place)):
            raise _ViolationError(path, f"({spot.parameters})" if spot.parameters else "to exist", "nothing")
    if spot.parameters is None:
        return
    found = getattr(place, spot.name)
    if not callable(found):
        raise _ViolationError(path, f"({spot.parameters})", f"{found!r}, which cannot be called")
    theirs = list(inspect.signature(found).parameters.values())
    if inspect.isclass(place) and isinstance(inspect.getattr_static(place, spot.name), types.FunctionType):
        theirs = theirs[1:]  # self
    ours = _parameters(spot.parameters)
    before = [p.name for p in ours if p.kind is p.POSITIONAL_ONLY]
    places = [p.name for p in theirs if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in theirs):
        places += before[len(places) :]
    fits = places[: len(before)] == before and _names(ours) - set(before) <= _names(theirs)
    passes_on = any(p.kind is p.VAR_KEYWORD for p in ours)
    if not fits or not (passes_on or _required(theirs) <= _names(ours)):
        listed = ", ".join(str(p.replace(annotation=p.empty)) for p in theirs)
        raise _ViolationError(path, f"({spot.parameters})", f"({listed})")


def _check_calls(place: Any, spot: Spot) -> None:
    """Compare the calls in a function of LightRFT with what this example's replacement takes."""
    path, expected = f"{spot.owner}.{spot.caller}", f"to call {spot.name}({spot.parameters})"
    caller = getattr(place, spot.caller or "", None)
    if caller is None:
        raise _ViolationError(path, expected, "nothing")
    source = inspect.getsource(caller)
    nodes = ast.walk(ast.parse(f"if True:\n{source}" if source[0].isspace() else source))
    called = [node for node in nodes if isinstance(node, ast.Call)]
    calls = [c for c in called if spot.name in (getattr(c.func, "attr", None), getattr(c.func, "id", None))]
    if not calls:
        raise _ViolationError(path, expected, "no such call")
    ours = _parameters(spot.parameters or "")
    keywords = {keyword.arg for call in calls for keyword in call.keywords}
    positional = max(len(call.args) for call in calls)
    places = [p.name for p in ours if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    problems = []
    if not any(p.kind is p.VAR_KEYWORD for p in ours):
        unknown = sorted(keyword for keyword in keywords if keyword and keyword not in _names(ours))
        problems += [f"the keyword {name}, which ours does not take" for name in unknown]
        problems += [f"{positional} arguments by position"] * (positional > len(places))
    if None not in keywords:  # no **: what is missing is missing
        missing = sorted(_required(ours) - keywords - set(places[:positional]))
        problems += [f"no {name}, which ours requires" for name in missing]
    if problems:
        raise _ViolationError(path, expected, ", ".join(problems))


def _parameters(text: str) -> list[Parameter]:
    return list(inspect.signature(eval(f"lambda {text}: None")).parameters.values())


def _names(parameters: Sequence[Parameter]) -> set[str]:
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _required(parameters: Sequence[Parameter]) -> set[str]:
    return {name for p in parameters for name in _names([p]) if p.default is p.empty}
