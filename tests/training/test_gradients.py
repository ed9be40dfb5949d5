"""Is the step that training takes the gradient of the documented loss, for every method's flags?

A real training process runs with plain SGD and records its weights around each optimizer step. Here rewards,
advantages and loss are computed again with nothing of the runtime's: transformers' own forward, one unpadded sequence
at a time, in float32, autograd through the formulas of the papers. The two steps must agree within 1e-5.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.training import metrics_of, train_recorded
from transformers import (
    AudioFlamingo3ForConditionalGeneration,
    AutoTokenizer,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    WhisperFeatureExtractor,
)

from aqa.audio.decode import load_audio

SETUP = """
    --max_samples 8 --rollout_batch_size 4 --n_samples_per_prompt 4 --train_batch_size 16 --micro_train_batch_size 4
    --micro_rollout_batch_size 4 --generate_max_len 20 --temperature 1.7 --reward gradient_capture:vowels
    --engine_type hf --max_norm 0 --init_kl_coef 0.04 --no-report --actor_learning_rate 1.0
"""  # a step of plain SGD with that rate is the gradient itself
TWO_STEPS = "--train_batch_size 8 --actor_learning_rate 0.2"  # of half a rollout each, and not too far
K1 = "--no-use_kl_loss --kl_estimator k1 --gamma 0.95"
CUT = "--mask_truncated --generate_max_len 12"  # the model cuts some responses off, and ends others
LORA = "--lora_rank 2 --lora_alpha 4"
GSPO = "--use_gspo --eps_clip 0.3 --eps_clip_high 0.4"
TIS = "--rollout_correction tis --rollout_correction_limit 1.2"
MIS = "--rollout_correction mis --rollout_correction_limit 1.2"
GEO = "--rollout_correction geo --rollout_correction_floor 0.98 --rollout_correction_limit 1.02"
GAIN = "--reward gradient_capture:vowels+accuracy+audio_gain --reward_weights 1 1 0.5"
AUDIO = f"--audio_token_weights 0.7 {GAIN} --temperature 1"  # with which some responses are right
OVERLONG = "--overlong_buffer --overlong_buffer_len 10"
DR_GRPO = "--advantage_estimator dr_grpo --loss_agg_mode seq-mean-token-sum-norm"
GDPO = "--advantage_estimator gdpo --reward accuracy+format+gradient_capture:vowels --reward_weights 1 1 0.5"
FROZEN = "--freeze_prefix audio_tower --advantage_estimator rloo --kl_estimator k2 --max_norm 0.3"
CLIP_HIGHER = "--loss_agg_mode token-mean --eps_clip 0.01 --eps_clip_high 0.02"
REINFORCE_PP = "--advantage_estimator reinforce++ --loss_agg_mode seq-mean-token-sum"
# each flag of a method is in one case at least, with one process or two, on each way to shard; the first are the fast
ON_TWO = {
    "token-mean, clip-higher, two steps a rollout on two ranks": f"{CLIP_HIGHER} {TWO_STEPS} {CUT}",
    "GSPO, two epochs on ZeRO-3": f"{GSPO} --zero_stage 3 --max_epochs 2 --micro_train_batch_size 2 {TWO_STEPS}",
    "Dr. GRPO, truncated masked on FSDP2": f"--fsdp {DR_GRPO} {TWO_STEPS} {CUT} --actor_learning_rate 1.0",
    "gradient checkpointing on FSDP2": "--fsdp --gradient_checkpointing --micro_train_batch_size 2",
    "REINFORCE++, k1 in the reward, sum of tokens on ZeRO-0": f"{REINFORCE_PP} --zero_stage 0 {K1}",
    "GDPO with audio gain, truncated masked on ZeRO-3": f"--advantage_estimator gdpo --zero_stage 3 {AUDIO} {CUT}",
    "LoRA on ZeRO-3": f"{LORA} --zero_stage 3",
}
ON_ONE = {
    "divided groups, gradient checkpointing": "--micro_train_batch_size 2 --gradient_checkpointing",
    "LoRA, two epochs": f"{LORA} --max_epochs 2 --eps_clip 0.01",
    "frozen tower, RLOO, k2, overlong penalty, clipped gradient": f"{FROZEN} {OVERLONG}",
    "baseline, TIS, dynamic sampling": f"--advantage_estimator reinforce_baseline --dynamic_sampling {TIS}",
    "REINFORCE, MIS, k1 in the reward, two steps": f"--advantage_estimator reinforce {MIS} {K1} {TWO_STEPS}",
    "CISPO, geometric mask, two epochs": f"--use_cispo --eps_clip_high 0.02 {GEO} --max_epochs 2 {TWO_STEPS}",
    "GDPO, three rewards, overlong penalty": f"{GDPO} {OVERLONG}",
    "audio gain and token weights, two steps": f"{AUDIO} {TWO_STEPS} --actor_learning_rate 0.1",
    "two rollouts a step, truncated masked": f"--train_batch_size 32 {CUT}",
    "Qwen2.5-Omni, two steps": f"--eps_clip 0.01 {TWO_STEPS}",
    "Audio Flamingo, two steps": f"--eps_clip 0.01 {TWO_STEPS}",
}
CASES = ON_TWO | ON_ONE
TINY = {"Qwen2.5-Omni": "tiny_omni", "Audio Flamingo": "tiny_flamingo"}
MODELS = {  # transformers' own classes, and what they call the mask of valid frames
    "qwen2_audio": (Qwen2AudioForConditionalGeneration, "feature_attention_mask"),
    "qwen2_5_omni": (Qwen2_5OmniThinkerForConditionalGeneration, "feature_attention_mask"),
    "audioflamingo3": (AudioFlamingo3ForConditionalGeneration, "input_features_mask"),
}
FAST = [*list(ON_TWO)[:1], *list(ON_ONE)[:2]]


class Oracle:
    """The documented loss, by brute force.

    :param content: What the training process has recorded.
    :param pretrain: Its ``--pretrain``.
    :param scratch: Folder for weights on their way into transformers.
    """

    def __init__(self, content, pretrain, scratch):
        self.args, self.logit_bias = content["args"], content["logit_bias"]
        self.pretrain, self.scratch = pretrain, scratch
        self.model_class, self.mask = MODELS[json.loads((pretrain / "config.json").read_text())["model_type"]]
        self.extractor = WhisperFeatureExtractor.from_pretrained(pretrain)
        self.eos = AutoTokenizer.from_pretrained(pretrain).eos_token_id
        self.features = {}

    def load(self, recorded):
        """transformers' model with recorded weights; with LoRA the start's, plus what the adapters add."""
        weights, adapters = recorded
        self.scratch.mkdir(exist_ok=True)
        shutil.copy(self.pretrain / "config.json", self.scratch)
        if self.args["lora_rank"]:
            self.base = weights = getattr(self, "base", weights)  # B is 0 at the start
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, self.scratch / "model.safetensors", metadata={"format": "pt"})
        model = self.model_class.from_pretrained(self.scratch, dtype=torch.float32).eval()
        with torch.no_grad():
            for layer, (_, a, _, b) in self.pairs(adapters).items():
                model.get_parameter(layer + ".weight").add_(b @ a, alpha=self.lora_scale)
        return model

    @property
    def lora_scale(self):
        return self.args["lora_alpha"] / self.args["lora_rank"]

    @staticmethod
    def pairs(adapters):
        """By layer: names and values of A ``(rank, in)`` and B ``(out, rank)``."""
        a, b = ({n.partition(key)[0]: n for n in adapters if key in n} for key in (".lora_A", ".lora_B"))
        return {layer: (a[layer], adapters[a[layer]], b[layer], adapters[b[layer]]) for layer in a}

    def audio(self, path, silent):
        if (path, silent) not in self.features:
            wave, rate = load_audio(path) * (not silent), self.extractor.sampling_rate
            options = {"sampling_rate": rate, "padding": "max_length", "return_attention_mask": True}
            self.features[path, silent] = self.extractor(wave, return_tensors="pt", **options)
        return self.features[path, silent]

    def log_probs(self, model, item, silent=False):
        """Of the response's tokens, under the distribution that was sampled from ``(response length,)``."""
        ids = torch.cat([item["prompt_ids"], item["response_ids"]])[None]
        audio = self.audio(item["audio_path"], silent)
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=audio["input_features"],
            **{self.mask: audio["attention_mask"]},
        ).logits[0]
        bias = torch.zeros(logits.shape[1])
        for token, value in self.logit_bias.items():
            bias[token] = value
        length = len(item["response_ids"])
        all_log_probs = ((logits + bias) / self.args["temperature"]).log_softmax(-1)[-length - 1 : -1]
        return all_log_probs.gather(1, item["response_ids"][:, None])[:, 0]

    def reward(self, item):
        """The rule's, and DAPO's (2025) equation 13 for responses that come near the limit."""
        reward, most = item["reward_metrics"]["rule_reward"], self.args["generate_max_len"]
        buffer = self.args["overlong_buffer_len"]
        beyond = len(item["response_ids"]) - (most - buffer)
        if self.args["overlong_buffer"] and beyond > 0:
            reward -= min(beyond / buffer, 1) * self.args["overlong_buffer_penalty_factor"]
        if "audio_gain_reward" in self.args["reward_parts"]:  # what silence costs, in the geometric mean over tokens
            gain = max(0.0, 1 - (item["silent"] - item["old"]).mean().exp().item())
            gain *= item["reward_metrics"]["accuracy_reward"]
            assert item["reward_metrics"]["audio_gain_reward"] == pytest.approx(gain, abs=1e-5)
            reward += self.args["reward_parts"]["audio_gain_reward"] * gain
        assert item["reward"] == pytest.approx(reward, abs=1e-5)
        return reward

    def advantages(self, items, kl_coef):
        """One tensor a response, a value a token.

        DeepSeekMath (2024), section 4.1, with R1-AQA's 1e-4; Dr. GRPO (2025); RLOO: Ahmadian et al. (2024); REINFORCE++
        (2025): KL in the reward, returns, and whitening over all tokens, its baseline version after the group's mean.
        """
        n, estimator = self.args["n_samples_per_prompt"], self.args["advantage_estimator"]
        if estimator == "gdpo":  # GDPO (2026): each part by itself within the group, the sum over the batch
            names = {**self.args["reward_parts"], "overlong_penalty": 1.0}
            parts = torch.tensor([[item["reward_metrics"].get(name, 0.0) for name in names] for item in items]).double()
            groups = parts.reshape(-1, n, len(names))
            groups = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
            total = (groups.flatten(0, 1) * torch.tensor(list(names.values()))).sum(1)
            total = (total - total.mean()) / total.std(correction=0)
            return [score.expand(len(item["old"])) for score, item in zip(total, items, strict=True)]
        rewards = torch.tensor([self.reward(item) for item in items], dtype=torch.float64).reshape(-1, n)
        mean = rewards.mean(1, keepdim=True)
        scores = {
            "group_norm": (rewards - mean) / (rewards.std(1, keepdim=True) + 1e-4),
            "dr_grpo": rewards - mean,
            "rloo": rewards - torch.stack([(rewards.sum(1) - rewards[:, i]) / (n - 1) for i in range(n)], 1),
            "reinforce_baseline": rewards - mean,
            "reinforce++": rewards,
            "reinforce": rewards,
        }[estimator]
        found = []
        for item, score in zip(items, scores.flatten().tolist(), strict=True):
            kl = (item["old"] - item["reference"]).tolist()
            values, following = [], score
            for token in reversed(range(len(kl))):
                following -= 0.0 if self.args["use_kl_loss"] else kl_coef * kl[token]
                values.append(following)
                following *= self.args["gamma"]
            found.append(torch.tensor(values[::-1], dtype=torch.float64))
        if estimator.startswith("reinforce"):
            all_tokens = torch.cat(found)
            found = [(values - all_tokens.mean()) / all_tokens.std(correction=0) for values in found]
        return found

    def loss(self, model, item, kl_coef, token_count, response_count):
        """What one response adds to the loss of its optimizer step; see ``lightrft.models.loss`` for the papers."""
        args, advantage = self.args, item["advantage"].float()
        log_probs = self.log_probs(model, item)
        log_ratio = log_probs - item["old"]
        if args["use_gspo"]:  # one ratio a response: the geometric mean of its tokens' ratios
            log_ratio = log_ratio.mean().expand(len(log_probs))
        ratio, low = log_ratio.exp(), args["eps_clip"]
        high = low if args["eps_clip_high"] is None else args["eps_clip_high"]
        tokens = -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        if args["use_cispo"]:  # weights without a gradient, and nothing is left out
            tokens = -ratio.detach().clamp(max=1 + high) * advantage * log_probs
        off_policy, limit = (item["old"] - item["engine_log_probs"]).exp(), args["rollout_correction_limit"]
        if args["rollout_correction"] == "tis":
            tokens = tokens * off_policy.clamp(max=limit)
        elif args["rollout_correction"] == "mis":
            tokens = tokens * (off_policy.prod() if off_policy.prod() <= limit else 0.0)
        elif args["rollout_correction"] == "geo":
            tokens = tokens * float(args["rollout_correction_floor"] <= off_policy.log().mean().exp() <= limit)
        if args["audio_token_weights"]:  # tokens weigh by how much silence changes their probability
            heard, silent = item["old"].exp(), item["silent"].exp()
            change = 1 - torch.minimum(heard, silent) / torch.maximum(heard, silent) + 0.01
            tokens = tokens * (1 + args["audio_token_weights"] * (change / change.mean() - 1))
        if args["use_kl_loss"]:
            to_reference = item["reference"] - log_probs
            kl = {"k2": to_reference**2 / 2, "k3": to_reference.exp() - to_reference - 1}[args["kl_estimator"]]
            tokens = tokens + kl_coef * kl
        return {
            "seq-mean-token-mean": tokens.mean() / response_count,
            "token-mean": tokens.sum() / token_count,
            "seq-mean-token-sum": tokens.sum() / response_count,
            "seq-mean-token-sum-norm": tokens.sum() / args["generate_max_len"] / response_count,
        }[args["loss_agg_mode"]]

    def prepare(self, record, reference):
        """Set old and reference log-probs and the advantages of a rollout's items."""
        items = [item for rank in record["ranks"] for item in rank]
        model = self.load(record["weights"][0])
        for item in items:
            with torch.no_grad():
                item["old"], item["reference"] = self.log_probs(model, item), self.log_probs(reference, item)
                item["silent"] = self.log_probs(model, item, silent=True)
            ids = item["response_ids"]
            assert item["truncated"] == (len(ids) == self.args["generate_max_len"] and ids[-1] != self.eos)
        for item, advantages in zip(items, self.advantages(items, record["kl_coef"]), strict=True):
            torch.testing.assert_close(item["advantages"], advantages.float(), atol=2e-5, rtol=2e-5)
            item["advantage"] = advantages

    def steps(self, updates):
        """Weights before, weights after, items and KL weight of each optimizer step."""
        args, waiting = self.args, []
        for record in updates:
            ranks, weights = record["ranks"], iter(record["weights"])
            before = next(weights)
            share = min(args["train_batch_size"] // len(ranks), len(ranks[0]))  # of a rank, in this rollout
            for _ in range(args["max_epochs"]):
                for start in range(0, len(ranks[0]), share):
                    waiting += [item for rank in ranks for item in rank[start : start + share]]
                    if len(waiting) == args["train_batch_size"]:
                        after = next(weights)
                        yield before, after, waiting, record["kl_coef"]
                        before, waiting = after, []
            assert next(weights, None) is None

    def step(self, recorded, items, kl_coef):
        """What an optimizer step adds to each weight, or to each adapter, by live name."""
        model, tokens = self.load(recorded), sum(len(item["response_ids"]) for item in items)
        for item in items:
            if not (self.args["mask_truncated"] and item["truncated"]):  # it still counts in the two divisors
                self.loss(model, item, kl_coef, tokens, len(items)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if self.args["lora_rank"]:  # W = W0 + s B A
            whole, gradients = gradients, {}
            for layer, (name_a, a, name_b, b) in self.pairs(recorded[1]).items():
                gradients[name_a] = self.lora_scale * b.T @ whole[layer + ".weight"]
                gradients[name_b] = self.lora_scale * whole[layer + ".weight"] @ a.T
        frozen = ("embed_positions", "audio_tower" if self.args["freeze_prefix"] else "embed_positions")
        gradients = {n: g.double() for n, g in gradients.items() if not any(part in n for part in frozen)}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        factor = min(1.0, self.args["max_norm"] / norm) if self.args["max_norm"] else 1.0
        old = recorded[1] or {name: parameter.detach() for name, parameter in model.named_parameters()}
        return old, {
            name: -self.args["actor_learning_rate"] * factor * gradient for name, gradient in gradients.items()
        }

    def compare(self, before, after, items, kl_coef):
        """Size of an optimizer step, and its relative error; what does not train must not move."""
        old, changes = self.step(before, items, kl_coef)
        new = after[1] or dict(self.load(after).named_parameters())
        error = size = 0.0
        for name, was in old.items():
            moved = new[name].double() - was.double()
            # float32 weights hold a change no more finely than this
            rounded = (was + changes[name].float()).double() - was.double() if name in changes else None
            if rounded is None:
                assert not moved.any(), name
                continue
            error += (moved - rounded).square().sum().item()
            size += rounded.square().sum().item()
        return size**0.5, (error / size) ** 0.5


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_update_is_the_gradient_of_the_documented_loss(case, request, demo_parquet, tmp_path, capsys):
    processes, flags = 1 + (case in ON_TWO), CASES[case].split()
    model = request.getfixturevalue(TINY.get(case.partition(",")[0], "tiny_model"))
    train_recorded(model, demo_parquet, tmp_path, *SETUP.split(), *flags, processes=processes)
    content = torch.load(tmp_path / "updates.pt", weights_only=False)
    oracle, updates = Oracle(content, model, tmp_path / "scratch"), content["updates"]
    reference = oracle.load(updates[0]["weights"][0])
    assert len(updates) == 2  # in the second one the policy differs from the reference, so that the KL has a gradient
    metrics = metrics_of(tmp_path / "run")
    for record, metric in zip(updates, metrics, strict=True):
        oracle.prepare(record, reference)
        sampled = torch.cat([item["old"] for rank in record["ranks"] for item in rank])
        assert metric["train/entropy"] == pytest.approx(-sampled.mean().item(), rel=1e-5)
    # the case has what it is there for
    assert not {"--eps_clip", "--use_cispo"} & set(flags) or any(metric["train/clip_fraction"] for metric in metrics)
    assert "--mask_truncated" not in flags or any(0 < metric["rollout/truncated_fraction"] < 1 for metric in metrics)
    assert "--rollout_correction" not in flags or any(metric["train/correction_limited"] for metric in metrics)
    assert "--audio_token_weights" not in flags or any(metric["rollout/audio_gain_reward"] for metric in metrics)
    for step in oracle.steps(updates):
        size, relative = oracle.compare(*step)
        with capsys.disabled():
            print(f"\n{case}: |step| {size:.4f}, relative error {relative:.1e}")
        assert relative < 1e-5
