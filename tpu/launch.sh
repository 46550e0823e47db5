#!/bin/sh
# Starts a task on all hosts in the background, with restarts (see tpu/host/restart.sh).
USAGE='usage: tpu/launch.sh [--dry-run] [--retries=10] pretrain|sft|evaluate|prepare [FLAG…]
  FLAGs are those of python -m illada_jax.main, .evaluate or .prepare; the output directory is BUCKET/RUN
  --retries: restarts in a row without a new checkpoint, shard or result, before a host gives up
  --confirm=NAME: on GKE, replace a workload of this name without asking'
TAKES_TASK=true
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME BUCKET
python_command "$@"
[ -z "${FORWARD:-}" ] || environment_file
supervisor="${RETRIES:+ILLADA_RESTARTS=$RETRIES }"

if [ "$BACKEND" = xpk ]; then
  need IMAGE ACCELERATOR
  slices=$NUM_SLICES
  # `exec`: the signal that stops a pod must reach restart.sh.
  start="${RETRIES:+export ILLADA_RESTARTS=$RETRIES; }exec sh tpu/host/restart.sh $COMMAND"
  if [ "$WORKERS" = 0 ]; then
    slices=1
    # The command starts on every host of a slice.
    start="[ \"\${JOB_COMPLETION_INDEX:-0}\" = 0 ] || exit 0; $start"
  fi
  set -- xpk workload create --cluster="$NAME" --project="$PROJECT" --zone="$ZONE" --workload="$NAME-$RUN" \
    --tpu-type="$ACCELERATOR" --num-slices="$slices" --docker-image="$(image)"
  # XPK recreates all pods when one is lost or ends with 1, 42, 75 or 127 to 255; restart.sh restarts the command in its
  # pod and ends with another code when it gives up.
  set -- "$@" --max-restarts=100 --restart-on-exit-codes=1,75 --termination-grace-period-seconds=600
  [ -z "${FORWARD:-}" ] || set -- "$@" --env-file="$FORWARDED"
  # Without --quiet XPK asks before it replaces a workload.
  [ -z "$CONFIRM" ] || set -- "$@" --quiet
  explained "$@" --command="$start"
  [ -z "${FORWARD:-}" ] || $DRY_RUN || rm -f "$FORWARDED"
  exit
fi

# The processes of all slices wait for each other when they join.
nodes | while read -r node; do
  [ -z "${FORWARD:-}" ] || copy_to "$node" "$WORKERS" "$FORWARDED" illada.env </dev/null
  on_workers "$node" "$WORKERS" "${supervisor}sh illada/tpu/host/task.sh start $COMMAND" </dev/null
done
[ -z "${FORWARD:-}" ] || $DRY_RUN || rm -f "$FORWARDED"
