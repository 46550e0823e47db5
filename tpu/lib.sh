# Shared by the scripts, each of which sets USAGE and sources this file. POSIX shell only.
# shellcheck shell=sh disable=SC2034 # the scripts that source this file use the variables

set -eu

ME=tpu/$(basename "$0")
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
DRY_RUN=false
CONFIRM=
EXIT_BAD_INPUT=2
EXIT_QUOTA=3
EXIT_GONE=4

if [ -n "${POD_ENV:-}" ]; then
  [ -r "$POD_ENV" ] || { echo "error: $ME: POD_ENV=$POD_ENV cannot be read" >&2; exit 2; }
  case $POD_ENV in */*) ;; *) POD_ENV=./$POD_ENV ;; esac
  # shellcheck disable=SC1090 # the user's file
  . "$POD_ENV"
fi

BACKEND=${BACKEND:-gcloud}
NUM_SLICES=${NUM_SLICES:-1}
PROVISIONING=${PROVISIONING:-spot}
RUN=${RUN:-run}
MOUNT=/mnt/bucket

# fail CODE MESSAGE: prints one line and exits with CODE.
fail() {
  code=$1
  shift
  echo "error: $ME: $*" >&2
  exit "$code"
}

# need NAME…: refuses variables without a value, and names all of them at once.
need() {
  missing=''
  for variable in "$@"; do
    eval "value=\${$variable:-}"
    [ -n "$value" ] || missing="$missing $variable"
  done
  [ -z "$missing" ] || fail "$EXIT_BAD_INPUT" "set$missing (see tpu/README.md)"
}

# options "$@": parses --dry-run, --confirm=NAME and --help; refuses anything else.
options() {
  for argument in "$@"; do
    case $argument in
      --dry-run) DRY_RUN=true ;;
      --confirm=*) CONFIRM=${argument#--confirm=} ;;
      --help) echo "$USAGE" && exit 0 ;;
      *) fail "$EXIT_BAD_INPUT" "unexpected argument '$argument'; $USAGE" ;;
    esac
  done
}

# check_task "$@": refuses a command line that does not begin with a task.
check_task() {
  case ${1:-} in
    pretrain | sft | evaluate | prepare) ;;
    '') fail "$EXIT_BAD_INPUT" "which task? $USAGE" ;;
    -*) fail "$EXIT_BAD_INPUT" "unexpected argument '$1'; $USAGE" ;;
    *) fail "$EXIT_BAD_INPUT" "'$1': must be pretrain, sft, evaluate or prepare" ;;
  esac
}

# check_settings: refuses invalid values of the settings, by name.
check_settings() {
  case $BACKEND in gcloud | xpk) ;; *) fail "$EXIT_BAD_INPUT" "BACKEND=$BACKEND: must be gcloud or xpk" ;; esac
  case $PROVISIONING in
    spot | on-demand) ;;
    reserved) need RESERVATION ;;
    *) fail "$EXIT_BAD_INPUT" "PROVISIONING=$PROVISIONING: must be spot, on-demand or reserved" ;;
  esac
  case $NUM_SLICES in
    '' | *[!0-9]* | 0*) fail "$EXIT_BAD_INPUT" "NUM_SLICES=$NUM_SLICES: must be 1 or more" ;;
  esac
  case ${NAME:-n}-$RUN in
    -* | *[!a-z0-9-]*) fail "$EXIT_BAD_INPUT" "NAME=${NAME:-} RUN=$RUN: only small letters, digits and dashes" ;;
  esac
  case ${BUCKET:-gs://b} in
    gs://?*/ | gs:///*) fail "$EXIT_BAD_INPUT" "BUCKET=$BUCKET: must look like gs://NAME, without a slash at the end" ;;
    gs://?*) ;;
    *) fail "$EXIT_BAD_INPUT" "BUCKET=$BUCKET: must look like gs://NAME" ;;
  esac
}

# quote WORD…: prints the words quoted for a shell.
quote() {
  separator=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*)
        printf "%s'%s'" "$separator" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")" ;;
      *) printf '%s%s' "$separator" "$word" ;;
    esac
    separator=' '
  done
}

# run WORD…: prints the command, and runs it unless --dry-run is given.
run() {
  printf '%s\n' "$(quote "$@")"
  $DRY_RUN || "$@"
}

# explained WORD…: like `run`, and explains a refusal by the cloud. Exits with 3 if quota or capacity is missing.
explained() {
  printf '%s\n' "$(quote "$@")"
  $DRY_RUN && return 0
  said=$(mktemp)
  status=0
  "$@" 2>"$said" || status=$?
  cat "$said" >&2
  if [ $status -ne 0 ] && grep -qE 'RESOURCE_EXHAUSTED|[Qq]uota' "$said"; then
    rm -f "$said"
    fail "$EXIT_QUOTA" "no quota or capacity for ${ACCELERATOR:-this} in $ZONE: ask for it in the console (IAM & Admin," \
      "Quotas), or take another ZONE, ACCELERATOR or PROVISIONING"
  fi
  EXISTS=false
  if [ $status -ne 0 ] && grep -qE 'ALREADY_EXISTS|already exists' "$said"; then EXISTS=true; fi
  rm -f "$said"
  return $status
}

# nodes: prints the TPU VMs of the pod, one for each slice.
nodes() {
  if [ "$NUM_SLICES" -eq 1 ]; then
    echo "$NAME"
    return
  fi
  slice=0
  while [ "$slice" -lt "$NUM_SLICES" ]; do
    echo "$NAME-$slice"
    slice=$((slice + 1))
  done
}

# on_workers NODE WORKERS COMMAND: runs a command line on hosts of a slice (`all`, or the number of one).
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$1" --project="$PROJECT" --zone="$ZONE" --worker="$2" --command="$3"
}

# read_state: sets STATE to that of the queued resource (ACTIVE, SUSPENDED, …), NOT_FOUND if it does not exist.
read_state() {
  said=$(mktemp)
  if STATE=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)' 2>"$said"); then
    rm -f "$said"
  elif grep -q NOT_FOUND "$said"; then
    rm -f "$said"
    STATE=NOT_FOUND
  else
    cat "$said" >&2
    rm -f "$said"
    fail "$EXIT_GONE" "the state of $NAME cannot be read"
  fi
}

# get_credentials: gives kubectl access to the cluster.
get_credentials() {
  run gcloud container clusters get-credentials "$NAME" --project="$PROJECT" --location="${ZONE%-*}"
}

# confirm WHAT: requires the name of the hardware, typed or given with --confirm, before it is deleted.
confirm() {
  if $DRY_RUN; then return 0; fi
  if [ -z "$CONFIRM" ]; then
    printf 'This deletes %s. Type its name to continue: ' "$1" >&2
    read -r CONFIRM || CONFIRM=
  fi
  [ "$CONFIRM" = "$NAME" ] || fail "$EXIT_BAD_INPUT" "'$CONFIRM' is not $NAME: nothing was deleted"
}

# python_command TASK ARGUMENT…: sets COMMAND, the output directory and command line of a task, for restart.sh.
python_command() {
  task=$1
  shift
  case $task in
    pretrain | sft)
      set -- python -m illada_jax.main --processes=auto --workdir="$BUCKET/$RUN" \
        --compilation_cache="$BUCKET/compiled" "$@" ;;
    evaluate) set -- python -m illada_jax.evaluate --processes=auto --output_dir="$BUCKET/$RUN" "$@" ;;
    prepare) set -- python -m illada_jax.prepare --target="$MOUNT/$RUN" "$@" ;;
  esac
  COMMAND=$(quote "$MOUNT/$RUN" "$@")
}
