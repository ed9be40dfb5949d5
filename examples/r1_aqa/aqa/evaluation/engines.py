"""Answers to questions about sounds, by transformers or by vLLM. Qwen2-Audio needs nothing of LightRFT here.

Both engines get the same prompts and waveforms, stop at the same tokens, ignore the checkpoint's
``generation_config.json`` (that of Qwen2-Audio-7B-Instruct samples and penalises repetition), and never generate the
audio placeholder. The same tokenizer decodes their tokens. In float32 their greedy answers are the same; sampled ones
are drawn from the whole distribution, as in training.

torch, transformers and vllm are imported inside functions: eval_mmau.py answers --help and refused flags without them,
and vllm reads the environment when it is imported.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqa.common.constants import HOP_LENGTH, SAMPLING_RATE
from aqa.data.prompts import end_tokens, render_chat
from aqa.evaluation.checkpoints import Model
from aqa.evaluation.items import EvalError
from aqa.families import Family, family_named, write_checkpoint

if TYPE_CHECKING:
    from aqa.audio.reader import AudioReader

VLLM_WINDOW = 512  # requests that vLLM holds at once: always enough to fill its batch, and bounded memory


@dataclass(frozen=True)
class Job:
    """A question, ready to be asked."""

    index: int  # the item's place in the file
    text: str  # rendered prompt with an audio placeholder for each recording
    audio: Sequence[Path]
    samples: Sequence[int]  # length of each recording at 16 kHz
    silent: bool = False  # ask with silence of that length instead
    reader: AudioReader | None = None  # decodes the recordings; None: in this process

    def load(self) -> list[Any]:
        """The waveforms ``(samples,)`` float32 at 16 kHz.

        :raises EvalError: if a file does not decode any more.
        """
        import numpy as np

        from aqa.audio.decode import AudioError
        from aqa.audio.reader import AudioReader

        if self.silent:
            return [np.zeros(length, dtype=np.float32) for length in self.samples]
        try:
            # check_audio() reported digital silence when the run started; such items are asked all the same
            reader = self.reader or AudioReader()
            return [reader.load(path, silence_ok=True) for path in self.audio]
        except AudioError as error:
            raise EvalError(f"the audio was usable when the run started: {error}") from error


@dataclass(frozen=True)
class Settings:
    max_new_tokens: int
    batch_size: int  # questions at once
    dtype: str  # auto, float32, bfloat16 or float16
    tensor_parallel_size: int = 1  # GPUs of one vLLM engine
    seed: int = 0  # of the libraries' generators; greedy decoding draws nothing from them
    samples: int = 1  # responses a question
    temperature: float = 0.0  # 0: greedy
    audio_seconds: float = 30.0  # longest clip


Answers = Iterator[list[tuple[int, list[str]]]]  # item index and its responses, some items at a time


# --------------------------------------------------------------------------------------------------------------- shared
def load_processor(model: Model) -> Any:
    """Tokenizer, feature extractor and chat template.

    :raises EvalError: if it is of no family that this example knows, or cannot be found.
    """
    try:
        return family_of(model).processor_class().from_pretrained(model.processor)
    except (OSError, KeyError) as error:
        raise EvalError(f"{model.path}: cannot be loaded: {error}") from error


def family_of(model: Model) -> Family:
    """The family of a model.

    :raises EvalError: if this example does not know it.
    """
    try:
        return family_named(model.path)
    except ValueError as error:
        raise EvalError(str(error)) from error


def render(processor: Any, prompt: str, clips: int = 1) -> str:
    """The chat of one question, up to where the answer begins.

    :param clips: Recordings that it is about, each a part of the message, as Qwen2-Audio takes them.
    :raises EvalError: if the prompt would not hold exactly one placeholder a clip.
    """
    content = [{"type": "audio", "audio_url": "audio"}] * clips + [{"type": "text", "text": prompt}]
    text = render_chat(processor, [{"role": "user", "content": content}])
    if text.count(processor.audio_token) != clips or prompt not in text:
        raise EvalError(f"the chat template does not give the question and {clips} {processor.audio_token}: {text!r}")
    return text


def decode(processor: Any, token_ids: Sequence[int]) -> str:
    """The text of a response's tokens, which may include end and padding."""
    return processor.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def choose_dtype(name: str) -> str:
    """The value of ``--dtype``, where ``auto`` means bfloat16 on a GPU and float32 on a CPU."""
    import torch

    return name if name != "auto" else "bfloat16" if torch.cuda.is_available() else "float32"


