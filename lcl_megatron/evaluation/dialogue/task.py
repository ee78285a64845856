"""Multi-modal dialogue in two stages, as LLaVA-1.5 does it and as LCL's appendix A.2 follows it.

Alignment: pairs of an image and a caption train the connector alone. Tuning: conversations train connector and
language model ("frozen transfer"), or the vision encoder along with them ("full transfer"). Then benchmarks are
answered, and the answers written in the form that each of them takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcl_megatron.config.errors import require
from lcl_megatron.evaluation.dialogue.benchmark import Score
from lcl_megatron.evaluation.dialogue.benchmark_list import BenchmarkRun
from lcl_megatron.evaluation.dialogue.conversations import (
    Conversation,
    Template,
    conversation_pieces,
    described,
    question_pieces,
    read_conversations,
)
from lcl_megatron.evaluation.transfer.fit import Curve, FitConfig
from lcl_megatron.evaluation.transfer.image_sets import FolderImages, ImageSet
from lcl_megatron.evaluation.transfer.results import MetricSummary, TaskResult, Trial, UnitScores, summarize
from lcl_megatron.evaluation.transfer.session import FitIdentity, Mode, Session, digest
from lcl_megatron.evaluation.vision_language.answering import answer_prompts
from lcl_megatron.evaluation.vision_language.assembly import Assembled, Recipe, assemble, load_model
from lcl_megatron.evaluation.vision_language.exam import Trained, score_saved, score_trained
from lcl_megatron.evaluation.vision_language.model import Generation, Part
from lcl_megatron.evaluation.vision_language.pixels import ImageFit
from lcl_megatron.evaluation.vision_language.sequences import SequenceBuilder, TokenSequence
from lcl_megatron.evaluation.vision_language.training import Stage, train_stage


@dataclass(frozen=True, kw_only=True)
class DialogueSettings:
    """Settings of the task."""

    alignment: FitConfig
    """Training of the connector on image-caption pairs (stage 1)."""
    tuning: FitConfig
    """Training on conversations (stage 2)."""
    drop_path_rate: float = 0.0
    """Full transfer, tuning: probability of dropping a branch of the encoder's last layer."""
    connector_layers: int = 2
    """Linear layers of the connector."""
    image_fit: ImageFit = "pad"
    """How images become square."""
    max_length: int = 2048
    """Positions of a conversation, images included."""
    num_beams: int = 1
    """Answers that the search follows at the same time; 1 = greedy."""
    eval_batch_size: int = 32
    """Questions that a rank answers at the same time."""
    other_images: bool = False
    """Answer every benchmark a second time with the image of another question, which tells what is known unseen."""
    save_model: bool = True
    """Whether the trained models are written to OUTPUT/models."""


@dataclass(frozen=True)
class ConversationTexts:
    """Conversations as training texts."""

    conversations: Sequence[Conversation]
    """N conversations."""
    images: ImageSet
    """Their images, conversation after conversation."""
    first: np.ndarray
    """(N,) int64: number of the first image of a conversation."""
    template: Template
    """How they become text."""
    builder: SequenceBuilder
    """Makes tokens."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.conversations)

    def image_numbers(self, index: int) -> tuple[int, ...]:
        """Return the images of a conversation."""
        first = int(self.first[index])
        return tuple(range(first, first + len(self.conversations[index].images)))

    def sequence(self, index: int) -> TokenSequence:
        """Return a conversation's tokens; the answers are learnt."""
        conversation = self.conversations[index]
        return self.builder.build(conversation_pieces(conversation, self.template), len(conversation.images))


@dataclass(frozen=True)
class ConversationSet:
    """Conversations of a file, and their images."""

    source: str
    """The file, for results."""
    conversations: list[Conversation]
    """At least one."""
    images: ImageSet
    """Their images, conversation after conversation."""

    def texts(self, template: Template, builder: SequenceBuilder) -> ConversationTexts:
        """Return the conversations as training texts."""
        counts = [len(conversation.images) for conversation in self.conversations]
        first = np.cumsum([0, *counts[:-1]])
        return ConversationTexts(self.conversations, self.images, first, template, builder)


