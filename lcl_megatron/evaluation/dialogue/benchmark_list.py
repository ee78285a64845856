"""Which benchmarks are run and where they lie: a TOML file with a table for each.

::

    [vqav2]
    questions = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
    annotations = "vqav2/v2_mscoco_val2014_annotations.json"
    images = "coco/val2014"

    [textvqa]
    form = "vqav2"            # the benchmark whose files these are; without it the table's name
    questions = "textvqa/questions.json"
    images = "textvqa/images"

Paths are relative to the file.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcl_megatron.evaluation.dialogue.benchmark import Benchmark, BenchmarkError, BenchmarkFiles, Question
from lcl_megatron.evaluation.dialogue.benchmarks.known import known_benchmark
from lcl_megatron.evaluation.transfer.image_sets import FolderImages

KEYS = ("form", "questions", "annotations", "images", "split")


@dataclass(frozen=True)
class QuestionImages:
    """The images of questions, by number of the question: files of a folder, or bytes of the question file."""

    questions: list[Question]
    """Questions."""
    files: FolderImages | None
    """One name per question, empty where there is none; None = there is no folder."""

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.questions)

    def name(self, index: int) -> str:
        """Return the path of an image, or of which question it is."""
        question = self.questions[index]
        if question.image_data is not None or self.files is None:
            return f"image of question {question.identity}"
        return self.files.name(index)

    def read(self, index: int) -> bytes:
        """Return the encoded image of a question that has one; raises ``DataError``."""
        data = self.questions[index].image_data
        if data is not None:
            return data
        assert self.files is not None, "open_benchmarks asks for a folder where questions name images"
        return self.files.read(index)

    @property
    def fingerprint(self) -> str:
        """Hash of the files; raises ``DataError`` with the names of those that are missing."""
        named = [question.image for question in self.questions if question.image]
        return FolderImages(self.files.root, named).fingerprint if self.files else ""


@dataclass(frozen=True)
class BenchmarkRun:
    """A benchmark with its questions and images."""

    name: str
    """For tables and folders."""
    benchmark: Benchmark
    """What it is."""
    questions: list[Question]
    """At least one."""
    images: QuestionImages
    """Their images; all are there."""


def open_benchmarks(path: Path) -> list[BenchmarkRun]:
    """Return the benchmarks of a TOML file, their questions read and their images looked for.

    Raises:
        BenchmarkError: the file, or a file of a benchmark, is missing or damaged.
        DataError: images are missing.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BenchmarkError(f"there is no file {path}; write a table for every benchmark, see the docs") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} is not valid TOML: {error}") from error
    if not tables:
        raise BenchmarkError(f"{path} names no benchmark; write a table such as [vqav2] for each")
    return [_open(path, name, table) for name, table in tables.items()]


def _open(path: Path, name: str, table: Any) -> BenchmarkRun:
    where = f"{path}: [{name}]"
    if not isinstance(table, dict):
        raise BenchmarkError(f"{path}: {name} is no table; write [{name}] with questions = ... below it")
    unknown = [key for key in table if key not in KEYS]
    if unknown or not all(isinstance(value, str) for value in table.values()):
        raise BenchmarkError(
            f"{where} has {', '.join(unknown) or 'values that are no texts'}; known: {', '.join(KEYS)}"
        )
    if "questions" not in table:
        raise BenchmarkError(f"{where} has no questions; give the question file, or the folder of the benchmark")
    benchmark = known_benchmark(table.get("form", name))
    folder = path.parent
    annotations = folder / table["annotations"] if "annotations" in table else None
    questions = benchmark.read(BenchmarkFiles(folder / table["questions"], annotations, table.get("split", "")))
    if not questions:
        raise BenchmarkError(f"{where}: {folder / table['questions']} has no question")
    files = FolderImages(folder / table["images"], [q.image for q in questions]) if "images" in table else None
    if files is None and any(question.image for question in questions):
        raise BenchmarkError(f"{where} has no images; give the folder that the names of images are relative to")
    images = QuestionImages(questions, files)
    _ = images.fingerprint
    return BenchmarkRun(name, benchmark, questions, images)
