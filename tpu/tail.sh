#!/bin/sh
# Follows the log of the first host. Ctrl-C does not end the task.
USAGE='usage: tpu/tail.sh [--dry-run]; LINES=100 lines from before'
# shellcheck source=tpu/lib.sh
. "$(dirname -- "$0")/lib.sh"
need PROJECT ZONE NAME
lines=${LINES:-100}

if [ "$BACKEND" = xpk ]; then
  get_credentials
  run kubectl logs --follow --tail="$lines" --prefix \
    --selector="jobset.sigs.k8s.io/jobset-name=$NAME-$RUN,batch.kubernetes.io/job-completion-index=0"
  exit
fi
REMOTE="tail -n $lines -F illada/log"
tpu_vm ssh 0 "$(nodes | head -n 1)"
