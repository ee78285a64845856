"""What only a CUDA device can show; everything else is tested on the CPU.

Oracles: the same computation on the CPU in float32; the torch backend for TransformerEngine; a closed form of the
optimizer's effect (the loss of documents that are read again and again falls).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lcl_megatron.config import ConfigError, ParallelConfig, RunConfig
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.model.attention import PackedSequences, TorchCoreAttention
from lcl_megatron.model.specs import Runtime, language_transformer_config, resolve_transformer_impl
from lcl_megatron.parallel import engine as engines
from lcl_megatron.parallel.agreement import agree
from lcl_megatron.parallel.groups import initialize
from lcl_megatron.parallel.zigzag import ZigZag
from lcl_megatron.training.loop import train
from lcl_megatron.training.objective import Objective
from lcl_megatron.training.setup import run_from
from tests.batches import layout_of, make_rows, merge
from tests.training.small_runs import DataFolder, plain_document, read_reports, small_config

pytestmark = pytest.mark.gpu

ROWS = [
    [(20, (0, 9)), (30, (5,))],
    [(64, (3, 15, 30))],
    [(10, ()), (40, (12,))],
    [(25, (7,)), (25, (1,)), (14, (4,))],
]
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative; fp32 sums in another order than the CPU, bf16 has 8 bits."""
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}
"""Norm of the difference of all gradients, relative to the norm of the gradient; bf16 seen on a CPU: 0.11."""


def transformer_engine_or_skip() -> None:
    try:
        resolve_transformer_impl("transformer_engine")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_a_mask_equals_each_document_alone_on_the_cpu(causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    borders = torch.tensor([0, 20, 50, 64, 128, 129, 192], dtype=torch.int32)
    tensors = [torch.randn(192, 4, 16, generator=generator).requires_grad_() for _ in range(3)]
    attention = TorchCoreAttention(
        TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4),
        1,
        AttnMaskType.causal if causal else AttnMaskType.no_mask,
    )
    weights = torch.randn(192, 64, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        inputs = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        sequences = PackedSequences.of(borders.to(device), max_seqlen=64, row_length=64)
        output = attention(*inputs, None, packed_seq_params=sequences)
        (output * weights.to(device)).sum().backward()
        found.append([output.detach().cpu(), *(tensor.grad.cpu() for tensor in inputs if tensor.grad is not None)])
    for cuda, cpu in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
def test_attention_to_fetched_keys_equals_that_over_whole_rows(backend: str, rank: int, tiny_run: RunConfig) -> None:
    """One of two context-parallel ranks, with the keys that the other one would send."""
    if backend == "transformer_engine":
        transformer_engine_or_skip()
    generator = torch.Generator().manual_seed(1)
    borders = torch.tensor([0, 20, 50, 64, 128, 129, 192], dtype=torch.int32)
    whole = [torch.randn(192, 4, 16, generator=generator).requires_grad_() for _ in range(3)]
    weights = torch.randn(192, 64, generator=generator)
    attention = TorchCoreAttention(
        TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4), 1, AttnMaskType.causal
    )
    split = ZigZag(2, 64)
    held = [split.take(torch.arange(192).view(3, 64), other).flatten() for other in (0, 1)]
    expected = attention(*whole, None, packed_seq_params=PackedSequences.of(borders, max_seqlen=64, row_length=64))
    gradients = torch.autograd.grad((expected * weights)[held[rank]].sum(), whole)

    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    try:
        language = dataclasses.replace(tiny_run.language, hidden_size=64)
        config = language_transformer_config(language, Runtime(groups.collection, params_dtype=torch.bfloat16))
        core = attention
        if backend == "transformer_engine":
            from lcl_megatron.model.te_attention import FetchingTEAttention

            core = FetchingTEAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups.collection)
        inputs = [tensor.detach().to("cuda", torch.bfloat16).requires_grad_() for tensor in whole]
        runs = split.runs(borders, rank).to("cuda")
        order = torch.cat(held).cuda().index_select(0, runs.key_rows)
        sequences = PackedSequences.of_runs(runs, 32, lambda key, value: (key[order], value[order]))
        own = held[rank].cuda()
        output = core(
            inputs[0][own], *inputs[1:], None, attn_mask_type=AttnMaskType.causal, packed_seq_params=sequences
        )
        found = torch.autograd.grad((output * weights.to(output)[own]).sum(), inputs)
    finally:
        groups.destroy()
    torch.testing.assert_close(output.float().cpu(), expected[held[rank]], rtol=3e-2, atol=3e-2)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs, rtol=5e-2, atol=5e-2)


