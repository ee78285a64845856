"""Image captioning: a language model on top of an encoder learns to write captions (LCL, appendix A.2).

In "frozen transfer" the parameters of the vision model stay fixed, while the connector and the language model are
trained; in "full transfer" the vision model is trained along. Chance is what the same captions score when they are
handed to other images: what a model gains by knowing how captions read, without looking.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcl_megatron.evaluation.captioning.annotations import CaptionedImage, read_caption_test_set
from lcl_megatron.evaluation.captioning.predictions import write_predictions
from lcl_megatron.evaluation.captioning.scores import BLEU, CIDER, CaptionScores, check_scorer, score_captions
from lcl_megatron.evaluation.transfer.caption_sets import CaptionedSet
from lcl_megatron.evaluation.transfer.fit import FitConfig
from lcl_megatron.evaluation.transfer.image_sets import FolderImages, ImageSet
from lcl_megatron.evaluation.transfer.results import MetricSummary, TaskResult, Trial, summarize
from lcl_megatron.evaluation.transfer.session import FitIdentity, Mode, Session, digest
from lcl_megatron.evaluation.vision_language.answering import answer_prompts
from lcl_megatron.evaluation.vision_language.assembly import Assembled, Recipe, assemble
from lcl_megatron.evaluation.vision_language.exam import Trained, score_saved, score_trained
from lcl_megatron.evaluation.vision_language.model import Generation, Part
from lcl_megatron.evaluation.vision_language.pixels import ImageFit
from lcl_megatron.evaluation.vision_language.sequences import PLACEHOLDER, Piece, SequenceBuilder, TokenSequence
from lcl_megatron.evaluation.vision_language.training import Stage, train_stage


@dataclass(frozen=True, kw_only=True)
class CaptioningSettings:
    """Settings of the task."""

    fit: FitConfig
    """Training."""
    drop_path_rate: float = 0.2
    """Full transfer: probability of dropping a branch of the encoder's last layer, linear from 0 in the first."""
    connector_layers: int = 2
    """Linear layers of the connector."""
    train_language_model: bool = True
    """Whether the language model is trained; else only the connector is, and in full transfer the encoder."""
    prompt: str = ""
    """Text between image and caption, in training and in generation."""
    image_fit: ImageFit = "crop"
    """How images become square."""
    max_length: int = 512
    """Positions of image and caption in training."""
    max_new_tokens: int = 30
    """Longest caption that is generated, in tokens."""
    num_beams: int = 3
    """Captions that the search follows at the same time; 1 = greedy."""
    length_penalty: float = 1.0
    """Exponent of the length that the search divides log probabilities by."""
    eval_batch_size: int = 32
    """Images that a rank writes captions for at the same time."""
    save_model: bool = True
    """Whether the trained model is written to OUTPUT/models."""

    def parts(self, mode: Mode) -> tuple[Part, ...]:
        """Return what is trained."""
        language_model: tuple[Part, ...] = ("language_model",) if self.train_language_model else ()
        encoder: tuple[Part, ...] = ("encoder",) if mode == "full" else ()
        return ("connector", *language_model, *encoder)


@dataclass(frozen=True)
class CaptionTest:
    """A test set."""

    name: str
    """For tables and file names."""
    entries: list[CaptionedImage]
    """What people wrote."""
    images: ImageSet
    """The images, in the same order."""


def open_caption_test(path: Path, image_root: Path, split: str = "test") -> CaptionTest:
    """Return a test set; all of its images must be there.

    Args:
        path: see ``read_caption_test_set``.
        image_root: folder of the images.
        split: where the file has several.

    Raises:
        DataError: the file is missing or damaged, or images are missing.
    """
    entries = read_caption_test_set(path, split)
    images = FolderImages(image_root, [entry.name for entry in entries])
    _ = images.fingerprint  # names what is missing now, and not after hours of training
    return CaptionTest(path.stem, entries, images)


