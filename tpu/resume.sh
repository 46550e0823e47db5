#!/bin/sh
# Continues after a preemption: requests lost hardware again, waits, installs, starts the same task.
USAGE='usage: tpu/resume.sh [--dry-run] [--confirm=NAME] pretrain|sft|evaluate|prepare [FLAG…]
  --confirm=NAME: delete the remains of preempted hardware without asking'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
# Options of the script may stand anywhere; all other arguments are those of the task.
for argument in "$@"; do
  shift
  case $argument in
    --dry-run | --confirm=* | --help) options "$argument" ;;
    *) set -- "$@" "$argument" ;;
  esac
done
check_task "$@"
check_settings
need PROJECT ZONE NAME BUCKET

here=$(dirname -- "$0")
dry=
if $DRY_RUN; then dry=--dry-run; fi

if [ "$BACKEND" = xpk ]; then
  # GKE replaces hardware and XPK restarts the workload: only one that has used up its restarts needs this.
  confirm "workload $NAME-$RUN (not the cluster $NAME)"
  run xpk workload delete --cluster="$NAME" --project="$PROJECT" --zone="$ZONE" --workload="$NAME-$RUN" --force
  exec sh "$here/launch.sh" ${dry:+"$dry"} "$@"
fi

need ACCELERATOR RUNTIME_VERSION
if $DRY_RUN; then STATE=SUSPENDED; else read_state; fi
case $STATE in
  ACTIVE)
    # Replaced hosts are empty: install and start again; a task that still runs is left alone.
    sh "$here/install.sh"
    exec sh "$here/launch.sh" "$@" ;;
  SUSPENDED | FAILED)
    confirm "queued resource $NAME, which is $STATE"
    run gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
    sh "$here/create.sh" ${dry:+"$dry"} ;;
  NOT_FOUND) sh "$here/create.sh" ;;
  *) echo "$NAME is $STATE" ;;
esac
sh "$here/wait.sh" ${dry:+"$dry"}
sh "$here/install.sh" ${dry:+"$dry"}
exec sh "$here/launch.sh" ${dry:+"$dry"} "$@"
