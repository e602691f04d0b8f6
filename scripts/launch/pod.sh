#!/usr/bin/env bash
# Cloud TPU slices: creates a slice, installs this repository on its hosts, and runs one command on all of them.
# `scripts/launch/pod.sh --help` is the manual. docs/tpu_pods.md describes all steps to a trained model.
set -euo pipefail

usage() {
  cat <<'END'
Usage: scripts/launch/pod.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS]

Commands
  create   requests a slice through the queue (queued resources) and waits until it is ready
  install  copies a commit to every host, makes a Python environment there, runs --setup
  run      starts `python -m halonet_jax.train ARGUMENTS` on every host; it continues when your connection ends
  resume   repeats `run` until the training ends. Creates and installs the slice if there is none, and again after a
           pre-emption. Starts again after exit codes 69, 75, 134, 137, 139, 143. Ends with the run's exit code. Keep it
           alive (tmux).
  logs     follows the log of --worker
  status   state of the slice, of the run on each host, and the last log line
  stop     sends SIGTERM to the run on every host: it saves its state and ends
  ssh      opens a shell on --worker, or runs the command after -- there
  delete   deletes the slice with everything on its disks

Options; those marked * may come from environment variables: POD_NAME, POD_ZONE, POD_PROJECT, POD_ACCELERATOR_TYPE
  --name=NAME              * name of the slice and of its queued request
  --zone=ZONE              * zone, such as us-west4-a
  --project=PROJECT        * default: gcloud's project
  --accelerator-type=TYPE  * type, such as v5litepod-64, v4-32, v5p-32, v6e-64 (create, resume)
  --runtime-version=NAME     default: the one for the type
  --spot                     use a spot slice: cheaper, may be pre-empted at any time (create, resume)
  --create-flags="FLAGS"     more flags of `gcloud compute tpus queued-resources create`
  --revision=REVISION        commit to install; default HEAD. Uncommitted changes are not copied.
  --python=VERSION           default 3.12; downloaded on the hosts, because their own is too old
  --setup="COMMAND"          command for bash on every host at the end of install, such as a copy of the data
  --module=MODULE            default halonet_jax.train
  --worker=N|all             host for logs and ssh; default 0
  --poll=SECONDS             time between checks of the state; default 60
  --dry-run                  print the commands, run nothing
  --yes                      delete without asking

Example: a complete run on a spot slice
  scripts/launch/pod.sh resume --name=h4 --zone=us-west4-a --accelerator-type=v5litepod-64 --spot -- \
    --config=configs/h4.py --workdir=gs://BUCKET/runs/h4 --config.data.dir=gs://BUCKET/tensorflow_datasets
END
}

fail() { printf 'error: %s\n' "$1" >&2 && exit "${2:-2}"; }
say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$1" >&2; }

# Runs a command, or prints it in a dry run. The printed line is quoted for pasting.
do_() {
  if [[ ! $dry_run ]]; then
    "$@"
    return
  fi
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

tpus() { do_ gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}; }
on_workers() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }
worker_script() { on_workers all "\$HOME/halonet_jax/scripts/launch/pod_worker.sh $1"; }

# --- the slice

runtime_version() {
  case $accelerator_type in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

# Prints one word: ABSENT, the state of the request, or UNKNOWN. Once the request is ACTIVE, it prints the slice's state
# (GONE: no slice). It uses `list`, because its exit code tells "nothing there" from "could not ask". The latter must
# never look like a pre-emption.
slice_state() {
  local state
  state=$(tpus queued-resources list --filter="name~/$name\$" --format="value(state.state)") || state=UNKNOWN
  if [[ $state == ACTIVE ]]; then
    state=$(tpus tpu-vm list --filter="name~/$name\$" --format="value(state)") || state=UNKNOWN
    state=${state:-GONE}
  fi
  echo "${state:-ABSENT}"
}

create() {
  local words
  read -ra words <<<"$create_flags"
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator_type" \
    --runtime-version="${runtime_version:-$(runtime_version)}" ${spot:+--spot} ${words[@]+"${words[@]}"} --quiet || return
  [[ ! $dry_run ]] || return 0
  local state last=
  while state=$(slice_state) && [[ $state != READY ]]; do
    [[ $state == "$last" ]] || say "slice $name: $state"
    last=$state
    case $state in FAILED | SUSPENDED | GONE | PREEMPTED | TERMINATED) return 1 ;; esac
    sleep "$poll"
  done
  say "slice $name is ready"
}

delete_slice() { tpus queued-resources delete "$name" --force --quiet; }

# --- the run

