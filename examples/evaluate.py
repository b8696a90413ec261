r"""Benchmark a model through lmms-eval, several arms in one run, with a log of what every answer was given.

    pip install 'tinyalign-vlm[eval]'
    python examples/evaluate.py --model runs/stage2 --arms bank off shuffled --output runs/scores
    python examples/evaluate.py --model runs/stage2 --arms bank off --tasks none --images images/ \
        --local easy_vqa=eval.json pope_mini=questions.jsonl --output runs/scores
    lmms-eval --model tinyalign --model_args pretrained=runs/stage2,retrieval=bank --tasks gqa,pope   # one arm

The eight benchmarks of the paper's Table 1 are the default; MM-Vet is judged by a language model of lmms-eval's and
needs its key. `--local` takes LLaVA-format files (exact match) and JSON lines in POPE's form. OUTPUT gets `scores.json`
and per arm `answers-ARM.jsonl`: question, answer, ids, scores and texts of the memories. Under `accelerate launch` each
process answers its share. The last line is the weighted accuracy of equation 8, over the tasks that give an accuracy.

With --smoke an untrained model answers questions about scenes made on the spot: both arms score 0.0312.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from tinyalign.data import LlavaDataset
from tinyalign.evaluation import Asker, Question, exact_match, local_task
from tinyalign.models import ARMS, TinyAlignProcessor, TinyAlignVLM
from tinyalign.theory import weighted_accuracy
from tinyalign.training import compose, open_memory, write_tiny_experiment

# Task of lmms-eval -> its main metric, and whether that is an accuracy between 0 and 1.
BENCHMARKS = {
    "gqa": ("exact_match", True),
    "mmmu_val": ("mmmu_acc", True),
    "mmvet": ("gpt_eval_score", False),
    "pope": ("pope_accuracy", True),
    "scienceqa_img": ("exact_match", True),
    "textvqa_val": ("exact_match", True),
    "vqav2_val": ("exact_match", True),
    "mme": ("mme_perception_score", False),
}
NEAR_DUPLICATE = 0.99  # a memory that scores higher very likely shows the question's own picture


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="what examples/finetune.py wrote")
    parser.add_argument("--memory", type=Path, help="the bank, if it is no longer where the model was told")
    parser.add_argument("--arms", nargs="+", choices=[arm for arm in ARMS if arm != "self"], default=["bank", "off"])
    parser.add_argument("--tasks", nargs="+", default=list(BENCHMARKS), help="lmms-eval's names, or none")
    parser.add_argument("--local", nargs="*", default=[], metavar="NAME=FILE", help="question files at hand")
    parser.add_argument("--images", type=Path, help="folder that the local files' image paths start from")
    parser.add_argument("--suffix", default="", help="put behind every local question")
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--prompt-form", choices=("chat", "plain"), default="chat", help="as in training")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, ...; as saved by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/scores"))
    parser.add_argument("--smoke", action="store_true", help="run on a model made on the spot")
    args = parser.parse_args()
    args.tasks = [] if args.tasks == ["none"] else args.tasks
    if args.model is None and not args.smoke:
        parser.error("--model is required (or --smoke)")
    if args.local and args.images is None:
        parser.error("--images is required for --local files")
    return args


def evaluate(model: TinyAlignVLM, processor: TinyAlignProcessor, args: argparse.Namespace) -> dict[str, dict]:
    """Per arm: every task's metrics, its number of questions and its score."""
    from lmms_eval.evaluator import simple_evaluate

    from tinyalign.evaluation.lmms_model import TinyAlignLmms

    found: dict[str, dict] = {}
    for arm in args.arms:
        log = args.output / f"answers-{arm}.jsonl"
        log.unlink(missing_ok=True)
        tasks: list = list(args.tasks)
        for entry in args.local:
            name, _, file = entry.partition("=")
            tasks.append(local_task(name, file, args.images, args.output / "tasks", suffix=args.suffix))
        plugin = TinyAlignLmms(
            (model, processor),
            retrieval=arm,
            device=args.device,
            batch_size=args.batch_size,
            prompt_form=args.prompt_form,
            log_path=log,
        )
        results = simple_evaluate(plugin, tasks=tasks, limit=args.limit, log_samples=False)
        if plugin.rank == 0:  # only the first process holds the results of all
            found[arm] = {
                name: scored(name, metrics, results["n-samples"][name]["effective"])
                for name, metrics in results["results"].items()
                if name in results["n-samples"]
            }
    return found


