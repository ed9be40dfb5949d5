#!/usr/bin/env python3
"""Selection by select_data.py: does it find questions that need no sound, and does training without them gain?

    python benchmarks/select_rows.py --demo_dir results/demo

Work: half of the demo's training questions get a sentence that gives the answer away. The demo's model learns to read
it from the warm start's questions and sounds, which are drawn independently, so it knows nothing of sounds. Its pass
rates in silence select; then it is trained on all rows, and in half the steps on the selected ones. Both are measured
on the demo's held-out questions, which give nothing away. The same command goes on where it was interrupted. Limits:
precision and recall of at least 0.95; held-out accuracy of the selected rows' run at least that of the other one.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from harness import EXAMPLE, Report, make_parser, parse

MOST_SILENT = 0.5
TRAINING = (
    *("--rollout_batch_size", 16, "--n_samples_per_prompt", 8, "--train_batch_size", 128, "--generate_max_len", 16),
    *("--micro_train_batch_size", 32, "--micro_rollout_batch_size", 32, "--actor_learning_rate", 1e-3, "--no-report"),
    *("--save_steps", 50, "--max_ckpt_num", 1),
)


def run(done: Path, script: str, *args: object) -> None:
    """Run one of the example's scripts, unless its result is there.

    :param done: File that it writes last.
    """
    if done.is_file():
        return print(f"{done}: reused", flush=True)
    print(f"== {script} -> {done}", flush=True)
    if subprocess.run([sys.executable, str(EXAMPLE / script), *map(str, args)]).returncode:
        raise SystemExit(f"{script} failed; the same command goes on")


def write_questions(demo: Path, out: Path) -> set[int]:
    """Write the questions, and prepare them.

    :return: Ids of the questions that give their answer away.
    """
    rng = np.random.default_rng(0)
    rows = [json.loads(line) for line in (demo / "data" / "train_qa.data").read_text().splitlines()]
    given = set(rng.permutation(len(rows))[: len(rows) // 2].tolist())
    for i in given:
        rows[i]["question_text"] += f" The answer is {rows[i]['multi_choice'][rows[i]['answer']]}."
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ("--input_jsonl", out / "rows.jsonl", "--audio_dir", demo / "data")
    run(out / "rows" / "train.parquet", "data_preprocess/avqa.py", *source, "--local_save_dir", out / "rows")
    return {rows[i]["id"] for i in given}


def make_start_model(demo: Path, start: Path) -> None:
    """Teach the demo's model to read an answer that a question gives away, and to guess evenly otherwise."""
    if start.is_dir():
        return
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    from demo.make_data import QUESTIONS, draw_options
    from demo.sounds import CLASSES
    from demo.tiny_model import save
    from demo.warm_start import warm_start

    rng = np.random.default_rng(1)
    rows = []
    for number in range(2000):
        answer = str(rng.choice(CLASSES))
        hint = f" The answer is {answer}." if number % 2 else ""
        rows.append((str(rng.choice(QUESTIONS)) + hint, draw_options(answer, rng)))

    def right_of(question: str, options: list[str]) -> list[str]:
        told = [option for option in options if question.endswith(f" The answer is {option}.")]
        return told or options

    processor = AutoProcessor.from_pretrained(demo / "model")
    model = Qwen2AudioForConditionalGeneration.from_pretrained(demo / "model")
    warm_start(model, processor, 150, 32, 3e-3, seed=1, rows=rows, right_of=right_of)
    save(model, processor, start)


def evaluate(demo: Path, out: Path, model: Path, *extra: object) -> float:
    result = out / f"{model.name}{'_silent' if extra else ''}.json"
    questions = ("--data_file", demo / "data" / "demo-test.json", "--audio_dir", demo / "data")
    flags = ("--model_path", model, "--out_file", result, "--max_new_tokens", 16, *extra)
    run(result, "eval_mmau.py", *questions, *flags)
    return json.loads(result.with_suffix(".score.json").read_text())["accuracy"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out_dir", type=Path, default=Path("results/select"), help="everything goes here")
    parser.add_argument("--steps", type=int, default=200, help="of the run on all rows (default: %(default)s)")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="of select_data.py")
    parser.add_argument("--seed", type=int, default=0, help="of both trainings")
    args = parse(parser)
    demo, out, report = args.demo_dir, args.out_dir, Report("select", 1)
    given = write_questions(demo, out)
    start, rated = out / "start", out / "rated"
    make_start_model(demo, start)
    asked = ("--model_path", start, "--data_file", out / "rows", "--out_dir", rated, "--max_new_tokens", 16)
    run(rated / "train.parquet", "select_data.py", *asked, "--engine", args.engine)

    import pyarrow.parquet as pq

    rows = pq.read_table(rated / "train.parquet", columns=["extra_info", "pass_rate_silent"]).to_pylist()
    found = {row["extra_info"]["id"] for row in rows if row["pass_rate_silent"] > MOST_SILENT}
    accuracies = {"start model": evaluate(demo, out, start)}
    for name, steps, flags in (
        ("all", args.steps, ()),
        ("selected", args.steps // 2, ("--max_silent_pass_rate", MOST_SILENT)),
    ):
        model = out / f"{name}_{steps}_seed{args.seed}"
        flags += ("--load_checkpoint",) if (model / "_actor" / "latest").is_file() else ()
        source = ("--pretrain", start, "--prompt_data", rated, "--save_path", model, "--seed", args.seed)
        run(model / "r1_aqa.json", "train_colocate.py", *source, "--max_steps", steps, *flags, *TRAINING)
        accuracies[f"{name} rows, {steps} steps"] = evaluate(demo, out, model)
        accuracies[f"{name} rows, in silence"] = evaluate(demo, out, model, "--silent_audio")
    for name, accuracy in accuracies.items():
        print(f"{name:<28} held-out accuracy {accuracy:.3f}")
    _, every, _, selected, _ = accuracies.values()
    report.judge("selection: precision", len(found & given) / max(1, len(found)), at_least=0.95)
    report.judge("selection: recall", len(found & given) / len(given), at_least=0.95)
    report.judge("selection: accuracy beyond that of all rows, in half the steps", selected - every, at_least=0)
    report.finish(rows=len(rows), found=len(found), accuracies=accuracies)


if __name__ == "__main__":
    main()