def ahead(function: Callable[[Any], Any], tasks: Iterable[Any], depth: int, workers: int) -> Iterator[tuple[Any, Any]]:
    """Call a function on tasks in threads, ``depth`` tasks ahead of the one that is needed.

    :return: Each task with its result, in order.
    """
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting = []
        try:
            for task in tasks:
                waiting.append((task, pool.submit(function, task)))
                if len(waiting) > depth:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            while waiting:
                first, future = waiting.pop(0)
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


# --------------------------------------------------------------------------------------------------------- transformers
class HFEngine:
    """transformers' ``generate``, in batches of questions of about the same length.

    Only the valid frames of a clip are encoded, without the padding to 30 s, and each different clip of a batch once.
    Tested to give the values of the model's own forward by ``tests/engines/test_eval_mmau.py``.

    :raises EvalError: if the checkpoint does not fit the model, or a LoRA adapter is given and peft is not installed.
    """

    def __init__(self, model: Model, processor: Any, settings: Settings) -> None:
        import torch
        import transformers

        from aqa.patches.multimodal_processor import AudioMultimodalProcessor

        torch.manual_seed(settings.seed)
        transformers.utils.logging.set_verbosity_error()
        self.model = load_model(model, settings)
        self.processor = processor
        self.settings = settings
        self.batch_size = max(1, settings.batch_size // settings.samples)
        lengths = sys.maxsize, settings.audio_seconds
        self.inputs = AudioMultimodalProcessor(processor.tokenizer, processor, *lengths)
        ends = end_tokens(processor.tokenizer, model.path)
        pad = processor.tokenizer.pad_token_id
        self.pad_token_id = ends[0] if pad is None else pad
        # generate() fills in settings that we leave open from the model's generation_config; none shall be left there
        self.model.generation_config = transformers.GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            **({"do_sample": True, "temperature": settings.temperature, "top_k": 0} if settings.temperature else {}),
            eos_token_id=ends,
            pad_token_id=self.pad_token_id,
            suppress_tokens=[self.inputs.audio_token_id],
        )

    def plan(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Batches of similar length, the longest first, so that a lack of memory shows at once.

        :param jobs: All questions, finished ones too, so that a resumed run has the same batches.
        """
        order = sorted(jobs, key=lambda job: (-sum(job.samples), -len(job.text), job.index))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def answer(self, jobs: Sequence[Job], finished: set[int]) -> Answers:
        """Ask all questions but those whose indices are ``finished``, a batch at a time.

        :raises EvalError: if the GPU's memory does not suffice.
        """
        import torch

        batches = [batch for batch in self.plan(jobs) if not all(job.index in finished for job in batch)]
        for batch, inputs in ahead(self.prepare, batches, depth=1, workers=1):
            try:
                texts = self.generate(inputs)
            except torch.cuda.OutOfMemoryError as error:
                raise EvalError(
                    f"the GPU's memory does not suffice for --batch_size {self.settings.batch_size}; the same command "
                    "with a smaller one, and without --overwrite, continues where this one stopped"
                ) from error
            pairs = zip(batch, texts, strict=True)
            yield [(job.index, answers) for job, answers in pairs if job.index not in finished]

    def prepare(self, batch: Sequence[Job]) -> dict[str, Any]:
        """Token ids with expanded placeholders, padded on the left, and the clips' mel frames, as in training.

        :return: ``input_ids`` and ``attention_mask`` ``(batch, length)``; ``clips``, :class:`aqa.patches.slots.Clips`.
        """
        import torch

        from aqa.patches.slots import grid_of, unpack_clips

        rows, mels, placeholder = [], [], self.inputs.audio_token_id
        for job in batch:
            extracted = [self.inputs.extract((wave, SAMPLING_RATE)) for wave in job.load()]
            counts = iter([tokens for _, tokens in extracted])
            ids = self.processor.tokenizer(job.text, add_special_tokens=False)["input_ids"]
            rows.append([each for token in ids for each in [token] * (next(counts) if token == placeholder else 1)])
            mels += [mel for windows, _ in extracted for mel in windows]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        clips = unpack_clips(mels, torch.cat(list(map(grid_of, mels))))
        return {"input_ids": ids, "attention_mask": mask, "clips": clips}

    def generate(self, inputs: dict[str, Any]) -> list[list[str]]:
        """The responses to each of the inputs from :meth:`prepare`."""
        import torch

        from aqa.policy.forward import encode_clips

        device = self.model.device
        ids, mask, clips = inputs["input_ids"].to(device), inputs["attention_mask"].to(device), inputs["clips"]
        with torch.inference_mode():
            embeds = self.model.get_input_embeddings()(ids)
            packed, tokens = encode_clips(self.model, clips.features.to(device), clips.frames.to(device))
            encoded = packed.split(tokens.tolist())
            audio = torch.cat([encoded[i] for i in clips.index.tolist()])
            is_audio = (ids == self.inputs.audio_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(is_audio, audio.to(embeds.dtype))
            count = self.settings.samples
            embeds, mask = embeds.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
            # given embeddings instead of ids, generate() returns the new tokens alone
            how = self.model.generation_config
            tokens = self.model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=how)
        texts = [decode(self.processor, row) for row in tokens.tolist()]
        return [texts[i : i + count] for i in range(0, len(texts), count)]


def load_model(model: Model, settings: Settings, device: str | None = None) -> Any:
    """The model in evaluation mode, with its adapter merged.

    :param device: None: the GPU if there is one.
    :raises EvalError: as :class:`HFEngine`.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, choose_dtype(settings.dtype))
    family = family_of(model)
    loaded, info = family.model_class().from_pretrained(model.path, dtype=dtype, output_loading_info=True)
    wrong = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    wrong["unexpected"] = [name for name in wrong["unexpected"] if not name.startswith(family.foreign)]
    if any(wrong.values()):
        shown = {kind: names[:5] for kind, names in wrong.items()}
        raise EvalError(f"{model.path}: is not a whole {family.name} checkpoint: {shown}")
    if model.adapter is not None:
        loaded = _with_adapter(loaded, model.adapter, model.lora_scale)
    return loaded.to(device).eval()


