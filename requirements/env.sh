#!/usr/bin/env bash
# Makes .venv, the environment that every make target uses: `make env`, or `requirements/env.sh`.
#
# Done once: what was installed from is kept in .venv/.installed-from and compared; a change of setup.py or of the pins
# installs the difference. An install that was killed leaves .venv/.unfinished, and the next call starts it afresh.
# PYTHON=/path/to/python chooses the interpreter (3.11, 3.12 or 3.13).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
venv_python=$venv/bin/python

description() { # of what the environment was, or would be, installed from
    echo "folder: $PWD"
    cat setup.py requirements/pins.txt
}

is_supported() { # a name on the PATH may be a shim for an interpreter that is not there: run it
    "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if is_supported "$PYTHON"; then echo "$PYTHON" && return; fi
        echo "make env: PYTHON=$PYTHON is $("$PYTHON" -V 2>&1 | head -n 1 || true)." >&2
        echo "This project needs Python 3.11, 3.12 or 3.13: set PYTHON to such an interpreter." >&2
        return 1
    fi
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if command -v "$candidate" >/dev/null && is_supported "$candidate"; then echo "$candidate" && return; fi
    done
    echo "make env: no Python 3.11, 3.12 or 3.13 is on the PATH (python3 is $(python3 -V 2>&1 | head -n 1 || true))." >&2
    echo "Install one of them, or name one: make env PYTHON=/path/to/python3.11" >&2
    return 1
}

is_current() {
    [ -f $venv/.installed-from ] && [ ! -e $venv/.unfinished ] && [ -x $venv_python ] &&
        description | cmp -s - $venv/.installed-from
}

if is_current; then exit 0; fi
if command -v flock >/dev/null; then # two makes at once: the second waits, then finds the work done
    exec 9<"$PWD/requirements/env.sh"
    flock 9
    if is_current; then exit 0; fi
fi

python=$(find_python)
if [ -e $venv/.unfinished ]; then
    echo "make env: an earlier install of $venv was cut short; starting it afresh"
    rm -rf $venv
elif [ -f $venv/.installed-from ] && [ "$(head -n 1 $venv/.installed-from)" != "folder: $PWD" ]; then
    echo "make env: $venv was made in another folder; making it again here"
    rm -rf $venv
elif [ -d $venv ] && ! is_supported $venv_python; then
    echo "make env: $venv has no working Python 3.11-3.13; making it again"
    rm -rf $venv
fi

mkdir -p $venv
touch $venv/.unfinished
rm -f $venv/.installed-from
if [ ! -x $venv_python ] && ! "$python" -m venv $venv; then
    echo "make env: $python -m venv failed. On Debian and Ubuntu it needs the package python3-venv." >&2
    exit 1
fi
echo "make env: installing into $venv with $($venv_python -V) (minutes; several GB on a machine with CUDA wheels)"
$venv_python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]' -c requirements/pins.txt |
    { grep -v -e '^Requirement already satisfied' -e '^Looking in' || true; }
$venv_python -m pip check --disable-pip-version-check
description >$venv/.installed-from
rm $venv/.unfinished
echo "make env: $venv is ready"
