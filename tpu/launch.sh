#!/bin/sh
# Starts a task on all hosts in the background, with restarts (see tpu/host/restart.sh).
USAGE='usage: tpu/launch.sh [--dry-run] pretrain|sft|evaluate|prepare [FLAG…]
  FLAGs are those of python -m illada_jax.main, .evaluate or .prepare; the output directory is BUCKET/RUN'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
# Options of the script may stand anywhere; all other arguments are those of the task.
for argument in "$@"; do
  shift
  case $argument in
    --dry-run | --help) options "$argument" ;;
    *) set -- "$@" "$argument" ;;
  esac
done
check_task "$@"
check_settings
need PROJECT ZONE NAME BUCKET
task=$1
python_command "$@"

if [ "$BACKEND" = xpk ]; then
  need IMAGE ACCELERATOR
  # XPK recreates all pods when one is lost or ends with 75 or 127 to 255; restart.sh restarts the command in its pod.
  explained xpk workload create --cluster="$NAME" --project="$PROJECT" --zone="$ZONE" --workload="$NAME-$RUN" \
    --tpu-type="$ACCELERATOR" --num-slices="$NUM_SLICES" --docker-image="$IMAGE" --max-restarts=100 \
    --restart-on-exit-codes=75 --termination-grace-period-seconds=600 --command="sh tpu/host/restart.sh $COMMAND"
  exit
fi

# A single host prepares a corpus; all other tasks run on all hosts.
if [ "$task" = prepare ]; then
  on_workers "$(nodes | head -n 1)" 0 "sh illada/tpu/host/start.sh $COMMAND"
  exit
fi
# The processes of all slices wait for each other when they join.
nodes | while read -r node; do
  on_workers "$node" all "sh illada/tpu/host/start.sh $COMMAND" </dev/null
done
