"""Read prompts from several sources, and mix them by shares that are constant or change over a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets

SOURCE_COLUMN = "prompt_source"  # names each row's source if there are several


def read_sources(sources: str, split: str, strategy: Any, seed: int, needed: Sequence[str]) -> list[Dataset]:
    """Read each source's rows, with column types that allow the sources to be joined.

    If there are several, each row gets :data:`SOURCE_COLUMN`. A column whose type differs between sources is cast to
    the first source's type if it is needed, and otherwise removed. A column that a source lacks stays empty there.

    :param sources: Files or folders, separated by commas.
    :param needed: Columns that are read later.
    :raises SystemExit: if a source cannot be read, or a needed column cannot be cast.
    """
    from lightrft.utils import blending_datasets

    names = [source.strip() for source in sources.split(",")]
    parts = []
    for name in names:
        try:
            parts.append(blending_datasets(name, "1.0", strategy, seed, return_eval=False, train_split=split))
        except (ValueError, OSError) as error:  # half a copy, or no such format
            raise SystemExit(f"{name}: cannot be read ({error}); make or copy it again") from error
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
            except (ValueError, TypeError, NotImplementedError) as error:  # Arrow's exceptions derive from these
                raise SystemExit(
                    f"{label}: column {name!r} cannot be cast to its type in {labels[0]}: {error}"
                ) from error
        fitted.append(part.add_column(SOURCE_COLUMN, [label] * len(part)))
    return fitted


def mix(parts: Sequence[Dataset], shares: Sequence[float], seed: int) -> Dataset:
    """Draw rows from the sources by constant shares until one source is used up, as LightRFT does.

    :param shares: One per source; they add up to 1.
    """
    if len(parts) == 1:
        return parts[0]
    return interleave_datasets(list(parts), list(shares), seed=seed, stopping_strategy="first_exhausted")


def mix_drifting(
    parts: Sequence[Dataset], start: Sequence[float], end: Sequence[float], most: int, seed: int
) -> Dataset:
    """Order rows so that the sources' shares move from ``start`` to ``end``; see :func:`drifting_order`.

    :param most: Limit of rows, where all sources together have more.
    """
    sizes = [len(part) for part in parts]
    order = drifting_order(sizes, start, end, min(most, sum(sizes)), seed)
    return concatenate_datasets(list(parts)).select(order)


def drifting_order(
    sizes: Sequence[int], start: Sequence[float], end: Sequence[float], rows: int, seed: int
) -> list[int]:
    """Choose and order rows so that the sources' shares move linearly.

    The next row comes from the source that is furthest behind the sum of its shares so far, so any stretch of the order
    keeps the shares to within a row or two. Each source is shuffled, and shuffled again when it is used up.

    :param sizes: Rows of each source.
    :param start: Shares at the first row; they add up to 1.
    :param end: Shares at the last row.
    :param rows: Number of rows to choose.
    :return: Indices into the concatenation of all sources.
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
    """One line that says which share of the mixed rows each source has."""
    names, counts = np.unique(rows[SOURCE_COLUMN], return_counts=True)
    parts = ", ".join(f"{name} {count / len(rows):.1%}" for name, count in zip(names, counts, strict=True))
    return f"mix       {len(rows)} rows: {parts}"
