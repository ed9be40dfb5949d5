#!/usr/bin/env python3
"""GRPO the way R1-AQA's trainer does it, on plain transformers: the baseline of ``bench_step.py``, which runs this.

Written from a description of the scheme: each of a prompt's responses is a sequence with its own copy of the clip's
features, padded to 30 s, and with its own pass through the audio tower, in ``generate``, in the policy and in the
reference model; logits are made for every position. Model, rows and their order, sampling distribution, rewards, loss,
reference model and AdamW are those of ``train_colocate.py``; afterwards that is checked on the last micro-batch:
log-probs, loss and gradient of both computations (``check.json``).
"""

import argparse
import copy
import json
import time
from typing import Any

import torch
from harness import make_step_parser

MAX_NORM, BETAS = 1.0, (0.9, 0.95)


def sample(model: Any, processor: Any, rows: list[Any], n: int, max_new_tokens: int) -> dict[str, Any]:
    """A micro-batch of responses.

    :param processor: Qwen2-Audio processor.
    :param rows: Prompts: text, (waveform, rate), reference, label.
    :param n: Responses a prompt.
    :return: What :func:`log_probs` takes: sequences ``(batch, length)``, the response mask ``(batch, response width)``
        and each sequence's own features ``(batch, n_mels, 3000)``.
    """
    from transformers import GenerationConfig

    tokenizer = processor.tokenizer
    clips, rate = [row[1][0] for row in rows], rows[0][1][1]
    inputs = processor(
        text=[row[0] for row in rows], audio=clips, sampling_rate=rate, padding=True, return_tensors="pt"
    )
    audio_token = tokenizer.convert_tokens_to_ids(processor.audio_token)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=n,
        suppress_tokens=[audio_token],  # as in train_colocate.py: sampled, it would stand for audio that is not there
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad():
        sequences = model.generate(**inputs, generation_config=config)
    each = {name: value.repeat_interleave(n, 0) for name, value in inputs.items()}
    response = sequences[:, each["input_ids"].shape[1] :]
    ended = (response == tokenizer.eos_token_id).long()
    mask = (ended.cumsum(-1) - ended) == 0  # up to the first end of turn
    return {
        "sequences": sequences,
        "attention_mask": torch.cat([each["attention_mask"], mask.long()], 1),
        "mask": mask,
        "input_features": each["input_features"],
        "feature_attention_mask": each["feature_attention_mask"],
        "suppressed": audio_token,
    }


def log_probs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Log-probs of the response tokens, from logits of all positions.

    :param batch: From :func:`sample`.
    :return: ``(batch, response width)`` float32.
    """
    logits = model(
        input_ids=batch["sequences"],
        attention_mask=batch["attention_mask"],
        input_features=batch["input_features"],
        feature_attention_mask=batch["feature_attention_mask"],
        use_cache=False,
    ).logits[:, :-1]
    logits[..., batch["suppressed"]] = float("-inf")  # the distribution sampled from
    chosen = logits.log_softmax(-1).gather(-1, batch["sequences"][:, 1:, None])[..., 0]
    return chosen[:, -batch["mask"].shape[1] :]


def grpo_loss(
    values: torch.Tensor, reference: torch.Tensor, advantages: torch.Tensor, mask: Any, kl_coef: float
) -> Any:
    """GRPO's loss of an on-policy micro-batch, and the mean KL of its tokens.

    :param values: Log-probs of the policy ``(batch, width)``.
    :param advantages: ``(batch,)``.
    :param mask: 1 at response tokens.
    :param kl_coef: Weight of the KL (k3).
    """
    kl = torch.exp(reference - values) - (reference - values) - 1
    ratio = torch.exp(values - values.detach())
    tokens = -(ratio * advantages[:, None] - kl_coef * kl)
    return ((tokens * mask).sum(1) / mask.sum(1)).mean(), float((kl.detach() * mask).sum() / mask.sum())


def compare(model: Any, ref: Any, batch: dict[str, Any], kl_coef: float, n: int) -> dict[str, float]:
    """Log-probs, loss and gradient of one micro-batch, here and in the runtime, with advantages from -1 to 1.

    :param batch: From :func:`sample`.
    :param kl_coef: Weight of the KL.
    :param n: Responses a prompt.
    :return: Largest differences; the gradient's relative to its norm.
    """
    from aqa.hosts.targets import patch_actor_for_audio
    from aqa.patches.experience_maker import BANNED
    from aqa.patches.slots import pack_clip
    from lightrft.models.actor_al import ActorAL
    from lightrft.models.loss import aggregate, kl_tokens, policy_loss_tokens
    from lightrft.trainer.fast_exp_maker import forward
    from lightrft.trainer.replay_buffer import Experience, make_micro_batch

    mask, width = batch["mask"], batch["mask"].shape[1]
    items = []
    for i, sequence in enumerate(batch["sequences"]):
        prompt = sequence[:-width][batch["attention_mask"][i, :-width].bool()]
        frames = int(batch["feature_attention_mask"][i].sum())
        rows = items[-1].clips if i % n else [pack_clip(batch["input_features"][i], frames)]
        response = sequence[-width:][mask[i]]
        items.append(Experience("", prompt, response, torch.zeros(len(response)), False, rows, "", ""))
    advantages = torch.linspace(-1, 1, len(items))  # those of a group of equal rewards would leave no gradient
    model.zero_grad()
    theirs, theirs_ref = log_probs(model, batch), log_probs(ref, batch).detach()
    loss, _ = grpo_loss(theirs, theirs_ref, advantages, mask, kl_coef)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    actors = [ActorAL(model), ActorAL(ref)]
    for actor in actors:
        patch_actor_for_audio(actor)
        actor.logit_bias = {batch["suppressed"]: BANNED}
    micro = make_micro_batch(items, 0, torch.device("cpu"))
    ours, ours_ref = forward(actors[0], micro), forward(actors[1], micro).detach()
    shown = micro.response_mask
    tokens, _ = policy_loss_tokens(ours, ours.detach(), advantages[:, None].expand_as(ours), 0.2)
    ours_loss = aggregate(tokens, shown, "seq-mean-token-mean")
    ours_loss = ours_loss + kl_coef * aggregate(kl_tokens(ours, ours_ref, "k3"), shown, "seq-mean-token-mean")
    ours_loss.backward()
    square = sum(
        float((p.grad - gradient[name]).square().sum()) for name, p in model.named_parameters() if name in gradient
    )
    norm = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
    gap = (ours[shown] - theirs[mask]).abs().max()
    return {
        "log_probs": float(gap.detach()),
        "loss": abs(float((ours_loss - loss).detach())),
        "gradient": square**0.5 / norm,
        "gradient_norm": norm,
    }


def load(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Model, processor, optimizer, and the rows in batches, as ``train_colocate.py`` would load them."""
    from audio_dataset import AudioPromptDataset
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    from lightrft.utils import blending_datasets

    processor = AutoProcessor.from_pretrained(args.pretrain)
    processor.tokenizer.padding_side = "left"
    model = Qwen2AudioForConditionalGeneration.from_pretrained(args.pretrain, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.actor_learning_rate, betas=BETAS, weight_decay=0.0)
    keys = {"input_key": "prompt", "images_key": "audio_path", "reference_key": "reference", "label_key": "label"}
    rows = blending_datasets(str(args.prompt_data), "1.0", return_eval=False)
    columns = argparse.Namespace(args=argparse.Namespace(**keys))
    dataset = AudioPromptDataset(rows, processor.tokenizer, processor, 512, columns)
    sampler = DistributedSampler(dataset, 1, 0, shuffle=True, seed=args.seed)
    loader = DataLoader(dataset, args.rollout_batch_size, sampler=sampler, collate_fn=list, drop_last=True)
    return model, processor, optimizer, loader


