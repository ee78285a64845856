"""Set-up shared by all tests: one thread, the CPU host, the gpu marker, optional real data, tiny configurations."""

from __future__ import annotations

import os

# Before torch is imported: a process that has started a thread pool must not fork (see tests/distributed.py).
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

from pathlib import Path

import pytest
import torch

from lcl_megatron.config import (
    DataConfig,
    LanguageConfig,
    OptimizerConfig,
    PoolConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from lcl_megatron.parallel import cpu_host

torch.set_num_threads(1)
cpu_host.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real MMC4, OBELICS and caption samples, which are not part of the repository."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LCL_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder}; set LCL_SHARED_DATA to a folder that holds them")
    return folder


@pytest.fixture
def tiny_vision() -> VisionConfig:
    """Two layers of width 32 on 28 px images: 4 latents per image."""
    return VisionConfig(
        image_size=28, patch_size=14, num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4
    )


@pytest.fixture
def tiny_language() -> LanguageConfig:
    """Two layers of width 32, 100 tokens, padded to 128."""
    return LanguageConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
    )


@pytest.fixture
def tiny_run(tiny_vision: VisionConfig, tiny_language: LanguageConfig) -> RunConfig:
    """A run that takes milliseconds per step on a CPU, in fp32."""
    return RunConfig(
        vision=tiny_vision,
        pool=PoolConfig(num_attention_heads=4),
        language=tiny_language,
        data=DataConfig(seq_length=64, num_workers=0),
        training=TrainingConfig(
            train_iters=4, global_batch_size=4, micro_batch_size=2, precision="fp32", transformer_impl="torch"
        ),
        optimizer=OptimizerConfig(lr_warmup_iters=2),
    )
