"""Benchmarks with short free answers: VQAv2 (also TextVQA's files), VizWiz and GQA.

================  =========================================  ==========================================
benchmark         question file                              answer file
================  =========================================  ==========================================
``vqav2``         v2_OpenEnded_*_questions.json              ``[{"question_id": 1, "answer": "cat"}]``
``vizwiz``        val.json, test.json                        ``[{"image": "a.jpg", "answer": "cat"}]``
``gqa``           testdev_balanced_questions.json            ``[{"questionId": "1", "prediction": "cat"}]``
================  =========================================  ==========================================

Answers for VQAv2 and VizWiz are written as the VQA challenge cleans them, as LLaVA-1.5 does it; those for GQA in lower
case without a full stop at the end, because its score is equality of strings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcl_megatron.data.readers.records import get_field, get_text
from lcl_megatron.evaluation.dialogue.benchmark import (
    SHORT_ANSWER,
    Benchmark,
    BenchmarkError,
    BenchmarkFiles,
    Question,
    Score,
    means_by_category,
)
from lcl_megatron.evaluation.dialogue.benchmarks.files import list_of, read_json, records_of, write_json
from lcl_megatron.evaluation.dialogue.vqa_accuracy import clean_answer, vizwiz_accuracy, vqa_accuracy

_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def read_vqav2(files: BenchmarkFiles) -> list[Question]:
    """Return the questions of a file of the VQA challenge, with the answers if annotations are given.

    An image whose id is a number is called ``COCO_val2014_000000000042.jpg``, with the split of the file's
    ``data_subtype`` (``test-dev2015`` questions are about ``test2015`` images); else the id is its name, and ``.jpg``
    is added where it has no ending.

    Raises:
        BenchmarkError: a file is missing or damaged, or a question has no annotation.
    """
    content = read_json(files.questions, dict)
    subtype = str(content.get("data_subtype") or files.split).replace("test-dev", "test")
    annotations = {} if files.annotations is None else _annotations(files.annotations)
    questions = []
    for number, entry in enumerate(list_of(content, "questions", files.questions)):
        where = f"questions[{number}]"
        with records_of(files.questions):
            identity = get_field(entry, "question_id", (int, str), where)
            text = get_text(entry, "question", where)
            image = _coco_image(get_field(entry, "image_id", (int, str), where), subtype, files.questions)
        if annotations and identity not in annotations:
            raise BenchmarkError(
                f"{files.annotations}: no annotation of question {identity} of {files.questions}; "
                "give questions and annotations of the same split"
            )
        answers, category = annotations.get(identity, ((), ""))
        questions.append(Question(identity, f"{text}\n{SHORT_ANSWER}", image, answers=answers, category=category))
    return questions


def _coco_image(identity: int | str, subtype: str, path: Path) -> str:
    if isinstance(identity, str):
        return identity if "." in identity else f"{identity}.jpg"
    if not subtype:
        raise BenchmarkError(f"{path}: images have numbers, but no data_subtype says of which split; give --split")
    return f"COCO_{subtype}_{identity:012}.jpg"


def _annotations(path: Path) -> dict[int | str, tuple[tuple[str, ...], str]]:
    """Return answers and answer type by question."""
    found = {}
    for number, entry in enumerate(list_of(read_json(path, dict), "annotations", path)):
        where = f"annotations[{number}]"
        with records_of(path):
            identity = get_field(entry, "question_id", (int, str), where)
            category = entry.get("answer_type") or ""
        found[identity] = (_answer_texts(entry, path, where), str(category))
    return found


def _answer_texts(entry: dict[str, Any], path: Path, where: str) -> tuple[str, ...]:
    with records_of(path):
        return tuple(get_text(answer, "answer", f"{where}.answers") for answer in list_of(entry, "answers", path))


def write_vqav2(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
    """Write the answers as the VQA challenge's server takes them; see ``Benchmark.write``."""
    records = [
        {"question_id": question.identity, "answer": clean_answer(answer)}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return [write_json(records, folder / "vqav2.json")]


def score_vqav2(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Return the accuracy, over all and by answer type; empty without annotations."""
    return _scored(questions, answers, vqa_accuracy)


def read_vizwiz(files: BenchmarkFiles) -> list[Question]:
    """Return the questions of a file of VizWiz.

    Raises:
        BenchmarkError: the file is missing or damaged.
    """
    questions = []
    for number, entry in enumerate(read_json(files.questions, list)):
        where = f"entry {number}"
        if not isinstance(entry, dict):
            raise BenchmarkError(f"{files.questions}: {where} is no object; give val.json or test.json of VizWiz")
        with records_of(files.questions):
            image, text = get_text(entry, "image", where), get_text(entry, "question", where)
        answers = _answer_texts(entry, files.questions, where) if "answers" in entry else ()
        category = str(entry.get("answer_type") or "")
        prompt = f"{text}\n{_UNANSWERABLE}\n{SHORT_ANSWER}"
        questions.append(Question(image, prompt, image, answers=answers, category=category))
    return questions


def write_vizwiz(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
    """Write the answers as the server of VizWiz takes them; see ``Benchmark.write``."""
    records = [
        {"image": question.image, "answer": clean_answer(answer)}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return [write_json(records, folder / "vizwiz.json")]


def score_vizwiz(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Return the accuracy, over all and by answer type; empty for the test split, which has no answers."""
    return _scored(questions, answers, vizwiz_accuracy)


def _scored(questions: Sequence[Question], answers: Sequence[str], accuracy: Callable[..., float]) -> Score:
    """Return an accuracy against people's answers, over all and by answer type; empty where people's are unknown."""
    if not all(question.answers for question in questions):
        return {}
    values = [accuracy(answer, question.answers) for question, answer in zip(questions, answers, strict=True)]
    return means_by_category(questions, values)


def read_gqa(files: BenchmarkFiles) -> list[Question]:
    """Return the questions of a file of GQA.

    Raises:
        BenchmarkError: the file is missing or damaged.
    """
    questions = []
    for identity, entry in read_json(files.questions, dict).items():
        if not isinstance(entry, dict):
            raise BenchmarkError(f"{files.questions}: {identity} is no object; give *_questions.json of GQA")
        with records_of(files.questions):
            text, image = get_text(entry, "question", identity), get_text(entry, "imageId", identity)
        questions.append(
            Question(
                identity,
                f"{text}\n{SHORT_ANSWER}",
                f"{image}.jpg",
                answers=(entry["answer"],) if isinstance(entry.get("answer"), str) else (),
                category=_gqa_category(entry),
                record={"is_balanced": bool(entry.get("isBalanced", True))},
            )
        )
    return questions


def _gqa_category(entry: Mapping[str, Any]) -> str:
    """Return what GQA's own evaluation calls the question; empty where the file does not say it."""
    types = entry.get("types")
    if not isinstance(types, dict) or "structural" not in types:
        return ""
    return "open" if types["structural"] == "query" else "binary"


def _gqa_answer(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def write_gqa(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
    """Write the answers as GQA's ``eval.py`` takes them; see ``Benchmark.write``."""
    records = [
        {"questionId": question.identity, "prediction": _gqa_answer(answer)}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return [write_json(records, folder / "gqa.json")]


def score_gqa(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Return the accuracy over the balanced questions, and over binary and open ones; empty without answers."""
    pairs = [pair for pair in zip(questions, answers, strict=True) if pair[0].record["is_balanced"]]
    balanced = [question for question, _ in pairs]
    if not balanced or not all(question.answers for question in balanced):
        return {}
    values = [float(_gqa_answer(answer) == question.answers[0]) for question, answer in pairs]
    return means_by_category(balanced, values)


VQAV2 = Benchmark("vqav2", read_vqav2, write_vqav2, score_vqav2)
VIZWIZ = Benchmark("vizwiz", read_vizwiz, write_vizwiz, score_vizwiz)
GQA = Benchmark("gqa", read_gqa, write_gqa, score_gqa)
