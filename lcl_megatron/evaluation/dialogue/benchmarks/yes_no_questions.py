"""Benchmarks with yes or no for an answer: POPE and MME.

POPE's questions are ``coco_pope_{random,popular,adversarial}.json`` in one folder, one JSON object per line; its
answers are lines ``{"question": ..., "answer": ...}``, one file per category, in the order of the questions.

MME's questions lie in one folder per task, ``TASK/NAME.txt`` beside ``TASK/NAME.jpg``, or in
``TASK/questions_answers_YN`` and ``TASK/images``; every file has two lines ``question TAB Yes|No``. Its answers are
``TASK.txt`` with ``image TAB question TAB right TAB answer``, which ``calculation.py`` of its release reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from lcl_megatron.data.readers.records import get_field, get_text
from lcl_megatron.evaluation.dialogue.benchmark import (
    SHORT_ANSWER,
    Benchmark,
    BenchmarkError,
    BenchmarkFiles,
    Measure,
    Question,
    Score,
    mean_by_image,
)
from lcl_megatron.evaluation.dialogue.benchmarks.files import (
    one_line,
    read_json_lines,
    read_text,
    records_of,
    write_json_lines,
)
from lcl_megatron.evaluation.dialogue.yes_no import YesNo, mme_answer, mme_task_score, pope_answer, pope_counts

POPE_CATEGORIES = ("random", "popular", "adversarial")
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
"""Tasks of MME whose scores add up to "perception" (at most 2,000)."""
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""Tasks of MME whose scores add up to "cognition" (at most 800)."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_MME_INSTRUCTION = "Please answer yes or no."


def read_pope(files: BenchmarkFiles) -> list[Question]:
    """Return the questions of a folder of POPE, category after category.

    Raises:
        BenchmarkError: the folder has none of the files, or one is damaged.
    """
    found = [(category, files.questions / f"coco_pope_{category}.json") for category in POPE_CATEGORIES]
    found = [(category, path) for category, path in found if path.is_file()]
    if not found:
        raise BenchmarkError(
            f"{files.questions} has no coco_pope_CATEGORY.json ({', '.join(POPE_CATEGORIES)}); give the folder of them"
        )
    questions = []
    for category, path in found:
        for number, record in enumerate(read_json_lines(path), start=1):
            where = f"object {number}"
            with records_of(path):
                text, image = get_text(record, "text", where), get_text(record, "image", where)
                identity = get_field(record, "question_id", int, where)
                label = _label(get_text(record, "label", where), path, number)
            questions.append(
                Question(identity, f"{text}\n{SHORT_ANSWER}", image, None, (label,), category, {"question": text})
            )
    return questions


def write_pope(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
    """Write ``pope_CATEGORY.jsonl`` for POPE's ``evaluate.py``; see ``Benchmark.write``."""
    paths = []
    for category in dict.fromkeys(question.category for question in questions):
        records = (
            {"question": question.record["question"], "answer": answer}
            for question, answer in zip(questions, answers, strict=True)
            if question.category == category
        )
        paths.append(write_json_lines(records, folder / f"pope_{category}.jsonl"))
    return paths


