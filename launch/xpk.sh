#!/usr/bin/env bash
# Slices in a GKE cluster, by XPK (https://github.com/AI-Hypercomputer/xpk). The cluster restarts a run by itself when a host
# is preempted. launch/README.md tells the whole way.
#
#   launch/xpk.sh VERB CLUSTER --zone=ZONE --project=PROJECT [OPTIONS] [-- ARGUMENTS of python -m grm_jax.main]
#
# Verbs:
#   create    make the cluster and its slices
#   setup     build the image of the source and push it
#   run       start ARGUMENTS on all hosts
#   watch     follow the log of host 0, and end with XPK's exit code: 0 if the run was completed
#   status    list the runs of the cluster
#   stop      delete the run; it saves first, if --grace is long enough
#   resume    stop, if it is still there, and run
#   delete    delete the cluster with all that runs in it
#
# Options:
#   --zone=ZONE --project=PROJECT        where
#   --type=v5p-128 --slices=N            accelerator type (create, run, resume) and number of slices (1)
#   --spot | --reservation=NAME          cheap and preemptible, or of your reservation; else on demand  (create)
#   --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME    without a tag: that is the commit  (setup, run, resume)
#   --workload=NAME                      the run's name in the cluster (grm)
#   --source=REVISION                    the commit that is built and run (HEAD)
#   --env=KEY=VALUE                      set for the run; again for more
#   --max-restarts=N                     restarts in all, those after preemptions too (100)
#   --grace=SECONDS                      from SIGTERM, upon which training saves, to SIGKILL (600)
#   --yes                                delete without asking
#   --dry-run                            print every command and run none
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=launch/perform.sh
source "$here/perform.sh"

cluster="" zone="" project="" type="" slices=1 capacity="--on-demand" image="" workload="grm" revision="HEAD"
max_restarts=100 grace=600 yes=""
settings=() arguments=() place=()

read_options() {
    local option value
    while (($#)); do
        option="${1%%=*}"
        case "$1" in
            --) shift && arguments=("$@") && return ;;
            --spot) set_capacity --spot && shift && continue ;;
            --yes) yes=yes && shift && continue ;;
            --dry-run) dry=yes && shift && continue ;;
            --*=*) value="${1#*=}" && shift ;;
            --*) (($# > 1)) || fail "$1 has no value: --help lists the options" && value="$2" && shift 2
                [[ $value != --* ]] || fail "$option has no value, $value follows: write $option=VALUE" ;;
            *) fail "'$1' is no option: arguments of the run go behind --, as in launch/xpk.sh run CLUSTER ... -- rl ..." ;;
        esac
        [[ -n $value ]] || fail "$option is empty: give it a value, or leave it out"
        case "$option" in
            --zone) zone="$value" ;;
            --project) project="$value" ;;
            --type) type="$value" ;;
            --slices) whole "$option" "$value" && slices="$value" ;;
            --reservation) set_capacity "--reservation=$value" ;;
            --image) image="$value" ;;
            --workload) workload="$value" ;;
            --source) revision="$value" ;;
            --env) [[ $value == [A-Za-z_]*=* ]] || fail "--env $value is not KEY=VALUE" && settings+=("--env=$value") ;;
            --max-restarts) whole "$option" "$value" && max_restarts="$value" ;;
            --grace) whole "$option" "$value" && grace="$value" ;;
            *) fail "$option is no option: launch/xpk.sh --help lists them" ;;
        esac
    done
}

set_capacity() {
    [[ $capacity == --on-demand ]] || fail "$capacity and $1 exclude each other: a slice has one kind of capacity"
    capacity="$1"
}

check() { # VERB: what it needs, before anything is done
    local value
    for value in "$cluster" "$workload"; do # XPK's rule
        [[ $value =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#value} -le 40 ]] ||
            fail "'$value' is no name for a cluster or a run: up to 40 of a-z, 0-9 and -, a letter first"
    done
    [[ -n $zone ]] || fail "--zone is missing, as us-east5-a"
    [[ -n $project ]] || fail "--project is missing: gcloud config get project prints the one that gcloud takes"
    place=("--cluster=$cluster" "--zone=$zone" "--project=$project")
    case "$1" in
        create | run | resume) [[ -n $type ]] || fail "--type is missing, as v5p-128" ;;
    esac
    case "$1" in
        run | resume)
            ((${#arguments[@]})) || fail "what shall run? launch/xpk.sh $1 $cluster ... -- rl --config configs/gemma2_27b_rl.py ..."
            one_line "${arguments[@]}" ${settings[@]+"${settings[@]}"}
            ;;
        *) ((!${#arguments[@]})) || fail "$1 takes no arguments behind --: run and resume do" ;;
    esac
    case "$1" in
        setup | run | resume)
            [[ -n $image && ${image##*/} != *:* ]] ||
                fail "--image '$image' is no image without a tag, as us-east5-docker.pkg.dev/PROJECT/REPOSITORY/grm_jax"
            pick_commit "$revision"
            image="$image:${commit:0:12}"
            ;;
    esac
    [[ $1 == setup ]] && need gcloud https://cloud.google.com/sdk/docs/install
    [[ $1 == setup ]] || need xpk https://github.com/AI-Hypercomputer/xpk
}

create() {
    perform xpk cluster create "${place[@]}" --tpu-type="$type" --num-slices="$slices" "$capacity"
}

setup() {
    local folder
    pack
    folder="${archive%.tar.gz}"
    perform mkdir -p "$folder"
    perform tar -xzf "$archive" -C "$folder"
    perform cp "$folder/launch/Dockerfile" "$folder/Dockerfile"
    perform gcloud builds submit "$folder" --tag="$image" --timeout=1h --project="$project"
}

run() { # 1 and 75 restart too: hosts that lose one of them end with 75
    perform xpk workload create "${place[@]}" --workload="$workload" --tpu-type="$type" --num-slices="$slices" \
        --docker-image="$image" ${settings[@]+"${settings[@]}"} --max-restarts="$max_restarts" --restart-on-exit-codes=1,75 \
        --termination-grace-period-seconds="$grace" --command="exec $(quote python -m grm_jax.main "${arguments[@]}")"
}

watch() {
    local chosen="jobset.sigs.k8s.io/jobset-name=$workload,jobset.sigs.k8s.io/job-index=0"
    status # which lets kubectl know the cluster, too
    perform kubectl logs --follow --tail=50 --selector="$chosen,batch.kubernetes.io/job-completion-index=0" || true
    perform xpk workload list "${place[@]}" --wait-for-job-completion="$workload"
}

status() {
    perform xpk workload list "${place[@]}" --filter-by-job="$workload"
}

stop() {
    perform xpk workload delete "${place[@]}" --workload="$workload" --force
}

resume() {
    stop || note "$workload was not there to delete"
    run
}

delete() {
    perform xpk cluster delete "${place[@]}" ${yes:+--force}
}

whole() { # OPTION VALUE
    [[ $2 =~ ^[0-9]+$ ]] || fail "$1 $2 is no whole number"
}

verb="${1:-}" cluster="${2:-}"
case "$verb" in
    -h | --help) usage "$0" && exit ;;
    create | setup | run | watch | status | stop | resume | delete) ;;
    *) fail "'$verb' is no verb of launch/xpk.sh: create, setup, run, watch, status, stop, resume, delete; --help explains" ;;
esac
read_options "${@:3}"
check "$verb"
"$verb"