def advantages_of(rows: list[Any], batch: dict[str, Any], n: int, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the responses, and each one's distance to its group's mean, by the group's deviation.

    :param rows: Prompts, with ``n`` responses each in ``batch``.
    """
    from aqa.rewards.r1_aqa import reward_fn

    rewards, _ = reward_fn(
        model_reward_list=[],
        labels=[row[3] for row in rows for _ in range(n)],
        queries=tokenizer.batch_decode(batch["sequences"]),
        refs=[row[2] for row in rows for _ in range(n)],
        label_map={},
    )
    groups = rewards.reshape(-1, n)
    return rewards, ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def main() -> None:
    """Train some steps, write their metrics, compare with the runtime (``check.json``)."""
    parser = make_step_parser(__doc__)
    parser.add_argument("--init_kl_coef", type=float, default=0.04, help="weight of the KL to the start model")
    parser.add_argument("--seed", type=int, default=42, help="order of the rows, sampling")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, processor, optimizer, loader = load(args)
    ref = copy.deepcopy(model).eval().requires_grad_(False)
    n, prompts = args.n_samples_per_prompt, args.micro_train_batch_size // args.n_samples_per_prompt
    micro_batches = args.rollout_batch_size // prompts
    args.save_path.mkdir(parents=True, exist_ok=True)
    with (args.save_path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step, rows in enumerate(loader, 1):
            times = dict.fromkeys(("rollout", "logprobs", "train", "sync"), 0.0)
            sums = dict.fromkeys(("rollout/reward", "rollout/response_length", "train/loss", "train/kl"), 0.0)
            started = time.perf_counter()
            for i in range(micro_batches):
                part = rows[i * prompts : (i + 1) * prompts]
                clock = time.perf_counter()
                model.eval()
                batch = sample(model, processor, part, n, args.generate_max_len)
                rewards, advantages = advantages_of(part, batch, n, processor.tokenizer)
                clock = _lap(times, "rollout", clock)
                with torch.no_grad():
                    reference = log_probs(ref, batch)
                clock = _lap(times, "logprobs", clock)
                model.train()
                loss, kl = grpo_loss(log_probs(model, batch), reference, advantages, batch["mask"], args.init_kl_coef)
                (loss / micro_batches).backward()
                if i == micro_batches - 1:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                    optimizer.step()
                    optimizer.zero_grad()
                _lap(times, "train", clock)
                values = (rewards.mean(), batch["mask"].sum(1).float().mean(), loss.detach(), kl)
                for name, value in zip(sums, values, strict=True):
                    sums[name] += float(value) / micro_batches
            times["step"] = time.perf_counter() - started
            record = {"step": step, **sums, **{f"time/{name}": value for name, value in times.items()}}
            file.write(json.dumps(record) + "\n")
            file.flush()
    gaps = compare(model, ref, batch, args.init_kl_coef, n)
    (args.save_path / "check.json").write_text(json.dumps(gaps), encoding="utf-8")


def _lap(times: dict[str, float], name: str, since: float) -> float:
    now = time.perf_counter()
    times[name] += now - since
    return now


if __name__ == "__main__":
    main()