def open_conversations(path: Path, image_root: Path, template: Template) -> ConversationSet:
    """Return the conversations of a file; all of their images must be there.

    Args:
        path: see ``read_conversations``.
        image_root: folder of the images.
        template: what they will be told as; all of them must fit it.

    Raises:
        ConversationError: the file is missing or damaged, or a conversation does not fit the template.
        DataError: images are missing.
    """
    conversations = read_conversations(path)
    for conversation in conversations:
        conversation_pieces(conversation, template)
    images = FolderImages(image_root, [name for conversation in conversations for name in conversation.images])
    _ = images.fingerprint  # names what is missing now, and not after hours of training
    return ConversationSet(path.name, conversations, images)


@dataclass(frozen=True)
class DialogueData:
    """What models are trained and scored on."""

    alignment: ConversationSet | None
    """Pairs for stage 1; None = stage 1 was done before."""
    tuning: ConversationSet
    """Conversations for stage 2."""
    benchmarks: Sequence[BenchmarkRun]
    """What is asked."""

    def describe(self) -> dict[str, Any]:
        """Return names and sizes, for results."""
        alignment = {} if self.alignment is None else described(self.alignment.conversations)
        return {
            "train": " + ".join(part.source for part in (self.alignment, self.tuning) if part is not None),
            "alignment": alignment,
            "tuning": described(self.tuning.conversations),
        }


def converse(
    spec: str,
    language_model: str,
    data: DialogueData,
    settings: DialogueSettings,
    mode: Mode,
    seeds: Sequence[int],
    session: Session,
    aligned: Path | None = None,
) -> list[TaskResult]:
    """Train a model on one encoder for each seed, and put the benchmarks to it; one result per benchmark.

    Args:
        spec: which encoder, see ``load_encoder``.
        language_model: which language model, see ``Recipe``.
        data: conversations and benchmarks.
        settings: of the task.
        mode: frozen or full.
        seeds: of connector and order; one model each.
        session: ranks and folders.
        aligned: model of stage 1 that an earlier call has saved; its encoder and language model are those of the
            recipe in it.

    Raises:
        EncoderError, AssemblyError, DataError, ConversationError, DivergenceError: see there.
    """
    recipe = Recipe(spec, language_model, settings.connector_layers, settings.max_length, settings.image_fit)
    return score_trained(
        Trial("dialogue", mode, dataclasses.asdict(settings) | {"language_model": language_model}),
        _Training(recipe, aligned, data, settings, mode, session).model,
        seeds,
        [_Exam(run, settings, session) for run in data.benchmarks],
        data.describe(),
    )


@dataclass(frozen=True)
class _Training:
    """How the models of one encoder come to be."""

    recipe: Recipe
    aligned: Path | None
    data: DialogueData
    settings: DialogueSettings
    mode: Mode
    session: Session

    def model(self, seed: int) -> Trained:
        """Return the model after both stages, or after the second one of a model that was aligned before."""
        settings, assembled = self.settings, self._start(seed)
        encoder = self.session.replicas.from_first(assembled.encoder.describe())
        curves: dict[str, Curve] = {}
        if (data := self.data.alignment) is not None:
            fit = self._identity("alignment", data, assembled, encoder, seed)
            stage = Stage("alignment", "conversations", ("connector",), settings.alignment, fit, settings.save_model)
            texts = data.texts("plain", assembled.builder)
            curves[f"{seed} alignment"] = train_stage(assembled, stage, texts, self.session)
        data = self.data.tuning
        parts: tuple[Part, ...] = ("connector", "language_model", *(("encoder",) if self.mode == "full" else ()))
        fit = self._identity("dialogue", data, assembled, encoder, seed)
        stage = Stage("dialogue", "conversations", parts, settings.tuning, fit, settings.save_model)
        curves[str(seed)] = train_stage(assembled, stage, data.texts("vicuna_v1", assembled.builder), self.session)
        return Trained(assembled, stage.model_name, encoder, curves)

    def _start(self, seed: int) -> Assembled:
        """Return a model that has not been trained, or that of an earlier call's stage 1."""
        device, recipe = self.session.replicas.device, self.recipe
        drop_path_rate = self.settings.drop_path_rate if self.mode == "full" else 0.0
        if self.aligned is None:
            return assemble(recipe, device, seed, drop_path_rate)
        assembled = load_model(
            self.aligned,
            device,
            drop_path_rate,
            lambda saved: dataclasses.replace(saved, max_length=recipe.max_length, image_fit=recipe.image_fit),
        )
        found = assembled.recipe
        require(
            (found.encoder, found.language_model) == (recipe.encoder, recipe.language_model),
            f"{self.aligned} was aligned with encoder {found.encoder!r} and language model "
            f"{found.language_model!r}; give the same ones",
        )
        return assembled

    def _identity(
        self, stage: str, data: ConversationSet, assembled: Assembled, encoder: dict[str, Any], seed: int
    ) -> FitIdentity:
        # The connector tells what was done before: it begins as stage 1, or the model of an earlier call, has left it.
        connector = [parameter.detach().cpu().numpy().tobytes() for parameter in assembled.model.connector.parameters()]
        recipe = dataclasses.replace(assembled.recipe, encoder="")
        trained_on = digest(stage, recipe, self.settings.drop_path_rate, data.conversations, connector)
        return FitIdentity(encoder, self.mode, seed, trained_on)


