"""Evaluate on MMAU or MMAR during training, with the prompts, answer extraction and rule of ``eval_mmau.py``."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aqa.audio.decode import SAMPLING_RATE, probe_all
from aqa.audio.prefetch import DECODE_THREADS, WaveformCache
from aqa.audio.reader import AudioReader
from aqa.evaluation.answers import extract_answer
from aqa.evaluation.engines import decode, render
from aqa.evaluation.items import EvalError, make_items, read_rows, result_rows, several, write_rows
from aqa.evaluation.scoring import judge, score
from lightrft.utils.distributed import gather_objects

Ask = Callable[[Sequence[str], Sequence[Any]], list[list[int]]]


class BenchmarkEvaluator:
    """An evaluator for the trainer, see ``lightrft.trainer.evaluation.Evaluation``; creating it checks all questions.

    Each rank asks its share of the questions. Every evaluation writes a result file into ``<save_path>/eval/``, which
    ``eval_mmau.py score`` and ``compare`` read.

    :param path: MMAU's .json or MMAR's .jsonl, with answers.
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
        self.reader = AudioReader(args.sandbox_audio)
        self.batch_size = args.rollout_batch_size * args.n_samples_per_prompt // strategy.world_size
        try:
            self.benchmark, rows = read_rows(path)
            self.items = make_items(rows, self.benchmark, audio_dir, think, confine=args.confine_audio is not None)
            self.prompts = [render(processor, item.prompt) for item in self.items]
            self._check(args)
        except EvalError as error:
            raise SystemExit(f"--eval_benchmark: {error}") from error
        load = functools.partial(self.reader.load, silence_ok=True)  # digital silence is no error here
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
        :return: ``eval/<file>/accuracy``, and the accuracy for each value of the benchmark's main breakdown.
        """
        rank, world = self.strategy.rank, self.strategy.world_size
        # All ranks must ask equally often, so a rank whose share is shorter repeats questions of other ranks.
        rounds = -(-len(self.items) // world)
        mine = [i % len(self.items) for i in range(rank, rounds * world, world)]
        answers: dict[int, str] = {}
        for start in range(0, rounds, self.batch_size):
            part = mine[start : start + self.batch_size]
            with ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode") as pool:
                waves = list(pool.map(self.clips, [str(self.items[i].audio) for i in part]))
            tokens = ask([self.prompts[i] for i in part], [(wave, SAMPLING_RATE) for wave in waves])
            answers |= {i: decode(self.processor, ids) for i, ids in zip(part, tokens, strict=True)}
        responses = {i: text for share in reversed(gather_objects(answers)) for i, text in share.items()}
        raw = [responses[item.index] for item in self.items]
        predictions = [
            extract_answer(text, item.row["choices"]).text for item, text in zip(self.items, raw, strict=True)
        ]
        results = result_rows(self.items, zip(predictions, raw, strict=True), self.benchmark, silent_audio=False)
        if self.strategy.is_rank_0():
            self._write(results, step)
        scores = score(judge(results, self.benchmark))
        main = scores["by"].get(self.benchmark.breakdowns[0], {})
        by_value = {f"eval/{self.path.stem}/{value}": entry["accuracy"] for value, entry in main.items()}
        return {self.metric: scores["accuracy"]} | by_value

    def _write(self, results: list[dict[str, Any]], step: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_rows(results, self.folder / f"{self.path.stem}_step_{step:06d}{self.path.suffix or '.json'}")
        except OSError as error:
            self.strategy.print(f"note: the answers of step {step} could not be written: {error}")
