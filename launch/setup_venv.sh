# Sourced by quickstart.sh (with the word train) and tests/run.sh (dev): makes the virtual environment once, of the lock's
# versions and of files that have its hashes, and puts it first on the path. DISTSEG_VENV names another one than .venv.
venv=${DISTSEG_VENV:-.venv}
case $1 in
    dev) lock=requirements-dev.txt ;;
    train) lock=requirements.txt ;;
    *) echo "launch/setup_venv.sh: got '$1'; must be train or dev" >&2 && exit 2 ;;
esac
if [ ! -x "$venv/bin/python" ]; then
    python3.11 -m venv "$venv"
fi
PATH=$(cd "$venv" && pwd)/bin:$PATH
export PATH
# A stamp of what was installed, so that a second run starts at once; what dev installs holds train.
stamp=$(cat pyproject.toml requirements.txt requirements-dev.txt | sha256sum | cut -c1-16)-$(pwd)
installed=$(cat "$venv/distseg-installed" 2>/dev/null || true)
if [ "$installed" != "$stamp-$1" ] && [ "$installed" != "$stamp-dev" ]; then
    pip_install() { python -m pip install --quiet --disable-pip-version-check --no-build-isolation "$@"; }
    # What builds packages comes first: pip would fetch builders of its own choice otherwise.
    pip_install --require-hashes -r <(awk '/^[a-z]/ { kept = /^(setuptools|wheel|packaging)==/ } kept' "$lock")
    pip_install --require-hashes -r "$lock"
    pip_install --no-deps -e .
    echo "$stamp-$1" >"$venv/distseg-installed"
fi
