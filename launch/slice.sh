# shellcheck shell=bash
# shellcheck disable=SC2154 # root, dry, commit and archive are of perform.sh
# Sourced by tpu_vm.sh and queued.sh: what is the same for a slice of either kind, the verbs on its hosts. Each of the two
# has create_slice, delete_slice, own_option, the words ready_word and lost_word, and read_state, which sets `state` to
# absent, waiting, ready or lost, or to gcloud's own word for what only a person can mend.

script="launch/$(basename -- "$0")"
name="" zone="" project="" type="" version="" capacity="" revision="HEAD" every=60 max_restarts=3 yes="" separator=""
place=() wanted=() reach=() settings=() arguments=()
host="grm_jax/source/launch/host.sh" # on every host, below the home folder
state="" answer=""                   # of the slice: one of the above, and gcloud's own word
assumed="$ready_word"                # the answer that a dry run takes for granted
run_state="" run_code=0 failures=0   # what all hosts together say of the run; failures since the slice was made

read_options() {
    local option value
    while (($#)); do
        option="${1%%=*}"
        case "$1" in
            --) separator=yes && shift && arguments=("$@") && return ;;
            --spot | --reserved)
                [[ -z $capacity || $capacity == "$1" ]] || fail "$capacity and $1 exclude each other: a slice has one kind of capacity"
                capacity="$1" && wanted+=("$1") && shift && continue
                ;;
            --internal-ips) wanted+=("$1") && reach+=(--internal-ip) && shift && continue ;;
            --yes) yes=yes && shift && continue ;;
            --dry-run) dry=yes && shift && continue ;;
            --*=*) value="${1#*=}" && shift ;;
            --*) (($# > 1)) || fail "$1 has no value: $script --help lists the options" && value="$2" && shift 2
                [[ $value != --* ]] || fail "$option has no value, $value follows: write $option=VALUE" ;;
            *) fail "'$1' is no option: arguments of the run go behind --, as in $script run NAME --zone=ZONE -- rl ..." ;;
        esac
        [[ -n $value ]] || fail "$option is empty: give it a value, or leave it out"
        case "$option" in
            --zone) zone="$value" ;;
            --project) project="$value" ;;
            --type) type="$value" ;;
            --version) version="$value" ;;
            --service-account | --network | --subnetwork | --labels) wanted+=("$option=$value") ;;
            --source) revision="$value" ;;
            --env) [[ $value == [A-Za-z_]*=* ]] || fail "--env $value is not KEY=VALUE" && settings+=("$value") ;;
            --every) whole "$option" "$value" && every="$value" ;;
            --max-restarts) whole "$option" "$value" && max_restarts="$value" ;;
            *) own_option "$option" "$value" || fail "$option is no option: $script --help lists them" ;;
        esac
    done
}

whole() { # OPTION VALUE
    [[ $2 =~ ^[0-9]+$ ]] || fail "$1 $2 is no whole number"
}

check() { # VERB: what it needs, before anything is done
    [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#name} -le 61 ]] ||
        fail "'$name' is no name for a slice: up to 61 of a-z, 0-9 and -, a letter first; $script VERB NAME ..."
    [[ -n $zone ]] || fail "--zone is missing: gcloud compute tpus locations list prints the zones"
    place=("--zone=$zone" ${project:+"--project=$project"})
    case "$1" in
        create | resume | keep)
            [[ -n $type ]] || fail "--type is missing, as v5p-128: gcloud compute tpus accelerator-types list --zone=$zone"
            [[ -n $version ]] ||
                fail "--version is missing, as v2-alpha-tpuv5 for v5p: gcloud compute tpus tpu-vm versions list --zone=$zone"
            ;;
    esac
    case "$1" in
        run | resume | keep)
            ((${#arguments[@]})) || fail "what shall run? $script $1 $name ... -- rl --config configs/gemma2_27b_rl.py ..."
            one_line "${arguments[@]}" ${settings[@]+"${settings[@]}"}
            ;;
        *) [[ -z $separator ]] || fail "$1 takes no arguments behind --: run, resume and keep do" ;;
    esac
    case "$1" in setup | resume | keep) pick_commit "$revision" ;; esac
    need gcloud https://cloud.google.com/sdk/docs/install
}

ask() { # a describe command; sets `answer`, to absent where there is no such resource
    local errors
    answer="$assumed"
    [[ -z $dry ]] || { perform "$@" && return; }
    errors="$(mktemp)"
    if answer="$("$@" 2>"$errors")"; then
        rm -f -- "$errors"
    elif grep -q NOT_FOUND "$errors"; then
        rm -f -- "$errors"
        answer="absent"
    else # no network, no rights: that says nothing about the slice
        cat -- "$errors" >&2
        rm -f -- "$errors"
        return 1
    fi
}

make() { # the slice, and wait until it is there
    create_slice ${wanted[@]+"${wanted[@]}"} && assumed="$ready_word" && failures=0 && wait_ready
}