@dataclass(frozen=True)
class CaptionTexts:
    """Pairs of an image and one of its captions, as training texts."""

    data: CaptionedSet
    """Images with captions."""
    builder: SequenceBuilder
    """Makes tokens."""
    prompt: str
    """Text between image and caption."""
    ends: np.ndarray
    """(N,) int64: pairs up to and including an image."""

    @classmethod
    def of(cls, data: CaptionedSet, builder: SequenceBuilder, prompt: str) -> CaptionTexts:
        """Return the pairs of a set."""
        return cls(data, builder, prompt, np.cumsum([len(captions) for captions in data.captions]))

    @property
    def images(self) -> ImageSet:
        """The images."""
        return self.data.images

    def __len__(self) -> int:
        """Return the number of pairs."""
        return int(self.ends[-1])

    def image_numbers(self, index: int) -> tuple[int, ...]:
        """Return the image of a pair."""
        return (int(np.searchsorted(self.ends, index, side="right")),)

    def sequence(self, index: int) -> TokenSequence:
        """Return image, prompt and caption; the caption is learnt."""
        (image,) = self.image_numbers(index)
        captions = self.data.captions[image]
        caption = captions[index - int(self.ends[image]) + len(captions)].strip()
        target = Piece(f" {caption}" if self.prompt else caption, is_target=True, ends_turn=True)
        return self.builder.build([Piece(PLACEHOLDER + self.prompt), target], 1)


def caption(
    spec: str,
    language_model: str,
    train: CaptionedSet,
    tests: Sequence[CaptionTest],
    settings: CaptioningSettings,
    mode: Mode,
    seeds: Sequence[int],
    session: Session,
) -> list[TaskResult]:
    """Train a model on one encoder for each seed, and score it; one result per test set.

    Args:
        spec: which encoder, see ``load_encoder``.
        language_model: which language model, see ``Recipe``.
        train: images with captions.
        tests: test sets.
        settings: of the task.
        mode: frozen or full.
        seeds: of connector and order; one model each.
        session: ranks and folders.

    Raises:
        EncoderError, AssemblyError, DataError, CaptionScoreError, DivergenceError: see there.
    """
    check_scorer()
    recipe = Recipe(spec, language_model, settings.connector_layers, settings.max_length, settings.image_fit)
    return score_trained(
        Trial("captioning", mode, dataclasses.asdict(settings) | {"language_model": language_model}),
        _Training(recipe, train, settings, mode, session).model,
        seeds,
        [_Exam(test, settings, session) for test in tests],
        {"train": train.source, "train_images": len(train), "left_out": dict(train.left_out)},
    )


@dataclass(frozen=True)
class _Training:
    """How the models of one encoder come to be."""

    recipe: Recipe
    train: CaptionedSet
    settings: CaptioningSettings
    mode: Mode
    session: Session

    def model(self, seed: int) -> Trained:
        """Return the model of a seed, trained."""
        settings, train = self.settings, self.train
        drop_path_rate = settings.drop_path_rate if self.mode == "full" else 0.0
        assembled = assemble(self.recipe, self.session.replicas.device, seed, drop_path_rate)
        encoder = self.session.replicas.from_first(assembled.encoder.describe())
        trained_on = digest("captioning", self.recipe, *train.contents(), drop_path_rate, settings.prompt)
        fit = FitIdentity(encoder, self.mode, seed, trained_on)
        stage = Stage("captioning", "captions", settings.parts(self.mode), settings.fit, fit, settings.save_model)
        texts = CaptionTexts.of(train, assembled.builder, settings.prompt)
        curve = train_stage(assembled, stage, texts, self.session)
        return Trained(assembled, stage.model_name, encoder, {str(seed): curve})


