#!/bin/sh
# Keeps a task going until it ends: looks at it again and again, and does what tpu/resume.sh does when the hardware is
# SUSPENDED, FAILED or NOT_FOUND, or when a host has nothing that runs or restarts the task. Ctrl-C ends only this script.
USAGE='usage: tpu/babysit.sh [--dry-run] --confirm=NAME [--retries=10] pretrain|sft|evaluate|prepare [FLAG…]
  WAIT_SECONDS=60 between looks. Exits with 0 when the task is complete, or with the code with which it gave up'
TAKES_TASK=true
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME BUCKET
confirm "the remains of $NAME whenever it is preempted, and replaces them"
here=$(dirname -- "$0")
# Hardware that comes back gets the code that the run began with.
COMMIT=${COMMIT:-$(git -C "$ROOT" rev-parse HEAD)}
export COMMIT
if $DRY_RUN; then exec sh "$here/resume.sh" --dry-run ${RETRIES:+"--retries=$RETRIES"} "$@"; fi
python_command "$@"

# look_at_hosts: sets SEEN to the state of the hardware or, if it is ACTIVE, of the task: RUNNING, STOPPED, ENDED (with
# CODE), or UNREACHABLE.
look_at_hosts() {
  read_state || return 1
  SEEN=$STATE
  [ "$STATE" = ACTIVE ] || return 0
  all=
  for node in $(nodes); do
    host_states "$node" || { SEEN=UNREACHABLE; return 0; }
    all="$all$STATES
"
  done
  CODE=$(printf %s "$all" | sed -n 's/^ended //p' | grep -vx 0 | head -n 1) || CODE=
  case $all in
    *other*) fail 1 "another task runs on $NAME; tpu/stop.sh stops it" ;;
    *missing* | *dead* | *idle*) SEEN=STOPPED ;;
    *running*) SEEN=RUNNING ;;
    *) SEEN=ENDED CODE=${CODE:-0} ;;
  esac
  # A host that gave up is not started again: the others cannot go on without it, and give up too.
  [ -z "$CODE" ] || SEEN=ENDED
}

# look_at_workload: the same for a workload on GKE.
look_at_workload() {
  SEEN=$(kubectl get jobset "$NAME-$RUN" --ignore-not-found \
    --output=jsonpath='{.metadata.name}={.status.terminalState}') || return 1
  case $SEEN in
    '') SEEN=NOT_FOUND ;;
    *=Completed) SEEN=ENDED CODE=0 ;;
    *=Failed)
      codes=$(kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME-$RUN" \
        --output=jsonpath='{.items[*].status.containerStatuses[*].state.terminated.exitCode}') || return 1
      SEEN=STOPPED
      for CODE in $codes; do
        # Of other codes the workload has been restarted, as often as it may be.
        case $CODE in 0 | 1 | 42 | 75 | 12[7-9] | 1[3-9]? | 2??) CODE= ;; *) SEEN=ENDED && break ;; esac
      done ;;
    *) SEEN=RUNNING ;;
  esac
}

# progress: a summary of the names one level below the directories of the output.
progress() {
  gcloud storage ls "$BUCKET/$RUN/*/" --project="$PROJECT" 2>/dev/null | grep -v '/logs/' | cksum
}

if [ "$BACKEND" = xpk ]; then
  (QUIET=true && get_credentials)
  look=look_at_workload
else
  look=look_at_hosts
fi
last=
before=
restarts=0
first=true
while :; do
  SEEN=UNREACHABLE
  CODE=
  $look || :
  [ "$SEEN" = "$last" ] || echo "$(date -u '+%F %T') $NAME-$RUN: $SEEN${CODE:+ with $CODE}"
  last=$SEEN
  # Whoever starts this again has corrected what ended the task.
  if $first && [ "$SEEN" = ENDED ] && [ "$CODE" -ne 0 ]; then SEEN=STOPPED; fi
  case $SEEN in
    ENDED)
      [ "$CODE" -eq 0 ] || fail "$CODE" "the task ended with $CODE on a host; tpu/tail.sh and tpu/collect.sh show why"
      exit 0 ;;
    SUSPENDED | FAILED | NOT_FOUND | STOPPED)
      if [ "$SEEN" = STOPPED ]; then
        now=$(progress)
        if [ "$now" = "$before" ]; then restarts=$((restarts + 1)); else restarts=1; fi
        before=$now
        [ $restarts -le "${RETRIES:-10}" ] || fail 70 "${RETRIES:-10} restarts without progress in $BUCKET/$RUN"
      fi
      status=0
      sh "$here/resume.sh" --confirm="$NAME" ${RETRIES:+"--retries=$RETRIES"} "$@" || status=$?
      [ $status -ne "$EXIT_BAD_INPUT" ] || exit $status
      first=false
      last= ;;
    RUNNING) first=false ;;
  esac
  sleep "${WAIT_SECONDS:-60}"
done