# Uses three folders of the home: the code, its environment (kept for a quick second install), the run's log and state.
install() {
  local commit archive=${TMPDIR:-/tmp}/halonet_jax-$name.tar.gz script
  commit=$(git -C "$root" rev-parse --short "$revision^{commit}" 2>/dev/null) ||
    fail "revision '$revision' is no commit of $root; give a commit, branch or tag of a git checkout"
  [[ $revision != HEAD || -z $(git --no-optional-locks -C "$root" status --porcelain) ]] ||
    say "not copied, because not committed: changes in $root"
  script=$(
    cat <<'END'
set -e
cd
! halonet_jax/scripts/launch/pod_worker.sh status 2>/dev/null | grep running || { echo "error: stop the run first" >&2; exit 2; }
rm -rf halonet_jax
mkdir halonet_jax
tar -xzf halonet_jax.tar.gz -C halonet_jax
cd halonet_jax
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python "$python" ~/halonet_venv
~/.local/bin/uv pip install --quiet --python ~/halonet_venv/bin/python -r requirements.txt -e ".[tpu]"
echo "$commit" >REVISION
END
  )
  do_ git -C "$root" archive --format=tar.gz --output="$archive" "$commit" || return
  tpus tpu-vm scp "$archive" "$name:halonet_jax.tar.gz" --worker=all || return
  on_workers all "python=$python commit=$commit"$'\n'"$script" || return
  [[ -z $setup ]] || on_workers all "$setup"
}

run() { worker_script "start \$HOME/halonet_venv/bin/python -m $module$(printf ' %q' "${arguments[@]}")"; }

# Reads the status lines of all hosts and prints the state of the whole run in one or two words.
verdict() {
  local states bad
  states=$(sed -n 's/^halonet [^ ]* //p')
  has() { grep -qE "^($1)$" <<<"$states"; }
  bad=$(grep -E '^exited' <<<"$states" | grep -vE ' (0|69|75|134|137|139|143)$' | head -n 1) || true
  if [[ -z $states ]]; then
    echo unknown
  elif has 'bare'; then
    echo bare
  elif has 'stopped .*'; then
    has running && echo running || echo stopped
  elif [[ $bad ]]; then
    echo "final ${bad#exited }" # of one host; the codes of the others only say that they lost a peer
  elif has running; then
    has 'exited .*|lost|idle' && echo torn || echo running
  elif has 'idle'; then
    echo idle
  elif has 'lost|exited [1-9].*'; then
    echo "again $(grep -vx 'exited 0' <<<"$states" | head -n 1)"
  else
    echo "final 0"
  fi
}

all_workers_status() {
  on_workers all "cd \$HOME/halonet_jax 2>/dev/null && scripts/launch/pod_worker.sh status || echo halonet \$(hostname) bare"
}

resume() {
  if [[ $dry_run ]]; then
    echo "# checked every $poll s:" && tpus queued-resources list --filter="name~/$name\$" --format="value(state.state)"
    tpus tpu-vm list --filter="name~/$name\$" --format="value(state)" && all_workers_status
    echo "# if the slice was pre-empted:" && delete_slice
    echo "# if there is no slice, and after that:" && create && install
    echo "# if nothing runs, or after an exit code that allows it:" && run
    return
  fi
  # looks: checks since the run was started. gone, torn: checks in a row in which the slice was gone, or the hosts
  # disagreed. short: starts in a row that ended soon.
  local looks=0 gone=0 torn=0 short=0 state now
  # shellcheck disable=SC2329 # called through try
  begin() { run && say "run started" && looks=0; }
  # shellcheck disable=SC2329
  equip() { install && begin; }
  # shellcheck disable=SC2329
  renew() { create && equip; }
  try() { "$@" || say "'$*' failed, see above; looking again"; } # a slice may be pre-empted at any moment
  while true; do
    state=$(slice_state)
    case $state in
      READY) now=$(all_workers_status | verdict) || now=unknown ;;
      ABSENT) now=absent ;;
      SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | GONE) now=gone ;;
      FAILED) fail "the request for $name failed; 'gcloud compute tpus queued-resources describe $name' says why" 1 ;;
      *) now="waiting ($state)" ;;
    esac
    [[ $now == gone ]] || gone=0
    [[ $now == torn ]] || torn=0
    looks=$((looks + 1))
    case $now in
      absent) say "no slice: creating one" && try renew ;;
      bare) say "not installed yet" && try equip ;;
      idle) try begin ;;
      gone) # must be seen twice, because deleting cannot be undone
        if ((++gone > 1)); then
          say "slice is $state: deleting it and creating a new one"
          try delete_slice # its next state is ABSENT
        fi
        ;;
      torn) # a host ended; the others should notice within minutes
        if ((++torn > 10)); then say "some hosts ended, others hang: ending all" && try worker_script "end 60"; fi
        ;;
      again*)
        ((looks > 10)) && short=0 || short=$((short + 1))
        ((short < 5)) || fail "ended ${now#again } soon after each of 5 starts; 'pod.sh logs' shows why" 1
        say "${now#again }: starting again" && try begin
        ;;
      stopped) say "stopped by 'pod.sh stop'; 'pod.sh run' starts it again" && exit 75 ;;
      "final 0") say "done" && exit 0 ;;
      final*)
        say "exit code ${now#final }; the same command would fail again; the end of the logs:"
        on_workers all "tail -n 3 \$HOME/halonet_run/log" || true
        exit "${now#final }"
        ;;
      running) ;;
      *) say "$now" ;;
    esac
    sleep "$poll"
  done
}

