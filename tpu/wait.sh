#!/bin/sh
# Waits until the hardware is ready. Exits with 4 if it will not be, or was preempted.
USAGE='usage: tpu/wait.sh [--dry-run]; WAIT_SECONDS=30 between checks, WAIT_HOURS=72 at most'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
options "$@"
check_settings
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
while :; do
  read_state
  now=$STATE
  [ "$now" = "$last" ] || echo "$NAME is $now"
  last=$now
  case $now in
    ACTIVE) exit 0 ;;
    NOT_FOUND) fail "$EXIT_GONE" "there is no $NAME in $ZONE; request it with tpu/create.sh" ;;
    FAILED) fail "$EXIT_GONE" "the request failed; run tpu/delete.sh, then tpu/create.sh, perhaps in another ZONE" ;;
    SUSPENDING | SUSPENDED) fail "$EXIT_GONE" "$NAME was preempted; continue with tpu/resume.sh" ;;
  esac
  [ "$left" -gt 0 ] || fail "$EXIT_GONE" "$NAME is still $now after ${WAIT_HOURS:-72} hours"
  sleep "$seconds"
  left=$((left - seconds))
done