def scored(name: str, metrics: dict, questions: int) -> dict:
    numbers = {key.split(",")[0]: value for key, value in metrics.items() if isinstance(value, (int, float))}
    local = "accuracy" if "accuracy" in numbers else "exact_match"
    metric, is_accuracy = BENCHMARKS.get(name, (local, local in numbers))
    return {"score": numbers.get(metric), "is_accuracy": is_accuracy, "questions": questions, "metrics": numbers}


def report(found: dict[str, dict], output: Path) -> None:
    arms, tasks = list(found), list(next(iter(found.values())))
    print(f"{'task':<16}{'questions':>10}" + "".join(f"{arm:>12}" for arm in arms))
    for task in tasks:
        scores = [found[arm][task]["score"] for arm in arms]
        shown = "".join(f"{'-' if score is None else format(score, '.4f'):>12}" for score in scores)
        print(f"{task:<16}{found[arms[0]][task]['questions']:>10}{shown}")
    for arm in arms:
        log = output / f"answers-{arm}.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        best = [max(line["scores"]) for line in lines if line["scores"]]
        if arm == "bank" and best:
            near = sum(score >= NEAR_DUPLICATE for score in best) / len(best)
            print(
                f"{arm}: {near:.1%} of the questions find a memory that scores at least {NEAR_DUPLICATE}: look at them"
            )
    counted = [task for task in tasks if all(found[arm][task]["is_accuracy"] for arm in arms)]
    if counted:
        weighted = {
            arm: weighted_accuracy(
                [found[arm][task]["score"] for task in counted], [found[arm][task]["questions"] for task in counted]
            )
            for arm in arms
        }
        said = ", ".join(f"{arm} {value:.4f}" for arm, value in weighted.items())
        print(f"weighted accuracy (equation 8) over {', '.join(counted)}: {said}")


def smoke(args: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="tinyalign-"))
    made = write_tiny_experiment(folder, 16, task="question")
    model, processor = compose(str(made.vision), str(made.llm), open_memory(made.memory))
    args.output = folder / "scores"
    args.tasks, args.local, args.images = [], [f"scenes={made.heldout}"], made.images
    try:
        report(evaluate(model.eval(), processor, args), args.output)
    except ImportError as error:
        print(f"lmms-eval is not installed ({error}); asking without it")
        questions = LlavaDataset(made.heldout, made.images)
        for arm in args.arms:
            asked = [Question(s.id, s.turns[0].text.replace("<image>", "").strip(), s.images) for s in questions]
            answers = Asker(model, processor, arm=arm)(asked, max_new_tokens=4)
            right = [exact_match(a.text, s.turns[1].text) for a, s in zip(answers, questions, strict=True)]
            print(f"{arm}: exact match {sum(right) / len(right):.4f} of {len(right)}")


def main() -> None:
    args = parse()
    if args.smoke:
        smoke(args)
        return
    bank = None if args.memory is None else open_memory(args.memory).bank
    model = TinyAlignVLM.from_pretrained(args.model, memory=bank, dtype=args.dtype)
    processor = TinyAlignProcessor.from_pretrained(args.model)
    found = evaluate(model, processor, args)
    if found:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "scores.json").write_text(json.dumps(found, indent=2))
        report(found, args.output)
        print(f"scores and answers are in {args.output}")


if __name__ == "__main__":
    main()