def _with_adapter(model: Any, adapter: str, scale: float) -> Any:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    adapted = PeftModel.from_pretrained(model, adapter)
    if scale != 1 and (whole := adapted.peft_config["default"].modules_to_save):
        raise EvalError(f"--lora_scale {scale}: {adapter} also holds whole modules, which have no scale: {whole}")
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(scale)
    return adapted.merge_and_unload()


@contextlib.contextmanager
def merged(model: Model, processor: Any, settings: Settings) -> Iterator[Model]:
    """A model that vLLM can load: the same, or for an adapter a temporary folder (``TMPDIR``) with it merged."""
    if model.adapter is None:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="merged-adapter-") as folder:
        write_checkpoint(load_model(model, settings, "cpu"), Path(folder))
        processor.save_pretrained(folder)
        yield Model(folder, folder)


# ----------------------------------------------------------------------------------------------------------------- vLLM
class VLLMEngine:
    """vLLM with all questions at once: it forms its own batches, and returns each answer when it is complete.

    :param jobs: The questions.
    :param longest: Tokens of the longest prompt and its response, see :func:`longest_sequence`.
    :raises EvalError: if vLLM is not installed or too old, or cannot load this kind of model folder.
    """

    def __init__(self, model: Model, processor: Any, settings: Settings, jobs: Sequence[Job], longest: int) -> None:
        _refuse_model(model)
        self.processor = processor
        self.queued = 0
        with merged(model, processor, settings) as whole:
            self.load(whole, settings, jobs, longest)

    def load(self, model: Model, settings: Settings, jobs: Sequence[Job], longest: int) -> None:
        """Load the weights, which are not read again; parameters as for the class."""
        import torch
        from transformers import AutoConfig

        processor, family = self.processor, family_of(model)
        recordings = max(len(job.audio) for job in jobs)
        if recordings > 1 and family.one_clip_in_vllm:
            raise EvalError(
                f"{family.name}: vLLM takes one recording a question, and there are some about {recordings}; "
                "--engine hf takes several"
            )
        on_gpu = torch.cuda.is_available()
        dtype = choose_dtype(settings.dtype)
        text = AutoConfig.from_pretrained(model.path).get_text_config()
        _set_vllm_environment(settings, cache_gib=_cache_gib(text, dtype, longest))
        vllm = _import_vllm()
        if family.ours_in_vllm and settings.tensor_parallel_size > 1:
            raise EvalError(f"{family.name}: our class of it is known to this process alone; --tensor_parallel_size 1")
        self.llm = vllm.LLM(
            model=model.path,
            tokenizer=model.processor,
            dtype=dtype,
            seed=settings.seed,
            max_model_len=longest,
            max_num_seqs=settings.batch_size,
            max_num_batched_tokens=max(longest, 8192),
            tensor_parallel_size=settings.tensor_parallel_size,
            limit_mm_per_prompt={"audio": recordings},
            mm_processor_cache_gb=0,  # each question has a clip of its own
            generation_config="vllm",
            enforce_eager=not on_gpu,
            disable_log_stats=True,
            **family.vllm_options(settings.audio_seconds),
        )
        self.params = vllm.SamplingParams(
            n=settings.samples,
            temperature=settings.temperature,
            max_tokens=settings.max_new_tokens,
            stop_token_ids=end_tokens(processor.tokenizer, model.path),
            logit_bias={processor.tokenizer.convert_tokens_to_ids(processor.audio_token): -math.inf},
            detokenize=False,
        )

    def answer(self, jobs: Sequence[Job], finished: set[int]) -> Answers:
        """Ask all questions but those whose indices are ``finished``."""
        left = [job for job in jobs if job.index not in finished]
        asked: dict[str, Job] = {}
        engine = self.llm.llm_engine
        for job, waves in ahead(Job.load, left, depth=32, workers=4):
            # requests are numbered in the order in which they are queued
            asked[str(self.queued)] = job
            self.queued += 1
            audio = [(wave, SAMPLING_RATE) for wave in waves]
            request = {"prompt": job.text, "multi_modal_data": {"audio": audio}}
            self.llm.enqueue([request], self.params, use_tqdm=False)
            while engine.get_num_unfinished_requests() >= VLLM_WINDOW:
                yield from self._step(asked)
        while engine.has_unfinished_requests():
            yield from self._step(asked)

    def _step(self, asked: dict[str, Job]) -> Answers:
        outputs = [output for output in self.llm.llm_engine.step() if output.finished]
        if outputs:
            yield [
                (asked[o.request_id].index, [decode(self.processor, each.token_ids) for each in o.outputs])
                for o in outputs
            ]


