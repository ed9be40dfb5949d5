"""Write the demo's data: synthetic clips as wav files, with questions in R1-AQA's and in MMAU's format.

Layout of the output folder::

    audios/*.wav            training clips
    train_qa.data           R1-AQA JSON lines: id, question_text, multi_choice, answer (index), dataset_name, audio_path
    test-audios/*.wav       test clips, one per test question, none of them in the training set
    demo-test.json          MMAU-style JSON list: id, audio_id, question, choices, answer (text), task, ...

One clip in ten has another sampling rate than 16 kHz and one in ten two channels, as real collections do.

    python examples/r1_aqa/demo/make_data.py --out_dir data/demo --seed 0
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aqa.common.arguments import Defaults, Parser
from demo import written
from demo.sounds import CLASSES, SAMPLING_RATE, synthesize

QUESTIONS = (
    "What is making the sound in the video?",
    "What is the source of the sound in the video?",
    "Which sound can be heard in the video?",
    "What do you hear in the audio?",
    "Based on the given audio, identify the source of the sound.",
)
NUM_OPTIONS = 4
OTHER_RATES = (22050, 44100, 48000)  # Hz
OTHER_RATE_SHARE = 0.1
STEREO_SHARE = 0.1
SPLITS = ("train", "test")


def draw_options(label: str, rng: np.random.Generator) -> list[str]:
    """Draw the options of one question: the right class and three others, in random order."""
    others = [name for name in CLASSES if name != label]
    options = [label, *rng.choice(others, NUM_OPTIONS - 1, replace=False)]
    return [str(options[i]) for i in rng.permutation(NUM_OPTIONS)]


def make_clip(label: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Make one clip in one of the shapes found in the wild.

    :return: Waveform of shape ``(samples,)`` or ``(samples, 2)``, and its sampling rate in Hz.
    """
    rate = int(rng.choice(OTHER_RATES)) if rng.random() < OTHER_RATE_SHARE else SAMPLING_RATE
    stereo = rng.random() < STEREO_SHARE
    wave = synthesize(label, rng, rate)
    if stereo:  # the sound somewhere between left and right
        pan = rng.uniform(0.4, 1.0)
        wave = np.stack([wave, wave * pan] if rng.random() < 0.5 else [wave * pan, wave], axis=1)
    return wave, rate


def write_clips(folder: Path, prefix: str, count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Write clips, the classes taking turns.

    :param folder: Folder for the wav files; made here.
    :param prefix: Start of every file name.
    :return: For each clip its file name and its class.
    """
    folder.mkdir(parents=True)
    clips = []
    for i in range(count):
        label = CLASSES[i % len(CLASSES)]
        wave, rate = make_clip(label, rng)
        # The name must not give the class away.
        name = f"{prefix}_{i:05d}.wav"
        soundfile.write(folder / name, wave, rate, subtype="PCM_16")
        clips.append((name, label))
    return clips


def train_rows(clips: list[tuple[str, str]], count: int, rng: np.random.Generator) -> list[dict]:
    """Ask about the training clips, every clip about equally often and never in the order of the classes.

    :param clips: File name and class of each clip.
    :return: Rows of R1-AQA's JSON lines.
    """
    rounds = -(-count // len(clips))
    order = np.concatenate([rng.permutation(len(clips)) for _ in range(rounds)])[:count]
    rows = []
    for i, clip in enumerate(order):
        name, label = clips[clip]
        options = draw_options(label, rng)
        rows.append(train_row(i, str(rng.choice(QUESTIONS)), options, label, f"audios/{name}"))
    return rows


def train_row(number: int, question: str, options: list[str], answer: str, file: str) -> dict:
    """One of R1-AQA's JSON lines.

    :param file: Path of the clip in the data folder.
    """
    return {
        "id": number,
        "question_text": question,
        "multi_choice": options,
        "answer": options.index(answer),
        "dataset_name": "AVQA",
        "audio_path": file,
    }


def test_rows(clips: list[tuple[str, str]], rng: np.random.Generator) -> list[dict]:
    """Ask one question about every test clip.

    :param clips: File name and class of each clip.
    :return: Entries of an MMAU-style JSON list.
    """
    rows = []
    for name, label in clips:
        question = str(rng.choice(QUESTIONS)).replace("video", "audio")
        rows.append(test_row(Path(name).stem, question, draw_options(label, rng), label, f"test-audios/{name}"))
    return rows


def test_row(name: str, question: str, options: list[str], answer: str, file: str) -> dict:
    """One entry of an MMAU-style JSON list.

    :param name: Of the question.
    :param file: Path of the clip in the data folder.
    """
    return {
        "id": name,
        "audio_id": f"./{file}",
        "question": question,
        "choices": options,
        "answer": answer,
        "dataset": "demo",
        "task": "sound",
        "split": "demo-test",
        "category": "Information Extraction",
        "sub-category": "Acoustic Source Inference",
        "difficulty": "easy",
    }


def make_data(out_dir: Path, seed: int, train_questions: int, train_clips: int, test_questions: int) -> None:
    """Write the whole data folder; it appears under its name only once it is complete.

    :param out_dir: Folder to write; one of the demo is replaced.
    :param seed: Seed of everything drawn. Training and test set have streams of their own.
    :param train_clips: Number of training clips; questions share them.
    :param test_questions: Number of test questions and test clips.
    """
    train_rng, test_rng = (np.random.default_rng([seed, stream]) for stream in range(len(SPLITS)))
    with written(out_dir, "demo-test.json") as folder:
        train = train_rows(write_clips(folder / "audios", "train", train_clips, train_rng), train_questions, train_rng)
        test = test_rows(write_clips(folder / "test-audios", "test", test_questions, test_rng), test_rng)
        (folder / "train_qa.data").write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
        (folder / "demo-test.json").write_text(json.dumps(test, indent=1) + "\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Write the demo's synthetic audio question answering set.",
        formatter_class=Defaults,
    )
    parser.add_argument("--out_dir", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn")
    parser.add_argument("--train_questions", type=int, default=1280, help="number of training questions")
    parser.add_argument("--train_clips", type=int, default=480, help="number of training clips, shared by questions")
    parser.add_argument("--test_questions", type=int, default=240, help="number of test questions, each with a clip")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    counts = {name: getattr(args, name) for name in ("train_questions", "train_clips", "test_questions")}
    if min(counts.values()) < 1:
        raise SystemExit(f"Every count must be at least 1, got {counts}.")
    start = time.perf_counter()
    make_data(args.out_dir, args.seed, **counts)
    print(
        f"demo data: {args.train_questions} training questions on {args.train_clips} clips, {args.test_questions} test "
        f"questions, {len(CLASSES)} classes, {time.perf_counter() - start:.1f} s -> {args.out_dir}"
    )


if __name__ == "__main__":
    main()
