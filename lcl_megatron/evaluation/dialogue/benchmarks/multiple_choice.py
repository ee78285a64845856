"""Multiple-choice benchmarks: ScienceQA, MMBench and SEED-Bench.

==============  ==============================================  =================================================
benchmark       question file                                   answer file
==============  ==============================================  =================================================
``scienceqa``   problems.json, pid_splits.json beside it        ``{"acc", "correct", "count", "results", "outputs"}``
``mmbench``     mmbench_dev_*.tsv, images inside                table of index, question, options, prediction
``seed``        SEED-Bench.json                                 lines ``{"question_id": "1", "prediction": "A"}``
==============  ==============================================  =================================================
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcl_megatron.data.readers.records import get_field, get_text
from lcl_megatron.evaluation.dialogue.benchmark import (
    Benchmark,
    BenchmarkError,
    BenchmarkFiles,
    Measure,
    Question,
    Score,
    mean_by_image,
    means_by_category,
)
from lcl_megatron.evaluation.dialogue.benchmarks.files import (
    list_of,
    one_line,
    read_json,
    read_text,
    records_of,
    write_json,
    write_json_lines,
)
from lcl_megatron.evaluation.dialogue.benchmarks.spreadsheet import write_spreadsheet
from lcl_megatron.evaluation.dialogue.choices import LETTERS, choice_prompt, chosen_option

_MMBENCH_LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category", "split")
_MMBENCH_ROTATION = 1_000_000
"""The index of a question whose options are rotated is that of the question, plus a multiple of this."""


def read_scienceqa(files: BenchmarkFiles) -> list[Question]:
    """Return the questions of one split of ScienceQA (``test`` unless said otherwise).

    Images are called ``ID/image.png``, below the folder of the split.

    Raises:
        BenchmarkError: a file is missing or damaged, or has no such split.
    """
    split = files.split or "test"
    splits_path = files.annotations or files.questions.with_name("pid_splits.json")
    problems, splits = read_json(files.questions, dict), read_json(splits_path, dict)
    with records_of(splits_path):
        identities = get_field(splits, split, list)
    if not identities:
        raise BenchmarkError(f"{splits_path}: no questions in split {split}; give another one")
    questions = []
    for identity in identities:
        with records_of(files.questions):
            problem = get_field(problems, identity, dict)
            text = get_text(problem, "question", identity)
            options = [str(option) for option in get_field(problem, "choices", list, identity)]
            answer = get_field(problem, "answer", int, identity)
        if not 0 <= answer < len(options) <= len(LETTERS):
            raise BenchmarkError(
                f"{files.questions}: problem {identity} has answer {answer} of {len(options)} choices; fetch it again"
            )
        image = f"{identity}/{problem['image']}" if problem.get("image") else ""
        hint = str(problem.get("hint") or "")
        questions.append(
            Question(
                identity,
                choice_prompt(text, options, f"Context: {hint}" if hint else ""),
                image,
                answers=(LETTERS[answer],),
                category="image" if image else "text",
                record={"num_options": len(options), "right": answer},
            )
        )
    return questions


def write_scienceqa(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
    """Write what LLaVA's ``eval_science_qa.py --output-result`` writes; see ``Benchmark.write``."""
    chosen = [chosen_option(a, q.record["num_options"]) for q, a in zip(questions, answers, strict=True)]
    correct = sum(option == question.record["right"] for question, option in zip(questions, chosen, strict=True))
    result = {
        "acc": 100 * correct / len(questions),
        "correct": correct,
        "count": len(questions),
        "results": {q.identity: option for q, option in zip(questions, chosen, strict=True)},
        "outputs": {q.identity: answer.replace("\n", ". ") for q, answer in zip(questions, answers, strict=True)},
    }
    return [write_json(result, folder / "scienceqa.json")]


