"""Prompts of several sources: read so that they fit together, mixed by weights, weights that change over a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets

SOURCE_COLUMN = "prompt_source"  # which source a row is of, where there are several


def read_sources(sources: str, split: str, strategy: Any, seed: int, needed: Sequence[str]) -> list[Dataset]:
    """Each source's rows, with columns that fit together.

    Several sources get :data:`SOURCE_COLUMN`. A column that some lack is empty there; one that has different types is
    left out, unless it is needed: then it is cast to the first source's type.

    :param sources: Files or folders, with commas.
    :param split: Split.
    :param strategy: Prints what is read.
    :param seed: Seed of the run.
    :param needed: Columns that are read later.
    :raises SystemExit: if a needed column cannot be cast.
    """
    from lightrft.utils import blending_datasets

    names = [source.strip() for source in sources.split(",")]
    parts = [blending_datasets(name, "1.0", strategy, seed, return_eval=False, train_split=split) for name in names]
    if len(parts) == 1:
        return parts
    features: dict[str, list[Any]] = {}
    for part in parts:
        for name, kind in part.features.items():
            features.setdefault(name, []).append(kind)
    differing = [name for name, kinds in features.items() if any(kind != kinds[0] for kind in kinds)]
    short = [Path(name).stem for name in names]
    labels = short if len(set(short)) == len(short) else names
    fitted = []
    for part, label in zip(parts, labels, strict=True):
        for name in filter(part.column_names.__contains__, differing):
            if name not in needed:
                part = part.remove_columns(name)
                continue
            try:
                part = part.cast_column(name, features[name][0])
            except (ValueError, TypeError, NotImplementedError) as error:  # Arrow's are kinds of these
                raise SystemExit(f"{label}: its column {name!r} is not that of {labels[0]}: {error}") from error
        fitted.append(part.add_column(SOURCE_COLUMN, [label] * len(part)))
    return fitted


def mix(parts: Sequence[Dataset], shares: Sequence[float], seed: int) -> Dataset:
    """Rows drawn from sources by constant shares until the first source has no more, as LightRFT does.

    :param parts: From :func:`read_sources`.
    :param shares: Of each, their sum 1.
    :param seed: Of the draws.
    """
    if len(parts) == 1:
        return parts[0]
    return interleave_datasets(list(parts), list(shares), seed=seed, stopping_strategy="first_exhausted")


def mix_drifting(
    parts: Sequence[Dataset], start: Sequence[float], end: Sequence[float], most: int, seed: int
) -> Dataset:
    """Rows in the order in which a run shall use them, the sources' shares moving over it. See :func:`drifting_order`.

    :param parts: From :func:`read_sources`.
    :param start: Shares at the first row, their sum 1.
    :param end: Shares at the last.
    :param most: Most rows; without this limit as many as all sources have together.
    :param seed: Of each source's order.
    """
    sizes = [len(part) for part in parts]
    order = drifting_order(sizes, start, end, min(most, sum(sizes)), seed)
    return concatenate_datasets(list(parts)).select(order)


def drifting_order(
    sizes: Sequence[int], start: Sequence[float], end: Sequence[float], rows: int, seed: int
) -> list[int]:
    """Which rows to use, one after the other, so that the sources' shares move linearly.

    At each place the source comes next that is furthest behind the sum of its shares so far, so that any stretch of
    the order holds the asked-for shares, but for a row or two. A source is gone through in random order, and again in
    another one when it is used up.

    :param sizes: Rows of each source.
    :param start: Shares at the first place.
    :param end: Shares at the last.
    :param rows: Places.
    :param seed: Of the random orders.
    :return: Indices into all sources one behind the other.
    """
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *sizes])
    waiting: list[list[int]] = [[] for _ in sizes]
    behind = [0.0] * len(sizes)
    order = []
    for place in range(rows):
        t = place / max(rows - 1, 1)
        behind = [b + (1 - t) * first + t * last for b, first, last in zip(behind, start, end, strict=True)]
        source = max(range(len(sizes)), key=behind.__getitem__)
        behind[source] -= 1
        if not waiting[source]:
            waiting[source] = (offsets[source] + rng.permutation(sizes[source])).tolist()
        order.append(waiting[source].pop())
    return order


def describe_mix(rows: Dataset) -> str:
    """How many rows of each source there are.

    :param rows: Mixed rows with :data:`SOURCE_COLUMN`.
    """
    names, counts = np.unique(rows[SOURCE_COLUMN], return_counts=True)
    parts = ", ".join(f"{name} {count / len(rows):.1%}" for name, count in zip(names, counts, strict=True))
    return f"mix       {len(rows)} rows: {parts}"
