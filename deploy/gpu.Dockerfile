# Every process of the system on a host with NVIDIA GPUs. PyPI's wheels of torch and vLLM bring the CUDA libraries; the
# driver comes from the host, through the NVIDIA Container Toolkit.
#   docker build -f deploy/gpu.Dockerfile -t vaopd:gpu .
FROM docker.io/library/python:3.11-slim-bookworm

# Triton compiles the launchers of its kernels while it runs. There is no nvcc, hence no FlashInfer sampler.
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1 VLLM_USE_FLASHINFER_SAMPLER=0

# /cache keeps downloaded models and compiled kernels between starts. It is a volume, not /tmp, where engines forbid
# executable files. The folders are mount points: a new volume takes their owner.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp vaopd \
 && install -d -o vaopd -g vaopd /runs /cache
ENV HOME=/tmp XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor MPLCONFIGDIR=/tmp/matplotlib \
    TOKENIZERS_PARALLELISM=false

# The dependencies first, from the lock alone: this large layer stays while the source changes. Every file must have a
# digest of gpu.txt.
WORKDIR /app
COPY deploy/locks/gpu.txt /locks/
RUN --mount=type=cache,target=/root/.cache/pip pip install --quiet --no-deps --require-hashes -r /locks/gpu.txt

COPY pyproject.toml LICENSE NOTICE deploy/health.py deploy/entrypoint.sh ./
COPY configs configs
COPY vaopd vaopd
COPY services services
# Built with the lock's setuptools. Files are readable by all, whatever the umask of the checkout.
RUN touch README.md && pip install --quiet --no-cache-dir --no-deps --no-build-isolation . && rm -rf build ./*.egg-info vaopd services && chmod -R a+rX .

USER 10001:10001
ENTRYPOINT ["sh", "/app/entrypoint.sh"]
CMD ["--help"]
