# For NVIDIA GPUs: the NGC image brings torch, CUDA, NCCL, apex and TransformerEngine built for each other.
# Not built or run yet by this project. 25.12: torch 2.10.0a0, Python 3.12, CUDA 13.1.
#   docker build -t lcl_megatron .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data -it lcl_megatron make gpu-check
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

WORKDIR /workspace/lcl_megatron

# Fails here, and not in the middle of a job, if the base image's TransformerEngine does not fit megatron-core 0.16.1.
RUN python -c "from importlib.metadata import version as v; te = v('transformer-engine'); print('TransformerEngine', te); \
t = tuple(map(int, te.split('.')[:2])); assert (2, 9) <= t < (2, 12), f'need 2.9 <= TransformerEngine < 2.12, got {te}'"

# The image's own torch, numpy, ... are pinned by its constraint file, so none of these lines can replace them.
# DALI is in the image already; TransformerEngine must stay the image's build, so the `gpu` extra is not asked for.
COPY setup.py pyproject.toml README.md ./
COPY lcl_megatron/__init__.py lcl_megatron/
RUN python -c "import torch; print(torch.__version__)" > /tmp/torch_before \
    && pip install --no-cache-dir ".[dev]" \
    && pip uninstall --yes lcl_megatron \
    && python -c "import torch; print(torch.__version__)" | diff /tmp/torch_before -

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
