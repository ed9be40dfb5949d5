"""Rollouts with transformers' generate, on the trained weights themselves: for machines without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from .base import RolloutOutput, Sampling


class HFEngine:
    """Samples from the actor itself, so that its weights are always the trainer's.

    :param processor: Qwen2-Audio processor.
    :param policy: Returns a context manager that yields the unwrapped policy, with its parameters gathered.
    :param batch_size: Sequences generated at once.
    """

    def __init__(
        self, processor: Any, policy: Callable[[], AbstractContextManager[torch.nn.Module]], batch_size: int = 64
    ) -> None:
        self.processor = processor
        self.policy = policy
        self.batch_size = batch_size

    @torch.no_grad()
    def generate(self, prompts: list[Any], sampling: Sequence[Sampling]) -> list[RolloutOutput]:
        """See :class:`~lightrft.engines.base.RolloutEngine`."""
        rows = [(p, s, i) for p, s in zip(prompts, sampling, strict=True) for i in range(s.n)]
        outputs = []
        with self.policy() as model:
            training = model.training
            model.eval()
            try:
                for start in range(0, len(rows), self.batch_size):
                    outputs += self._batch(model, rows[start : start + self.batch_size])
            finally:
                model.train(training)
        return outputs

    def _batch(self, model: torch.nn.Module, rows: list[tuple[Any, Sampling, int]]) -> list[RolloutOutput]:
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        first = rows[0][1]
        if isinstance(rows[0][0], dict):
            texts = [row["prompt"] for row, _, _ in rows]
            clips = [wave for row, _, _ in rows for wave, _ in row.get("multi_modal_data", {}).get("audio", [])]
            rate = self.processor.feature_extractor.sampling_rate
            audio = {"audio": clips, "sampling_rate": rate} if clips else {}
            inputs = self.processor(text=texts, return_tensors="pt", padding=True, **audio)
        else:
            inputs = tokenizer.pad({"input_ids": [list(row) for row, _, _ in rows]}, return_tensors="pt")
        inputs = inputs.to(model.device)
        sampler = _Sampler([(s, i) for _, s, i in rows], model.device)
        config = GenerationConfig(
            max_new_tokens=first.max_tokens,
            do_sample=False,  # the sampler below draws; generate takes its best
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        sequences = model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([sampler]))
        width = inputs["input_ids"].shape[1]
        log_probs = sampler.log_probs(sequences[:, width:])
        outputs = []
        for i in range(len(rows)):
            response = sequences[i, width:].tolist()
            ended = tokenizer.eos_token_id in response
            length = response.index(tokenizer.eos_token_id) + 1 if ended else len(response)
            prompt = inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist()
            outputs.append(RolloutOutput(prompt, response[:length], log_probs[i, :length].cpu(), not ended))
        return outputs

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Nothing to do: the weights are shared."""

    def sleep(self) -> None:
        """Nothing to free."""

    def wake_up(self) -> None:
        """Nothing to take."""


class _Sampler(LogitsProcessor):
    """Draws tokens with a generator a row (Gumbel-max), and notes the log-probs of the distribution drawn from."""

    def __init__(self, rows: list[tuple[Sampling, int]], device: torch.device) -> None:
        self.sampling = rows[0][0]
        self.generators = []
        for sampling, i in rows:
            generator = torch.Generator(device=device)
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed + i)
            self.generators.append(generator)
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        s = self.sampling
        scores = scores.float().clone()
        for token, bias in s.logit_bias.items():
            scores[:, token] += bias
        if s.temperature > 0:
            scores = scores / s.temperature
            if s.top_k > 0:
                scores = TopKLogitsWarper(s.top_k)(input_ids, scores)
            if s.top_p < 1:
                scores = TopPLogitsWarper(s.top_p)(input_ids, scores)
        log_probs = scores.log_softmax(-1)
        self.steps.append(log_probs)
        if s.temperature == 0:
            return log_probs
        noise = torch.stack(
            [torch.empty_like(log_probs[0]).exponential_(generator=generator) for generator in self.generators]
        )
        return log_probs - noise.log()

    def log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probs of the tokens that were chosen.

        :param tokens: ``(rows, steps)``.
        :return: ``(rows, steps)`` float32.
        """
        stacked = torch.stack(self.steps, 1)
        return stacked.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
