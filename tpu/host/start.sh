#!/bin/sh
# Runs on a TPU VM: starts a command in the background and starts it again until it is done.
# usage: start.sh COMMAND [ARGUMENT…]
# Exit codes of the command: 0 done and 2 bad input end it; 75 (told to stop, or another host is gone) and signals do not.
set -eu
cd -- "$(dirname -- "$0")/../.."

if [ "${ILLADA_AGAIN:-}" = yes ]; then
  trap 'stopped=yes; kill -TERM "$child" 2>/dev/null || :' TERM
  stopped=no
  while :; do
    echo "== $(date -u '+%F %T') $*"
    "$@" &
    child=$!
    status=0
    wait "$child" || status=$?
    # A signal ends `wait` before the child has saved.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || status=$?; done
    echo "== $(date -u '+%F %T') exit code $status"
    [ $stopped = no ] || exit $status
    if [ $status -ne 75 ] && [ $status -lt 128 ]; then exit $status; fi
    sleep "${ILLADA_PAUSE:-20}"
  done
fi

if [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; then
  echo "runs already, as process $(cat pid); tpu/tail.sh shows it"
  exit 0
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH
ILLADA_AGAIN=yes nohup sh tpu/host/start.sh "$@" >>log 2>&1 </dev/null &
echo $! >pid
echo "started as process $(cat pid)"
