"""New runs that start from weights. Oracles: the tensors in the folder, bit by bit on whatever ranks hold them; the
seeded initial values for all else; recorded losses of the released code for a model of its own.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lcl_megatron.checkpoint.convert.importing import ImportOptions, import_weights, only_parts
from lcl_megatron.checkpoint.convert.official_file import Heads
from lcl_megatron.checkpoint.folders import step_folder
from lcl_megatron.checkpoint.initial_weights import check_fit, load_initial_weights
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.native import Trainable
from lcl_megatron.checkpoint.parameters import parameter_shapes
from lcl_megatron.checkpoint.reference_case import ReferenceCase
from lcl_megatron.checkpoint.weights import ModelWeights, read_weights, write_weights
from lcl_megatron.config import CheckpointConfig, RunConfig
from lcl_megatron.model.lcl import LCLOutput
from lcl_megatron.parallel import engine as engines
from lcl_megatron.training.loop import train
from lcl_megatron.training.optimizer import build_optimizer, build_scheduler
from lcl_megatron.training.setup import run_from
from tests.checkpoint import runs
from tests.checkpoint.runs import CONFIG, HeldState, Layout
from tests.data.corpora import WrittenCorpus
from tests.distributed import run_distributed
from tests.reference_lcl import Sizes, record_case

ONE = Layout("one")
LAYOUTS = [
    Layout("tp2", tp=2),
    Layout("dp2 x tp2, sequence parallel", dp=2, tp=2, sequence_parallel=True),
    Layout("pp2 in the ViT", cuts=("vision.1",)),
    Layout("pp2 at the heads", cuts=("heads",)),
    Layout("dp2, whole optimizer", dp=2, distributed_optimizer=False),
]
GOLDEN = Path(os.environ.get("LCL_SHARED_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))


def random_weights(config: RunConfig) -> ModelWeights:
    """Weights of a run's model, no two entries alike, with a vocabulary padded otherwise than the run's."""
    language = dataclasses.replace(config.language, make_vocab_size_divisible_by=4)
    config = dataclasses.replace(config, language=language)
    generator = torch.Generator().manual_seed(3)
    shapes = parameter_shapes(config)
    return ModelWeights(config, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def _start(rank: int, world_size: int, config: RunConfig, folder: Path) -> HeldState:
    engine = engines.build_engine(config, engines.start(config))
    load_initial_weights(folder, engine, b"the tokenizer")
    optimizer = build_optimizer(engine)
    return runs.held_state(Trainable(engine, optimizer, build_scheduler(config, optimizer)))


def _seeded(rank: int, world_size: int, config: RunConfig) -> HeldState:
    return runs.held_state(runs.build(config))


def _weights_of(state: dict[str, np.ndarray], kind: str = "weight") -> dict[str, np.ndarray]:
    return {n.removeprefix(f"{kind}/"): values for n, values in state.items() if n.startswith(f"{kind}/")}


def _expected(weights: ModelWeights, config: RunConfig) -> dict[str, np.ndarray]:
    """What ranks must hold: the folder's tensors in the run's dtype, the vocabulary padded with zeros."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.training.precision]
    ids, rows = config.language.vocab_size, config.language.padded_vocab_size
    expected = {}
    for name, tensor in weights.state.items():
        if name in ("language.embedding.word_embeddings.weight", "language.output_projection.weight"):
            tensor = torch.cat([tensor[:ids], torch.zeros(rows - ids, tensor.shape[1])])
        expected[name] = (tensor if name == "logit_scale" else tensor.to(dtype)).float().numpy()
    return expected


@pytest.mark.parametrize("layout", [ONE, *LAYOUTS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_layout_starts_with_the_bits_of_the_weights(layout: Layout, tied: bool, tmp_path: Path) -> None:
    config = layout.apply(CONFIG)
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, tie_embeddings=tied))
    weights = random_weights(config)
    write_weights(weights, tmp_path / "weights")
    state = runs.whole_state(run_distributed(_start, layout.world_size, config, tmp_path / "weights"))
    expected = _expected(weights, config)
    runs.assert_same_bits(_weights_of(state), expected)
    # What Adam updates: after the first step nothing else would be left of the weights.
    runs.assert_same_bits(_weights_of(state, "param"), expected)


