"""From prompts to experiences: rollout, rewards, log-probs, advantages."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from lightrft.engines.base import Sampling, stable_seed
from lightrft.models.actor_al import ActorAL
from lightrft.models.actor_modality import get_supported_parameters
from lightrft.models.loss import kl_tokens
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.trainer.advantages import (
    WHITENED,
    KLController,
    audio_gain,
    decoupled_advantages,
    overlong_penalty,
    shape_rewards,
    token_advantages,
    whiten,
)
from lightrft.trainer.replay_buffer import Experience, MicroBatch, make_micro_batch
from lightrft.trainer.step_metrics import has_spread, normalised_parts, reward_parts
from lightrft.utils.preemption import stop_request

NOT_PATCHED = "the image slot carries nothing yet: call patch_experience_maker_for_audio(experience_maker, ...)"
AUDIO_GAIN = "audio_gain_reward"  # a part of the reward that takes the policy's own log-probs


def normalize_images(raw_images: Sequence[Any]) -> list[Any]:
    """Bring the image slot's content into the form that the processor takes.

    :raises RuntimeError: always: this runtime carries audio only, and ``patch_experience_maker_for_audio`` says how.
    """
    raise RuntimeError(NOT_PATCHED)


def get_images_num(all_images: Sequence[Any]) -> list[int]:
    """Number of images of each prompt.

    :raises RuntimeError: always, as :func:`normalize_images`.
    """
    raise RuntimeError(NOT_PATCHED)


class FastExperienceMaker:
    """Makes experiences of a batch of prompts.

    :param reward_fn: LightRFT's signature, see :meth:`score`.
    :param needs_old_log_probs: The update is not on-policy, or KL or :func:`~.advantages.audio_gain` is paid for.
    """

    def __init__(
        self,
        actor: ActorAL,
        initial_model: ActorAL | None,
        tokenizer: PreTrainedTokenizerBase,
        strategy: StrategyBase,
        kl_ctl: KLController,
        reward_fn: Callable,
        reward_fn_label_map: dict[str, int],
        sampling: Sampling,
        needs_old_log_probs: bool,
    ) -> None:
        self.actor = actor
        self.initial_model = initial_model
        self.tokenizer = tokenizer
        self.strategy = strategy
        self.kl_ctl = kl_ctl
        self.reward_fn = reward_fn
        self.reward_fn_label_map = reward_fn_label_map
        self.sampling = sampling
        self.needs_old_log_probs = needs_old_log_probs
        self.multimodal_processor: Any = None  # set by patch_experience_maker_for_audio
        # what trajectories record of an image-slot entry; whoever fills the slot may say
        self.describe_image: Callable[[Any], dict[str, Any]] = lambda image: {}
        self.draw_prompts: Callable[[int, int, int], tuple[Any, ...]] | None = None  # see replace_groups
        self.timings: dict[str, float] = {}
        self.on_phase: Callable[[str], None] = lambda name: None

    def make_experience_list(
        self,
        all_prompts: Sequence[str],
        all_images: Sequence[Any],
        all_references: Sequence[str],
        all_labels: Sequence[str],
        step: int,
        all_tags: Sequence[Sequence[str]] | None = None,
    ) -> list[Experience]:
        """Rollout, rewards, log-probs and advantages for this rank's prompts.

        :param all_images: What the image slot carries, one entry a prompt; None for text.
        :param step: Rollout step, which the sampling seeds depend on.
        :param all_tags: Further names under which metrics count each prompt.
        :return: ``n`` experiences a prompt, a group's next to each other.
        """
        started = time.perf_counter()
        self.on_phase("rollout")
        prompts = (all_prompts, all_images, all_references, all_labels)
        with self.ending_together():
            items = self.rollout(*prompts, self.sampling, step, all_tags=all_tags)
        self.score(items)
        if self.draw_prompts is not None:
            items = self.replace_groups(items, step)
        self.strategy.inference_engine.sleep()  # once a step: it may wake without weights, see RolloutEngine.complete
        if self.strategy.args.overlong_buffer:
            self.penalise_length(items)
        rolled_out = time.perf_counter()
        self.timings = {"rollout": rolled_out - started}
        self.on_phase("log-probs")
        self.add_log_probs(items)
        self.add_advantages(items)
        seconds = time.perf_counter() - rolled_out
        self.timings["logprobs"] = seconds - self.timings.get("silence", 0.0)
        return items

    def ending_together(self) -> AbstractContextManager[None]:
        """For a rollout: an error of one rank ends all of them at the same point, so that they can save.

        Not where ranks sample together, or gather sharded weights to do so: they would wait for the one that failed.
        """
        args = self.strategy.args
        sharded = args.fsdp or args.zero_stage == 3
        alone = args.engine_tp_size == 1 and not (args.engine_type == "hf" and sharded)
        return stop_request.together(self.strategy.device) if alone else nullcontext()

    def rollout(
        self,
        all_prompts: Sequence[str],
        all_images: Sequence[Any],
        all_references: Sequence[str],
        all_labels: Sequence[str],
        sampling: Sampling,
        step: int,
        attempt: int = 0,
        all_tags: Sequence[Sequence[str]] | None = None,
    ) -> list[Experience]:
        """Sample responses, one engine request a prompt.

        :param sampling: How to sample; each prompt gets a seed of (run seed, step, position in the global batch).
        :param attempt: Number of the rollout within the step, which the seeds depend on, too.
        :return: Experiences without rewards.
        :raises RuntimeError: if the engine saw other prompt tokens than the trainer will.
        """
        data, images, clips = self.read_prompts(all_prompts, all_images, all_references)
        rank, world = self.strategy.rank, self.strategy.world_size
        seed = (self.strategy.args.seed, step, *([attempt] if attempt else []))
        outputs = self.strategy.gather_and_generate(
            sampling_params=[sampling.with_seed(stable_seed(*seed, i * world + rank)) for i in range(len(all_prompts))],
            all_prompt_token_ids=data["all_prompt_token_ids"],
            all_prompts=data["all_prompts"],
            all_images=data["all_images"],
            images_num=data["all_images_num"],
        )
        items = []
        for i, prompt_ids in enumerate(data["all_prompt_token_ids"]):
            ids = torch.tensor(prompt_ids, dtype=torch.long)
            for output in outputs[i * sampling.n : (i + 1) * sampling.n]:
                if list(output.prompt_token_ids) != list(prompt_ids):
                    raise RuntimeError(
                        f"prompt {i} of step {step} is {len(output.prompt_token_ids)} tokens in the engine and "
                        f"{len(prompt_ids)} in the trainer, or differs in content: {all_prompts[i]!r}"
                    )
                items.append(
                    Experience(
                        prompt=all_prompts[i],
                        prompt_ids=ids,
                        response_ids=torch.tensor(output.output_token_ids, dtype=torch.long),
                        engine_log_probs=output.output_log_probs,
                        truncated=output.truncated,
                        clips=clips[i],
                        reference=all_references[i],
                        label=all_labels[i],
                        tags=all_tags[i] if all_tags else (),
                        source=self.describe_image(images[i]),
                    )
                )
        return items

    def read_prompts(
        self, all_prompts: Sequence[str], all_images: Sequence[Any], all_references: Sequence[str]
    ) -> tuple[dict[str, Any], list[Any], list[list[torch.Tensor]]]:
        """Tokenise prompts and prepare what the image slot carries.

        :return: LightRFT's mapping, the image slot's content, and the rows of each prompt's clips.
        """
        images = normalize_images(all_images)
        data = self.multimodal_processor.process_multimodal_batch(
            all_prompts=all_prompts,
            all_images=images,
            all_references=all_references,
            images_num=get_images_num(images),
            n_samples_per_prompt=1,  # the engine samples n times from one request; a clip is prepared once
            all_videos=None,
            videos_num=None,
        )
        rows = data["all_images_pixel_values"]
        parts = iter(rows.split(data["all_images_grid_thw"].prod(-1).tolist()) if rows is not None else ())
        return data, images, [[next(parts) for _ in range(count)] for count in data["all_images_num"]]

    def replace_groups(self, items: list[Experience], step: int) -> list[Experience]:
        """Replace groups whose rewards are all equal, and whose advantages are therefore 0, by others.

        Prompts are drawn with ``draw_prompts(step, attempt, count)``, as many on every rank as the rank with most to
        replace needs, since an engine may span ranks. After ``dynamic_sampling_rounds`` what is left stays as it is.

        :param items: Scored experiences, a group's next to each other.
        :return: As many, group by group; each carries whether it is a replacement in its reward metrics.

        Source: Yu et al., DAPO (2025), section 3.2.
        """
        n = self.sampling.n
        groups = [items[i : i + n] for i in range(0, len(items), n)]
        parts = [part for part in normalised_parts(self.strategy.args) if part != AUDIO_GAIN]  # that comes later
        dull = [i for i, group in enumerate(groups) if not has_spread(group, parts)]
        replaced = set()
        for attempt in range(1, self.strategy.args.dynamic_sampling_rounds + 1):
            most = torch.tensor(float(len(dull)), device=self.strategy.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            if most == 0:
                break
            prompts, tags = split_tags(self.draw_prompts(step, attempt, int(most)))
            with self.ending_together():
                drawn = self.rollout(*prompts, self.sampling, step, attempt, all_tags=tags)
            self.score(drawn)
            fresh = [drawn[i : i + n] for i in range(0, len(drawn), n)]
            for group in fresh:
                if dull and has_spread(group, parts):
                    groups[dull[0]] = group
                    replaced.add(dull.pop(0))
        for i, group in enumerate(groups):
            for item in group:
                item.reward_metrics["replaced"] = float(i in replaced)
        return [item for group in groups for item in group]

    def penalise_length(self, items: list[Experience]) -> None:
        """Subtract the overlong penalty from the rewards of responses near the token limit.

        :param items: Scored experiences; changed in place.
        """
        args = self.strategy.args
        lengths = torch.tensor([float(len(item.response_ids)) for item in items])
        penalties = overlong_penalty(
            lengths, self.sampling.max_tokens, args.overlong_buffer_len, args.overlong_buffer_penalty_factor
        )
        for item, penalty in zip(items, penalties.tolist(), strict=True):
            item.reward += penalty
            item.reward_metrics["overlong_penalty"] = penalty

    def score(self, items: list[Experience]) -> None:
        """Set the rewards.

        The reward function gets what LightRFT gives it: whole decoded sequences, special tokens included.

        Collective: a signal interrupts the reward function, and the ranks stop together.

        :param items: From :meth:`rollout`; changed in place.
        :raises FloatingPointError: if a reward is not finite.
        """
        decode = self.tokenizer.batch_decode
        queries = decode([torch.cat([item.prompt_ids, item.response_ids]) for item in items], skip_special_tokens=False)

        def judge() -> tuple[torch.Tensor, dict[str, Any]]:
            rewards, metrics = self.reward_fn(
                model_reward_list=[],
                labels=[item.label for item in items],
                queries=queries,
                refs=[item.reference for item in items],
                label_map=self.reward_fn_label_map,
            )
            if not torch.isfinite(rewards).all():
                raise FloatingPointError(f"the reward function returned {rewards.tolist()}")
            return rewards, metrics

        with stop_request.together(self.strategy.device):  # so that scores are None on no rank
            scores = stop_request.interrupt(judge)
        rewards, metrics = scores
        responses = decode([item.response_ids for item in items], skip_special_tokens=False)
        for i, item in enumerate(items):
            item.response = responses[i]
            item.reward = float(rewards[i])
            item.reward_metrics = {name: float(values[i]) for name, values in metrics.items()}

    @torch.no_grad()
    def log_probs(self, model: ActorAL, items: Sequence[Experience], silent: bool = False) -> list[torch.Tensor]:
        """Log-probs of the responses, given prompt and audio.

        :param silent: Put silence of the same length in place of every clip.
        :return: ``(response length,)`` each, in CPU memory.
        """
        size = self.strategy.args.micro_rollout_batch_size
        out = []
        for start in range(0, len(items), size):
            part = items[start : start + size]
            if silent:
                silence = self.multimodal_processor.silence
                part = [replace(item, clips=[silence(clip) for clip in item.clips]) for item in part]
            batch = make_micro_batch(part, self.tokenizer.pad_token_id, self.strategy.device)
            values = forward(model, batch).cpu()
            out += [values[i, : len(item.response_ids)] for i, item in enumerate(part)]
        return out

    def add_log_probs(self, items: list[Experience]) -> None:
        """Set old and reference log-probs and those in silence, where they are needed, and pay for the audio's gain."""
        if self.needs_old_log_probs:
            for item, values in zip(items, self.log_probs(self.actor, items), strict=True):
                item.old_log_probs = values
        if self.initial_model is not None:
            self.strategy.reload_model(self.initial_model)
            for item, values in zip(items, self.log_probs(self.initial_model, items), strict=True):
                item.ref_log_probs = values
            self.strategy.offload_model(self.initial_model)
        args = self.strategy.args
        if args.audio_token_weights or AUDIO_GAIN in args.reward_parts:
            started = time.perf_counter()
            for item, values in zip(items, self.log_probs(self.actor, items, silent=True), strict=True):
                item.silent_log_probs = values
            self.timings["silence"] = time.perf_counter() - started
        if AUDIO_GAIN in args.reward_parts:
            for item in items:
                # paid to all, it teaches to answer whatever silence would not
                gain = audio_gain(item.old_log_probs, item.silent_log_probs) * item.reward_metrics["accuracy_reward"]
                item.reward += args.reward_parts[AUDIO_GAIN] * gain
                item.reward_metrics[AUDIO_GAIN] = gain

    def add_advantages(self, items: list[Experience]) -> None:
        """Set the advantages.

        :param items: Whole groups; changed in place.
        """
        args = self.strategy.args
        if args.advantage_estimator == "gdpo":
            parts = torch.tensor([reward_parts(item, args.reward_parts) for item in items])
            shaped = decoupled_advantages(parts, torch.tensor([*args.reward_parts.values(), 1.0]), self.sampling.n)
            mean, factor = self.whitening(shaped)
            shaped = (shaped - mean) * factor
        else:
            rewards = torch.tensor([item.reward for item in items])
            shaped = shape_rewards(rewards, args.advantage_estimator, self.sampling.n)
        in_reward = self.initial_model is not None and not args.use_kl_loss
        for item, value in zip(items, shaped, strict=True):
            kl = kl_tokens(item.old_log_probs, item.ref_log_probs, args.kl_estimator) if in_reward else None
            item.advantages = token_advantages(value, len(item.response_ids), kl, self.kl_ctl.value, args.gamma)
        if args.advantage_estimator in WHITENED:
            mean, factor = self.whitening(torch.cat([item.advantages for item in items]))
            for item in items:
                item.advantages = (item.advantages - mean) * factor

    def whitening(self, values: torch.Tensor) -> tuple[float, float]:
        """Mean, and the factor that makes the variance 1, of the values ``(n,)`` of all ranks together."""
        values = values.double()
        sums = torch.stack([values.sum(), values.square().sum(), values.new_tensor(len(values))])
        sums = sums.to(self.strategy.device)
        dist.all_reduce(sums)
        return whiten(*sums.tolist())


def split_tags(batch: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Sequence[str]] | None]:
    """Prompts, images, references and labels of a batch, and its tags, if it has that fifth member."""
    return batch[:4], batch[4] if len(batch) > 4 else None


def forward(model: ActorAL, batch: MicroBatch) -> torch.Tensor:
    """Call an actor with the inputs that its modality takes.

    :return: Log-probs ``(batch, response width)``.
    """
    candidates = {"audio_values": batch.audio_values, "image_grid_thw": batch.image_grid_thw}
    taken = get_supported_parameters(model.modality)
    return model(
        batch.sequences,
        batch.response_mask.shape[1],
        attention_mask=batch.attention_mask,
        **{name: value for name, value in candidates.items() if name in taken},
    )
