"""Choose and order training rows by the rates that ``select_data.py`` has measured.

GRPO learns nothing from a prompt whose responses are all right or all wrong, since their advantages are 0 (DAPO, Yu et
al. 2025), and not to listen from one that is answered right in silence, which AudioMCQ (He et al. 2025) keeps out of
its reinforcement learning. Easy rows first is the curriculum of SARI (Wen et al. 2025).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PASS_RATE = "pass_rate"  # share of a row's sampled responses that are right, 0 to 1
SILENT_PASS_RATE = "pass_rate_silent"  # the same with silence in place of the sound
NOTE = b"r1_aqa_pass_rates"  # key of the file's metadata: whose rates these are


def rate_columns(args: argparse.Namespace) -> list[str]:
    """The columns that the flags select by."""
    by_rate = args.pass_rate is not None or args.easy_first
    return [PASS_RATE] * by_rate + [SILENT_PASS_RATE] * (args.max_silent_pass_rate is not None)


def select_rows(rows: Any, source: str, args: argparse.Namespace, say: Callable[[str], object]) -> Any:
    """Leave out the rows that ``--pass_rate`` and ``--max_silent_pass_rate`` exclude.

    :param rows: A ``datasets.Dataset``.
    :param source: Its file or folder, for messages.
    :param say: Prints how many rows are left out, and why.
    :raises SystemExit: if rows have no rate, or none is left.
    """
    import numpy as np

    rates = {name: _read(rows, name, source) for name in rate_columns(args)}
    asked = _asked_model(source, args.prompt_split) if rates else None
    if asked and Path(asked).resolve() != Path(args.pretrain).resolve():
        say(f"WARNING: {source}: its pass rates are those of {asked}, not of --pretrain {args.pretrain}")
    least, most = args.pass_rate or (0.0, 1.0)
    silent = args.max_silent_pass_rate
    left, reasons = np.ones(len(rows), bool), []
    for name, is_out, why in (
        (SILENT_PASS_RATE, lambda rate: rate > silent, f"right without sound (above {silent})"),
        (PASS_RATE, lambda rate: rate < least, f"too hard (right in less than {least})"),
        (PASS_RATE, lambda rate: rate > most, f"too easy (right in more than {most})"),
    ):
        if name in rates:
            out = left & is_out(rates[name])
            left &= ~out
            reasons.append(f"{out.sum():,} {why}")
    if args.pass_rate is None and silent is None:
        return rows
    counts = f"{source}: of {len(rows):,} rows are left out: {', '.join(reasons)}"
    if not left.any():
        raise SystemExit(f"{counts}; none is left: widen --pass_rate or raise --max_silent_pass_rate")
    say(f"selected  {left.sum():,} rows; {counts}")
    return rows.select(np.flatnonzero(left))


def easy_first(rows: Any, source: str) -> Any:
    """Order rows by falling pass rate; rows of one rate stay in their order.

    :param rows: A ``datasets.Dataset``.
    """
    import numpy as np

    return rows.select(np.argsort(-_read(rows, PASS_RATE, source), kind="stable"))


def _asked_model(source: str, split: str) -> str | None:
    """The model whose rates a source has, where its file tells."""
    import pyarrow.parquet as pq

    path = Path(source.strip())
    path = path if path.is_file() else path / f"{split}.parquet"
    if path.suffix != ".parquet" or not path.is_file():
        return None
    note = (pq.read_schema(path).metadata or {}).get(NOTE)
    return json.loads(note)["model_path"] if note else None


def _read(rows: Any, name: str, source: str) -> np.ndarray:
    import numpy as np

    remedy = f"select_data.py measures it: --prompt_data must name the folder that it writes, not {source}"
    if name not in rows.column_names:
        raise SystemExit(f"{source}: has no column {name}; {remedy}")
    values = list(rows[name])
    bad = [i for i, rate in enumerate(values) if not (isinstance(rate, (int, float)) and 0 <= rate <= 1)]
    if bad:
        raise SystemExit(
            f"{source}: {len(bad)} of {len(rows)} rows have no {name} from 0 to 1 (row {bad[0]}: "
            f"{values[bad[0]]!r}); {remedy}"
        )
    return np.array(values, float)