def score_model(
    folder: Path, tests: Sequence[CaptionTest], settings: CaptioningSettings, session: Session
) -> list[TaskResult]:
    """Score a model that an earlier call has saved; one result per test set.

    Args:
        folder: of the model.
        tests: test sets.
        settings: what concerns generation is used.
        session: ranks and folders.

    Raises:
        AssemblyError, EncoderError, DataError, CaptionScoreError: see there.
    """
    check_scorer()
    exams = [_Exam(test, settings, session) for test in tests]
    return score_saved("captioning", folder, exams, dataclasses.asdict(settings), session)


@dataclass(frozen=True)
class Scored:
    """Scores of one model on one test set."""

    scores: Mapping[str, CaptionScores]
    """By domain; the whole set under the empty name."""
    chance: dict[str, float]
    """Scores of the same captions on other images."""


@dataclass(frozen=True)
class _Exam:
    """A test set, and how captions are written for it."""

    test: CaptionTest
    settings: CaptioningSettings
    session: Session

    @property
    def data(self) -> dict[str, Any]:
        return {"test": self.test.name, "test_images": len(self.test.entries)}

    def take(self, assembled: Assembled, name: str) -> Scored:
        """Write captions, to a file too, and score them on the first rank."""
        settings, replicas, entries = self.settings, self.session.replicas, self.test.entries
        prompt = assembled.builder.build([Piece(PLACEHOLDER + settings.prompt)], 1)
        captions = answer_prompts(
            assembled,
            [(prompt, (image,)) for image in range(len(entries))],
            self.test.images,
            Generation(settings.max_new_tokens, settings.num_beams, settings.length_penalty),
            replicas,
            batch_size=settings.eval_batch_size,
            bf16=settings.fit.precision == "bf16",
        )
        scored = None
        if replicas.is_first:
            write_predictions(entries, captions, self.session.output / "predictions" / f"{name}-{self.test.name}.json")
            scored = score_test(entries, captions)
        found = replicas.from_first(scored)
        assert found is not None
        return found

    def metrics(self, by_seed: Mapping[int, Scored]) -> tuple[MetricSummary, ...]:
        """Return CIDEr and BLEU times 100, as papers print them, and CIDEr of every domain."""
        first = next(iter(by_seed.values()))
        wanted = [("", CIDER), *(("", name) for name in reversed(BLEU))]
        wanted += [(domain, CIDER) for domain in first.scores if domain]
        return tuple(_summary(domain, name, by_seed) for domain, name in wanted)


def score_test(entries: Sequence[CaptionedImage], captions: Sequence[str]) -> Scored:
    """Return the scores of captions on a test set, on each of its domains, and on other images.

    A domain is scored as a set of its own, as NoCaps does it: n-grams that are rare in it weigh more.
    """
    domains = sorted({entry.domain for entry in entries} - {""})
    scores = {}
    for domain in ["", *domains]:
        chosen = [index for index, entry in enumerate(entries) if domain in ("", entry.domain)]
        references = [entries[index].captions for index in chosen]
        scores[domain] = score_captions([captions[index] for index in chosen], references)
    # Each takes the caption of the next one in a random circle, so that none is on its own image.
    circle = np.random.default_rng(0).permutation(len(entries))
    exchanged = np.empty_like(circle)
    exchanged[circle] = np.roll(circle, 1)
    blind = score_captions([captions[index] for index in exchanged], [entry.captions for entry in entries])
    return Scored(scores, blind.values)


def _summary(domain: str, name: str, by_seed: Mapping[int, Scored]) -> MetricSummary:
    scores = {seed: scored.scores[domain] for seed, scored in by_seed.items()}
    chance = None if domain else 100 * float(np.mean([scored.chance[name] for scored in by_seed.values()]))
    resampled: Callable[[np.ndarray], float] = lambda images: (  # noqa: E731
        100 * float(np.mean([of_seed.resampled(name, images) for of_seed in scores.values()]))
    )
    return summarize(
        f"{name} {domain}".strip(),
        {seed: 100 * of_seed.values[name] for seed, of_seed in scores.items()},
        resampled,
        len(next(iter(scores.values())).cider),
        chance=chance,
        percent=False,
    )
