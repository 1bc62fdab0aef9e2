# shellcheck shell=bash
# Sourced by the scripts that rent machines: says what is wrong, quotes words, prints or performs commands, packs the source.

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
dry="" # --dry-run sets it: commands are printed, one a line and quoted for a shell, and none is run
exec 3>&1 # what --dry-run prints goes here, also from where standard output is caught

fail() {
    echo "error: $1" >&2
    exit 2
}

note() {
    echo "$1" >&2
}

usage() { # the first lines of a script, from the second to the first that is no comment
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$1"
}

quote() { # words of any POSIX shell that stand for exactly the arguments, on one line
    local LC_ALL=C word line="" inner="'\\''"
    for word in "$@"; do
        if [[ -z $word || $word == *[!A-Za-z0-9_./:=@%+,-]* ]]; then
            word="'${word//\'/$inner}'"
        fi
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

perform() {
    if [[ -n $dry ]]; then
        quote "$@" >&3
    else
        "$@"
    fi
}

need() { # COMMAND, and where it comes from
    [[ -n $dry ]] || command -v "$1" >/dev/null || fail "there is no command $1 on PATH: install it from $2, or look with --dry-run"
}

one_line() { # what is printed or sent to hosts as one line
    local word
    for word in "$@"; do
        [[ $word != *$'\n'* ]] || fail "an argument holds a line break: '$word'; put such text into a file and name that"
    done
}

pick_commit() { # REVISION; sets `commit`, so that hosts made later get the same source
    commit="$(git -C "$root" rev-parse --verify --quiet "$1^{commit}")" ||
        fail "--source $1 is no revision of $root: name a commit, a branch or a tag of a git checkout"
    [[ $1 != HEAD || -z $(git -C "$root" status --porcelain) ]] ||
        note "note: uncommitted changes stay here; what runs is the commit ${commit:0:12}"
}

pack() { # the source at `commit` as `archive`
    archive="${XDG_CACHE_HOME:-$HOME/.cache}/grm_jax/launch/grm_jax-${commit:0:12}.tar.gz"
    perform mkdir -p "${archive%/*}" &&
        perform git -C "$root" archive --format=tar.gz --output="$archive" "$commit"
}
