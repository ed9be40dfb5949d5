"""Make the demo's model: a Qwen2-Audio of under a million parameters that knows the answer's format, but no sound.

With ``--family`` it is of another family instead, of the same sizes; of Qwen2.5-Omni it is the thinker (``omni.py``).

The architecture, file layout, checkpoint names, special tokens and chat template behaviour are Qwen2-Audio's, so that
transformers and vLLM load it as they load the real one. Three things stand in for pretraining:

- a small byte-level tokenizer, trained on the demo's own sentences, in which every class is one token;
- an audio tower that starts as a bank of triangular filters, so that its output follows the spectrum of the sound;
- a short warm start of the language model on ``<answer>OPTION</answer>``, every option being equally right (see
  ``warm_start.py``). No label of any sound enters: listening is left for GRPO to learn.

    python examples/r1_aqa/demo/make_model.py --out_dir models/demo --seed 0

With ``--rows`` the questions and options are those of files as ``avqa.py`` reads them, for sounds of one's own.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aqa.common.arguments import Defaults, Parser
from aqa.common.console import say
from aqa.data.rows import AvqaError, parse_records
from aqa.data.tables import records_of
from demo import FAMILIES, refuse_foreign


def read_questions(path: Path) -> list[tuple[str, list[str]]]:
    """Questions and options of the usable rows of a file, as ``avqa.py`` reads it.

    :param path: Rows in any format.
    :raises SystemExit: if there is none, or the file cannot be read.
    """
    try:
        records = records_of(path)
    except OSError as error:
        raise SystemExit(f"--rows {path}: {error.strerror or error}") from error
    except AvqaError as error:
        raise SystemExit(f"--rows {error}") from error
    rows, problems = parse_records(records, enable_think=False)
    if not rows:
        raise SystemExit(f"--rows {path}: no usable row; the first: {problems[0].reason}")
    return [(row.question, row.choices) for row in rows]


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = Parser(description="Make the demo's tiny model.", formatter_class=Defaults)
    parser.add_argument("--out_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that the demo has made there")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen2_audio", help="what kind of model")
    parser.add_argument(
        "--rows",
        type=Path,
        nargs="+",
        help="files that avqa.py reads, whose questions and options it shall know; otherwise the demo's",
    )
    parser.add_argument(
        "--whisper", type=Path, metavar="WHEEL", help="package with Whisper's encoder, to be its tower (see whisper.py)"
    )
    parser.add_argument(
        "--sounds",
        type=Path,
        metavar="FOLDER",
        help="real recordings, without their answers: centre the projector on them, and warm start without any sound, "
        "an option's embedding in noise standing in its place and being the answer",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and warm start")
    parser.add_argument("--warm_start_steps", type=int, default=150, help="optimizer steps of the warm start; 0: none")
    parser.add_argument("--warm_start_batch_size", type=int, default=32, help="examples a step of the warm start")
    parser.add_argument("--warm_start_lr", type=float, default=3e-3, help="peak learning rate of the warm start")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = build_parser().parse_args(argv)
    if args.warm_start_steps < 0 or args.warm_start_batch_size < 1:
        raise SystemExit("--warm_start_steps must be at least 0 and --warm_start_batch_size at least 1.")
    refuse_foreign(args.out_dir, "model.safetensors")
    if not args.overwrite and (args.out_dir / "model.safetensors").exists():
        raise SystemExit(f"--out_dir {args.out_dir}: holds a model; --overwrite replaces it")
    rows = [question for path in args.rows or () for question in read_questions(path)]
    try:
        from demo.tiny_model import make_model  # torch and transformers take seconds to import

        make_model(args, rows)
    except KeyboardInterrupt:
        say("make_model.py: interrupted, nothing was written")
        sys.exit(130)


if __name__ == "__main__":
    main()
