#!/bin/sh
# Continues after a preemption: requests lost hardware again, waits, installs where nothing is, starts the task where it
# does not run. Safe to repeat; tpu/babysit.sh repeats it.
USAGE='usage: tpu/resume.sh [--dry-run] [--confirm=NAME] [--retries=10] pretrain|sft|evaluate|prepare [FLAG…]
  --confirm=NAME: delete the remains of preempted hardware, or of an ended workload, without asking'
TAKES_TASK=true
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME BUCKET
here=$(dirname -- "$0")
dry=
! $DRY_RUN || dry=--dry-run

if [ "$BACKEND" = xpk ]; then
  # GKE replaces hardware and XPK restarts the workload: only one that is gone or has used up its restarts needs this.
  confirm "workload $NAME-$RUN (not the cluster $NAME)"
  exec sh "$here/launch.sh" --confirm="$NAME" ${RETRIES:+"--retries=$RETRIES"} ${dry:+"$dry"} "$@"
fi

need ACCELERATOR RUNTIME_VERSION
python_command "$@"
if $DRY_RUN; then
  STATE=SUSPENDED
else
  read_state || fail "$EXIT_GONE" "the state of $NAME cannot be read"
fi
case $STATE in
  SUSPENDED | FAILED)
    [ "$STATE" != FAILED ] || echo "the request failed: $(reason)"
    confirm "queued resource $NAME, which is $STATE"
    run gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
    sh "$here/create.sh" ${dry:+"$dry"} ;;
  NOT_FOUND) sh "$here/create.sh" ;;
  *) echo "$NAME is $STATE" ;;
esac
[ "$STATE" = ACTIVE ] || sh "$here/wait.sh" ${dry:+"$dry"}

if $DRY_RUN; then
  sh "$here/install.sh" --dry-run
else
  missing=
  for node in $(nodes); do
    retried host_states "$node" || fail "$EXIT_GONE" "a host of $node cannot be reached"
    case $STATES in *missing*) missing="$missing$node
" ;; esac
  done
  [ -z "$missing" ] || NODES=${missing%?} MISSING_ONLY=true sh "$here/install.sh"
fi
exec sh "$here/launch.sh" ${RETRIES:+"--retries=$RETRIES"} ${dry:+"$dry"} "$@"
