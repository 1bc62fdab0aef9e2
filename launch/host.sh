#!/usr/bin/env bash
# What one host of a slice does. The launch scripts send it with the source and call it on all hosts at once:
#
#   host.sh setup             a Python 3.12 by uv (the images' own is 3.10) with the package for TPUs
#   host.sh run ARGUMENTS     start `python -m grm_jax.main ARGUMENTS`; it goes on when the connection ends
#   host.sh status [ARGUMENTS]   one line: idle, running, "exited CODE", or lost (ended without a code: the host
#                             restarted); with ARGUMENTS of that run alone, and "other" while another one goes on
#   host.sh watch             follow the log of the run and end with its exit code
#   host.sh stop [SECONDS]    SIGTERM, upon which training saves first; SIGKILL after SECONDS (600)
#
# Beside the source lie venv/, run.log (all runs, the last one at the end), run.arguments, run.pid, run.code and run.lock. The lock is
# held as long as a run lives, so that neither a restart of the host nor a number used again passes for a run.
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
base="$(dirname -- "$(dirname -- "$here")")"
python="$base/venv/bin/python"

fail() {
    echo "error: $1" >&2
    exit 2
}

alive() {
    [[ -e $base/run.lock ]] && ! flock --nonblock "$base/run.lock" true
}

busy() {
    fail "a run is going on here (process $(<"$base/run.pid")): watch it, or stop it first"
}

setup() { # the source comes as next/; that of a run which is going on stays as it is
    ! alive || busy
    if [[ $here == "$base/next/launch" ]]; then
        rm -rf -- "$base/source"
        mv -- "$base/next" "$base/source"
    fi
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --quiet --allow-existing --python 3.12 "$base/venv"
    # Without --reinstall-package uv may take what it built of an earlier source with the same version.
    uv pip install --quiet --python "$python" --reinstall-package grm-jax "$base/source[tpu]"
}

run() {
    ! alive || busy
    [[ -x $python ]] || fail "there is no $python: set this host up first"
    rm -f -- "$base/run.pid" "$base/run.code"
    printf '%s\n' "$@" >"$base/run.arguments"
    setsid nohup bash "$here/host.sh" attend "$@" </dev/null >>"$base/run.log" 2>&1 &
    for _ in {1..100}; do
        [[ ! -s $base/run.pid ]] || return 0
        sleep 0.1
    done
    fail "the run did not start; see $base/run.log"
}

attend() { # the run's parent: holds the lock, and writes the exit code down
    local child code
    exec 9>"$base/run.lock"
    flock --nonblock 9 || exit 2
    trap : TERM HUP INT # at a shutdown all get SIGTERM; this one stays to see how the run ends
    cd -- "$base/source"
    echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) python -m grm_jax.main $*"
    "$python" -m grm_jax.main "$@" &
    child=$!
    echo "$child" >"$base/run.pid.new"
    mv -- "$base/run.pid.new" "$base/run.pid"
    while true; do # a signal ends `wait` before the child ends
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) exit code $code"
    echo "$code" >"$base/run.code.new"
    mv -- "$base/run.code.new" "$base/run.code"
}

status() {
    local same=yes
    (($# == 0)) || [[ "$(printf '%s\n' "$@")" == "$(cat -- "$base/run.arguments" 2>/dev/null)" ]] || same=""
    if alive && [[ -z $same ]]; then
        echo "grm_jax: other"
    elif [[ -z $same ]]; then
        echo "grm_jax: idle"
    elif alive; then
        echo "grm_jax: running"
    elif [[ -s $base/run.code ]]; then
        echo "grm_jax: exited $(<"$base/run.code")"
    elif [[ -e $base/run.pid ]]; then
        echo "grm_jax: lost"
    else
        echo "grm_jax: idle"
    fi
}

watch() {
    [[ -e $base/run.log ]] || fail "nothing has been run on this host: start with run"
    if alive; then
        tail --lines=50 --follow --pid="$(<"$base/run.pid")" "$base/run.log"
        flock "$base/run.lock" true # until the exit code is written
    else
        tail --lines=50 "$base/run.log"
    fi
    [[ -s $base/run.code ]] || fail "the run ended without an exit code, as when the host restarts: resume it"
    exit "$(<"$base/run.code")"
}

stop() {
    local left=$((${1:-600} * 10))
    alive || return 0
    kill -TERM "$(<"$base/run.pid")"
    while alive && ((left-- > 0)); do
        sleep 0.1
    done
    ! alive || kill -KILL "$(<"$base/run.pid")"
    flock "$base/run.lock" true
}

case "${1:-}" in
    setup | run | attend | status | watch | stop) "$@" ;;
    *) fail "'${1:-}' is none of setup, run, status, watch and stop" ;;
esac
