#!/bin/sh
# Installs the checked-out commit on every TPU VM, or builds an image of it for GKE.
USAGE='usage: tpu/install.sh [--dry-run]'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
options "$@"
check_settings
need PROJECT ZONE NAME BUCKET

if [ "$BACKEND" = xpk ]; then
  need IMAGE
  run gcloud builds submit "$ROOT" --project="$PROJECT" --config="$ROOT/tpu/host/cloudbuild.yaml" \
    --substitutions="_IMAGE=$IMAGE"
  exit
fi

archive=${TMPDIR:-/tmp}/illada-$NAME.tar.gz
run git -C "$ROOT" archive --format=tar.gz --output="$archive" HEAD
nodes | while read -r node; do
  run gcloud compute tpus tpu-vm scp "$archive" "$node:illada.tar.gz" --project="$PROJECT" --zone="$ZONE" \
    --worker=all </dev/null
  on_workers "$node" all "mkdir -p illada && tar -xzf illada.tar.gz -C illada && sh illada/tpu/host/setup.sh \
$(quote "${BUCKET#gs://}" "$MOUNT")" </dev/null
done
$DRY_RUN || rm -f "$archive"