wait_ready() {
    while read_state; do
        case "$state" in
            ready) return 0 ;;
            waiting) note "$name: $answer; looking again in $every s" && sleep "$every" ;;
            *) note "$name: $answer" && return 1 ;;
        esac
    done
    return 1
}

bring_up() { # a slice that is ready, made anew where it was preempted
    read_state || return 1
    case "$state" in
        ready) ;;
        waiting) wait_ready ;;
        absent) make ;;
        lost) note "$name: $answer; making it anew" && delete_slice --quiet && make ;;
        *) fail "$name is $answer, which $script does not mend: see to it with gcloud, or $script delete $name --zone=$zone" ;;
    esac
}

on_hosts() { # WORKER COMMAND
    perform gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" ${reach[@]+"${reach[@]}"} --worker="$1" --command="$2"
}

set_up() {
    local next="${host/source/next}"
    pack && perform gcloud compute tpus tpu-vm scp "$archive" "$name:grm_jax.tar.gz" "${place[@]}" \
        ${reach[@]+"${reach[@]}"} --worker=all &&
        on_hosts all "rm -rf grm_jax/next && mkdir -p grm_jax/next && tar -xzf grm_jax.tar.gz -C grm_jax/next && bash $next setup"
}

run() {
    local words=(bash "$host" run "${arguments[@]}")
    ((!${#settings[@]})) || words=(env "${settings[@]}" "${words[@]}")
    on_hosts all "$(quote "${words[@]}")"
}

stop() { # [SECONDS]
    on_hosts all "bash $host stop${1:+ $1}"
}

ask_hosts() { # of the run that was started with `arguments`, or of any
    on_hosts all "if [ -e $host ]; then $(quote bash "$host" status ${arguments[@]+"${arguments[@]}"}); else echo 'grm_jax: bare'; fi"
}

read_run() { # sets `run_state`: what is wrong on one host is wrong with the run
    local lines line code=0 worst=0 rank
    lines="$(ask_hosts)" || return 1
    [[ -z $dry ]] || lines="grm_jax: bare"
    [[ $lines == *"grm_jax: "* ]] || return 1
    while read -r line; do
        case "$line" in
            "grm_jax: exited 0") rank=0 ;;
            "grm_jax: running") rank=1 ;;
            "grm_jax: exited 130" | "grm_jax: exited 143") rank=2 ;; # by SIGTERM, as hosts get it before a preemption
            "grm_jax: exited "*) rank=3 && { [[ $code == 2 ]] || code="${line##* }"; } ;;
            "grm_jax: idle" | "grm_jax: lost") rank=4 ;;
            "grm_jax: bare") rank=5 ;;
            "grm_jax: other") rank=6 ;;
            *) continue ;;
        esac
        ((rank <= worst)) || worst=$rank
    done <<<"$lines"
    run_code=$code
    local ranks=(finished running interrupted failed lost bare other)
    run_state="${ranks[worst]}"
}

begin() { # the run on a slice that is ready, from whatever is there
    case "$run_state" in
        finished | running) ;;
        bare) set_up && run ;;
        other) fail "another run goes on on $name: $script watch $name --zone=$zone shows it, stop ends it" ;;
        interrupted) stop && run ;; # others may still save
        *) stop 60 && run ;; # hosts that wait for one which is gone do not end by themselves
    esac
}

resume() {
    assumed="$lost_word"
    bring_up && read_run && note "$name: the run is $run_state" && begin
}

keep() {
    assumed="$lost_word"
    while true; do
        if bring_up && read_run; then
            [[ $run_state != finished ]] || { note "$name: the run is finished" && return 0; }
            [[ $run_state == running ]] || note "$name: the run is $run_state"
            if [[ $run_state == failed ]]; then
                # 2 is bad input or settings: that does not pass. What else fails may be a peer's loss.
                if ((run_code == 2 || failures++ >= max_restarts)); then
                    stop 60 || true
                    note "error: the run ended with exit code $run_code: $script watch $name --zone=$zone shows why"
                    return "$run_code"
                fi
            fi
            begin || note "$name: that failed; trying again in $every s"
        else
            note "$name: not to be had or not to be reached; trying again in $every s"
        fi
        [[ -z $dry ]] || return 0
        sleep "$every"
    done
}

status() {
    read_state || return 1
    [[ -n $dry ]] || echo "$name: $answer"
    [[ $state != ready ]] || ask_hosts
}

main() { # VERB NAME ...
    local verb="${1:-}"
    case "$verb" in
        -h | --help) usage "$0" && return ;;
        create | setup | run | watch | status | stop | resume | keep | delete) ;;
        *) fail "'$verb' is no verb of $script: create, setup, run, watch, status, stop, resume, keep, delete; --help explains" ;;
    esac
    name="${2:-}"
    read_options "${@:3}"
    check "$verb"
    case "$verb" in
        create) make ;;
        setup) set_up ;;
        watch) on_hosts 0 "bash $host watch" ;;
        delete) delete_slice ${yes:+--quiet} ;;
        *) "$verb" ;;
    esac
}
