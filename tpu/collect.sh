#!/bin/sh
# Copies the outputs of a run, without its checkpoints, and the logs of all hosts, also of hosts that are gone.
USAGE='usage: tpu/collect.sh [--dry-run]; into DESTINATION (default: collected/RUN)'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME BUCKET
destination=${DESTINATION:-collected/$RUN}
run mkdir -p "$destination/logs"

if [ "$BACKEND" = xpk ]; then
  # Pods that were replaced are gone; Cloud Logging keeps what they printed for 30 days.
  filter="resource.type=\"k8s_container\" AND resource.labels.cluster_name=\"$NAME\" AND \
resource.labels.pod_name:\"$NAME-$RUN-slice-job-\""
  format='--format=value(timestamp,resource.labels.pod_name,textPayload)'
  # shellcheck disable=SC2016 # expanded by the inner shell
  run sh -c 'file=$1; shift; "$@" >"$file"' sh "$destination/logs/$NAME-$RUN.log" \
    gcloud logging read "$filter" --project="$PROJECT" --order=asc --freshness=30d "$format"
else
  # A host's log goes to the bucket whenever its task ends, under the id of its boot; so does a running task's here.
  nodes | while read -r node; do
    on_workers "$node" all "gcloud storage cp illada/log $(quote "$BUCKET/$RUN/logs/")\
\$(hostname)-\$(tr -d - </proc/sys/kernel/random/boot_id).log" </dev/null
  done
fi
run gcloud storage rsync "$BUCKET/$RUN" "$destination" --project="$PROJECT" --recursive --exclude='^checkpoints/.*'
