#!/usr/bin/env bash
# pod.sh runs this on each host of a slice. It keeps one command running after the ssh connection ends.
#
#   pod_worker.sh start COMMAND...   starts it detached; output goes to ~/halonet_run/log, the exit code to exit_code
#   pod_worker.sh status             one line: halonet HOST idle|running|lost|exited CODE|stopped CODE
#   pod_worker.sh end SECONDS        SIGTERM; SIGKILL if it has not ended after SECONDS
#   pod_worker.sh stop SECONDS       the same, and notes it, so that `pod.sh resume` does not start it again
set -euo pipefail

dir=$HOME/halonet_run
mkdir -p "$dir"

# Checks the name too: after a reboot another process may have the number.
alive() { pid=$(cat "$dir/pid" 2>/dev/null) && grep -q pod_worker "/proc/$pid/cmdline" 2>/dev/null; }

status() {
  local state=idle
  if alive; then
    state=running
  elif [[ -f $dir/exit_code ]]; then
    state="$([[ -f $dir/stopped ]] && echo stopped || echo exited) $(cat "$dir/exit_code")"
  elif [[ -f $dir/pid ]]; then
    state=lost # the host went down with the command
  fi
  echo "halonet $(hostname) $state"
}

# `pkill -P` reaches the command but not this script, which must still write the exit code.
end() {
  alive || return 0
  pkill -TERM -P "$pid" || true
  for ((second = 0; second < $1; second++)); do
    alive || return 0
    sleep 1
  done
  pkill -KILL -P "$pid" || true
  sleep 1
}

command=${1:?start, status, stop or end}
shift
case $command in
  start)
    if alive; then
      echo "error: $(hostname) runs a command already, process $pid; stop it first" >&2
      exit 2
    fi
    rm -f "$dir/exit_code" "$dir/stopped" "$dir/pid"
    setsid nohup "$0" keep "$@" >>"$dir/log" 2>&1 </dev/null &
    until [[ -s $dir/pid ]]; do sleep 0.1; done
    status
    ;;
  keep)
    echo $$ >"$dir/pid"
    cd "$(dirname "$0")/../.."
    echo "--- $(date -u +%FT%TZ) revision $(cat REVISION 2>/dev/null || echo unknown): $*"
    trap : TERM # at shutdown, wait for the command: it saves its state on the same signal
    code=0
    "$@" || code=$?
    echo "--- $(date -u +%FT%TZ) exit code $code"
    echo "$code" >"$dir/exit_code"
    ;;
  status) status ;;
  end | stop)
    if [[ $command == stop ]]; then touch "$dir/stopped"; fi
    end "$1"
    status
    ;;
  *)
    echo "error: unknown command '$command'; use start, status, stop or end" >&2
    exit 2
    ;;
esac
