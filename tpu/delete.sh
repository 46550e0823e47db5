#!/bin/sh
# Deletes the hardware, never the bucket. Its name must be typed or given with --confirm=NAME.
USAGE='usage: tpu/delete.sh [--dry-run] [--confirm=NAME]'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME

if [ "$BACKEND" = xpk ]; then
  confirm "cluster $NAME in project $PROJECT"
  run xpk cluster delete --cluster="$NAME" --project="$PROJECT" --zone="$ZONE" --force
  exit
fi
confirm "queued resource $NAME with its TPU VMs in project $PROJECT"
run gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
