"""The model as one straight line of pieces, and where a pipeline cuts it.

    vision.embed, vision.0 ... vision.n, pool, language.embed, language.0 ... language.m, heads

A stage is any run of consecutive pieces, so an encoder may span several stages. A rank holds one stage, or several that
are not neighbours (``parallel.virtual_pipeline_model_parallel_size``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

from lcl_megatron.config import ConfigError, LanguageConfig, RunConfig, VisionConfig
from lcl_megatron.model.drop_rates import computed_share

VISION_EMBED, POOL, LANGUAGE_EMBED, HEADS = "vision.embed", "pool", "language.embed", "heads"


def line_of_pieces(vision: VisionConfig, language: LanguageConfig) -> tuple[str, ...]:
    """Return the names of all pieces in the order in which data passes them."""
    vision_layers = [f"vision.{i}" for i in range(vision.num_layers)]
    language_layers = [f"language.{i}" for i in range(language.num_layers)]
    return (VISION_EMBED, *vision_layers, POOL, LANGUAGE_EMBED, *language_layers, HEADS)


@dataclass(frozen=True)
class Stage:
    """The pieces of one pipeline stage."""

    pieces: tuple[str, ...]
    """Consecutive pieces of the line, at least one."""
    next_piece: str | None
    """First piece of the next stage; None on the last stage."""

    @property
    def first_piece(self) -> str:
        """The piece that receives what the stage before sends."""
        return self.pieces[0]

    @property
    def is_first(self) -> bool:
        """True for the stage that reads pixels."""
        return self.first_piece == VISION_EMBED

    @property
    def is_last(self) -> bool:
        """True for the stage that computes the losses."""
        return self.next_piece is None

    def has(self, piece: str) -> bool:
        """Return whether the stage holds a piece."""
        return piece in self.pieces

    def layers(self, tower: str) -> range:
        """Return indices of the stage's layers of ``vision`` or ``language``."""
        indices = [int(p.split(".")[1]) for p in self.pieces if p.startswith(f"{tower}.") and p.split(".")[1].isdigit()]
        return range(indices[0], indices[-1] + 1) if indices else range(0)

    @property
    def has_vision(self) -> bool:
        """True if any part of the vision tower is here; the final LayerNorm goes with the pool."""
        return any(p.startswith("vision.") or p == POOL for p in self.pieces)

    @property
    def has_language(self) -> bool:
        """True if any part of the language model is here."""
        return any(p.startswith("language.") or p == HEADS for p in self.pieces)


def whole_model(vision: VisionConfig, language: LanguageConfig) -> Stage:
    """Return the only stage of a model that is not cut."""
    return Stage(line_of_pieces(vision, language), None)


def cut_line(config: RunConfig) -> tuple[Stage, ...]:
    """Return the pipeline's stages in the order of the line: at ``parallel.pipeline_cuts``, or balanced by FLOPs.

    Raises:
        ConfigError: a cut names no piece, or the cuts are not in the order of the line.
    """
    line = line_of_pieces(config.vision, config.language)
    num_stages = config.parallel.num_stages
    if num_stages > len(line):
        raise ConfigError(f"{num_stages} pipeline stages for {len(line)} pieces; use at most {len(line)} stages")
    cuts = config.parallel.pipeline_cuts
    if cuts or num_stages == 1:
        unknown = [cut for cut in cuts if cut not in line[1:]]
        if unknown:
            raise ConfigError(f"parallel.pipeline_cuts names {unknown}; known pieces: {', '.join(line[1:])}")
        starts = [0, *(line.index(cut) for cut in cuts)]
        if starts != sorted(set(starts)):
            raise ConfigError(f"parallel.pipeline_cuts = {cuts} are not in the order of the line: {', '.join(line)}")
    else:
        starts = list(_balanced_starts(tuple(_piece_flops(piece, config) for piece in line), num_stages))
    ends = [*starts[1:], len(line)]
    return tuple(
        Stage(line[begin:end], line[end] if end < len(line) else None) for begin, end in zip(starts, ends, strict=True)
    )


def _piece_flops(piece: str, config: RunConfig) -> float:
    """Return FLOPs of a piece for one row of which half is image latents, in units in which a forward pass counts once.

    A training step is three forward passes, and four where the whole piece is recomputed.
    """
    vision, language, row = config.vision, config.language, config.data.seq_length
    tokens = row / (2 * vision.num_patches) * vision.num_tokens
    c, h = vision.hidden_size, language.hidden_size
    if piece == VISION_EMBED:
        return 2 * tokens * c * 3 * vision.patch_size**2
    if piece == POOL:
        return 2 * tokens * (2 * c * h + h * h)
    if piece == LANGUAGE_EMBED:
        return 0.0
    if piece == HEADS:
        return row / 2 * 2 * h * language.padded_vocab_size
    if piece.startswith("vision."):
        tokens *= computed_share(vision, int(piece.removeprefix("vision."))) * _recompute_factor(vision)
        return tokens * (8 * c * c + 4 * c * vision.ffn_hidden_size + 4 * c * vision.num_tokens)
    return _recompute_factor(language) * row * (8 * h * h + 4 * h * language.ffn_hidden_size + 2 * h * row)


def _recompute_factor(tower: VisionConfig | LanguageConfig) -> float:
    # Which of a stage's layers are recomputed is known only once the line is cut: a share counts as that share of each.
    share = (tower.recompute_num_layers or tower.num_layers) / tower.num_layers
    return 1 + share / 3 if tower.recompute_granularity == "full" else 1.0


@lru_cache(maxsize=64)  # Whoever plans a run asks for many layouts of one model.
def _balanced_starts(costs: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Return begins of ``num_stages`` non-empty runs whose largest sum is smallest (dynamic programme)."""
    sums = [0.0, *itertools.accumulate(costs)]
    # best[end] = (largest sum, begins) of the first ``end`` pieces in the stages so far.
    best: dict[int, tuple[float, list[int]]] = {end: (sums[end], [0]) for end in range(1, len(costs) + 1)}
    for stage in range(2, num_stages + 1):
        best = {
            end: min(
                (max(best[begin][0], sums[end] - sums[begin]), [*best[begin][1], begin])
                for begin in range(stage - 1, end)
            )
            for end in range(stage, len(costs) + 1)
        }
    return tuple(best[len(costs)][1])