def score_model(
    folder: Path, benchmarks: Sequence[BenchmarkRun], settings: DialogueSettings, session: Session
) -> list[TaskResult]:
    """Put benchmarks to a model that an earlier call has saved; one result per benchmark.

    Args:
        folder: of the model.
        benchmarks: what is asked.
        settings: what concerns generation is used.
        session: ranks and folders.

    Raises:
        AssemblyError, EncoderError, DataError: see there.
    """
    exams = [_Exam(run, settings, session) for run in benchmarks]
    return score_saved("dialogue", folder, exams, dataclasses.asdict(settings), session)


@dataclass(frozen=True)
class _Exam:
    """A benchmark, and how it is answered."""

    run: BenchmarkRun
    settings: DialogueSettings
    session: Session

    @property
    def data(self) -> dict[str, Any]:
        return {"test": self.run.name, "test_questions": len(self.run.questions)}

    def take(self, assembled: Assembled, name: str) -> Score:
        """Answer the questions, write the answer files, and return the scores."""
        run = self.run
        answers = self._answers(assembled, np.arange(len(run.questions)))
        if self.session.replicas.is_first:
            folder = self.session.output / "answers" / name / run.name
            folder.mkdir(parents=True, exist_ok=True)
            for path in run.benchmark.write(run.questions, answers, folder):
                self.session.say(f"wrote {path}")
        score = run.benchmark.score(run.questions, answers)
        if self.settings.other_images and score:
            blind = self._answers(assembled, other_images(run))
            measures = run.benchmark.score(run.questions, blind)
            main = next(iter(score))
            score |= {f"{main}, other images": measures[main]}
        return score

    def metrics(self, by_seed: Mapping[int, Score]) -> tuple[MetricSummary, ...]:
        """Return a summary of every measure; nothing where only a server can tell."""
        first = next(iter(by_seed.values()))
        return tuple(_summary(name, {seed: score[name] for seed, score in by_seed.items()}) for name in first)

    def _answers(self, assembled: Assembled, images: np.ndarray) -> list[str]:
        run, settings = self.run, self.settings
        prompts = [
            (
                assembled.builder.build(question_pieces(question.text, question.has_image), int(question.has_image)),
                (int(images[index]),) if question.has_image else (),
            )
            for index, question in enumerate(run.questions)
        ]
        return answer_prompts(
            assembled,
            prompts,
            run.images,
            Generation(run.benchmark.max_new_tokens, settings.num_beams),
            self.session.replicas,
            batch_size=settings.eval_batch_size,
            bf16=settings.tuning.precision == "bf16",
        )


def other_images(run: BenchmarkRun) -> np.ndarray:
    """Return for every question the number of another question with an image, at random; its own without an image."""
    numbers = np.arange(len(run.questions))
    seeing = np.array([index for index in numbers if run.questions[index].has_image], dtype=np.int64)
    # Each takes the image of the next one in a random circle, so that nobody keeps an image.
    circle = np.random.default_rng(0).permutation(seeing)
    numbers[circle] = np.roll(circle, 1)
    return numbers


def _summary(name: str, measures: Mapping[int, Any]) -> MetricSummary:
    values = {seed: measure.value for seed, measure in measures.items()}
    percent = next(iter(measures.values())).percent
    if any(measure.sums is None for measure in measures.values()):
        return summarize(name, values, percent=percent)
    units = [UnitScores(measure.sums, measure.counts) for measure in measures.values()]
    return summarize(
        name,
        values,
        lambda drawn: float(np.mean([of_seed.resampled(drawn) for of_seed in units])),
        len(units[0].sums),
        percent=percent,
    )
