"""The part of LightRFT that this example calls or patches, written down, and a check of a LightRFT against it.

The check reads LightRFT's source and imports nothing: an import takes seconds and wants a GPU's packages, and what has
changed would come up one at a time, some of it only in the middle of a training run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TESTED = "0.1.1 at commit 49e62cb"


@dataclass(frozen=True)
class Spot:
    """One place in LightRFT that this example relies on.

    :param path: Dotted path of a function, class or attribute: in the module where this example looks it up, in the
        class that defines it. A step below a function is a call in it: ``m.C.f.g`` means that ``C.f`` calls ``g``.
    :param parameters: Names that must be accepted, without self and cls; of a call, keywords that it must pass. Any
        other parameter must be optional. Empty for classes and attributes, or where any parameters will do.
    :param since: First version with this form; where the version did not change, the commit's date.
    :param why: What this example does with it.
    :param positional: How many of the names, from the first, are passed by position and must keep their places.
    :param explicit: The names must be spelled out: ``**kwargs`` would swallow a renamed one.
    """

    path: str
    parameters: tuple[str, ...]
    since: str
    why: str
    positional: int = 0
    explicit: bool = False


# An owner, then its members: signature | since | why. Before "/" stands what is passed by position; "*" means explicit.
_TABLE = """
lightrft.strategy
    get_strategy(args, /) | 0.1.0 | makes the strategy

lightrft.strategy.strategy_base.StrategyBase
    setup_dataloader(replay_buffer, batch_size, pin_memory, shuffle, /, collate_fn, drop_last) | 0.1.0 | prompts
    prepare_models_and_optimizers(actor, critic, reward_models, initial_model, args, max_steps, /) | 0.1.0 | set-up
    setup_inference_engine(args, /, engine_type, actor) | 0.1.0 | starts the rollout engine
    report_memory(prefix, /) | 0.1.0 | one line after set-up
    print | 0.1.0 | wrapped: cuts lines as long as a waveform
    is_rank_0 | 0.1.0 | one rank saves the processor
    unwrap_model(model, /) | 0.1.0 | the model within DeepSpeed's or FSDP's wrapper
    inference_engine | 0.1.0 | asked for rollouts, caches reset
    inference_engine_type | 0.1.0 | which engine's interface to use
    broadcast_manager | 0.1.0 | made beforehand, with the audio model's weight names
    _build_multimodal_inputs(all_prompts, all_images, images_num, all_videos, videos_num) | 0.1.1 | replaced: audio
    gather_and_generate(sampling_params, all_prompt_token_ids, all_prompts, all_images, sleep_engine, images_num,
        all_videos, videos_num) | 0.1.1 | rollouts
    gather_and_generate._build_multimodal_inputs(all_prompts, all_images, images_num, all_videos, videos_num)
        | 0.1.1 | how our replacement is called
    engine_generate_local(sampling_params, prompt_token_ids, multi_modal_inputs) | 0.1.0 | replaced: log-probs, audio
    gather_and_generate.engine_generate_local(sampling_params, prompt_token_ids, multi_modal_inputs)
        | 0.1.0 | how our replacement is called
    update_engine_weights(actor, /) | 0.1.0 | wrapped: weight names, caches

lightrft.strategy.deepspeed.deepspeed.DeepspeedStrategy
    get_ds_train_config(is_actor) | 0.1.0 | the actor's configuration
    get_ds_eval_config(offload) | 0.1.0 | the reference model's configuration
    init_model_context | 0.1.0 | models are made in it
    save_model(model, tokenizer, output_dir, /) | 0.1.0 | wrapped: saves the processor too
    save_ckpt(model, save_dir, tag, max_num, max_mem, client_state, /) | 0.1.0 | checkpoints
    load_ckpt(model, load_dir, /, optimizer, scheduler) | 0.1.0 | resumes

