#!/bin/sh
# Copies the outputs of a run, without its checkpoints, and the logs of all hosts.
USAGE='usage: tpu/collect.sh [--dry-run]; into DESTINATION (default: collected/RUN)'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
options "$@"
check_settings
need PROJECT ZONE NAME BUCKET
destination=${DESTINATION:-collected/$RUN}
run mkdir -p "$destination/logs"

if [ "$BACKEND" = xpk ]; then
  get_credentials
  # shellcheck disable=SC2016 # expanded by the inner shell
  run sh -c 'kubectl logs --prefix --tail=-1 --selector="$1" >"$2"' sh \
    "jobset.sigs.k8s.io/jobset-name=$NAME-$RUN" "$destination/logs/$NAME-$RUN.log"
else
  nodes | while read -r node; do
    on_workers "$node" all "gcloud storage cp illada/log $(quote "$BUCKET/$RUN/logs/")\$(hostname).log" </dev/null
  done
fi
run gcloud storage rsync "$BUCKET/$RUN" "$destination" --project="$PROJECT" --recursive --exclude='^checkpoints/.*'
