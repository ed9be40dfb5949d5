#!/usr/bin/env python3
"""A run as one page that opens anywhere: accuracy by question type, what is confused, clips to listen to, curves.

    python examples/r1_aqa/report.py results/demo/run
    python examples/r1_aqa/report.py RUN --compare OTHER_RUN result_before.json result_after.json

Writes report.html and metrics.csv into the run's folder. The page needs no network and no server. What was compared
once is compared again, until --compare names others.
"""

import argparse
import json
import os
from pathlib import Path

from aqa.common.arguments import Parser
from aqa.common.files import explain, write_atomically
from aqa.common.versions import require

COMPARED = "compared.json"  # in the run's folder: absolute paths


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run: holds metrics.jsonl")
    parser.add_argument(
        "--compare",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="folders of other runs, drawn over it, and result files of eval_mmau.py, of which each is compared with "
        "the first, and one in silence with the last that heard the sound; default: those of the last time",
    )
    parser.add_argument("--out", type=Path, help="file to write; default: report.html in the run's folder")
    parser.add_argument(
        "--groups",
        type=int,
        default=80,
        help="most groups to listen to; questions: twice as many (default: %(default)s)",
    )
    args = parser.parse_args()
    given, note = args.compare, args.run / COMPARED
    if given is None and note.is_file():
        known = [Path(path) for path in json.loads(note.read_text(encoding="utf-8"))]
        args.compare = [path for path in known if path.exists()]
        if known:
            print(f"beside it, as before: {', '.join(map(str, args.compare)) or 'nothing that is still there'}")
    for path in (args.run / "metrics.jsonl", *(args.compare or ())):
        if not path.exists():
            raise SystemExit(f"report.py: error: {path}: does not exist; the folder of a run holds metrics.jsonl")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    require("torch", "transformers", "matplotlib", "jinja2", "soundfile")
    # here, because numpy, matplotlib and transformers would make --help slow
    from aqa.evaluation.items import EvalError
    from aqa.report.page import write_report
    from aqa.report.run_data import ReportError

    out = args.out or args.run / "report.html"
    try:
        size = write_report(args.run, args.compare or [], out, args.groups)
        if given is not None and args.out is None:
            write_atomically(note, json.dumps([str(path.resolve()) for path in given]) + "\n")
    except (ReportError, EvalError) as error:
        raise SystemExit(f"report.py: error: {error}") from error
    except OSError as error:
        raise SystemExit(f"report.py: error: cannot write the report: {explain(error)}") from error
    print(f"{out} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
