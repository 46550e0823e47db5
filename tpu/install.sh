#!/bin/sh
# Installs a commit (COMMIT, by default the one checked out) on every TPU VM, or builds an image of it for GKE.
USAGE='usage: tpu/install.sh [--dry-run]; MISSING_ONLY=true leaves alone the hosts that have one'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME BUCKET
archive=${TMPDIR:-/tmp}/illada-$NAME.tar.gz

if [ "$BACKEND" = xpk ]; then
  need IMAGE
  name=$(image)
  run git -C "$ROOT" archive --format=tar.gz --output="$archive" "${COMMIT:-HEAD}"
  run gcloud builds submit "$archive" --project="$PROJECT" --config="$ROOT/tpu/host/cloudbuild.yaml" \
    --substitutions="_IMAGE=$name"
  $DRY_RUN || rm -f "$archive"
  exit
fi

install="mkdir -p illada && tar -xzf illada.tar.gz -C illada && sh illada/tpu/host/setup.sh \
$(quote "${BUCKET#gs://}" "$MOUNT")"
if ${MISSING_ONLY:-false}; then
  install="if [ ! -f illada/installed ]; then $install; fi"
else
  install="if systemctl is-active --quiet illada; then echo 'error: a task is running; tpu/stop.sh stops it' >&2; \
exit 1; fi; rm -f illada/installed; $install"
fi
run git -C "$ROOT" archive --format=tar.gz --output="$archive" "${COMMIT:-HEAD}"
nodes | while read -r node; do
  copy_to "$node" all "$archive" illada.tar.gz </dev/null
  on_workers "$node" all "$install" </dev/null
done
$DRY_RUN || rm -f "$archive"