lightrft.strategy.fsdp.fsdpv2.FSDPV2Strategy
    init_model_context | 0.1.0 | models are made in it
    offload_model(models, /) | 0.1.0 | the reference model waits outside the GPU
    save_model(model, tokenizer, output_dir, /) | 0.1.0 | replaced: it saves nothing
    save_ckpt(model, save_dir, tag, max_num, max_mem, client_state, /, save_latest, optimizer, scheduler)
        | 0.1.0 | wrapped: optimizer and schedule are saved too
    load_ckpt(model, load_dir, /, *, optimizer, scheduler) | 0.1.0 | resumes

lightrft.strategy.vllm_utils
    get_vllm_engine(pretrain_name_or_path, /, dtype, tp_size, mem_util, max_model_len, enable_sleep)
        | 0.1.0 | wrapped: audio in prompts, log-probs
    get_vllm_engine_for_rollout(args, /) | 0.1.0 | calls our wrapper
    get_vllm_engine_for_rollout.get_vllm_engine(dtype, max_model_len) | 0.1.0 | what our wrapper changes

lightrft.strategy.sglang_utils.sglang_engine.RLGenerationEngine
    _engine | 0.1.0 | asked for rollouts
    _tp_rank | 0.1.0 | the rank that asks
    _tp_size | 0.1.0 | whether to share the answer
    _leader_rank | 0.1.0 | who shares it
    tp_group_cpu | 0.1.0 | with whom

lightrft.strategy.utils.data_utils
    DistributedSampler | 0.1.0 | made known to the trainer: a resumed run skips what was used

lightrft.strategy.utils.broadcast_utils.BroadcastManager
    __init__(actor, strategy, inference_engine, /) | 0.1.0 | made with our view of the engine
    _map_weight_name_for_sglang(name, /) | 0.1.1 | replaced: the audio model's weight names
    _deepspeed_broadcast | 0.1.0 | weight sync
    _deepspeed_broadcast.collective_rpc(kwargs) | 0.1.0 | where our view changes weight names
    _fsdp_v2_broadcast | 0.1.0 | weight sync
    _fsdp_v2_broadcast.collective_rpc(kwargs) | 0.1.0 | where our view changes weight names

lightrft.models.actor_modality
    MODALITY_PARAMETERS | 2026-01-28 | the inputs an audio actor gets
    get_supported_parameters(modality, /) | 2026-01-28 | the inputs an audio actor gets

lightrft.models.actor_al
    _AudioEmbedPositions | 2026-03-03 | keeps the audio tower's positions whole under FSDP2
    ActorAL.__init__(pretrain_or_model, /, *, use_flash_attention_2, bf16, ds_config, packing_samples)
        | 0.1.0 | actor and reference model
    ActorAL.gradient_checkpointing_enable(gradient_checkpointing_kwargs, /) | 0.1.0 | saves memory
    ActorAL.forward(sequences, num_actions, attention_mask, /, pixel_values, image_grid_thw, pixel_values_videos,
        video_grid_thw, return_output, packed_seq_lens, audio_values) | 2026-03-03 | replaced: exact audio masks
    ActorAL.process_sequences(sequences, input_len, eos_token_id, pad_token_id, /) | 0.1.0 | wrapped: token ids stay

