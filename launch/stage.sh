#!/usr/bin/env bash
# Copies data, weights and checkpoints between this machine and a bucket. Folders are synchronised: of them only what is
# missing or older there is copied, and nothing is deleted there.
#
#   launch/stage.sh [--dry-run] SOURCE ... gs://BUCKET/FOLDER      files and folders into FOLDER, by their own names
#   launch/stage.sh [--dry-run] gs://BUCKET/FOLDER/ ... HERE       and back; a folder in a bucket is written with a / at its end
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=launch/perform.sh
source "$here/perform.sh"

copy() { # SOURCE DESTINATION
    local target="${2%/}" kept="${1%/}"
    if [[ -d $1 || $1 == gs://*/ ]]; then
        target="$target/${kept##*/}"
        [[ $target == gs://* ]] || perform mkdir -p "$target"
        perform gcloud storage rsync "$1" "$target" --recursive --skip-if-dest-has-newer-mtime
    else
        perform gcloud storage cp "$1" "$target/"
    fi
}

case "${1:-}" in
    -h | --help) usage "$0" && exit ;;
    --dry-run) dry=yes && shift ;;
    --*) fail "$1 is no option: --dry-run is the only one" ;;
esac
(($# > 1)) || fail "there must be something to copy and a place for it: launch/stage.sh SOURCE ... gs://BUCKET/FOLDER"
into="${!#}"
for source in "${@:1:$#-1}"; do
    [[ $source == gs://* || $into == gs://* ]] || fail "neither $source nor $into is in a bucket: one of them is gs://BUCKET/..."
    [[ $source == gs://* || -e $source ]] || fail "there is no $source here"
done
need gcloud https://cloud.google.com/sdk/docs/install
for source in "${@:1:$#-1}"; do
    copy "$source" "$into"
done
