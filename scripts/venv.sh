# Sourced by quickstart.sh and test.sh: makes .venv with the extras in $1, unless it is there and up to date.
# PYTHON names another interpreter than the first of python3, python3.12, python3.11, python3.10 that fits.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.10 to 3.12 found (tried: ${PYTHON:-python3 python3.12 python3.11 python3.10})." >&2
    echo "Install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    exit 1
}

make_venv() {
    local extra=$1 stamp=".venv/installed-$1" state python
    state=$(cat constraints.txt setup.cfg | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
        if [ ! -x .venv/bin/python ]; then
            python=$(find_python) || exit 1
            "$python" -m venv .venv
        fi
        .venv/bin/python -m pip install --quiet --quiet --upgrade pip setuptools wheel
        # torch first: DeepSpeed is built from source and looks at it.
        .venv/bin/python -m pip install --quiet --quiet --constraint constraints.txt torch numpy
        .venv/bin/python -m pip install --quiet --quiet --constraint constraints.txt --editable ".[$extra]"
        echo "$state" > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
