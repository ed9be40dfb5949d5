"""Evaluate on MMAU or MMAR during training, with the prompts, answer extraction and rule of ``eval_mmau.py``."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from aqa.audio.decode import SAMPLING_RATE
from aqa.audio.prefetch import DECODE_THREADS, WaveformCache
from aqa.audio.probe import probe_all
from aqa.audio.reader import AudioReader
from aqa.common.console import several
from aqa.data.prompts import choices_in
from aqa.evaluation.answers import extract_answer
from aqa.evaluation.engines import decode, render
from aqa.evaluation.items import EvalError, make_items, read_rows, result_rows, write_rows
from aqa.evaluation.scoring import Said, find_collapsed, judge, score
from aqa.rewards.r1_aqa import SPECIAL_TOKENS, extract_response
from lightrft.utils.distributed import gather_objects

Ask = Callable[[Sequence[str], Sequence[Any]], list[list[int]]]


def collapsed_rewards(
    heard: Sequence[dict[str, Any]], silent: Sequence[dict[str, Any]] | None, special: Sequence[str] = SPECIAL_TOKENS
) -> dict[str, str]:
    """What :func:`find_collapsed` says of the evaluation data's responses, by question type.

    :param heard: Responses to all rows, each with tags, prompt, response and reference.
    :param silent: Those without sound, in the same order; None: not asked for.
    :param special: See :func:`aqa.rewards.r1_aqa.extract_response`.
    """
    quiet = [None] * len(heard) if silent is None else [_prediction(row, special) for row in silent]
    said = [
        Said(_prediction(row, special), row["reference"], choices_in(row["prompt"]) or [], in_silence)
        for row, in_silence in zip(heard, quiet, strict=True)
    ]
    return find_collapsed(said, [[tag for tag in row["tags"] if tag.startswith("question_type/")] for row in heard])


def _prediction(row: dict[str, Any], special: Sequence[str]) -> str:
    prompt = row["prompt"]
    said = extract_response(prompt + row["response"], special)  # behind the prompt's header, as the reward reads it
    return extract_answer(said, choices_in(prompt) or [row["reference"]]).text


class BenchmarkEvaluator:
    """An evaluator for the trainer, see ``lightrft.trainer.evaluation.Evaluation``; creating it checks all questions.

    Each rank asks its share of the questions. Every evaluation writes a result file into ``<save_path>/eval/``, which
    ``eval_mmau.py score`` and ``compare`` read.

    :param path: A benchmark's questions, with answers.
    :param audio_dir: Folder of the recordings.
    :param think: Ask for the thinking process before the answer.
    :raises SystemExit: naming the questions that cannot be asked.
    """

    def __init__(
        self, path: Path, audio_dir: Path, think: bool, processor: Any, args: Namespace, strategy: Any
    ) -> None:
        self.path = path
        self.processor = processor
        self.strategy = strategy
        self.folder = Path(args.save_path) / "eval"
        self.reader = AudioReader(args.sandbox_audio, seconds=args.audio_seconds)
        self.batch_size = args.rollout_batch_size * args.n_samples_per_prompt // strategy.world_size
        try:
            self.benchmark, rows = read_rows(path)
            self.items = make_items(rows, self.benchmark, audio_dir, think, confine=args.confine_audio is not None)
            self.prompts = [render(processor, item.prompt) for item in self.items]
            self._check(args)
        except EvalError as error:
            raise SystemExit(f"--eval_benchmark: {error}") from error
        load = functools.partial(self.reader.load, silence_ok=True)  # digital silence is no error here
        self.silent = args.eval_silent
        self.warned: set[str] = set()
        self.clips = WaveformCache(load, args.audio_cache_mib * 2**20)

    def _check(self, args: Namespace) -> None:
        if self.items[0].gold is None:
            raise EvalError(f"{self.path}: has questions without an answer, which cannot be scored")
        lengths = [len(ids) for ids in self.processor.tokenizer(self.prompts, add_special_tokens=False)["input_ids"]]
        problems = [
            f"{item.label}: {length} prompt tokens, more than --prompt_max_len {args.prompt_max_len}"
            for item, length in zip(self.items, lengths, strict=True)
            if length > args.prompt_max_len
        ]
        problems += [
            f"{item.label}: has several recordings, and training takes one" for item in self.items if item.further
        ]
        rank, world = self.strategy.rank, self.strategy.world_size
        share = [str(item.audio) for item in self.items[rank::world]]
        for found in gather_objects(probe_all(share, reader=self.reader.read_header)):
            problems += found
        if problems:
            raise EvalError(several(f"{self.path}: {len(problems)} problems", problems))

    @property
    def metric(self) -> str:
        """Name of the overall accuracy."""
        return f"eval/{self.path.stem}/accuracy"

    def __call__(self, ask: Ask, step: int) -> dict[str, float]:
        """Ask all questions and score the answers. All ranks must call it.

        :param ask: Returns the engine's greedy answers, as token ids, to this rank's prompts and clips.
        :param step: Rollout step, for the result file's name.
        :return: ``eval/<file>/accuracy``, the accuracy for each value of the benchmark's main breakdown, and
            ``eval/<file>/collapsed``, the number of question types whose answers are alike; with ``--eval_silent`` also
            the accuracies of ``eval/<file>_silent``.
        """
        heard, metrics = self.measure(ask, step, silent=False)
        text_of = functools.partial(self.benchmark.said, key=self.benchmark.prediction_keys[0])
        said = [Said(text_of(row), row["answer"], row["choices"]) for row in heard]
        if self.silent:
            silent, more = self.measure(ask, step, silent=True)
            metrics |= more
            said = [entry._replace(in_silence=text_of(row)) for entry, row in zip(said, silent, strict=True)]
        types = [
            [f"{k} {value}" for k in self.benchmark.breakdowns if (value := self.benchmark.value(row, k)) is not None]
            for row in heard
        ]
        found = find_collapsed(said, types)
        for name in found.keys() - self.warned if step > 0 else ():  # the start model's are what training is for
            self.strategy.print(f"WARNING: {self.path.name}: {name}: {found[name]}")
            self.warned.add(name)
        return metrics | {f"eval/{self.path.stem}/collapsed": float(len(found))}

    def measure(self, ask: Ask, step: int, silent: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Ask all questions, write the result file, and score it.

        :param silent: Give silence of the same length in place of every clip.
        :return: The rows of the result file, and their accuracies.
        """
        raw = self.ask_all(ask, silent)
        predictions = [
            extract_answer(text, item.row["choices"]).text for item, text in zip(self.items, raw, strict=True)
        ]
        results = result_rows(self.items, zip(predictions, raw, strict=True), self.benchmark, silent)
        name = self.path.stem + ("_silent" if silent else "")
        if self.strategy.is_rank_0():
            suffixes = self.benchmark.suffixes
            suffix = self.path.suffix if self.path.suffix in suffixes else suffixes[0]
            self._write(results, f"{name}_step_{step:06d}{suffix}")
        # what MMSU's script leaves out is wrong here, else a model could win by one readable answer
        scores = score(judge(results, self.benchmark, leave_out=False))
        main = next(iter(scores["by"].values()), {})
        by_value = {f"eval/{name}/{value}": entry["accuracy"] for value, entry in main.items()}
        return results, {f"eval/{name}/accuracy": scores["accuracy"]} | by_value

    def ask_all(self, ask: Ask, silent: bool) -> list[str]:
        """The answers to all questions, in the file's order, on every rank."""
        rank, world = self.strategy.rank, self.strategy.world_size
        # All ranks must ask equally often, so a rank whose share is shorter repeats questions of other ranks.
        rounds = -(-len(self.items) // world)
        mine = [i % len(self.items) for i in range(rank, rounds * world, world)]
        answers: dict[int, str] = {}
        for start in range(0, rounds, self.batch_size):
            part = mine[start : start + self.batch_size]
            with ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode") as pool:
                waves = list(pool.map(self.clips, [str(self.items[i].audio) for i in part]))
            waves = [np.zeros_like(wave) for wave in waves] if silent else waves
            tokens = ask([self.prompts[i] for i in part], [(wave, SAMPLING_RATE) for wave in waves])
            answers |= {i: decode(self.processor, ids) for i, ids in zip(part, tokens, strict=True)}
        responses = {i: text for share in reversed(gather_objects(answers)) for i, text in share.items()}
        return [responses[item.index] for item in self.items]

    def _write(self, results: list[dict[str, Any]], name: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_rows([self.benchmark.without_copies(row) for row in results], self.folder / name)
        except OSError as error:
            self.strategy.print(f"note: the answers {name} could not be written: {error}")
