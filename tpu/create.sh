#!/bin/sh
# Requests the hardware: a queued resource of TPU VMs (BACKEND=gcloud) or a GKE cluster (BACKEND=xpk).
USAGE='usage: tpu/create.sh [--dry-run]'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
options "$@"
check_settings
need PROJECT ZONE NAME ACCELERATOR

case $PROVISIONING in
  spot) how=--spot ;;
  reserved) how=--reservation=$RESERVATION ;;
  on-demand) how= ;;
esac

if [ "$BACKEND" = xpk ]; then
  need BUCKET
  explained xpk cluster create --cluster="$NAME" --project="$PROJECT" --zone="$ZONE" --tpu-type="$ACCELERATOR" \
    --num-slices="$NUM_SLICES" "${how:---on-demand}" --enable-workload-identity --enable-gcsfuse-csi-driver
  run xpk storage attach "$NAME-bucket" --cluster="$NAME" --project="$PROJECT" --zone="$ZONE" --type=gcsfuse \
    --bucket="${BUCKET#gs://}" --size=1 --mount-point="$MOUNT" --readonly=false --auto-mount=true
  exit
fi

need RUNTIME_VERSION
set -- gcloud compute tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE" \
  --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME_VERSION"
if [ "$NUM_SLICES" -eq 1 ]; then
  set -- "$@" --node-id="$NAME"
else
  set -- "$@" --node-count="$NUM_SLICES" --node-prefix="$NAME"
fi
[ -z "$how" ] || set -- "$@" "$how"
status=0
explained "$@" || status=$?
if [ $status -ne 0 ] && $EXISTS; then
  read_state
  echo "$NAME already exists in state $STATE: continue with tpu/wait.sh, or remove it with tpu/delete.sh"
  exit 0
fi
exit $status
