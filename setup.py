"""Package metadata: what a user installs. Exact, tested versions are in ``requirements/cpu.txt``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lcl_megatron" / "__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="lcl_megatron",
    version=VERSION,
    description="Pre-training of vision encoders on interleaved image-text data (LCL) on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["lcl_megatron", "lcl_megatron.*"]),
    package_data={
        "lcl_megatron.config": ["presets/*.toml"],
        "lcl_megatron.evaluation": ["presets/*.toml"],
        "lcl_megatron": ["py.typed"],
    },
    install_requires=[
        # 2.8 runs; 2.10 closes known holes of torch.load(weights_only=True): prefer it for checkpoints of others.
        "torch>=2.8",
        "megatron-core>=0.16.1,<0.17",
        "numpy>=1.26",
        "pillow>=10.3",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "tyro>=0.9.17",
        "matplotlib>=3.8",
        "simplejpeg>=1.7",  # decodes JPEG without the GIL, faster than Pillow
    ],
    extras_require={
        # The range that megatron-core 0.16.1 declares. Never without a GPU: megatron-core would choose its kernels.
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
        "obelics": ["pyarrow>=15"],
        "ray": ["ray>=2.30"],  # tools/preprocess_data.py --engine ray
        "dali": ["nvidia-dali-cuda130>=2.4,<3"],
        # Stock libraries that load an export, and other encoders to compare with.
        "eval": [
            "timm>=1.0.20",
            "transformers>=4.57",
            "open_clip_torch>=3.0",
            "pycocoevalcap>=1.2",  # BLEU and CIDEr as the COCO server computes them
            "webdataset>=1.0",
        ],
        "dev": ["hypothesis>=6.100", "mypy>=2.0", "psutil>=5.9", "pytest>=8.0", "pytest-timeout>=2.3", "ruff>=0.15"],
    },
)