def test_bf16_run_starts_with_the_rounded_weights(tmp_path: Path) -> None:
    layout = Layout("tp2 x pp2", tp=2, cuts=("pool",))
    training = dataclasses.replace(CONFIG.training, precision="bf16")
    config = layout.apply(dataclasses.replace(CONFIG, training=training))
    weights = random_weights(config)
    write_weights(weights, tmp_path / "weights")
    state = runs.whole_state(run_distributed(_start, layout.world_size, config, tmp_path / "weights"))
    runs.assert_same_bits(_weights_of(state), _expected(weights, config))
    runs.assert_same_bits(_weights_of(state, "param"), _expected(weights, config))


@pytest.mark.parametrize("layout", [ONE, LAYOUTS[1], LAYOUTS[2]], ids=lambda layout: layout.name)
def test_parts_that_the_weights_lack_keep_their_seeded_values(layout: Layout, tmp_path: Path) -> None:
    config = layout.apply(CONFIG)
    weights = only_parts(random_weights(config), ["vision"])
    write_weights(weights, tmp_path / "weights")
    state = runs.whole_state(run_distributed(_start, layout.world_size, config, tmp_path / "weights"))
    seeded = _weights_of(runs.whole_state(run_distributed(_seeded, 1, ONE.apply(CONFIG))))
    kept = {name: values for name, values in seeded.items() if not name.startswith("vision.")}
    assert len(kept) > 30
    for kind in ("weight", "param"):
        runs.assert_same_bits(_weights_of(state, kind), _expected(weights, config) | kept)


def _run(rank: int, world_size: int, config: RunConfig) -> tuple[HeldState, HeldState]:
    with run_from(config) as run:
        before = runs.held_state(run.trainable)
        train(run)
        return before, runs.held_state(run.trainable)


def test_run_starts_from_weights_and_a_resumed_one_ignores_them(corpus: WrittenCorpus, tmp_path: Path) -> None:
    config = dataclasses.replace(
        ONE.apply(CONFIG),
        language=dataclasses.replace(CONFIG.language, vocab_size=corpus.corpus.vocab_size),
        data=dataclasses.replace(CONFIG.data, data_path=(str(corpus.corpus.path),)),
        training=dataclasses.replace(CONFIG.training, train_iters=3),
        checkpoint=CheckpointConfig(init_weights=str(tmp_path / "weights"), save=str(tmp_path / "save")),
    )
    weights = dataclasses.replace(random_weights(config), tokenizer=corpus.corpus.tokenizer.model)
    write_weights(weights, tmp_path / "weights")
    ((before, after),) = run_distributed(_run, 1, config)
    first, last = runs.whole_state([before]), runs.whole_state([after])
    runs.assert_same_bits(_weights_of(first), _expected(weights, config))
    shutil.rmtree(tmp_path / "weights")
    ((resumed, _),) = run_distributed(_run, 1, config)
    runs.assert_same_bits(runs.whole_state([resumed]), last)
    with pytest.raises(AssertionError):
        runs.assert_same_bits(_weights_of(last), _weights_of(first))
    # A checkpoint serves as well as a folder that was imported; its optimizer and its step do not go along.
    again = dataclasses.replace(
        config, checkpoint=CheckpointConfig(init_weights=str(step_folder(tmp_path / "save", 3)))
    )
    ((started, _),) = run_distributed(_run, 1, again)
    assert started.adam_steps in ([], [0])
    runs.assert_same_bits(_weights_of(runs.whole_state([started])), _weights_of(last))


def test_what_is_filled_and_what_is_random_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lcl_megatron")
    weights = random_weights(ONE.apply(CONFIG))
    write_weights(only_parts(weights, ["vision", "pool"]), tmp_path / "parts")
    write_weights(weights, tmp_path / "whole")
    config = weights.config
    groups = engines.start(config)
    try:
        engine = engines.build_engine(config, groups)
        load_initial_weights(tmp_path / "parts", engine, b"")
        load_initial_weights(tmp_path / "whole", engine, b"")
    finally:
        groups.destroy()
    parts, whole, warning = (record.getMessage() for record in caplog.records[-3:])
    assert parts.startswith(f"starting from {tmp_path / 'parts'}: vision, pool (0.0")
    assert parts.endswith(" M parameters); at random: language, logit_scale")
    assert whole.endswith("vision, pool, language, logit_scale (0.02 M parameters); nothing is at random")
    assert warning.startswith(f"{tmp_path / 'whole'} names no tokenizer: its language model is of use only if")


