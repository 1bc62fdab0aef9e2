#!/usr/bin/env bash
# A TPU slice that is there at once or not at all (`gcloud compute tpus tpu-vm`). launch/README.md tells the whole way.
#
#   launch/tpu_vm.sh VERB NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS of python -m grm_jax.main]
#
# Verbs; all hosts of the slice do the same at once:
#   create    make the slice
#   setup     send the source and install it
#   run       start ARGUMENTS on all hosts; it goes on when this machine disconnects
#   watch     follow the log of host 0, and end with the run's exit code
#   status    a line for each host
#   stop      let the run save and end
#   resume    whatever is missing: make the slice anew if it was preempted, set up, run ARGUMENTS
#   keep      resume, and again after each preemption, until the run has ended
#   delete    delete the slice
#
# Options:
#   --zone=ZONE --project=PROJECT        where; without a project that of gcloud
#   --type=v5p-128                       accelerator type  (create, resume, keep)
#   --version=v2-alpha-tpuv5             image of the hosts  (create, resume, keep)
#   --spot | --reserved                  cheap and preemptible, or of your reservation; else on demand
#   --service-account=EMAIL              whose rights the hosts have; they need the bucket
#   --network=NAME --subnetwork=NAME     else the default network
#   --internal-ips                       no external addresses; run this script on a machine of that network
#   --labels=KEY=VALUE,...               labels, for the bill
#   --source=REVISION                    the commit that is sent (HEAD)
#   --env=KEY=VALUE                      set for the run; again for more
#   --every=SECONDS                      between looks at the state (60)
#   --max-restarts=N                     keep: restarts after failures; those after preemptions are not counted (3)
#   --yes                                delete without asking
#   --dry-run                            print every command and run none
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=launch/perform.sh
source "$here/perform.sh"
ready_word="READY" lost_word="PREEMPTED" # gcloud's
# shellcheck source=launch/slice.sh
source "$here/slice.sh"

own_option() { # none beyond those of every slice
    return 1
}

create_slice() {
    perform gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" --version="$version" "$@"
}

read_state() {
    ask gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)' || return 1
    case "$answer" in
        READY) state="ready" ;;
        CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | DELETING) state="waiting" ;;
        PREEMPTED | TERMINATED) state="lost" ;;
        *) state="$answer" ;;
    esac
}

delete_slice() {
    perform gcloud compute tpus tpu-vm delete "$name" "${place[@]}" "$@"
}

main "$@"
