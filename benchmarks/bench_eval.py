#!/usr/bin/env python3
"""Questions a second of eval_mmau.py's engines against the published way: transformers, one question after another.

    python benchmarks/bench_eval.py --demo_dir results/demo

Work: greedy answers of up to 16 tokens to the same questions. Baseline: processor and ``generate`` for each question,
as in R1-AQA's and LightRFT's scripts (30 s of padding through the tower each time). Limits: every engine is faster than
the baseline and gives the same answers.
"""

import statistics
from collections.abc import Callable
from typing import Any

from harness import Report, make_parser, parse, ratio, timed

MAX_NEW_TOKENS = 16


def one_by_one(path: str, jobs: list[Any]) -> Callable[[], list[str]]:
    """The published way.

    :return: Answers them all.
    """
    import torch
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    from aqa.audio.decode import SAMPLING_RATE

    processor = AutoProcessor.from_pretrained(path)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer() -> list[str]:
        answers = []
        for job in jobs:
            inputs = processor(text=job.text, audio=job.load(), sampling_rate=SAMPLING_RATE, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            answers.append(processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], True))
        return answers

    return answer


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--questions", type=int, default=64, help="questions a round")
    args = parse(parser)

    from aqa.audio.decode import load_audio
    from aqa.common.console import output_to_log
    from aqa.evaluation import engines
    from aqa.evaluation.checkpoints import resolve_model
    from aqa.evaluation.engines import HFEngine, Job, Settings, load_processor, render
    from aqa.evaluation.items import make_items, read_rows

    report, data = Report("eval", args.rounds), args.demo_dir / "data"
    benchmark, rows = read_rows(data / "demo-test.json", "mmau")
    items = make_items(rows[: args.questions], benchmark, data, False)
    model = resolve_model(str(args.demo_dir / "model"), None)
    with output_to_log(report.log) as screen:
        processor = load_processor(model)
        jobs = [Job(i.index, render(processor, i.prompt), [i.audio], [len(load_audio(i.audio))], False) for i in items]

        def through(engine: Any) -> Callable[[], list[str]]:
            def answer() -> list[str]:
                done = {index: texts[0] for part in engine.answer(jobs, set()) for index, texts in part}
                return [done[job.index] for job in jobs]

            return answer

        def settings(size: int) -> Settings:
            return Settings(MAX_NEW_TOKENS, size, "float32", 1, 0)

        own = (model, processor, settings(256), jobs)
        ways = {
            "transformers, one by one": one_by_one(model.path, jobs),
            "hf, batch 1": through(HFEngine(model, processor, settings(1))),
            "hf, batch 32": through(HFEngine(model, processor, settings(32))),
            "vllm": through(engines.VLLMEngine(*own, engines.longest_sequence(*own))),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        answers = {name: way() for name, way in ways.items()}  # warms up, and shows that all say the same
        for round_ in range(args.rounds):
            for name, way in ways.items():
                seconds[name].append(timed(way)[0].wall)
            print(f"round {round_ + 1}/{args.rounds}", file=screen, flush=True)
    base = "transformers, one by one"
    table = {}
    for name, times in seconds.items():
        table[name] = {
            "questions_per_second": round(args.questions / statistics.median(times), 1),
            "ratio": round(ratio(seconds[base], times), 2),
            "same_answers": sum(a == b for a, b in zip(answers[base], answers[name], strict=True)),
        }
        print(
            f"{name:26}  {table[name]['questions_per_second']:8.1f} questions/s   {table[name]['ratio']:6.2f} x   "
            f"{table[name]['same_answers']}/{args.questions} same answers"
        )
    for name in [name for name in ways if name != base]:
        report.judge(f"evaluation, {name}: times one by one", table[name]["ratio"], at_least=1)
    same = min(row["same_answers"] for row in table.values())
    report.judge(f"evaluation: same answers, of {args.questions}", same, at_least=args.questions)
    report.finish(questions=args.questions, ways=table)


if __name__ == "__main__":
    main()
