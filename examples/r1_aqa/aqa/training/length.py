"""How long a run is: its steps, what they come from, and what guessing would earn on its questions."""

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from aqa.data.prompts import choices_in


@dataclass(frozen=True)
class Length:
    """What a run takes of its data.

    :param batches: Rollout batches of an episode.
    :param steps: Rollout batches of the run: ``--max_steps``, or those of ``--num_episodes``.
    :param updates: Optimizer steps of the run.
    :param updates_an_episode: Optimizer steps of a whole episode.
    :param left_over: Last responses of the run, which do not fill an optimizer step.
    """

    batches: int
    steps: int
    updates: int
    updates_an_episode: int
    left_over: int

    @property
    def episodes(self) -> int:
        """Episodes that the run begins."""
        return math.ceil(self.steps / self.batches)


def plan_length(args: argparse.Namespace, batches: int) -> Length:
    """The length of a run.

    :param batches: Rollout batches of an episode.
    :raises SystemExit: if no optimizer step would be made.
    """
    steps = args.max_steps or batches * args.num_episodes
    responses = args.rollout_batch_size * args.n_samples_per_prompt
    updates, left_over = divmod(steps * responses * args.max_epochs, args.train_batch_size)
    if updates == 0:
        raise SystemExit(
            f"{steps} rollouts of {responses} responses never fill --train_batch_size {args.train_batch_size}: "
            f"no optimizer step would be made; use --train_batch_size {responses} or more data"
        )
    return Length(batches, steps, updates, batches * responses * args.max_epochs // args.train_batch_size, left_over)


def describe_length(args: argparse.Namespace, length: Length, rows: int) -> list[str]:
    """Lines about the steps, and what each flag did to their number.

    :param rows: Training rows.
    """
    steps = "1 step" if length.batches == 1 else f"{length.batches:,} steps"
    an_episode = f"{rows:,} rows / {args.rollout_batch_size} prompts = {steps} an episode"
    if args.max_steps:
        whole = f"; --max_steps {args.max_steps:,}: {args.max_steps / length.batches:.3g} episodes"
    else:
        episodes = "1 episode" if args.num_episodes == 1 else f"{args.num_episodes:,} episodes"
        whole = f" x {episodes} = {length.steps:,} steps"
    responses = length.steps * args.rollout_batch_size * args.n_samples_per_prompt
    lines = [
        f"length    {an_episode}{whole}",
        f"          {responses:,} responses; the first steps tell how long it takes",
    ]
    if unused := rows - length.batches * args.rollout_batch_size:
        others = ", others in each" if args.prompt_data_probs_end is None and not args.easy_first else ""
        lines.append(f"note: an episode leaves out {unused} of {rows:,} rows, too few for a step{others}")
    if length.left_over:
        lines.append(
            f"note: the last {length.left_over} responses do not fill an optimizer step and are not trained on"
        )
    return lines


def describe_chance(training: Sequence[str], held_out: Sequence[str]) -> str:
    """A line about the accuracy of guessing, where the prompts list their options as R1-AQA's do.

    :param training: Rendered prompts; ``held_out`` may have none.
    """
    parts = [(name, chance_levels(prompts)) for name, prompts in (("training", training), ("held-out", held_out))]
    found = [f"{name} {levels['all']:.3f}" for name, levels in parts if levels]
    return f"chance    accuracy of guessing: {', '.join(found) or 'not known, since the prompts list no options'}"


def chance_levels(prompts: Sequence[str], tags: Sequence[Sequence[str]] | None = None) -> dict[str, float]:
    """The mean of 1 / number of options over the prompts that list them, of ``all`` and of each tag.

    :param tags: Of each prompt, such as ``question_type/music``.
    """
    shares: dict[str, list[float]] = defaultdict(list)
    for prompt, own in zip(prompts, tags or repeat(()), strict=tags is not None):
        if choices := choices_in(prompt):
            for name in ("all", *own):
                shares[name].append(1 / len(choices))
    return {name: round(sum(found) / len(found), 6) for name, found in shares.items()}


def has_ended(trained: int, total: int) -> bool:
    """Whether a resumed run has nothing left to do.

    :param trained: Prompts that its model or checkpoint was trained on.
    :param total: Prompts that the flags ask for.
    :raises SystemExit: if these are fewer.
    """
    if trained > total:
        raise SystemExit(
            f"--load_checkpoint: this run was trained on {trained} prompts already, and rows, --max_samples, "
            f"--num_episodes and --max_steps now make {total}: give at least as many, or start a new run with another "
            "--save_path"
        )
    return trained == total