def score_pope(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Return F1, accuracy, precision, recall and share of yes per category, and the mean F1 that LLaVA-1.5 reports."""
    per_category: Score = {}
    for category in dict.fromkeys(question.category for question in questions):
        chosen = [pair for pair in zip(questions, answers, strict=True) if pair[0].category == category]
        labels = [cast(YesNo, question.answers[0]) for question, _ in chosen]
        counts = pope_counts([answer for _, answer in chosen], labels)
        right = [float(pope_answer(answer) == label) for (_, answer), label in zip(chosen, labels, strict=True)]
        per_category |= {
            f"f1/{category}": Measure(counts.f1),
            f"accuracy/{category}": mean_by_image([question for question, _ in chosen], right),
            f"precision/{category}": Measure(counts.precision),
            f"recall/{category}": Measure(counts.recall),
            f"yes_ratio/{category}": Measure(counts.yes_ratio),
        }
    f1 = [measure.value for name, measure in per_category.items() if name.startswith("f1/")]
    right = [float(pope_answer(answer) == q.answers[0]) for q, answer in zip(questions, answers, strict=True)]
    return {"f1": Measure(sum(f1) / len(f1)), "accuracy": mean_by_image(questions, right), **per_category}


def read_mme(files: BenchmarkFiles) -> list[Question]:
    """Return the questions of MME's release, task after task, the two of an image one behind the other.

    Raises:
        BenchmarkError: a task's folder is damaged, or there is none.
    """
    questions: list[Question] = []
    for task in PERCEPTION + COGNITION:
        if (files.questions / task).is_dir():
            questions += _mme_task(files.questions, task)
    if not questions:
        raise BenchmarkError(
            f"{files.questions} has no folder of a task of MME ({', '.join(PERCEPTION[:3])}, ...); "
            "give MME_Benchmark_release_version"
        )
    return questions


def _mme_task(root: Path, task: str) -> list[Question]:
    texts = root / task / "questions_answers_YN"
    images = Path(task) / "images" if texts.is_dir() else Path(task)
    texts = texts if texts.is_dir() else root / task
    questions = []
    for path in sorted(texts.glob("*.txt")):
        image = next((name for s in IMAGE_SUFFIXES if (root / (name := images / f"{path.stem}{s}")).is_file()), None)
        if image is None:
            raise BenchmarkError(f"{path}: there is no image {root / images / path.stem}.jpg or .png for it")
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        if len(lines) != 2:
            raise BenchmarkError(f"{path}: {len(lines)} questions; MME asks two of every image")
        for number, line in enumerate(lines, start=1):
            question, _, answer = line.strip().rpartition("\t")
            label = _label(answer.strip().lower(), path, number)
            text = question.replace(_MME_INSTRUCTION, "").strip()
            questions.append(
                Question(
                    f"{task}/{path.stem}/{number}",
                    f"{text}\n{SHORT_ANSWER}",
                    image.as_posix(),
                    answers=(label,),
                    category=task,
                    record={"question": question.strip(), "image": image.name},
                )
            )
    return questions


def _label(label: str, path: Path, number: int) -> str:
    if label not in ("yes", "no"):
        raise BenchmarkError(f"{path}:{number}: the right answer is {label!r}; expected yes or no")
    return label


def write_mme(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
    """Write ``mme/TASK.txt`` for MME's ``calculation.py``; see ``Benchmark.write``."""
    (folder / "mme").mkdir(exist_ok=True)
    paths = []
    for task in dict.fromkeys(question.category for question in questions):
        lines = [
            "\t".join((q.record["image"], one_line(q.record["question"]), q.answers[0].capitalize(), one_line(answer)))
            for q, answer in zip(questions, answers, strict=True)
            if q.category == task
        ]
        paths.append(folder / "mme" / f"{task}.txt")
        paths[-1].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return paths


def score_mme(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Return the sums for perception and cognition as far as their tasks are there, and every task's score.

    Points, not shares: a task has up to 200.
    """
    tasks: dict[str, float] = {}
    for task in dict.fromkeys(question.category for question in questions):
        chosen = [pair for pair in zip(questions, answers, strict=True) if pair[0].category == task]
        labels = [cast(YesNo, question.answers[0]) for question, _ in chosen]
        tasks[task] = mme_task_score([answer for _, answer in chosen], labels).score
    right = [float(mme_answer(answer) == q.answers[0]) for q, answer in zip(questions, answers, strict=True)]
    score: Score = {}
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if found := [tasks[task] for task in members if task in tasks]:
            score[name] = Measure(float(np.sum(found)), percent=False)
    score["accuracy"] = mean_by_image(questions, right)
    return score | {f"task/{task}": Measure(value, percent=False) for task, value in tasks.items()}


POPE = Benchmark("pope", read_pope, write_pope, score_pope)
MME = Benchmark("mme", read_mme, write_mme, score_mme)