def _refuse_model(model: Model) -> None:
    renamed = [name for name in weight_names(Path(model.path)) if name.startswith(("model.", "lm_head."))]
    if renamed:
        raise EvalError(
            f"{model.path}: its weights have the names of transformers' modules ({renamed[0]}) instead of a "
            "checkpoint's, as DeepSpeed's zero_to_fp32.py leaves them; vLLM cannot load these, --engine hf can"
        )


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise EvalError(f"vLLM is installed and cannot be imported: {error}; `make doctor`, or --engine hf") from error
    if not callable(getattr(vllm.LLM, "enqueue", None)):
        raise EvalError(f"vLLM {vllm.__version__} has no LLM.enqueue; tested with 0.32.0. Or use --engine hf")
    return vllm


def longest_prompt(processor: Any, jobs: Sequence[Job]) -> int:
    """Tokens of the longest prompt, its audio included."""
    from aqa.patches.slots import audio_token_count

    ids = processor.tokenizer([job.text for job in jobs], add_special_tokens=False)["input_ids"]
    audio = [[audio_token_count(-(-length // HOP_LENGTH)) - 1 for length in job.samples] for job in jobs]
    return max(len(row) + sum(more) for row, more in zip(ids, audio, strict=True))


def longest_sequence(model: Model, processor: Any, settings: Settings, jobs: Sequence[Job]) -> int:
    """Tokens of the longest prompt and its response.

    :raises EvalError: if the model has not as many positions, beyond which it would answer nonsense.
    """
    tokens = longest_prompt(processor, jobs) + settings.max_new_tokens
    made = f"the longest prompt and --max_new_tokens {settings.max_new_tokens}"
    if problem := beyond_positions(model.path, tokens, made, "that or --audio_seconds"):
        raise EvalError(problem)
    return tokens


def beyond_positions(pretrain: str, tokens: int, made: str, remedy: str) -> str | None:
    """What is wrong with a sequence of more tokens than a model has positions; None if it has as many.

    :param made: What makes up the sequence.
    :param remedy: What to lower.
    """
    from transformers import AutoConfig

    most = AutoConfig.from_pretrained(pretrain).get_text_config().max_position_embeddings
    return f"{made} make {tokens} tokens, more than the model's {most}; lower {remedy}" if tokens > most else None


def weight_names(folder: Path) -> list[str]:
    """Names of the weights in a folder's safetensors files; none for a hub name."""
    from safetensors import safe_open

    names = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            names += weights.keys()
    return names


def _set_vllm_environment(settings: Settings, cache_gib: int) -> None:
    """Set what vLLM reads from the environment when it is imported; the user's own values stay.

    Its worker processes must not be forked: torch has looked for GPUs in this process, after which CUDA works in none
    that is forked. vLLM 0.32 switches to spawn by itself only once CUDA is initialised, which it is not yet.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
    if settings.tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _cache_gib(text: Any, dtype: str, max_model_len: int) -> int:
    """Size of the KV cache on a CPU: room for 32 of the longest sequences, but 1 to 16 GiB."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * (4 if dtype == "float32" else 2)
    return max(1, min(16, -(-32 * max_model_len * token // 2**30)))