lightrft.trainer.fast_exp_maker
    normalize_images(raw_images, /) | 0.1.1 | replaced: clips are decoded already
    get_images_num(all_images, /) | 0.1.1 | replaced: counts clips
    MultimodalDataProcessor.process_multimodal_batch(all_prompts, all_images, all_references, images_num,
        n_samples_per_prompt, all_videos, videos_num) | 0.1.1 | replaced by ours
    RewardComputationEngine._aggregate_rewards(outputs, all_rewards_list, is_multi_rm, /) | 0.1.0 | asks our rewards
    RewardComputationEngine._aggregate_rewards.reward_fn(model_reward_list, labels, queries, refs, label_map)
        | 0.1.0 | how our rewards are called
    FastExperienceMaker.multimodal_processor | 0.1.0 | replaced by ours
    FastExperienceMaker.make_experience_list | 0.1.0 | timed
    FastExperienceMaker.generate_samples | 0.1.0 | wrapped: sampling parameters, timed
    FastExperienceMaker.generate_samples.process_multimodal_batch(all_prompts, all_images, all_references, images_num,
        n_samples_per_prompt, all_videos, videos_num) | 0.1.1 | how our processor is called
    FastExperienceMaker.generate_samples.gather_and_generate(sampling_params, all_prompt_token_ids, all_prompts,
        all_images, sleep_engine, images_num, all_videos, videos_num) | 0.1.1 | rollouts
    FastExperienceMaker._build_unpacked_sample(outputs, prompts, labels, references, is_multimodal)
        | 0.1.0 | wrapped: keeps the engine's log-probs
    FastExperienceMaker.generate_samples._build_unpacked_sample(outputs, prompts, labels, references, is_multimodal)
        | 0.1.0 | how our wrapper is called
    FastExperienceMaker._make_experience_list_by_model(all_samples, /) | 0.1.0 | wrapped: metrics
    FastExperienceMaker._fix_qwen_vl_image_tokens(sequences, sample, vlm, /) | 0.1.1 | replaced: no image tokens

lightrft.trainer.ppo_trainer_vl
    DistributedSampler | 0.1.0 | replaced: also the class that the strategy makes

lightrft.trainer.ppo_trainer_vl.PPOTrainerVL
    __init__(strategy, actor, critic, reward_model, initial_model, ema_model, actor_optim, critic_optim,
        actor_scheduler, critic_scheduler, /, *, tokenizer, processor, prompt_max_len, reward_fn, reward_fn_label_map,
        max_epochs, micro_train_batch_size, micro_rollout_batch_size, eps_clip, init_kl_coef, kl_target, save_hf_ckpt,
        disable_ds_ckpt) | 0.1.0 | the trainer; what it does not know it takes for sampling parameters
    fit(args, /, prompts_dataloader, pretrain_dataloader, eval_dataloader, consumed_samples,
        num_update_steps_per_episodes) | 0.1.0 | trains
    evaluate(eval_dataloader, global_step, /) | 0.1.0 | wrapped: metrics
    save_logs_and_checkpoints(args, global_step, step_bar, logs_dict, client_states, /, episode)
        | 0.1.0 | wrapped: metrics

lightrft.trainer.spmd_ppo_trainer
    SPMDPPOTrainerBase.__init__(loss_agg_mode, *) | 0.1.0 | the trainer
    SPMDPPOTrainerBase.ppo_train(global_steps, /) | 0.1.0 | timed
    SPMDPPOTrainerBase.experience_maker | 0.1.0 | patched for audio
    SPMDPPOTrainerBase.trajectory_saver | 0.1.0 | patched for audio
    SPMDPPOTrainerVL.__init__(strategy, actor, critic, reward_model, initial_model, ema_model, actor_optim,
        critic_optim, actor_scheduler, critic_scheduler, /, tokenizer, reward_fn, loss_agg_mode) | 0.1.0 | the trainer

lightrft.utils
    add_arguments(parser, /) | 0.1.0 | LightRFT's flags
    blending_datasets(datasets, probabilities, strategy, seed, /, return_eval, train_split) | 0.1.0 | reads the data
    get_tokenizer_processor_vl(pretrain, model, padding_side, /) | 0.1.0 | tokenizer and processor
    trajectory_saver.TrajectorySaver._unpack_experience_to_dicts(exp, step, exp_idx, /) | 0.1.0 | wrapped: clips
    trajectory_saver.TrajectorySaver._save_images(imgs, step, exp_idx, sample_idx, /) | 0.1.0 | replaced: saves clips