def test_weights_of_another_architecture_are_refused_with_every_difference() -> None:
    weights = random_weights(ONE.apply(CONFIG))
    vision = dataclasses.replace(CONFIG.vision, num_layers=3, layer_scale_init=None, activation="quick_gelu")
    other = dataclasses.replace(
        CONFIG, vision=vision, language=dataclasses.replace(CONFIG.language, hidden_size=48, vocab_size=61)
    )
    with pytest.raises(CheckpointError) as caught:
        check_fit(weights, other, "W")
    message = str(caught.value)
    for line in (
        "--init-weights W: vision, pool, language, logit_scale there are of another architecture than this run's:\n",
        "  vision.num_layers: 2 in the checkpoint, 3 in this run\n",
        "  vision.layer_scale: True in the checkpoint, False in this run\n",
        "  vision.activation: 'gelu' in the checkpoint, 'quick_gelu' in this run\n",
        "  language.hidden_size: 24 in the checkpoint, 48 in this run\n",
        "  language.vocab_size: 60 in the checkpoint, 61 in this run\n",
        "set these fields as its run.toml has them (--config FILE); an encoder for another image size is made by",
    ):
        assert line in message
    assert "make_vocab_size_divisible_by" not in message
    # Of parts that are not there nothing is asked.
    check_fit(only_parts(weights, ["logit_scale"]), other, "W")
    with pytest.raises(CheckpointError, match="vision there are of another") as caught:
        check_fit(only_parts(weights, ["vision"]), other, "W")
    assert "language" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"language\.hidden_size: 24 in the checkpoint, 48 in this run"):
        check_fit(only_parts(weights, ["pool"]), other, "W")


def test_language_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    weights = dataclasses.replace(random_weights(ONE.apply(CONFIG)), tokenizer=b"another")
    write_weights(weights, tmp_path / "whole")
    write_weights(only_parts(weights, ["vision", "pool"]), tmp_path / "parts")
    groups = engines.start(weights.config)
    try:
        engine = engines.build_engine(weights.config, groups)
        with pytest.raises(CheckpointError, match="knows the token ids of another tokenizer than the corpus's; prepro"):
            load_initial_weights(tmp_path / "whole", engine, b"the corpus's")
        load_initial_weights(tmp_path / "parts", engine, b"the corpus's")
        with pytest.raises(CheckpointError, match="is neither a folder of weights"):
            load_initial_weights(tmp_path / "absent", engine, b"")
    finally:
        groups.destroy()


def _contrastive_loss(output: LCLOutput, pairs: Tensor) -> Tensor:
    """The whole matrix of similarities, both directions."""
    images, contexts = (F.normalize(x.float(), dim=-1)[pairs] for x in (output.pooled_ND, output.context_ND))
    scores = output.logit_scale.exp() * images @ contexts.T
    own = torch.arange(len(scores))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


@pytest.mark.parametrize("name", ["pairs", "interleaved", "independent"])
def test_step_from_an_imported_released_model_has_its_losses(name: str, tmp_path: Path) -> None:
    path = GOLDEN / f"{name}.safetensors"
    if name == "independent":
        path = record_case(tmp_path, name, Sizes(), [(4, 0, 7), (0, 9), (3, 0, 2, 0, 5)])
    if not path.is_file():
        pytest.skip(f"no recorded case at {path}; set LCL_SHARED_GOLDEN to the folder that holds them")
    case = ReferenceCase.load(path)
    config = case.config()
    save_file(case.group("weight"), tmp_path / "released.safetensors")
    heads = Heads(
        vision=config.vision.num_attention_heads,
        pool=config.pool.num_attention_heads,
        language=config.language.num_attention_heads,
    )
    options = ImportOptions(heads=heads)
    import_weights(str(tmp_path / "released.safetensors"), tmp_path / "weights", options)
    assert read_weights(tmp_path / "weights").config.language.padded_vocab_size % 128 == 0
    groups = engines.start(config)
    try:
        engine = engines.build_engine(config, groups)
        load_initial_weights(tmp_path / "weights", engine, b"")
        batch = case.batch()
        losses = {}

        def loss(index: int, output: LCLOutput) -> tuple[Tensor, Any]:
            losses["generation_loss"] = output.token_losses_K.mean()
            losses["contrastive_loss"] = _contrastive_loss(output, batch.pair_mask)
            total = losses["generation_loss"] + 0.1 * losses["contrastive_loss"]
            return total, total.item()

        (total,) = engine.forward_backward([batch], loss, step=0)
    finally:
        groups.destroy()
    assert total == pytest.approx(case.description["loss"], rel=1e-5)
    for key, value in losses.items():
        assert value.item() == pytest.approx(case.description[key], rel=1e-5)
