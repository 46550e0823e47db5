#!/bin/sh
# Runs on a TPU VM: starts a command in the background, with restarts, unless one is already running.
# usage: start.sh OUTPUT COMMAND [ARGUMENT…], as for restart.sh
set -eu
cd -- "$(dirname -- "$0")/../.."

if [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; then
  echo "already running as process $(cat pid); tpu/tail.sh shows its log"
  exit 0
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH
nohup sh tpu/host/restart.sh "$@" >>log 2>&1 </dev/null &
echo $! >pid
echo "started as process $(cat pid)"