"""


def _read(table: str) -> Iterator[Spot]:
    for block in table.strip().split("\n\n"):
        owner, _, rows = block.partition("\n")
        for signature, since, why in re.findall(r"([^|]+)\| (\S+) \| (.+)", rows):
            name, *words = re.findall(r"[\w.]+|[/*]", signature)
            positional = words.index("/") if "/" in words else 0
            names = tuple(word for word in words if word not in ("/", "*"))
            yield Spot(f"{owner}.{name}", names, since, why, positional, explicit="*" in words)


CONTRACT: tuple[Spot, ...] = tuple(_read(_TABLE))


def check_contract(package: Path) -> None:
    """Make sure that this example fits a LightRFT.

    :param package: The folder ``.../lightrft``.
    :raises SystemExit: if it does not; one message with everything that differs.
    """
    violations = find_violations(package)
    if violations:
        raise SystemExit(
            f"LightRFT {_version(package)} in {package} differs from the one tested, {TESTED}, in {len(violations)} of "
            f"the {len(CONTRACT)} places that this example relies on:\n  - "
            + "\n  - ".join(violations)
            + "\ncheck out LightRFT's commit 49e62cb, or report this list to the maintainers of this example"
        )


def find_violations(package: Path, contract: Sequence[Spot] = CONTRACT) -> list[str]:
    """Compare LightRFT's source with the contract.

    :param package: The folder ``.../lightrft``.
    :param contract: What to check.
    :return: One line a violation: path, what was expected, what is there, what this example does with it.
    """
    source = _Source(package)
    lines = []
    for spot in contract:
        try:
            found = _misfit(spot, *source.find(spot.path.split(".")[1:]))
        except _AbsentError as absent:
            found = str(absent)
        if found:
            expected = f"({', '.join(spot.parameters)})" if spot.parameters else "it to exist"
            lines.append(f"{spot.path}: expected {expected}, as since {spot.since}; found {found}; here: {spot.why}")
    return lines


def _version(package: Path) -> str:
    """The version that the source states; up to now LightRFT has it in setup.py alone."""
    for file, name in ((package / "__init__.py", "__version__"), (package.parent / "setup.py", "version")):
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if match := re.search(rf"""^\s*{name}\s*=\s*["']([^"']+)""", text, re.MULTILINE):
            return match[1]
    return "(unknown version)"


def _misfit(spot: Spot, found: ast.AST | list[ast.Call], bound: bool) -> str | None:
    """The parameters found, if they do not fit.

    :param spot: What was expected.
    :param found: What stands there; a list of calls where a call was expected.
    :param bound: The first parameter is self or cls.
    """
    if not spot.parameters or isinstance(found, ast.Import | ast.ImportFrom):  # from another package: not to be read
        return None
    if isinstance(found, list):
        calls = [[keyword.arg for keyword in call.keywords] for call in found]
        if any(None in names or set(spot.parameters) <= set(names) for names in calls):  # None is **
            return None
        return "calls with " + ", ".join(f"({', '.join(names)})" for names in calls)
    if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{type(found).__name__}, whose parameters cannot be read"
    a = found.args
    ordered = [p.arg for p in (*a.posonlyargs, *a.args)][bound:]
    only = [p.arg for p in a.kwonlyargs]
    by_name = {p.arg for p in a.args} | set(only)
    placed, named = spot.parameters[: spot.positional], spot.parameters[spot.positional :]
    fits = all(ordered[i] == name if i < len(ordered) else a.vararg for i, name in enumerate(placed))
    fits = fits and all(name in by_name or (a.kwarg and not spot.explicit) for name in named)
    required = ordered[: max(len(ordered) - len(a.defaults), 0)]
    required += [name for name, default in zip(only, a.kw_defaults, strict=True) if default is None]
    if fits and set(required) <= set(spot.parameters):
        return None
    rest = [f"*{a.vararg.arg}" if a.vararg else "*"] if a.vararg or only else []
    return f"({', '.join([*ordered, *rest, *only, *([f'**{a.kwarg.arg}'] if a.kwarg else [])])})"


class _AbsentError(Exception):
    """There is nothing at a path; the text says how far it goes."""


class _Source:
    """A package's modules, parsed once, when needed.

    :param package: Its folder.
    """

    def __init__(self, package: Path) -> None:
        self._package = package
        self._modules: dict[Path, ast.Module] = {}

    def find(self, parts: Sequence[str], seen: tuple[Sequence[str], ...] = ()) -> tuple[ast.AST | list[ast.Call], bool]:
        """What a path leads to; imports within the package are followed.

        :param parts: Path below the package.
        :param seen: Paths that led here.
        :return: The statement that binds the name, or the calls; and whether the first parameter is self or cls.
        :raises _AbsentError: if there is nothing.
        """
        if parts in seen:
            raise _AbsentError("missing: modules import it from each other")
        folder, depth = self._package, 0
        while depth < len(parts) and (folder / parts[depth]).is_dir():
            folder, depth = folder / parts[depth], depth + 1
        file = folder / "__init__.py"
        if depth < len(parts) and (folder / f"{parts[depth]}.py").is_file():
            file, depth = folder / f"{parts[depth]}.py", depth + 1
        node: ast.AST | list[ast.Call] = self._parse(file)
        bound = False
        for i, name in enumerate(parts[depth:], depth):
            in_class = isinstance(node, ast.ClassDef)
            node = _members(node, name)
            if not node:
                where = file.relative_to(self._package.parent)
                raise _AbsentError(f"missing: no {'.'.join(parts[depth : i + 1])} in {where}")
            if isinstance(node, ast.ImportFrom) and (target := self._target(file, node, name)) is not None:
                return self.find([*target, *parts[i + 1 :]], (*seen, parts))
            decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())]
            bound = in_class and "staticmethod" not in decorators
        return node, bound

    def _parse(self, file: Path) -> ast.Module:
        if file not in self._modules:
            where = file.relative_to(self._package.parent)
            try:
                self._modules[file] = ast.parse(file.read_bytes())
            except FileNotFoundError:
                raise _AbsentError(f"missing: no {where}") from None
            except (SyntaxError, ValueError) as error:  # ValueError: null bytes, before Python 3.11.4
                raise _AbsentError(f"{where}, which does not parse: {error}") from None
        return self._modules[file]

    def _target(self, file: Path, node: ast.ImportFrom, name: str) -> list[str] | None:
        """Path below the package of an imported name; None if it comes from elsewhere."""
        parts = node.module.split(".") if node.module else []
        if node.level:
            here = file.relative_to(self._package).parent.parts
            parts = [*here[: len(here) + 1 - node.level], *parts]
        elif parts.pop(0) != "lightrft":
            return None
        return [*parts, next(alias.name for alias in node.names if name == (alias.asname or alias.name))]


def _members(node: ast.AST | list[ast.Call], name: str) -> ast.AST | list[ast.Call] | None:
    """What binds a name in a module or class, attributes that methods set on self included; in a function, its calls.

    Definitions and imports win over assignments, which may stand in for a package that is not installed.
    """
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
        return [call for call in calls if name in (getattr(call.func, "attr", None), getattr(call.func, "id", None))]
    if not isinstance(node, ast.Module | ast.ClassDef):
        return None
    definitions, assignments = [], []
    for statement in _statements(node.body):
        aliases = getattr(statement, "names", ()) if isinstance(statement, ast.Import | ast.ImportFrom) else ()
        if getattr(statement, "name", None) == name or name in [alias.asname or alias.name for alias in aliases]:
            definitions.append(statement)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            assignments += [statement for target in targets if getattr(target, "id", None) == name]
    if isinstance(node, ast.ClassDef) and not definitions:
        on_self = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
        assignments += [n for n in on_self if n.attr == name and getattr(n.value, "id", None) == "self"]
    return (assignments + definitions or [None])[-1]


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block, with those in its if, try and with blocks."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for part in (statement, *getattr(statement, "handlers", ())):
                for block in ("body", "orelse", "finalbody"):
                    yield from _statements(getattr(part, block, ()))
