# Sourced by quickstart.sh and tests/run.sh: makes the virtual environment once and puts it first on the path.
# DISTSEG_VENV names another one than .venv; DISTSEG_CUDA=12 takes the CUDA 12 build of DALI (see setup.py).
venv=${DISTSEG_VENV:-.venv}
wanted=$1 # extras of setup.py, "" for none
if [ ! -x "$venv/bin/python" ]; then
    python3.11 -m venv "$venv"
fi
PATH=$(cd "$venv" && pwd)/bin:$PATH
export PATH
# A stamp of what was installed, so that a second run starts at once.
stamp=$(cat setup.py requirements.txt | sha256sum | cut -c1-16)-$wanted-$(pwd)
if [ "$(cat "$venv/distseg-installed" 2>/dev/null)" != "$stamp" ]; then
    python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e ".${wanted:+[$wanted]}"
    echo "$stamp" >"$venv/distseg-installed"
fi
