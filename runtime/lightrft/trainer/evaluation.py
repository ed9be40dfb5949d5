"""Evaluation while training: prompts scored by the reward, what the example adds, and the best model so far."""

import itertools
import json
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightrft.strategy import checkpoint
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.trainer import trajectories
from lightrft.trainer.fast_exp_maker import FastExperienceMaker, split_tags
from lightrft.trainer.step_metrics import reward_sums, tag_metrics, tag_sums
from lightrft.utils.distributed import gather_objects, reduce_by_name, reduce_metrics
from lightrft.utils.preemption import stop_request

Ask = Callable[[Sequence[str], Sequence[Any]], list[list[int]]]
Evaluator = Callable[[Ask, int], dict[str, float]]
# a record is what trajectories.describe says of a response, its row in the evaluation data, and whether it was silent
Record = dict[str, Any]
FindCollapsed = Callable[[list[Record], list[Record] | None], dict[str, str]]

BEST_RECORD = "best.json"


class Evaluation:
    """What is measured every ``eval_steps``, with greedy answers of the rollout engine.

    An evaluator is a function ``(ask, step) -> metrics`` that all ranks call: ``ask(prompts, images)`` gives the token
    ids of the answers to this rank's prompts, at least one and on all ranks equally often; the metrics are the same on
    every rank.

    :param dataloader: This rank's prompts to score by the reward, unshuffled; None: none.
    :param find_collapsed: Finds questions whose answers are all alike, by type, from all responses to the dataloader's
        prompts and those without sound; None: nothing is looked for.
    :param silent: Score answers to silence of the same length as well.
    :param folder: Where the responses to the dataloader's prompts are written, a file a step; None: nowhere.
    """

    def __init__(
        self,
        maker: FastExperienceMaker,
        dataloader: Any,
        evaluators: Sequence[Evaluator],
        find_collapsed: FindCollapsed | None = None,
        silent: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.maker = maker
        self.strategy = maker.strategy
        self.greedy = replace(maker.sampling, n=1, temperature=0.0)
        self.dataloader = dataloader
        self.evaluators = evaluators
        self.find_collapsed = find_collapsed
        self.silent = silent
        self.folder = folder
        self.warned: set[str] = set()

    def due(self, step: int, total: int, every: int) -> bool:
        """Whether to evaluate after a step: every so many, after the last, and before the first, as step 0.

        :param every: ``eval_steps``; -1: never.
        """
        something = self.dataloader is not None or bool(self.evaluators)
        return something and every > 0 and (step % every == 0 or step == total)

    def __call__(self, step: int) -> dict[str, float]:
        """Evaluate. Collective.

        :return: ``eval/*`` metrics and ``time/eval`` in seconds, the same on every rank.
        """
        started = time.perf_counter()
        metrics = {} if self.dataloader is None else self.measure(step)
        for evaluator in self.evaluators:
            metrics |= evaluator(self.ask, step)
        seconds = {"time/eval": time.perf_counter() - started}
        reduce_metrics({}, seconds, self.strategy.device)
        return metrics | seconds

    def ask(self, prompts: Sequence[str], images: Sequence[Any]) -> list[list[int]]:
        """Greedy answers to this rank's prompts, without a reward.

        :param prompts: Rendered prompts, at least one.
        :param images: What the image slot carries, one entry a prompt.
        :return: Token ids of each answer, end of turn included.
        """
        nothing = [""] * len(prompts)
        items = self.maker.rollout(prompts, images, nothing, nothing, self.greedy, step=0)
        return [item.response_ids.tolist() for item in items]

    def measure(self, step: int) -> dict[str, float]:
        """Score the dataloader's prompts, in silence too if that is asked for, and look for answers that are alike."""
        metrics, heard = self.rewards()
        silent = None
        if self.silent:
            more, silent = self.rewards(silent=True)
            name = "eval/accuracy_reward"
            metrics |= {k.replace(name, f"{name}_silent", 1): v for k, v in more.items() if k.startswith(name)}
        if self.find_collapsed is not None:
            found = self.find_collapsed(heard, silent)
            # step 0 is the start model, whose answers may well be all alike
            for name in found.keys() - self.warned if step > 0 else ():
                self.strategy.print(f"WARNING: evaluation data: {name}: {found[name]}")
                self.warned.add(name)
            metrics["eval/collapsed"] = float(len(found))
        if self.folder is not None and self.strategy.is_rank_0():
            try:
                trajectories.save(self.folder, step, heard + (silent or []))
            except OSError as error:
                self.strategy.print(f"WARNING: the responses of step {step}'s evaluation cannot be written ({error})")
        return metrics

    def rewards(self, silent: bool = False) -> tuple[dict[str, float], list[Record]]:
        """Answers to the dataloader's prompts, scored with the training reward; each row counts once.

        :param silent: Give silence of the same length in place of every clip.
        :return: ``eval/*`` metrics over all ranks, and the records of all rows, in the data's order.
        """
        rank, world = self.strategy.rank, self.strategy.world_size
        # the sampler repeats rows so that all ranks have as many; these are not counted
        left = len(range(rank, len(self.dataloader.dataset), world))
        sums: dict[Any, float] = defaultdict(float)
        tagged: dict[Any, float] = defaultdict(float)
        records: list[Record] = []
        for batch in stop_request.each(iter(self.dataloader), self.strategy.device):
            prompts, tags = split_tags(batch)
            if silent:
                prompts = (prompts[0], list(map(silence, prompts[1])), *prompts[2:])
            with self.maker.ending_together():
                items = self.maker.rollout(*prompts, self.greedy, step=0, all_tags=tags)
            items = items[:left]
            left -= len(items)
            self.maker.score(items)  # collective, so also without items
            if not items:
                continue
            for item in items:
                records.append({"row": rank + world * len(records), "silent": silent} | trajectories.describe(item))
            for total, part in ((sums, reward_sums(items)), (tagged, tag_sums(items))):
                for name, value in part.items():
                    total[name] += value
        # a rank without rows has no names to add up
        sums, tagged = (reduce_by_name(part, self.strategy.device) for part in (sums, tagged))
        count = sums["responses"]
        metrics = {f"eval/{k.removeprefix('rollout/')}": v / count for k, v in sums.items() if "/" in k}
        everywhere = sorted(itertools.chain(*gather_objects(records)), key=operator.itemgetter("row"))
        return metrics | tag_metrics(tagged, "eval", count), everywhere


def silence(clip: Any) -> Any:
    """As long a clip of zeros; None, a prompt without a clip, stays None.

    :param clip: ``(waveform (samples,), rate in Hz)``.
    """
    return None if clip is None else (np.zeros_like(clip[0]), clip[1])


class BestModel:
    """Keeps the model of the best evaluation as a Hugging Face folder, with :data:`BEST_RECORD` in it. Collective.

    The record in the folder is newer than the checkpoint's, and wins. A killed run leaves the old folder or the new
    one, complete.

    :param folder: Where to; a record in it is this run's own.
    :param metric: What is compared; more is better.
    :param remembered: What the checkpoint says: step, metric and value; None: of none.
    :raises SystemExit: if the folder's model was chosen by another metric.
    """

    def __init__(self, strategy: StrategyBase, folder: Path, metric: str, remembered: dict[str, Any] | None) -> None:
        self.strategy = strategy
        self.folder = folder
        self.metric = metric
        strategy.together(lambda: checkpoint.clear(str(folder.parent), folder.name), strategy.is_rank_0())
        record = folder / BEST_RECORD
        mine = json.loads(record.read_text(encoding="utf-8")) if strategy.is_rank_0() and record.is_file() else None
        self.record: dict[str, Any] | None = gather_objects(mine)[0]
        if self.record is not None and self.record["metric"] != metric:
            raise SystemExit(
                f"--keep_best {metric}: {folder} holds the best by {self.record['metric']}, which cannot be compared; "
                "name that one, or move the folder away"
            )
        if self.record is None and remembered is not None:
            strategy.print(f"note: {folder} is gone, the model of step {remembered['step']}: the next one is the best")

    def keep(self, metrics: dict[str, float], step: int, save: Callable[[str], None]) -> None:
        """Keep the model if it is better than the best so far; of equal ones the first stays.

        :param save: Writes the model into a folder, on all ranks together.
        :raises KeyError: if the evaluation does not have the metric.
        :raises SaveError: if it could not be written; the best so far is then as it was.
        """
        if self.metric not in metrics:
            there = ", ".join(sorted(name for name in metrics if name.startswith("eval/")))
            raise KeyError(f"--keep_best {self.metric}: the evaluation has no such metric; it has {there}")
        value = metrics[self.metric]
        if not value > (self.record["value"] if self.record else float("-inf")):
            return
        record = {"step": step, "metric": self.metric, "value": value}
        aside = self.folder.with_name(self.folder.name + checkpoint.PART)
        save(str(aside))

        def finish() -> None:
            (aside / BEST_RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
            checkpoint.replace_folder(aside, self.folder)

        self.strategy.together(finish, self.strategy.is_rank_0())
        self.record = record
