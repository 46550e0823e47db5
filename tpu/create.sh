#!/bin/sh
# Requests the hardware: a queued resource of TPU VMs (BACKEND=gcloud) or a GKE cluster (BACKEND=xpk).
USAGE='usage: tpu/create.sh [--dry-run]'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME ACCELERATOR

if [ "$BACKEND" = xpk ]; then
  need BUCKET
  set -- xpk cluster create --cluster="$NAME" --project="$PROJECT" --zone="$ZONE" --tpu-type="$ACCELERATOR" \
    --num-slices="$NUM_SLICES"
  case $PROVISIONING in
    spot) set -- "$@" --spot ;;
    reserved) set -- "$@" --reservation="$RESERVATION" ;;
    on-demand) set -- "$@" --on-demand ;;
  esac
  network="${NETWORK:+ --network=$NETWORK}${SUBNETWORK:+ --subnetwork=$SUBNETWORK}"
  [ -z "$network" ] || set -- "$@" --custom-cluster-arguments="${network# }"
  [ -z "${SERVICE_ACCOUNT:-}" ] || set -- "$@" --custom-nodepool-arguments="--service-account=$SERVICE_ACCOUNT"
  ! $INTERNAL_IPS || set -- "$@" --private
  explained "$@" --enable-workload-identity --enable-gcsfuse-csi-driver
  # By default gcsfuse refuses to rename directories of a bucket (EMFILE).
  run xpk storage attach "$NAME-bucket" --cluster="$NAME" --project="$PROJECT" --zone="$ZONE" --type=gcsfuse \
    --bucket="${BUCKET#gs://}" --size=1 --mount-point="$MOUNT" --readonly=false --auto-mount=true \
    --mount-options=implicit-dirs,rename-dir-limit=100000
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
case $PROVISIONING in
  spot) set -- "$@" --spot ;;
  reserved)
    set -- "$@" --reserved
    [ -z "${RESERVATION_PROJECT:-}" ] || set -- "$@" --reservation-host-project="$RESERVATION_PROJECT" ;;
esac
[ -z "${NETWORK:-}" ] || set -- "$@" --network="$NETWORK"
[ -z "${SUBNETWORK:-}" ] || set -- "$@" --subnetwork="$SUBNETWORK"
[ -z "${SERVICE_ACCOUNT:-}" ] || set -- "$@" --service-account="$SERVICE_ACCOUNT"
! $INTERNAL_IPS || set -- "$@" --internal-ips
status=0
explained "$@" || status=$?
if [ "$status" -ne 0 ] && $EXISTS; then
  read_state || fail "$EXIT_GONE" "$NAME already exists, but its state cannot be read"
  echo "$NAME already exists in state $STATE: continue with tpu/wait.sh, or remove it with tpu/delete.sh"
  exit 0
fi
exit "$status"
