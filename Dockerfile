# qft on a machine with an NVIDIA GPU, by a user without rights. What is downloaded and compiled lies in /cache, a volume:
#
#     docker build -t qft .
#     docker run --rm --gpus all -v qft-cache:/cache -v "$PWD":/work qft train recipe.yaml
#
# Files are written as user 1000; `--user "$(id -u):$(id -g)"` for another, with a cache of its own.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04 AS base

# Triton compiles for the GPU that it finds: a C compiler, and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/qft

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY qft /src/qft
# torch brings the CUDA libraries that it was built with.
RUN /opt/qft/bin/pip install --no-cache-dir --constraint /src/constraints.txt '/src[gguf,calibrate,eval]' \
    && install --directory --owner 1000 --group 1000 /cache /work

ENV PATH=/opt/qft/bin:$PATH \
    HOME=/cache/home \
    HF_HOME=/cache/huggingface \
    QFT_CACHE=/cache/qft \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    PYTHONUNBUFFERED=1
USER 1000:1000
VOLUME ["/cache"]
WORKDIR /work

# What `make setup` needs beside: the devcontainer's.
FROM base AS dev
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ git make \
    && rm -rf /var/lib/apt/lists/*
USER 1000:1000

FROM base
ENTRYPOINT ["qft"]
CMD ["--help"]
