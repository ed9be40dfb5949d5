"""Rollouts with transformers' generate, on the trained weights themselves: for machines without vLLM."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightrft.engines.base import RolloutOutput, Sampling, plain_linear
from lightrft.utils.families import family_of


class HFEngine:
    """Samples from the actor itself, so that its weights are always the trainer's.

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
        rows = [(prompt, s, i) for prompt, s in enumerate(sampling) for i in range(s.n)]
        # Audio Flamingo's processor wants a clip for each text, so that batches are of one kind
        heard = [bool(_clips(prompts[prompt])) for prompt, _, _ in rows]
        alike = [[i for i, has in enumerate(heard) if has is kind] for kind in (True, False)]
        outputs: dict[int, RolloutOutput] = {}
        with self.policy() as model, plain_linear():
            training, stored = model.training, model.generation_config
            model.eval()
            # generate fills in what a configuration leaves open from the model's: repetition_penalty, min_length, ...
            model.generation_config = GenerationConfig()
            try:
                for some in alike:
                    for start in range(0, len(some), self.batch_size):
                        batch = some[start : start + self.batch_size]
                        made = self._batch(model, prompts, [rows[i] for i in batch])
                        outputs |= zip(batch, made, strict=True)
            finally:
                model.generation_config = stored  # it is saved with the model
                model.train(training)
        return [outputs[i] for i in range(len(rows))]

    def _batch(
        self, model: torch.nn.Module, prompts: list[Any], rows: list[tuple[int, Sampling, int]]
    ) -> list[RolloutOutput]:
        """Responses of some rows; tower and prompt are computed once a prompt, not once a row.

        :param rows: Number of the prompt, how to sample, number of the sample.
        """
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        first = rows[0][1]
        numbers = sorted({number for number, _, _ in rows})
        inputs = self._inputs([prompts[number] for number in numbers]).to(model.device)
        of_row = torch.tensor([numbers.index(number) for number, _, _ in rows], device=model.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        cache = DynamicCache(config=model.config)
        if ids.shape[1] > 1:  # generate itself passes the last prompt token through the model
            inputs |= {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
            positions = (mask[:, :-1].cumsum(-1) - 1).clamp(min=0)  # as generate counts them
            family_of(model).prefill(model, inputs, positions, cache)
            cache.batch_select_indices(of_row)
        ids, mask = ids[of_row], mask[of_row]
        sampler = _Sampler([(s, i) for _, s, i in rows], model.device)
        config = GenerationConfig(
            max_new_tokens=first.max_tokens,
            do_sample=False,  # _Sampler adds the noise; generate then takes the argmax
            use_cache=True,  # the trained model's configuration switches the cache off
            eos_token_id=list(first.end_ids) or None,
            pad_token_id=tokenizer.pad_token_id,
        )
        sequences = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
        )
        width = ids.shape[1]
        log_probs = sampler.log_probs()
        outputs = []
        for i in range(len(rows)):
            response = sequences[i, width:].tolist()
            length = next((at for at, token in enumerate(response, 1) if token in first.end_ids), None)
            prompt = ids[i][mask[i].bool()].tolist()
            outputs.append(RolloutOutput(prompt, response[:length], log_probs[i, :length].cpu(), length is None))
        return outputs

    def _inputs(self, prompts: list[Any]) -> Any:
        if not isinstance(prompts[0], dict):
            return self.processor.tokenizer.pad({"input_ids": [list(ids) for ids in prompts]}, return_tensors="pt")
        texts = [prompt["prompt"] for prompt in prompts]
        clips = [wave for prompt in prompts for wave, _ in _clips(prompt)]
        rate = self.processor.feature_extractor.sampling_rate
        audio = {"audio": clips, "sampling_rate": rate} if clips else {}
        return self.processor(text=texts, return_tensors="pt", text_kwargs={"padding": True}, **audio)

    complete = True  # its weights are the trainer's own

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Nothing to do: the weights are shared."""

    def sleep(self) -> None:
        """Nothing to free."""

    def wake_up(self) -> None:
        """Nothing to allocate."""


def _clips(prompt: Any) -> list[Any]:
    """The clips of a prompt, ``(waveform, rate)`` each; none of one that is token ids."""
    return prompt.get("multi_modal_data", {}).get("audio", []) if isinstance(prompt, dict) else []


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
        log_probs = drawn = scores.log_softmax(-1)
        if s.temperature > 0:
            noise = torch.stack(
                [torch.empty_like(log_probs[0]).exponential_(generator=generator) for generator in self.generators]
            )
            drawn = log_probs - noise.log()
        chosen = drawn.argmax(-1, keepdim=True)  # generate's own choice; it pads rows that have ended
        self.steps.append(log_probs.gather(-1, chosen).squeeze(-1))
        return drawn

    def log_probs(self) -> torch.Tensor:
        """Log-probs of the tokens that were chosen: ``(rows, steps)`` float32."""
        return torch.stack(self.steps, 1)