def score_scienceqa(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Return the accuracy over all questions, over those with and those without an image."""
    values = [
        float(chosen_option(answer, question.record["num_options"]) == question.record["right"])
        for question, answer in zip(questions, answers, strict=True)
    ]
    return means_by_category(questions, values)


def read_mmbench(files: BenchmarkFiles) -> list[Question]:
    """Return the questions of a table of MMBench, which holds its images in base64.

    Raises:
        BenchmarkError: the file is missing or damaged, or lacks a column.
    """
    # Images make fields of any size.
    csv.field_size_limit(1 << 30)
    table = csv.DictReader(io.StringIO(read_text(files.questions), newline=""), delimiter="\t")
    missing = [name for name in ("index", "question", "image", "A", "B") if name not in (table.fieldnames or ())]
    if missing:
        raise BenchmarkError(f"{files.questions}: no column {', '.join(missing)}; give the .tsv of MMBench")
    return [_mmbench_question(row, f"{files.questions}:{table.line_num}") for row in table]


def _mmbench_question(row: dict[str, str], where: str) -> Question:
    options: list[str] = []
    for letter in LETTERS[:4]:
        if _is_none(row.get(letter)):
            break
        options.append(row[letter])
    try:
        index, image = int(row["index"]), base64.b64decode(row["image"] or "", validate=True)
    except (ValueError, binascii.Error) as error:
        raise BenchmarkError(f"{where}: index or image is damaged ({error}); fetch the table again") from error
    hint = "" if _is_none(row.get("hint")) else row["hint"]
    return Question(
        index,
        choice_prompt(row["question"], options, hint),
        image_data=image,
        answers=() if _is_none(row.get("answer")) else (row["answer"],),
        category="" if _is_none(row.get("category")) else row["category"],
        record={name: value for name, value in row.items() if name not in _MMBENCH_LEFT_OUT},
    )


def _is_none(value: str | None) -> bool:
    return value is None or value.strip().lower() in ("", "nan", "none")


def write_mmbench(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
    """Write the table of answers: as .xlsx, which the server takes, where openpyxl is installed, and as .tsv.

    The columns are those of the question file without images and groups; ``prediction`` comes behind the options.
    """
    names = list(questions[0].record)
    place = max(names.index(letter) for letter in LETTERS[:4] if letter in names) + 1
    header = [*names[:place], "prediction", *names[place:]]
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        cells: list[Any] = [question.record[name] for name in names]
        cells[names.index("index")] = question.identity
        rows.append([*cells[:place], one_line(answer), *cells[place:]])
    return write_spreadsheet(header, rows, folder / "mmbench")


def score_mmbench(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Return the accuracy by letter, and with rotated options (CircularEval): right in every rotation, or wrong.

    An answer that names no letter is wrong here; the official evaluation asks a chat model what it may have meant,
    so that this is at most its number. Empty for the test split, which has no answers.
    """
    if not all(question.answers for question in questions):
        return {}
    right: dict[int, list[float]] = {}
    first: dict[int, Question] = {}
    for question, answer in zip(questions, answers, strict=True):
        num_options = sum(not _is_none(question.record.get(letter)) for letter in LETTERS[:4])
        chosen = chosen_option(answer, num_options)
        base = int(question.identity) % _MMBENCH_ROTATION
        first.setdefault(base, question)
        right.setdefault(base, []).append(float(chosen >= 0 and LETTERS[chosen] == question.answers[0]))
    bases = [first[base] for base in right]
    score = means_by_category(bases, [min(values) for values in right.values()], "circular_accuracy")
    sums = np.array([sum(values) for values in right.values()])
    counts = np.array([len(values) for values in right.values()], dtype=np.float64)
    return score | {"letter_accuracy": Measure(float(sums.sum() / counts.sum()), sums, counts)}


def read_seed(files: BenchmarkFiles) -> list[Question]:
    """Return the questions of SEED-Bench.

    An image question's image is its ``data_id``; a video question's is the frame ``QUESTION_ID.png`` that LLaVA's
    instructions cut out. ``split = "image"`` (the default of most papers) or ``"video"`` leaves the others out.

    Raises:
        BenchmarkError: the file is missing or damaged, or nothing is left.
    """
    content = read_json(files.questions, dict)
    types = {number: name for name, number in content.get("question_type", {}).items()}
    questions = []
    for number, entry in enumerate(list_of(content, "questions", files.questions)):
        where = f"questions[{number}]"
        with records_of(files.questions):
            identity, kind = get_field(entry, "question_id", (str, int), where), get_text(entry, "data_type", where)
            options = [get_text(entry, f"choice_{letter}", where) for letter in "abcd"]
            prompt = choice_prompt(get_text(entry, "question", where), options)
            image = get_text(entry, "data_id", where) if kind == "image" else f"{identity}.png"
            answer, category = get_text(entry, "answer", where), get_field(entry, "question_type_id", int, where)
        if files.split in ("", kind):
            name = str(types.get(category, category))
            questions.append(Question(identity, prompt, image, None, (answer,), name, {"kind": kind}))
    if not questions:
        raise BenchmarkError(f"{files.questions}: no question of data_type {files.split!r}; known: image, video")
    return questions


def write_seed(questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
    """Write the lines that SEED-Bench's server takes; see ``Benchmark.write``."""
    records = (
        {"question_id": question.identity, "prediction": answer}
        for question, answer in zip(questions, answers, strict=True)
    )
    return [write_json_lines(records, folder / "seed.jsonl")]


def score_seed(questions: Sequence[Question], answers: Sequence[str]) -> Score:
    """Return the accuracy over all questions, over image and video questions, and by type of question."""
    values = [float(answer == question.answers[0]) for question, answer in zip(questions, answers, strict=True)]
    score = means_by_category(questions, values)
    for kind in ("image", "video"):
        chosen = [index for index, question in enumerate(questions) if question.record["kind"] == kind]
        if chosen:
            score[kind] = mean_by_image([questions[i] for i in chosen], [values[i] for i in chosen])
    return score


SCIENCEQA = Benchmark("scienceqa", read_scienceqa, write_scienceqa, score_scienceqa)
MMBENCH = Benchmark("mmbench", read_mmbench, write_mmbench, score_mmbench)
SEED = Benchmark("seed", read_seed, write_seed, score_seed)
