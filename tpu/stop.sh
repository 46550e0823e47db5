#!/bin/sh
# Stops the task; training saves first. The hardware stays. tpu/launch.sh continues it.
USAGE='usage: tpu/stop.sh [--dry-run]'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME

if [ "$BACKEND" = xpk ]; then
  run xpk workload delete --cluster="$NAME" --project="$PROJECT" --zone="$ZONE" --workload="$NAME-$RUN" --force
  exit
fi
nodes | while read -r node; do
  on_workers "$node" all 'sudo systemctl disable --now illada' </dev/null
done
