"""Every metric that a run writes: unit, meaning, and what to do when its curve looks wrong.

``python examples/r1_aqa/aqa/report/metrics.py`` prints the table, which a test compares with docs/metrics.md.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Metric(NamedTuple):
    """One metric."""

    title: str  # short name, over its curve
    unit: str  # empty for a plain number
    meaning: str
    advice: str  # what to do when its curve looks wrong


METRICS = {
    "rollout/reward": Metric(
        "Reward",
        "0 to 2",
        "mean reward of the step's responses; accuracy + format unless --reward says otherwise",
        "Flat while accuracy is low: look at groups_without_spread; raise the learning rate. Falls: KL and learning "
        "rate are the first to look at.",
    ),
    "rollout/accuracy_reward": Metric(
        "Sampled training accuracy",
        "share",
        "sampled responses that are right by --reward's rule (R1-AQA's for a reward of your own)",
        "Flat at chance: does the model hear? Listen to clips, evaluate with --silent_audio. High at once: the answer "
        "may stand in the question.",
    ),
    "rollout/format_reward": Metric(
        "Format",
        "share",
        "responses in the form that was asked for",
        "Near 0: read responses; the prompt's form and the model's do not meet. Falls late: raise --init_kl_coef.",
    ),
    "rollout/rule_reward": Metric(
        "Reward by rule",
        "0 to 2",
        "the reward before penalties (rollout/reward without --overlong_buffer) and without audio_gain",
        "As rollout/reward.",
    ),
    "rollout/reward_std": Metric(
        "Spread of rewards",
        "reward",
        "standard deviation over all responses of the step",
        "0: the reward cannot tell answers apart, or there is nothing left to learn.",
    ),
    "rollout/groups_without_spread": Metric(
        "Groups without spread",
        "share",
        "groups whose responses all earned the same; they teach nothing",
        "Near 1 from the start: questions too hard or too easy, or temperature too low. More responses a prompt find a "
        "right one (--n_samples_per_prompt); --dynamic_sampling replaces such groups.",
    ),
    "rollout/response_length": Metric(
        "Response length",
        "tokens",
        "mean length of the responses, end of turn included",
        "Grows without accuracy: responses ramble; --overlong_buffer or --reward length_aware. Collapses: read some.",
    ),
    "rollout/truncated_fraction": Metric(
        "Cut off",
        "share",
        "responses that hit --generate_max_len",
        "Above some per cent: raise --generate_max_len; these responses mostly earn nothing.",
    ),
    "rollout/logprob_gap_mean": Metric(
        "Log-prob gap, mean",
        "nats",
        "mean of |log p of the engine - log p of the trainer| over the sampled tokens; avg gap in a step's line",
        "Above 1e-3 in fp32 or 0.05 in bf16: the engine has other weights, audio or sampling than the trainer; do not "
        "trust the run.",
    ),
    "rollout/logprob_gap_max": Metric(
        "Log-prob gap, largest",
        "nats",
        "the largest of these differences in the step",
        "Single peaks in bf16 are rounding; with a raised mean as logprob_gap_mean.",
    ),
    "rollout/overlong_penalty": Metric(
        "Overlong penalty",
        "reward",
        "mean of what responses near the token limit lose (--overlong_buffer)",
        "Stays far below 0: the penalty does not shorten responses; raise its factor or the limit.",
    ),
    "rollout/replaced": Metric(
        "Replaced groups",
        "share",
        "groups that --dynamic_sampling put in place of others",
        "Near 1: almost no prompt teaches; other data. With groups_without_spread still high: more rounds.",
    ),
    "train/policy_loss": Metric(
        "Policy loss",
        "",
        "mean over micro-batches; near 0 by construction where a rollout has one optimizer step",
        "Not a measure of progress: look at reward. Far from 0 with one optimizer step a rollout: report it.",
    ),
    "train/entropy": Metric(
        "Entropy",
        "nats a token",
        "estimated as minus the mean log p of the sampled tokens under the policy that sampled, at --temperature",
        "Near 0: the responses of a group are alike and teach nothing; a lower learning rate, higher --temperature or "
        "--eps_clip_high. Rises steadily: the policy drifts into noise; lower the learning rate.",
    ),
    "train/kl": Metric(
        "KL to the start model",
        "nats a token",
        "mean estimate by --kl_estimator over the tokens that are trained on",
        "Runs away (above 1): lower the learning rate or raise --init_kl_coef. Stays 0: nothing is learned, or the "
        "learning rate is too low to see.",
    ),
    "train/clip_fraction": Metric(
        "Clipped",
        "share",
        "tokens at which the ratio was clipped (--use_cispo: their weight); 0 where a rollout has one optimizer step",
        "Above 0.2 with several optimizer steps a rollout: fewer of them (--train_batch_size, --max_epochs), or a "
        "lower learning rate.",
    ),
    "train/correction_weight": Metric(
        "Correction weight",
        "",
        "mean weight of --rollout_correction",
        "Far from 1: engine and trainer differ; see the log-prob gap.",
    ),
    "train/correction_limited": Metric(
        "Correction limited",
        "share",
        "tokens whose weight was at its bound, or 0 because their response is out of bounds",
        "Above some per cent: engine and trainer differ; see the log-prob gap.",
    ),
    "train/heard": Metric(
        "Heard",
        "share",
        "mean change of a token's probability by silence, of the larger one (--audio_token_weights)",
        "Near 0: no token depends on the sound, and all weigh the same; does the model hear? See --eval_silent.",
    ),
    "train/not_finite": Metric(
        "Not finite",
        "count",
        "micro-batches, or gradients, of the step that were not finite and were left out",
        "Ever above 0: find out why; --bf16, learning rate and damaged clips come first.",
    ),
    "train/grad_norm": Metric(
        "Gradient norm",
        "",
        "before clipping, the largest of the step's optimizer steps; null in a step without one",
        "Peaks above --max_norm are clipped. Grows steadily: lower the learning rate. 0: all groups without spread.",
    ),
    "train/sft_loss": Metric(
        "Warm start's loss",
        "nats a token",
        "cross-entropy of the given responses (--sft_steps); these steps count up to -1, before GRPO's step 1",
        "Does not fall: raise --sft_learning_rate. Near 0: fewer steps; GRPO needs responses that differ.",
    ),
    "train/lr": Metric(
        "Learning rate",
        "",
        "of the step's first optimizer step",
        "Not the shape you wanted: --lr_warmup_ratio, and --num_episodes or --max_steps, which sets its end.",
    ),
    "samples_per_second": Metric(
        "Responses a second",
        "1/s",
        "responses of all ranks by the step's time",
        "Falls: see which of the times grows.",
    ),
    "time/data": Metric(
        "Waiting for data",
        "s",
        "until the batch was decoded",
        "More than some per cent of the step: slow disk, or --audio_cache_mib too small.",
    ),
    "time/rollout": Metric(
        "Rollout",
        "s",
        "sampling and rewards; the slowest rank",
        "The first step includes warm-up. Grows with response_length. Else --engine_mem_util, --engine_tp_size.",
    ),
    "time/logprobs": Metric(
        "Log-probs",
        "s",
        "forward passes of reference and, where needed, old policy",
        "Long: raise --micro_rollout_batch_size.",
    ),
    "time/silence": Metric(
        "Log-probs in silence",
        "s",
        "the policy's forward pass without the sound, which --audio_token_weights and the reward audio_gain need",
        "As time/logprobs.",
    ),
    "time/train": Metric(
        "Training",
        "s",
        "forward, backward and optimizer step",
        "Long: raise --micro_train_batch_size; --freeze_prefix; no --gradient_checkpointing if memory allows.",
    ),
    "time/sync": Metric(
        "Weight sync",
        "s",
        "new weights to the engine; 0 in a step without optimizer step",
        "Long: --freeze_prefix or --lora_rank send less.",
    ),
    "time/step": Metric(
        "Whole step",
        "s",
        "all phases of a step; not its evaluation",
        "Grows over hours at equal lengths: report it; health and memory first.",
    ),
    "time/eval": Metric(
        "Evaluation",
        "s",
        "evaluation of the step; not a part of time/step",
        "Long: fewer --max_eval_samples, or --eval_steps farther apart.",
    ),
    "health/anomalies": Metric(
        "Anomalies",
        "count",
        "signs so far that something is wrong; each kind is explained once on the screen",
        "Rises: read the warning in the output; --on_anomaly stop or skip acts on it.",
    ),
    "health/skipped_steps": Metric(
        "Skipped steps",
        "count",
        "optimizer steps left out so far (--on_anomaly skip)",
        "Rises often: the run hardly trains; find the cause of the anomalies.",
    ),
    "health/failed_saves": Metric(
        "Failed saves",
        "count",
        "checkpoints so far that could not be written",
        "Above 0: the disk is full or not writable; what was saved before is whole.",
    ),
    "eval/reward": Metric(
        "Evaluation reward",
        "0 to 2",
        "mean reward of greedy answers to the evaluation data, without audio_gain",
        "Falls while rollout/reward rises: it learns the training data by heart; stop earlier.",
    ),
    "eval/accuracy_reward": Metric(
        "Evaluation accuracy",
        "share",
        "greedy answers to the evaluation data that are right",
        "As eval/reward; the one to choose a checkpoint by.",
    ),
    "eval/format_reward": Metric(
        "Evaluation format", "share", "greedy answers in the form that was asked for", "As rollout/format_reward."
    ),
    "eval/rule_reward": Metric("Evaluation reward by rule", "0 to 2", "the same as eval/reward", "As eval/reward."),
    "eval/response_length": Metric(
        "Evaluation length",
        "tokens",
        "mean length of greedy answers to the evaluation data",
        "As rollout/response_length.",
    ),
    "eval/truncated_fraction": Metric(
        "Evaluation cut off", "share", "greedy answers that hit --generate_max_len", "As rollout/truncated_fraction."
    ),
    "eval/accuracy_reward_silent": Metric(
        "Evaluation accuracy in silence",
        "share",
        "right answers to the same questions with silence in place of the clips (--eval_silent)",
        "As high as eval/accuracy_reward: the model does not listen, or the questions do not need it.",
    ),
    "eval/collapsed": Metric(
        "Collapsed question types",
        "count",
        "question types with at least 10 answers of which 95 % are alike, while that is right for at most 80 %",
        "Above 0: the model answers these without listening; the warning names them, --eval_silent confirms it.",
    ),
    "eval/best": Metric(
        "Best so far", "", "the best value of the metric that --keep_best compares", "Flat for long: stop earlier."
    ),
    "eval/best_step": Metric("Step of the best", "step", "when that was; its model is in best/", "As eval/best."),
}
# metrics whose names depend on the data; a part in <> stands for any text
PATTERNS = {
    "rollout/share/<kind>/<value>": Metric(
        "Share of a kind",
        "share",
        "responses to rows of one source, data set, question type or label, where rows differ in it",
        "Not the mixture you wanted: --prompt_data_probs.",
    ),
    "rollout/<metric>/<kind>/<value>": Metric(
        "The same of a kind", "as the metric's", "a metric of those rows alone", "As the metric; compare kinds."
    ),
    "rollout/<part>_reward": Metric(
        "Part of the reward", "as paid", "a part of --reward a+b, before its weight", "Rises alone: weigh it less."
    ),
    "eval/<part>_reward": Metric("Evaluation part", "as paid", "the same for the evaluation data", "As the part."),
    "eval/<metric>/<kind>/<value>": Metric(
        "Evaluation of a kind", "as the metric's", "the same for the evaluation data", "As the metric; compare kinds."
    ),
    "eval/<file>/<task>": Metric(
        "Benchmark",
        "share",
        "right by the official rule: accuracy for the whole --eval_benchmark file, and by task; an answer that MMSU's "
        "script cannot read and leaves out is wrong here; collapsed is as eval/collapsed; with --eval_silent "
        "<file>_silent is the same in silence",
        "Falls while rollout/accuracy_reward rises: it learns the training data by heart; --keep_best keeps the best.",
    ),
}


def known(name: str) -> bool:
    """Whether the table has a metric of that name, or a pattern for it."""
    patterns = (re.sub(r"<[a-z]+>", "[^/]+", pattern) for pattern in PATTERNS)
    return name in METRICS or any(re.fullmatch(pattern, name) for pattern in patterns)


def table() -> str:
    """The table in Markdown."""
    lines = ["| name | unit | what it is | when the curve looks wrong |", "|---|---|---|---|"]
    rows = METRICS | PATTERNS
    lines += [f"| `{name}` | {m.unit} | {escape(m.meaning)} | {escape(m.advice)} |" for name, m in rows.items()]
    return "\n".join(lines)


def escape(text: str) -> str:
    """A line of text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(table())
