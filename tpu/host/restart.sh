#!/bin/sh
# Runs a command, and runs it again while it can be resumed.
# usage: restart.sh OUTPUT COMMAND [ARGUMENT…]; OUTPUT is the local path of the command's output directory
#
# Exit codes of the command: 1 (an unexpected error, perhaps on this host only), 75 (see illada_jax/main.py) and those of
# signals (128 and above; JAX aborts a process with 134 when another one died) run it again. Any other code, and any code
# after a SIGTERM, ends this script with that code. After 10 restarts (ILLADA_RESTARTS) without progress it ends with 70.
# Progress is a new name one level below OUTPUT's directories: a checkpoint, a chunk of results, a shard. The code of a
# task that is over is left in the file `ended`.
set -eu
output=$1
shift
max_restarts=${ILLADA_RESTARTS:-10}
restarts=0
stopped=false
child=
gave_up=70 # neither a code of the commands nor one after which XPK recreates the pods
trap 'stopped=true; kill -TERM "$child" 2>/dev/null || :' TERM

# Transparent huge pages in a pod, which XPK makes privileged; JAX asks for them on v5e and newer (TPU VMs: task.sh).
if [ -n "${JOB_COMPLETION_INDEX:-}" ]; then
  { echo always >/sys/kernel/mm/transparent_hugepage/enabled; } 2>/dev/null || :
fi

progress() {
  find "$output" -mindepth 2 -maxdepth 2 ! -path "$output/logs/*" ! -name '.*' ! -name '*tmp*' 2>/dev/null | sort | cksum
}

# end CODE: leaves the code for those that look, and ends.
end() {
  echo "$1" >ended
  exit "$1"
}

while :; do
  before=$(progress)
  echo "== $(date -u '+%F %T') $*"
  "$@" &
  child=$!
  status=0
  wait "$child" || status=$?
  # A signal ends `wait` before the child has saved.
  while kill -0 "$child" 2>/dev/null; do wait "$child" || status=$?; done
  echo "== $(date -u '+%F %T') exit code $status"
  if $stopped; then exit $status; fi
  if [ $status -ne 1 ] && [ $status -ne 75 ] && [ $status -lt 128 ]; then end $status; fi
  if [ "$(progress)" = "$before" ]; then restarts=$((restarts + 1)); else restarts=1; fi
  if [ $restarts -gt "$max_restarts" ]; then
    echo "error: $max_restarts restarts without progress in $output; see the errors above, then start it again" >&2
    end $gave_up
  fi
  sleep "${ILLADA_PAUSE:-20}" &
  child=$!
  wait "$child" || :
  if $stopped; then exit $status; fi
done
