"""What training on DeepSpeed and on FSDP2 have in common: data, rollouts on an engine in the same process, folders.

vLLM and peft are optional, and imported inside functions.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lightrft.engines.base import RolloutEngine, RolloutOutput, Sampling
from lightrft.engines.hf_engine import HFEngine
from lightrft.strategy import checkpoint, weights
from lightrft.strategy.checkpoint import ABOUT, SaveError
from lightrft.utils.console import console
from lightrft.utils.distributed import ResumableSampler, engine_groups, gather_objects, init_process_group, pick_device
from lightrft.utils.families import family_of
from lightrft.utils.weight_names import is_adapter

AUDIO_TOKENS_A_SECOND = 25


class StrategyBase(ABC):
    """Everything that depends on how many processes there are and on what.

    :param args: The run's arguments, also available as :attr:`config`, LightRFT's name for them.
    """

    def __init__(self, args: Any) -> None:
        self.args = self.config = args
        self.device = pick_device()
        init_process_group(self.device)
        self.rank = console.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.engine_mp_group = engine_groups(args.engine_tp_size)
        self.inference_engine: RolloutEngine | None = None
        self.keep_engine_weights = False  # while it sleeps: whoever knows that there is room for them sets it
        self.model_files: dict[str, str] = {}  # further files of a model's folder, which checkpoints keep for export
        self.set_seed(args.seed)

    # ------------------------------------------------------------ small things
    @staticmethod
    def set_seed(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    @staticmethod
    def print(*parts: object) -> None:
        console.print(*parts)

    def is_rank_0(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def report_memory(self, prefix: str) -> None:
        """Print the accelerator memory in use; nothing on the CPU."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            self.print(f"memory    {prefix}: {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB in use")

    # ------------------------------------------------------------ training
    @contextmanager
    def init_model_context(self) -> Iterator[None]:
        """Where models are loaded: here into CPU memory, as without it."""
        yield

    def prepare_models_and_optimizers(
        self,
        actor: nn.Module,
        critic: None,
        reward_models: list[Any],
        initial_model: nn.Module | None,
        args: Any,
        max_steps: int,
    ) -> tuple[tuple[Any, Any, Any], tuple[None, None, None], list[Any], nn.Module | None]:
        """Shard the models and make the optimizer.

        :param reward_models: Rewards are rules; returned as they are.
        :param max_steps: Optimizer steps of GRPO, for the learning-rate schedule.
        :return: As LightRFT: (actor, optimizer, scheduler), (critic, ...), reward models, reference model.
        """
        actor.model, optimizer, scheduler = self.prepare_training(actor.model, max_steps)
        if initial_model is not None:
            initial_model = self.prepare_model(initial_model)
        return (actor, optimizer, scheduler), (None, None, None), reward_models, initial_model

    @abstractmethod
    def prepare_training(self, model: nn.Module, max_steps: int) -> tuple[Any, Any, Any]:
        """Shard the trained model.

        :return: Its engine, which has ``backward``, ``is_gradient_accumulation_boundary`` and ``step``; optimizer;
            scheduler.
        """

    @abstractmethod
    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Freeze a model, usually the reference model's actor, and move or shard it."""

    @abstractmethod
    def step_guard(self, engine: Any) -> Any:
        """What makes the optimizer's steps: its ``step(discard)`` returns the gradient's norm, ``applied`` says whether
        the last one was made; see :class:`~lightrft.strategy.deepspeed_hooks.StepGuard`.
        """

    @abstractmethod
    def offload_model(self, model: nn.Module) -> None:
        """Free the GPU memory of a read-only model that is whole on every rank."""

    @abstractmethod
    def reload_model(self, model: nn.Module) -> None:
        """Undo :meth:`offload_model`."""

    def optimizer_and_schedule(self, parameters: Iterable[tuple[str, nn.Parameter]], max_steps: int) -> tuple[Any, Any]:
        """AdamW with the schedule of :func:`rate_factor`."""
        args, decay, no_decay = self.args, [], []
        for name, parameter in parameters:
            (no_decay if exempt_from_decay(name) else decay).append(parameter)
        groups = [{"params": decay, "weight_decay": args.l2}, {"params": no_decay, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=args.actor_learning_rate,
            betas=tuple(args.adam_betas),
            fused=True,  # one pass over weights, gradients and moments, without temporaries, on CPUs too
        )

        def factor(step: int) -> float:  # the warm start's schedule, then GRPO's
            if step >= args.sft_steps:
                return rate_factor(step - args.sft_steps, math.ceil(max_steps * args.lr_warmup_ratio), max_steps)
            peak = (args.sft_learning_rate or args.actor_learning_rate) / args.actor_learning_rate
            return peak * rate_factor(step, math.ceil(args.sft_steps * args.lr_warmup_ratio), args.sft_steps)

        return optimizer, LambdaLR(optimizer, factor)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in one optimizer step."""
        return self.args.train_batch_size // (self.args.micro_train_batch_size * self.world_size)

    @property
    def warm_start_prompts(self) -> int:
        """Prompts of a rank in a supervised step: as many as an optimizer step of GRPO has, and one a micro-batch."""
        return self.accumulation * max(1, self.args.micro_train_batch_size // self.args.n_samples_per_prompt)

    def setup_dataloader(
        self,
        dataset: Dataset,
        batch_size: int,
        pin_memory: bool = False,
        shuffle: bool = True,
        collate_fn: Callable | None = None,
        drop_last: bool = True,
    ) -> DataLoader:
        """A loader of this rank's share of the data."""
        sampler = ResumableSampler(
            dataset, self.world_size, self.rank, shuffle=shuffle, seed=self.args.seed, drop_last=drop_last
        )
        return DataLoader(
            dataset, batch_size, sampler=sampler, collate_fn=collate_fn, drop_last=drop_last, pin_memory=pin_memory
        )

    # ------------------------------------------------------------ rollout engine
    def setup_inference_engine(self, args: Any, engine_type: str = "vllm", actor: nn.Module | None = None) -> Any:
        """Start the rollout engine and give it the actor's weights.

        :param engine_type: ``vllm`` or ``hf``.
        :raises ValueError: if the engine is not one of this runtime's.
        """
        if engine_type == "vllm":
            from lightrft.engines.vllm_engine import VLLMEngine

            self.inference_engine = VLLMEngine(
                model=args.pretrain,
                dtype=self.dtype,
                max_model_len=self.longest_sequence,
                audios_per_prompt=args.limit_mm_image_per_prompt,
                tensor_parallel_size=args.engine_tp_size,
                max_num_seqs=self.responses_at_once,
                memory_utilization=args.engine_mem_util,
                enable_sleep=args.enable_engine_sleep,
                keep_weights=self.keep_engine_weights,
                seed=args.seed,
                audio_seconds=args.audio_seconds,
            )
        elif engine_type == "hf":
            processor = family_of(args.pretrain).processor_class().from_pretrained(args.pretrain)
            rows = {} if self.device.type == "cpu" else {"batch_size": self.rows_at_once(actor.model.module.config)}
            self.inference_engine = HFEngine(processor, lambda: self.gathered(actor.model), **rows)
        else:
            raise ValueError(f"engine_type {engine_type!r}: this runtime has vllm and hf; sglang needs LightRFT itself")
        if actor is not None:
            self.update_engine_weights(actor)
        return self.inference_engine

    @property
    def longest_sequence(self) -> int:
        """Tokens of a prompt with all its audio, and the response."""
        audio = math.ceil(AUDIO_TOKENS_A_SECOND * self.args.audio_seconds) * self.args.limit_mm_image_per_prompt
        return self.args.prompt_max_len + audio + self.args.generate_max_len

    @property
    def responses_at_once(self) -> int:
        """Responses that an engine samples together in a rollout, at most vLLM's own default on a large GPU."""
        args = self.args
        prompts = args.rollout_batch_size * args.engine_tp_size // self.world_size
        return min(1024, prompts * args.n_samples_per_prompt)

    def rows_at_once(self, config: Any) -> int:
        """Sequences that the ``hf`` engine generates at once: as many as have room in its share of the GPU.

        :return: 1 to 64.
        """
        args, text = self.args, config.text_config
        head = text.hidden_size // text.num_attention_heads
        token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * self.dtype.itemsize
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return max(1, min(64, int(args.engine_mem_util * memory / (self.longest_sequence * token))))

    @staticmethod
    def _build_multimodal_inputs(
        all_prompts: Sequence[str],
        all_images: Sequence[Any],
        images_num: Sequence[int],
        all_videos: Sequence[Any] | None,
        videos_num: Sequence[int] | None,
    ) -> list[dict[str, Any]]:
        """Engine requests of prompts and what belongs to them.

        :raises RuntimeError: always: this runtime carries audio only, and ``patch_strategy_for_audio`` says how.
        """
        raise RuntimeError("the image slot has no meaning yet: call patch_strategy_for_audio(strategy)")

    def engine_generate_local(
        self,
        sampling_params: Sequence[Sampling],
        prompt_token_ids: Sequence[list[int]] | None = None,
        multi_modal_inputs: Sequence[dict[str, Any]] | None = None,
    ) -> list[RolloutOutput]:
        """Ask this rank's engine.

        :param prompt_token_ids: Text-only prompts, or
        :param multi_modal_inputs: requests from :meth:`_build_multimodal_inputs`.
        :return: All samples of the first prompt, then of the second, and so on.
        """
        prompts = multi_modal_inputs if multi_modal_inputs is not None else prompt_token_ids
        return self.inference_engine.generate(list(prompts), sampling_params)

    def gather_and_generate(
        self,
        sampling_params: Sequence[Sampling],
        all_prompt_token_ids: Sequence[list[int]] | None = None,
        all_prompts: Sequence[str] | None = None,
        all_images: Sequence[Any] | None = None,
        images_num: Sequence[int] | None = None,
    ) -> list[RolloutOutput]:
        """Generate for this rank's prompts; the ranks of a tensor-parallel engine put theirs together.

        :return: This rank's responses: all samples of its first prompt, then of the second, and so on.
        """
        self.inference_engine.wake_up()
        multimodal = all_images is not None
        if multimodal:
            audio = {"all_prompts": all_prompts, "all_images": all_images, "images_num": images_num}
            inputs = self._build_multimodal_inputs(**audio, all_videos=None, videos_num=None)
        else:
            inputs = list(all_prompt_token_ids)
        shares = gather_objects((inputs, list(sampling_params)), self.engine_mp_group)
        inputs = [x for share, _ in shares for x in share]
        params = [p for _, share in shares for p in share]
        outputs = self.engine_generate_local(params, None if multimodal else inputs, inputs if multimodal else None)
        if len(outputs) != sum(p.n for p in params):
            raise RuntimeError(f"the engine returned {len(outputs)} of {sum(p.n for p in params)} responses")
        me = dist.get_rank(self.engine_mp_group)
        start = sum(p.n for _, share in shares[:me] for p in share)
        return outputs[start : start + sum(p.n for p in shares[me][1])]

    def update_engine_weights(self, actor: nn.Module) -> None:
        """Give the rollout engine the actor's present weights: those that train, or all while it is not ``complete``.

        At first it is not, though it has read ``--pretrain`` itself: a resumed run's weights are its checkpoint's.

        :raises RuntimeError: if the engine's weights are not the new ones afterwards.
        """
        self.inference_engine.wake_up()
        trained_only = self.inference_engine.complete
        self.inference_engine.load_weights(self.named_weights(actor.model, trained_only))

    # ------------------------------------------------------------ weights and folders
    @property
    def dtype(self) -> torch.dtype:
        """Of forward passes, rollouts and the saved model."""
        return torch.bfloat16 if self.args.bf16 else torch.float32

    @staticmethod
    def unwrap_model(model: nn.Module) -> nn.Module:
        """The transformers model below its engine."""
        return getattr(model, "module", model)

    @abstractmethod
    def gathered(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The unwrapped model with whole parameters on every rank, all at once.

        :param model: Prepared model. A collective where it is sharded.
        """

    @abstractmethod
    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[list[torch.Tensor]]:
        """The values of some parameters, in :attr:`dtype`, gathered together.

        :param parameters: Of a prepared model. A collective where it is sharded.
        """

    def bytes_of(self, parameter: nn.Parameter) -> int:
        """Memory of a parameter once it is gathered."""
        return parameter.numel() * self.dtype.itemsize

    def named_weights(self, model: nn.Module, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint name and whole value of each parameter; not copied, but adapters are merged.

        A 4-bit weight comes out as what the trainer computes with, so that the engine's is the same.
        What is gathered at a time has at most ``sync_bucket_mb``; see :func:`~lightrft.strategy.weights.buckets`.

        :param model: Prepared model. A collective where it is sharded: all ranks iterate.
        """
        pieces = weights.pieces_of(self.unwrap_model(model), self.args.lora_rank > 0, trained_only)
        for bucket in weights.buckets(pieces, self.args.sync_bucket_mb * 2**20, self.bytes_of):
            yield from weights.gathered_weights(bucket, self.whole)

    def save_model(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> None:
        """Write a Hugging Face folder that transformers and vLLM load, and LoRA's adapter alone into ``adapter`` in it.

        :param output_dir: Folder; existing files are replaced once all new ones are written, one by one.
        :raises SaveError: if it could not be written.
        """
        module, lora_config = self.unwrap_model(model.model), model.lora_config
        weights, adapter = self.named_weights(model.model), {}
        if lora_config is not None:
            from lightrft.models.lora import write_adapter

            named = {name: p for name, p in module.named_parameters() if is_adapter(name)}
            with self.whole(list(named.values())) as values:
                if self.is_rank_0():
                    adapter = {name: value.cpu().clone() for name, value in zip(named, values, strict=True)}

        def add_files(folder: Path) -> None:
            if lora_config is not None:
                write_adapter(lora_config, adapter, folder / "adapter")
            self.add_model_files(folder)

        def write() -> None:
            try:
                if self.is_rank_0():
                    checkpoint.write_hf_folder(module, weights, tokenizer, output_dir, add_files)
            finally:
                for _ in weights:  # all ranks gather all of them, also after a failure of the one that writes
                    pass

        try:
            self.together(write)
        except SaveError as error:
            what = f"the model cannot be written to {output_dir} ({error}); see to room and rights there"
            raise SaveError(what) from error

    def add_model_files(self, folder: Path) -> None:  # noqa: B027 - a strategy need not have any
        """Write into a model's folder what else it needs; an example replaces this.

        :param folder: With all other files; on rank 0 only.
        :raises OSError: if that fails; :meth:`save_model` then fails on all ranks.
        """

    def save_ckpt(
        self, model: Any, save_dir: str, tag: str, max_num: int = 3, client_state: dict[str, Any] | None = None
    ) -> None:
        """Write a checkpoint for resuming, aside and then renamed; delete the oldest beyond ``max_num``.

        :param client_state: Stored with it and returned by :meth:`load_ckpt`: tensors and plain values;
            ``consumed_samples`` says how far the run is.
        :raises SaveError: if it could not be written, on any rank; the earlier ones are as they were.
        """
        name, state, mine = tag + checkpoint.PART, dict(client_state or {}), {}
        dtype = str(self.dtype).removeprefix("torch.")
        state[ABOUT] = {"dtype": dtype, "lora_alpha": self.args.lora_alpha, "files": self.model_files}

        def finish() -> None:
            hashes = {name: digest for part in everyones for name, digest in part.items()}
            checkpoint.commit(save_dir, tag, state.get("consumed_samples"), hashes)
            checkpoint.rotate(save_dir, keep=max_num)

        try:
            self.together(lambda: checkpoint.begin(save_dir, name), self.is_rank_0())
            self.together(lambda: mine.update(self.write_ckpt(model, save_dir, name, state)))
            everyones = gather_objects(mine)
            self.together(finish, self.is_rank_0())
        except SaveError:
            if self.is_rank_0():
                with suppress(OSError):
                    checkpoint.clear(save_dir)  # make room: a half-written checkpoint is useless
            raise

    @abstractmethod
    def write_ckpt(self, engine: Any, save_dir: str, tag: str, client_state: dict[str, Any]) -> dict[str, str]:
        """Write this rank's part of a checkpoint.

        :return: Hashes by file name.
        :raises OSError: if that fails.
        """

    def load_ckpt(self, model: Any, load_dir: str, **_: Any) -> tuple[str, dict[str, Any]]:
        """Load the newest whole checkpoint: the one that ``latest`` names, if it is whole. Collective.

        :return: Its folder, and its state, with ``step``, which its name tells.
        :raises SystemExit: if there is none that fits.
        """
        self.together(lambda: checkpoint.clear(load_dir), self.is_rank_0())
        named = checkpoint.latest(load_dir)
        named, found = gather_objects((named, checkpoint.newest_first(load_dir, named)))[0]
        for folder in found:
            mine = checkpoint.damage(folder, slice(self.rank, None, self.world_size))  # each rank reads its share
            wrong = next(filter(None, gather_objects(mine)), None)
            if wrong is None:
                break
            self.print(f"note: passed over a damaged checkpoint: {folder}: {wrong}")
        else:
            raise SystemExit(f"--load_checkpoint: no whole checkpoint in {load_dir}")
        if named not in [folder.name for folder in found]:
            says = "is missing" if named is None else f"names {named}, which is not there"
            self.print(f"note: {Path(load_dir) / 'latest'} {says}: {folder.name} is the newest whole checkpoint")
        step = int(folder.name.removeprefix("step_"))
        return str(folder), self.read_ckpt(model, load_dir, folder.name) | {"step": step}

    @abstractmethod
    def read_ckpt(self, engine: Any, load_dir: str, tag: str) -> dict[str, Any]:
        """Load this rank's part of a checkpoint.

        :raises SystemExit: if it does not fit.
        """

    @staticmethod
    def together(action: Callable[[], None], mine: bool = True) -> None:
        """Do something with files, on ranks where ``mine`` is true; if it fails on one rank, raise on all. Collective.

        :raises SaveError: naming the ranks and what went wrong.
        """
        failure = None
        if mine:
            try:
                action()
            except (OSError, SafetensorError) as error:
                failure = str(error)
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(gather_objects(failure)) if text]
        if failures:
            raise SaveError("; ".join(failures))


def rate_factor(step: int, warmup: int, total: int) -> float:
    """What the peak learning rate is multiplied by: a linear warm-up, then half a cosine down to a tenth.

    :param step: Optimizer steps made so far.
    :param warmup: Steps of the warm-up. The first has ``1 / warmup`` and not 0, which would waste its rollout.
    """
    if step < warmup:
        return (step + 1) / warmup
    # a resumed run with a larger --rollout_batch_size makes more steps than the total: the rate stays at its end
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def exempt_from_decay(name: str) -> bool:
    """Whether weight decay leaves a parameter alone: biases and the gains of normalisation layers.

    :param name: Parameter name. (The shape does not help: under ZeRO-3 every parameter is flat.)
    """
    return name.endswith(".bias") or "norm" in name or ".ln_post." in name


def is_usable(norm: float | torch.Tensor) -> bool:
    """Whether a gradient's norm is finite; DeepSpeed reports -1 where it found NaN or infinity."""
    return bool(math.isfinite(norm) and norm >= 0)