# --- the command line

root=$(cd "$(dirname "$0")/../.." && pwd)
name=${POD_NAME:-} zone=${POD_ZONE:-} project=${POD_PROJECT:-} accelerator_type=${POD_ACCELERATOR_TYPE:-}
runtime_version='' spot='' create_flags='' revision=HEAD python=3.12 setup='' module=halonet_jax.train worker=0 poll=60
dry_run='' yes='' arguments=()
command=${1:-}
case $command in
  create | install | run | resume | logs | status | stop | ssh | delete) shift ;;
  -h | --help | help) usage && exit ;;
  "") fail "no command; 'scripts/launch/pod.sh --help' lists them" ;;
  *) fail "unknown command '$command'; 'scripts/launch/pod.sh --help' lists them" ;;
esac
while (($#)); do
  case $1 in
    --) shift && arguments=("$@") && break ;;
    -h | --help) usage && exit ;;
    --spot | --dry-run | --yes) key=${1#--} value=1 ;;
    --*=*) key=${1%%=*} key=${key#--} value=${1#*=} ;;
    --?*) (($# > 1)) || fail "$1 has no value; write $1=VALUE" && key=${1#--} value=$2 && shift ;;
    *) fail "unknown argument '$1'; options look like --name=NAME; arguments of the training come after --" ;;
  esac
  case $key in
    name | zone | project | accelerator-type | runtime-version | spot | create-flags | revision | python | setup | module | \
      worker | poll | dry-run | yes) printf -v "${key//-/_}" %s "$value" ;;
    *) fail "unknown option --$key; arguments of the training come after --, 'scripts/launch/pod.sh --help' lists the others" ;;
  esac
  shift
done

[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "name '$name' must be lower-case letters, digits and dashes; give --name=h4"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "zone '$zone' must look like us-west4-a; give --zone=ZONE"
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "worker '$worker' must be a number or 'all'"
[[ $poll =~ ^[0-9]+$ ]] || fail "poll '$poll' must be a whole number of seconds"
[[ $python =~ ^3\.1[1-3](\.[0-9]+)?$ ]] || fail "python '$python' is not one that the package supports; use 3.11, 3.12 or 3.13"
if [[ $command == create || $command == resume ]]; then
  [[ $accelerator_type != v5e-* ]] || fail "accelerator-type '$accelerator_type' is called v5litepod-${accelerator_type#*-}"
  [[ $accelerator_type =~ -[0-9]+$ && $(runtime_version) ]] ||
    fail "accelerator-type '$accelerator_type' must be v2-N, v3-N, v4-N, v5litepod-N, v5p-N or v6e-N; give --accelerator-type=v4-32"
fi
if [[ $command == run || $command == resume ]]; then
  [[ " ${arguments[*]-}" =~ \ --workdir[=\ ](gs://[^/]|/) ]] ||
    fail "every host needs the same --workdir, on gs:// or an absolute shared path; give -- --workdir=gs://BUCKET/RUN"
fi
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install, or use --dry-run"

case $command in
  create) create || fail "slice $name was not created; its last state and gcloud's messages are above" 1 ;;
  status)
    if [[ $dry_run ]]; then
      tpus queued-resources list --filter="name~/$name\$" --format="value(state.state)"
      tpus tpu-vm list --filter="name~/$name\$" --format="value(state)"
    else
      state=$(slice_state) && echo "slice $name: $state" && [[ $state == READY ]] || exit 0
    fi
    all_workers_status
    on_workers 0 "tail -n 1 \$HOME/halonet_run/log"
    ;;
  logs) on_workers "$worker" "tail -n 100 -F \$HOME/halonet_run/log" ;;
  stop) worker_script "stop 600" ;;
  ssh)
    if ((${#arguments[@]})); then on_workers "$worker" "${arguments[*]}"; else tpus tpu-vm ssh "$name" --worker="$worker"; fi
    ;;
  delete)
    if [[ ! $yes && ! $dry_run ]]; then
      read -rp "Delete slice $name in $zone with everything on its disks? Type its name: " answer || answer=
      [[ $answer == "$name" ]] || fail "not deleted; type the name, or give --yes" 1
    fi
    delete_slice
    ;;
  *) "$command" ;;
esac
