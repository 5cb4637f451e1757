#!/usr/bin/env bash
# Puts a Triton server into a Python environment, for `distseg serve` and the tests: 55 MB to fetch, 145 MB on disk.
# It is the one inside the nvidia-pytriton wheel, with the python backend alone; production takes the container of
# export/triton. The wheel gets a folder of its own without its requirements: it asks for numpy below 2.
# The environment is that of the Python named behind the command; else DISTSEG_VENV, the checkout's .venv, or the active one.
set -euo pipefail
python=${1:-${DISTSEG_VENV:-$(dirname "$0")/../.venv}/bin/python}
if [ $# -eq 0 ] && [ ! -x "$python" ]; then
    python=python
fi
version=0.7.0
folder=$("$python" -c 'import sys; print(sys.prefix)')/tritonserver
if [ -e "$folder/installed-$version" ]; then
    exit 0
fi
rm -rf "$folder"
pip_install=("$python" -m pip install --disable-pip-version-check --no-compile)
if ! "$python" -c 'import pip' 2>/dev/null; then # an environment that uv made
    pip_install=(uv pip install --python "$python")
fi
"${pip_install[@]}" --quiet --no-deps --target "$folder" "nvidia-pytriton==$version"
# The backend runs models in this program, which must be the one for the environment's Python.
triton=$folder/pytriton/tritonserver
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
install -m 755 "$triton/python_backend_stubs/$minor/triton_python_backend_stub" "$triton/backends/python/"
touch "$folder/installed-$version"
