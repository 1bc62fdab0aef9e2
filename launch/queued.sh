#!/usr/bin/env bash
# A TPU slice that is waited for in a queue (`gcloud compute tpus queued-resources`): how spot and reserved capacity is had.
#
#   launch/queued.sh VERB NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS of python -m grm_jax.main]
#
# Verbs and options are those of launch/tpu_vm.sh; the request and its slice have the same NAME. One option more:
#   --valid-until=DURATION               give up waiting after this long, as 12h; the request then counts as lost
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=launch/perform.sh
source "$here/perform.sh"
ready_word="ACTIVE" lost_word="SUSPENDED" # gcloud's
# shellcheck source=launch/slice.sh
source "$here/slice.sh"
valid_until=""

own_option() { # NAME VALUE
    [[ $1 == --valid-until ]] && valid_until="$2"
}

create_slice() {
    perform gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" --accelerator-type="$type" \
        --runtime-version="$version" ${valid_until:+"--valid-until-duration=$valid_until"} "$@"
}

read_state() {
    ask gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' || return 1
    case "$answer" in
        ACTIVE) state="ready" ;;
        CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | SUSPENDING | DELETING) state="waiting" ;;
        SUSPENDED | FAILED) state="lost" ;;
        *) state="$answer" ;;
    esac
}

delete_slice() { # --force: with the slice, should there be one
    perform gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force "$@"
}

main "$@"