def tiny_config(base: RunConfig, precision: str, backend: str) -> RunConfig:
    training = dataclasses.replace(
        base.training,
        precision=precision,
        transformer_impl=backend,
        global_batch_size=len(ROWS),
        micro_batch_size=len(ROWS),
    )
    # TransformerEngine's kernels want heads of at least 16 channels.
    vision = dataclasses.replace(base.vision, hidden_size=64, drop_path_rate=0.4)
    language = dataclasses.replace(base.language, hidden_size=64)
    return dataclasses.replace(base, training=training, vision=vision, language=language)


def losses_and_gradients(config: RunConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Run one global batch; gradients under the names of the checkpoint, which both backends share."""
    groups = engines.start(config)
    try:
        engine = engines.build_engine(config, groups)
        micro = merge(make_rows(config, ROWS))
        agreed = agree(StepBatch(3, layout_of([[micro]]), (micro,)), groups)
        engine.zero_gradients()
        (part,) = engine.forward_backward(
            agreed.micro_batches, Objective(config.loss, agreed, groups), 3, whole_gradients=True
        )
        losses = [float(part.generation_loss), float(part.contrastive_loss)]
        gradients = {
            name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_").replace(
                "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
            ): parameter.main_grad.float().cpu().clone()
            for name, parameter in engine.model.named_parameters()
        }
    finally:
        groups.destroy()
    return losses, gradients


def check_close(found: Any, expected: Any, precision: str) -> None:
    (losses, gradients), (expected_losses, expected_gradients) = found, expected
    assert losses == pytest.approx(expected_losses, rel=LOSS_TOLERANCE[precision])
    assert gradients.keys() == expected_gradients.keys()
    difference = torch.cat([(gradients[name] - expected_gradients[name]).flatten() for name in gradients])
    whole = torch.cat([gradient.flatten() for gradient in expected_gradients.values()])
    assert float(difference.norm() / whole.norm()) < GRADIENT_TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_transformer_engine_equals_the_torch_backend(tiny_run: RunConfig, precision: str) -> None:
    transformer_engine_or_skip()
    found = losses_and_gradients(tiny_config(tiny_run, precision, "transformer_engine"))
    check_close(found, losses_and_gradients(tiny_config(tiny_run, precision, "torch")), precision)


def test_half_precision_is_close_to_single(tiny_run: RunConfig) -> None:
    found = losses_and_gradients(tiny_config(tiny_run, "bf16", "torch"))
    check_close(found, losses_and_gradients(tiny_config(tiny_run, "fp32", "torch")), "bf16")


@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
@pytest.mark.parametrize("drop_path_mode", ["mask", "subset"])
@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_no_gradient(
    tiny_run: RunConfig, granularity: Any, drop_path_mode: Any, backend: str
) -> None:
    if backend == "transformer_engine":
        transformer_engine_or_skip()
    keeping = tiny_config(tiny_run, "bf16", backend)
    keeping = dataclasses.replace(keeping, vision=dataclasses.replace(keeping.vision, drop_path_mode=drop_path_mode))
    saving = dataclasses.replace(
        keeping,
        vision=dataclasses.replace(keeping.vision, recompute_granularity=granularity),
        language=dataclasses.replace(keeping.language, recompute_granularity=granularity),
    )
    check_close(losses_and_gradients(saving), losses_and_gradients(keeping), "bf16")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    return data.corpus


@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_in_half_precision_learns_saves_and_goes_on(
    corpus: Path, tmp_path: Path, backend: str, distributed: bool
) -> None:
    """Over nccl, with the distributed optimizer and overlapped reductions, which need a device of their own."""
    if backend == "transformer_engine":
        transformer_engine_or_skip()
    config = small_config(
        corpus,
        data={"num_workers": 2},
        training={"train_iters": 60, "precision": "bf16", "transformer_impl": backend},
        parallel={"use_distributed_optimizer": distributed, "overlap_param_gather": distributed},
        checkpoint={"save": str(tmp_path / "save")},
        logging={"log_dir": str(tmp_path / "logs"), "log_interval": 10, "exit_interval": 30},
    )
    for expected in (30, 60):
        with run_from(config) as run:
            assert run.engine.device.type == "cuda"
            train(run)
            assert run.progress.step == expected
    generation = [report["loss/generation"] for report in read_reports(tmp_path / "logs")]
    assert len(generation) == 6
    assert generation[-1] < 0.5 * generation[0]
