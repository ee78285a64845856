"""Oracles: files in the forms that the benchmarks publish, written by hand; the answer files that their servers and
scripts document; scores worked out by hand.
"""

from __future__ import annotations

import base64
import csv
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.evaluation.dialogue.benchmark import BenchmarkError, BenchmarkFiles, Question
from lcl_megatron.evaluation.dialogue.benchmarks.files import read_json_lines
from lcl_megatron.evaluation.dialogue.benchmarks.known import BENCHMARKS, known_benchmark

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def read(name: str, questions: Path, **others: Any) -> list[Question]:
    return BENCHMARKS[name].read(BenchmarkFiles(questions, **others))


def answer_file(name: str, questions: Sequence[Question], answers: Sequence[str], folder: Path) -> list[Path]:
    return BENCHMARKS[name].write(questions, answers, folder)


def values(name: str, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    return {key: measure.value for key, measure in BENCHMARKS[name].score(questions, answers).items()}


@pytest.fixture
def vqav2(tmp_path: Path) -> tuple[Path, Path]:
    questions = [
        {"image_id": 42, "question": "Is it?", "question_id": 42000},
        {"image_id": 7, "question": "How many?", "question_id": 7001},
    ]
    annotations = [
        {"question_id": 7001, "answer_type": "number", "answers": [{"answer": "2"}] * 3 + [{"answer": "three"}] * 7},
        {"question_id": 42000, "answer_type": "yes/no", "answers": [{"answer": "yes"}] * 10},
    ]
    return (
        write(tmp_path / "questions.json", {"data_subtype": "val2014", "questions": questions}),
        write(tmp_path / "annotations.json", {"annotations": annotations}),
    )


def test_vqav2(vqav2: tuple[Path, Path], tmp_path: Path) -> None:
    questions = read("vqav2", vqav2[0], annotations=vqav2[1])
    assert [question.image for question in questions] == [
        "COCO_val2014_000000000042.jpg",
        "COCO_val2014_000000000007.jpg",
    ]
    assert questions[0].text == "Is it?" + SHORT
    (path,) = answer_file("vqav2", questions, ["Yes.", "two"], tmp_path)
    assert json.loads(path.read_text()) == [
        {"question_id": 42000, "answer": "yes"},
        {"question_id": 7001, "answer": "2"},
    ]
    # All ten say "yes", so that spelling counts; three of ten say "2": 0.9 by the mean over subsets.
    assert values("vqav2", questions, ["yes", "two"]) == pytest.approx(
        {"accuracy": 0.95, "accuracy/number": 0.9, "accuracy/yes/no": 1.0}
    )


def test_vqav2_without_annotations_has_no_score(vqav2: tuple[Path, Path]) -> None:
    assert values("vqav2", read("vqav2", vqav2[0]), ["yes", "2"]) == {}


def test_vqav2_of_the_test_server(tmp_path: Path) -> None:
    content = {"data_subtype": "test-dev2015", "questions": [{"image_id": 1, "question": "?", "question_id": 1}]}
    (question,) = read("vqav2", write(tmp_path / "q.json", content))
    assert question.image == "COCO_test2015_000000000001.jpg"


def test_files_of_textvqa_and_vizwiz_in_the_form_of_vqav2(shared_data: Path) -> None:
    folder = shared_data / "upstream_samples" / "vqa"
    for name, image in (("textvqa", "003a8ae2ef43b901.jpg"), ("vizwiz", "VizWiz_val_00000000.jpg")):
        questions = read(
            "vqav2",
            folder / f"{name}_val_questions_first20.json",
            annotations=folder / f"{name}_val_annotations_first20.json",
        )
        assert len(questions) == 20
        assert questions[0].image == image
        # Six of ten say "unanswerable" in VizWiz's first question, and so on: the most frequent answer is never wrong.
        most_frequent = [max(question.answers, key=question.answers.count) for question in questions]
        assert 0.5 < values("vqav2", questions, most_frequent)["accuracy"] <= 1.0


def test_vizwiz(tmp_path: Path) -> None:
    entries = [
        {"image": "a.jpg", "question": "What?", "answers": [{"answer": "dog"}] * 10, "answer_type": "other"},
        {"image": "b.jpg", "question": "Who?", "answers": [{"answer": "the end"}] * 10, "answer_type": "other"},
    ]
    questions = read("vizwiz", write(tmp_path / "val.json", entries))
    assert questions[0].text.split("\n")[1:] == [
        "When the provided information is insufficient, respond with 'Unanswerable'.",
        SHORT.strip(),
    ]
    (path,) = answer_file("vizwiz", questions, ["A dog", "the end"], tmp_path)
    assert json.loads(path.read_text()) == [{"image": "a.jpg", "answer": "dog"}, {"image": "b.jpg", "answer": "end"}]
    assert values("vizwiz", questions, ["A dog", "the end"])["accuracy"] == 0.5


def test_gqa(tmp_path: Path) -> None:
    def entry(answer: str, structural: str, balanced: bool = True) -> dict[str, Any]:
        types = {"structural": structural, "semantic": "attr"}
        return {"question": "Q?", "imageId": "n1", "answer": answer, "isBalanced": balanced, "types": types}

    content = {"10": entry("red", "query"), "11": entry("no", "verify"), "12": entry("cat", "query", balanced=False)}
    questions = read("gqa", write(tmp_path / "testdev.json", content))
    assert (questions[0].image, questions[0].text) == ("n1.jpg", "Q?" + SHORT)
    (path,) = answer_file("gqa", questions, ["Red.", "Yes", "dog"], tmp_path)
    assert json.loads(path.read_text())[0] == {"questionId": "10", "prediction": "red"}
    # eval.py counts balanced questions only.
    assert values("gqa", questions, ["Red.", "Yes", "dog"]) == {
        "accuracy": 0.5,
        "accuracy/binary": 0.0,
        "accuracy/open": 1.0,
    }


def test_scienceqa(tmp_path: Path) -> None:
    problems = {
        "4": {"question": "Which?", "choices": ["west", "east"], "answer": 1, "hint": "", "image": "image.png"},
        "5": {"question": "What?", "choices": ["a", "b", "c"], "answer": 2, "hint": "See.", "image": None},
        "6": {"question": "No.", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None},
    }
    write(tmp_path / "pid_splits.json", {"test": ["5", "4"], "train": ["6"]})
    questions = read("scienceqa", write(tmp_path / "problems.json", problems))
    assert [(q.identity, q.image, q.has_image) for q in questions] == [("5", "", False), ("4", "4/image.png", True)]
    assert questions[0].text == "Context: See.\nWhat?\nA. a\nB. b\nC. c" + LETTER
    (path,) = answer_file("scienceqa", questions, ["The answer is B.", "B"], tmp_path)
    assert json.loads(path.read_text()) == {
        "acc": 50.0,
        "correct": 1,
        "count": 2,
        "results": {"5": 1, "4": 1},
        "outputs": {"5": "The answer is B.", "4": "B"},
    }
    assert values("scienceqa", questions, ["The answer is B.", "B"]) == {
        "accuracy": 0.5,
        "accuracy/image": 1.0,
        "accuracy/text": 0.0,
    }


def test_pope(tmp_path: Path) -> None:
    for category, labels in (("adversarial", ["yes", "no"]), ("random", ["no", "no"])):
        lines = [
            {"question_id": n, "image": f"{n}.jpg", "text": f"Is there {n}?", "label": label}
            for n, label in enumerate(labels, start=1)
        ]
        write(tmp_path / f"coco_pope_{category}.json", "\n".join(map(json.dumps, lines)))
    questions = read("pope", tmp_path)
    assert [question.category for question in questions] == ["random"] * 2 + ["adversarial"] * 2
    answers = ["Yes", "No", "Yes", "Yes"]
    paths = answer_file("pope", questions, answers, tmp_path)
    assert [path.name for path in paths] == ["pope_random.jsonl", "pope_adversarial.jsonl"]
    assert json.loads(paths[0].read_text().splitlines()[0]) == {"question": "Is there 1?", "answer": "Yes"}
    score = values("pope", questions, answers)
    # adversarial: one true and one false yes, F1 2/3; random: one false yes and no true one, F1 0.
    assert score["f1"] == pytest.approx(1 / 3)
    assert score["accuracy"] == 0.5
    assert (score["precision/adversarial"], score["recall/adversarial"], score["yes_ratio/adversarial"]) == (0.5, 1, 1)


@pytest.mark.parametrize("separate", [False, True])
def test_mme(tmp_path: Path, separate: bool) -> None:
    release = tmp_path / "MME"
    for task, label in (("existence", "Yes"), ("code_reasoning", "No")):
        texts = release / task / ("questions_answers_YN" if separate else "")
        images = release / task / ("images" if separate else "")
        write(
            texts / "0001.txt", f"Is it A? Please answer yes or no.\t{label}\nIs it B? Please answer yes or no.\tNo\n"
        )
        write(images / "0001.png", "an image")
    questions = read("mme", release)
    assert [question.category for question in questions] == ["existence"] * 2 + ["code_reasoning"] * 2
    assert questions[0].text == "Is it A?" + SHORT
    assert (release / questions[0].image).is_file()
    answers = ["yes", "no", "No\tway", "Yes"]
    paths = answer_file("mme", questions, answers, tmp_path)
    assert paths[1].read_text().splitlines()[0] == "0001.png\tIs it A? Please answer yes or no.\tNo\tNo way"
    assert [path.name for path in paths] == ["existence.txt", "code_reasoning.txt"]
    score = values("mme", questions, answers)
    assert (score["perception"], score["cognition"], score["accuracy"]) == (200.0, 50.0, 0.75)
    assert (score["task/existence"], score["task/code_reasoning"]) == (200.0, 50.0)


@pytest.fixture
def mmbench(tmp_path: Path) -> Path:
    header = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    image = base64.b64encode(b"JPEG" * 50_000).decode()
    rows = [
        [1, "What?", "nan", "cat", "dog", "", "", "B", "animal", image, "s", "l", "", "dev"],
        [1000001, "What?", "nan", "dog", "cat", "", "", "A", "animal", image, "s", "l", "", "dev"],
        [2, "Who?", "Look.", "you", "me", "she", "", "C", "person", image, "s", "l", "", "dev"],
    ]  # fmt: skip
    with (tmp_path / "mmbench.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    return tmp_path / "mmbench.tsv"


def test_mmbench(mmbench: Path, tmp_path: Path) -> None:
    questions = read("mmbench", mmbench)
    assert questions[0].image_data == b"JPEG" * 50_000
    assert questions[2].text == "Look.\nWho?\nA. you\nB. me\nC. she" + LETTER
    answers = ["B", "B", "C. she"]
    paths = answer_file("mmbench", questions, answers, tmp_path)
    table = list(csv.reader(paths[0].open(), delimiter="\t"))
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert table[3] == ["2", "Who?", "you", "me", "she", "", "C. she", "C"]
    # Right once, wrong with rotated options; right.
    assert values("mmbench", questions, answers) == pytest.approx(
        {
            "circular_accuracy": 0.5,
            "circular_accuracy/animal": 0.0,
            "circular_accuracy/person": 1.0,
            "letter_accuracy": 2 / 3,
        }
    )


def test_mmbench_workbook(mmbench: Path, tmp_path: Path) -> None:
    questions = read("mmbench", mmbench)
    paths = answer_file("mmbench", questions, ["B", "A", "C"], tmp_path)
    if importlib.util.find_spec("openpyxl") is None:
        assert [path.suffix for path in paths] == [".tsv"]
        return
    sheet = pytest.importorskip("openpyxl").load_workbook(paths[1]).active
    rows = list(sheet.iter_rows(values_only=True))
    assert rows[1] == (1, "What?", "cat", "dog", None, None, "B", "B")


def test_seed(tmp_path: Path) -> None:
    def entry(identity: str, kind: str, answer: str, type_id: int) -> dict[str, Any]:
        choices = {f"choice_{letter}": f"option {letter}" for letter in "abcd"}
        record = {"question_id": identity, "question": "Q?", "data_type": kind, "data_id": "x_1", "answer": answer}
        return {**record, **choices, "question_type_id": type_id}

    content = {
        "question_type": {"Scene Understanding": 1, "Action Recognition": 10},
        "questions": [entry("101", "image", "A", 1), entry("102", "image", "B", 1), entry("v3", "video", "C", 10)],
    }
    path = write(tmp_path / "SEED-Bench.json", content)
    questions = read("seed", path)
    assert [question.image for question in questions] == ["x_1", "x_1", "v3.png"]
    (written,) = answer_file("seed", questions, ["A", "A", "C"], tmp_path)
    assert json.loads(written.read_text().splitlines()[2]) == {"question_id": "v3", "prediction": "C"}
    assert values("seed", questions, ["A", "A", "C"]) == pytest.approx(
        {
            "accuracy": 2 / 3,
            "accuracy/Action Recognition": 1.0,
            "accuracy/Scene Understanding": 0.5,
            "image": 0.5,
            "video": 1.0,
        }
    )
    assert len(read("seed", path, split="image")) == 2
    with pytest.raises(BenchmarkError, match="no question of data_type 'test'; known: image, video"):
        read("seed", path, split="test")


def test_questions_of_one_image_are_one_unit(tmp_path: Path) -> None:
    entries = [{"image": name, "question": "?", "answers": [{"answer": "x"}] * 10} for name in ("a", "b", "a")]
    questions = read("vizwiz", write(tmp_path / "val.json", entries))
    measure = BENCHMARKS["vizwiz"].score(questions, ["x", "x", "y"])["accuracy"]
    assert measure.sums is not None
    assert measure.counts is not None
    assert (measure.sums.tolist(), measure.counts.tolist()) == ([1.0, 1.0], [2.0, 1.0])


def test_unknown_benchmark() -> None:
    assert known_benchmark("gqa").name == "gqa"
    with pytest.raises(BenchmarkError, match="there is no benchmark 'vqa3'; known: vqav2, gqa"):
        known_benchmark("vqa3")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vqav2", None, "there is no file .*questions.json; fetch it again"),
        ("vqav2", "{", "questions.json: malformed JSON"),
        ("vqav2", [], "questions.json holds list; expected dict"),
        ("vqav2", {"questions": [{"question_id": 1, "question": "?"}]}, r"questions\[0\] has no image_id"),
        ("vqav2", {"questions": ["x"]}, r"questions\[0\] is str; expected an object"),
        ("vqav2", {"questions": [{"question_id": 1, "question": "?", "image_id": 3}]}, "no data_subtype says"),
        ("vizwiz", ["x"], "entry 0 is no object; give val.json or test.json"),
        ("gqa", {"1": 2}, "1 is no object; give .*_questions.json of GQA"),
        ("scienceqa", {}, "there is no file .*pid_splits.json"),
        ("mmbench", "index\tquestion\n", "no column image, A, B; give the .tsv of MMBench"),
        ("mmbench", "index\tquestion\timage\tA\tB\nx\t?\t\ta\tb\n", "questions.json:2: index or image is damaged"),
        ("seed", {"questions": [{"question_id": "1"}]}, r"questions\[0\] has no data_type"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / "questions.json"
    if content is not None:
        write(path, content)
    with pytest.raises(BenchmarkError, match=message):
        read(name, path)


def test_annotations_of_another_split(vqav2: tuple[Path, Path], tmp_path: Path) -> None:
    entry = {"question_id": 5, "answers": [{"answer": "x"}]}
    other = write(tmp_path / "other.json", {"annotations": [entry]})
    with pytest.raises(BenchmarkError, match="no annotation of question 42000 .* of the same split"):
        read("vqav2", vqav2[0], annotations=other)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"has no coco_pope_CATEGORY.json \(random, popular, adversarial\)"):
        read("pope", tmp_path)
    with pytest.raises(BenchmarkError, match="has no folder of a task of MME"):
        read("mme", tmp_path)
    write(
        tmp_path / "coco_pope_random.json",
        "\n" + json.dumps({"question_id": 1, "image": "a", "text": "?", "label": "x"}),
    )
    with pytest.raises(BenchmarkError, match="coco_pope_random.json:1: the right answer is 'x'; expected yes or no"):
        read("pope", tmp_path)
    write(tmp_path / "coco_pope_random.json", "{}\n7")
    with pytest.raises(BenchmarkError, match="coco_pope_random.json:2: int; expected an object"):
        read("pope", tmp_path)
    write(tmp_path / "count" / "1.txt", "Is it?\tYes\n")
    with pytest.raises(BenchmarkError, match="1.txt: there is no image .*count/1.jpg or .png for it"):
        read("mme", tmp_path)
    write(tmp_path / "count" / "1.jpg", "x")
    with pytest.raises(BenchmarkError, match="1.txt: 1 questions; MME asks two of every image"):
        read("mme", tmp_path)


def test_no_question_and_wrong_files(tmp_path: Path) -> None:
    write(tmp_path / "problems.json", {})
    write(tmp_path / "pid_splits.json", {"test": []})
    with pytest.raises(BenchmarkError, match="no questions in split test"):
        read("scienceqa", tmp_path / "problems.json")
    write(tmp_path / "problems.json", {"3": {"question": "?", "choices": ["a", "b"], "answer": 2}})
    write(tmp_path / "pid_splits.json", {"test": ["3"]})
    with pytest.raises(BenchmarkError, match="problem 3 has answer 2 of 2 choices; fetch it again"):
        read("scienceqa", tmp_path / "problems.json")
    with pytest.raises(BenchmarkError, match="is a folder; name the file in it"):
        read("gqa", tmp_path)
    (tmp_path / "gqa.json").write_bytes(b"\xff{}")
    with pytest.raises(BenchmarkError, match="is not UTF-8 text"):
        read("gqa", tmp_path / "gqa.json")
    with pytest.raises(BenchmarkError, match="there is no question to take a mean of"):
        BENCHMARKS["seed"].score([], [])


def test_json_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    path.write_bytes('{"text": "a\u2028b\x85c"}\r\n\n{"text": "d"}\n'.encode())
    assert [record["text"] for record in read_json_lines(path)] == ["a\u2028b\x85c", "d"]
