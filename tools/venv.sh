#!/bin/sh
# Make the virtual environment $1 with everything that building and testing need.
set -eu
venv=$1
python=${PYTHON:-python3}
command -v "$python" > /dev/null || {
    echo "error: $python is not there; install Python 3.11 or newer (apt-get install python3), or set PYTHON=" >&2
    exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON= to one" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || {
    echo "==> creating $venv"
    "$python" -m venv "$venv" || {
        echo "error: no virtual environment could be made; apt-get install python3-venv" >&2
        exit 1
    }
}
echo "==> installing Python packages into $venv, and building"
# pip's own progress on a terminal; a log stays short.
quiet=--quiet
if [ -t 1 ]; then quiet=; fi
"$venv/bin/python" -m pip install $quiet --disable-pip-version-check 'setuptools>=77' 'Cython>=3.1'
"$venv/bin/python" -m pip install $quiet --disable-pip-version-check --no-build-isolation -e '.[test]'
