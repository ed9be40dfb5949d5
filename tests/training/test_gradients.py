"""Is the step that training takes the gradient of the documented loss?

A real training process runs with plain SGD and records its weights around each optimizer step. Here the loss is
computed again with nothing of the runtime's: transformers' own forward, one unpadded sequence at a time, in float32,
autograd through the formulas of the papers. The two steps must agree within 1e-5.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLE, ROOT, child_environment
from safetensors.torch import save_file
from support.gradient_capture import LEARNING_RATE
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from aqa.audio.decode import load_audio

SETUP = (
    *("--max_samples", 8, "--rollout_batch_size", 4, "--n_samples_per_prompt", 4, "--train_batch_size", 16),
    *("--micro_train_batch_size", 4, "--micro_rollout_batch_size", 4, "--generate_max_len", 20, "--temperature", 1.7),
    *("--reward", "gradient_capture:vowels", "--engine_type", "hf", "--max_norm", 0, "--init_kl_coef", 0.04),
    *("--use_kl_loss", "--no-report"),
)
# processes, flags; the first two between them train on one rank and on two, and on groups that micro-batches divide
CASES = {
    "token-mean on two ranks": (2, ("--loss_agg_mode", "token-mean")),
    "divided groups and gradient checkpointing": (1, ("--micro_train_batch_size", 2, "--gradient_checkpointing")),
    "frozen tower": (1, ("--freeze_prefix", "audio_tower")),
    "GSPO, ZeRO-3, two epochs": (2, ("--use_gspo", "--zero_stage", 3, "--max_epochs", 2)),
    "Dr. GRPO on FSDP2": (
        2,
        ("--fsdp", "--advantage_estimator", "dr_grpo", "--loss_agg_mode", "seq-mean-token-sum-norm"),
    ),
    "gradient checkpointing on FSDP2": (2, ("--fsdp", "--gradient_checkpointing", "--micro_train_batch_size", 2)),
}
FAST = list(CASES)[:2]


class Oracle:
    """The documented loss, by brute force.

    :param content: What the training process has recorded.
    :param pretrain: Its ``--pretrain``.
    :param scratch: Folder for weights on their way into transformers.
    """

    def __init__(self, content, pretrain, scratch):
        self.args, self.logit_bias = content["args"], content["logit_bias"]
        self.pretrain, self.scratch = pretrain, scratch
        self.extractor = AutoProcessor.from_pretrained(pretrain).feature_extractor
        self.features = {}

    def load(self, weights):
        self.scratch.mkdir(exist_ok=True)
        shutil.copy(self.pretrain / "config.json", self.scratch)
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, self.scratch / "model.safetensors", metadata={"format": "pt"})
        return Qwen2AudioForConditionalGeneration.from_pretrained(self.scratch, dtype=torch.float32).eval()

    def audio(self, path):
        if path not in self.features:
            wave, rate = load_audio(path), self.extractor.sampling_rate
            options = {"sampling_rate": rate, "padding": "max_length", "return_attention_mask": True}
            self.features[path] = self.extractor(wave, return_tensors="pt", **options)
        return self.features[path]

    def log_probs(self, model, item):
        """Of the response's tokens, under the distribution that was sampled from ``(response length,)``."""
        ids = torch.cat([item["prompt_ids"], item["response_ids"]])[None]
        audio = self.audio(item["audio_path"])
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=audio["input_features"],
            feature_attention_mask=audio["attention_mask"],
        ).logits[0]
        bias = torch.zeros(logits.shape[1])
        for token, value in self.logit_bias.items():
            bias[token] = value
        length = len(item["response_ids"])
        all_log_probs = ((logits + bias) / self.args["temperature"]).log_softmax(-1)[-length - 1 : -1]
        return all_log_probs.gather(1, item["response_ids"][:, None])[:, 0]

    def advantages(self, items):
        """DeepSeekMath (2024), section 4.1; Dr. GRPO leaves out the division."""
        n = self.args["n_samples_per_prompt"]
        rewards = torch.tensor([item["reward"] for item in items], dtype=torch.float64).reshape(-1, n)
        centred = rewards - rewards.mean(1, keepdim=True)
        if self.args["advantage_estimator"] == "group_norm":
            centred = centred / (rewards.std(1, keepdim=True) + 1e-4)
        return centred.flatten().tolist()

    def loss(self, model, item, advantage, kl_coef, token_count, response_count):
        """What one response adds to the batch's loss."""
        log_probs = self.log_probs(model, item)
        log_ratio = log_probs - item["old"]
        if self.args["use_gspo"]:  # one ratio a response: the geometric mean of its tokens' ratios
            log_ratio = log_ratio.mean().expand(len(log_probs))
        ratio, eps = log_ratio.exp(), self.args["eps_clip"]
        tokens = -torch.min(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)
        to_reference = item["reference"] - log_probs
        tokens = tokens + kl_coef * (to_reference.exp() - to_reference - 1)  # k3
        return {
            "seq-mean-token-mean": tokens.mean() / response_count,
            "token-mean": tokens.sum() / token_count,
            "seq-mean-token-sum-norm": tokens.sum() / self.args["generate_max_len"] / response_count,
        }[self.args["loss_agg_mode"]]

    def prepare(self, record, reference):
        """Set old and reference log-probs and the advantages.

        :return: The items of all ranks.
        """
        items = [item for rank in record["ranks"] for item in rank]
        model = self.load(record["weights"][0])
        for item, advantage in zip(items, self.advantages(items), strict=True):
            with torch.no_grad():
                item["old"], item["reference"] = self.log_probs(model, item), self.log_probs(reference, item)
            assert item["advantages"].tolist() == pytest.approx([advantage] * len(item["response_ids"]), abs=1e-5)
            item["advantage"] = advantage
        return items

    def step(self, weights, items, kl_coef):
        """What one optimizer step adds to the weights, by live name, and the model that has the weights."""
        model, tokens = self.load(weights), sum(len(item["response_ids"]) for item in items)
        for item in items:
            self.loss(model, item, item["advantage"], kl_coef, tokens, len(items)).backward()
        old = {name: parameter.detach() for name, parameter in model.named_parameters()}
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        new = {name: w if gradients[name] is None else w - LEARNING_RATE * gradients[name] for name, w in old.items()}
        return {name: new[name].double() - old[name].double() for name in old}, old


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_update_is_the_gradient_of_the_documented_loss(case, tiny_model, demo_parquet, tmp_path, capsys):
    processes, flags = CASES[case]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += [ROOT / "tests" / "support" / "gradient_capture.py", tmp_path / "updates.pt"]
    command += [EXAMPLE / "train_colocate.py", "--pretrain", tiny_model, "--prompt_data", demo_parquet]
    command = [*map(str, (*command, "--save_path", tmp_path / "run", *SETUP, *flags))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=child_environment())
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    content = torch.load(tmp_path / "updates.pt", weights_only=False)
    oracle, updates = Oracle(content, tiny_model, tmp_path / "scratch"), content["updates"]
    reference = oracle.load(updates[0]["weights"][0])
    assert len(updates) == 2  # in the second one the policy differs from the reference, so that the KL has a gradient
    for record in updates:
        items = oracle.prepare(record, reference)
        assert len(record["weights"]) == 1 + content["args"]["max_epochs"]
        for before, after in itertools.pairwise(record["weights"]):
            expected, old = oracle.step(before, items, record["kl_coef"])
            new = dict(oracle.load(after).named_parameters())
            error = size = 0.0
            for name, change in expected.items():
                if "embed_positions" in name or (content["args"]["freeze_prefix"] and "audio_tower" in name):
                    assert torch.equal(old[name], new[name]), name
                    continue
                error += (new[name].double() - old[name].double() - change).square().sum().item()
                size += change.square().sum().item()
            relative = (error / size) ** 0.5
            with capsys.disabled():
                print(f"\n{case}: |step| {size**0.5:.4f}, relative error {relative:.1e}")
            assert relative < 1e-5
