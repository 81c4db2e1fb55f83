#!/usr/bin/env bash
# Install the course into a container's Python: Dockerfile, .devcontainer and .binder run this.
# More packages may be named: tools/container_setup.sh jupyterhub nbgitpuller
set -euo pipefail
cd "$(dirname "$0")/.."
python="$(command -v python)"
"$python" -m pip install --quiet --no-cache-dir uv
# A container seldom has a GPU. TORCH_BACKEND=auto: the build of PyTorch for those that there are.
# Compiled now: the learners may not write there, and each kernel would compile it for itself.
"$python" -m uv pip install --quiet --no-cache --compile-bytecode --python "$python" \
  --torch-backend="${TORCH_BACKEND:-cpu}" -c constraints.txt -e ".[lab]" "$@"
"$python" -m compileall -q course_lib
# Saved explorers keep their picture, and nobody is asked about news, whatever starts JupyterLab.
settings="$("$python" -c 'import sys; print(sys.prefix)')/etc/jupyter"
mkdir -p "$settings"
cp -r tools/jupyter/. "$settings/"
