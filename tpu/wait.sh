#!/bin/sh
# Waits until the hardware is ready. Exits with 4 if it will not be, or was preempted.
USAGE='usage: tpu/wait.sh [--dry-run]; WAIT_SECONDS=30 between checks, WAIT_HOURS=72 at most'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME
seconds=${WAIT_SECONDS:-30}
left=$((${WAIT_HOURS:-72} * 3600))

if [ "$BACKEND" = xpk ]; then
  get_credentials
  run kubectl wait --for=condition=Ready nodes --selector=cloud.google.com/gke-tpu-accelerator --timeout="${left}s"
  exit
fi

if $DRY_RUN; then
  run gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)'
  exit 0
fi
last=
unread=0
while :; do
  # An error may pass: the network, a limit of requests.
  if read_state; then unread=0; else unread=$((unread + 1)) STATE=unknown; fi
  [ "$STATE" = "$last" ] || echo "$NAME is $STATE"
  last=$STATE
  case $STATE in
    ACTIVE) exit 0 ;;
    NOT_FOUND) fail "$EXIT_GONE" "there is no $NAME in $ZONE; request it with tpu/create.sh" ;;
    FAILED)
      fail "$EXIT_GONE" "the request failed: $(reason). Run tpu/delete.sh, then tpu/create.sh, perhaps in another ZONE" ;;
    SUSPENDING | SUSPENDED) fail "$EXIT_GONE" "$NAME was preempted; continue with tpu/babysit.sh or tpu/resume.sh" ;;
  esac
  [ $unread -lt 20 ] || fail "$EXIT_GONE" "the state of $NAME cannot be read"
  [ "$left" -gt 0 ] || fail "$EXIT_GONE" "$NAME is still $STATE after ${WAIT_HOURS:-72} hours"
  sleep "$seconds"
  left=$((left - seconds))
done
