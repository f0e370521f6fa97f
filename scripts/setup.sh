#!/usr/bin/env bash
# Makes .venv with the package installed for development, from the locked and hashed requirements.
# Safe to run again: it does nothing while what it was made from is unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."

for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "${python:-}" ]; then
    echo "error: no Python 3.11 to 3.13 found; install Python 3.11 or set PYTHON to it" >&2
    exit 2
fi

stamp=$({ cat requirements/dev.txt requirements/uv.txt pyproject.toml scripts/setup.sh; "$python" -VV; pwd; } | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/.made-from 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi

echo "setting up .venv ($("$python" -V), locked requirements) ..."
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt

# uv does not read pip's configuration: where that names an index of its own, hand it on
index=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)
if [ -n "${PIP_INDEX_URL:-$index}" ]; then
    export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$index}}"
fi
links=${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}

install() { .venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode "$@"; }
# A folder of wheels with a CPU build of the pinned torch is preferred: a tenth of the size, a third of the memory.
version=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements/dev.txt)
folder=""
for link in $links; do
    if compgen -G "$link/torch-$version+cpu-*.whl" >/dev/null; then folder=$link; fi
done
if [ -n "$folder" ]; then
    echo "using the CPU build of torch $version in $folder"
    install --no-deps --no-index --find-links "$folder" "torch==$version+cpu"
    .venv/bin/python scripts/without_torch.py requirements/dev.txt > .venv/requirements.txt
    install --require-hashes --no-deps -r .venv/requirements.txt
else
    install --require-hashes -r requirements/dev.txt
fi
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
echo "$stamp" > .venv/.made-from
