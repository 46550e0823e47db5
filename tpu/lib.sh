# Shared by the scripts, each of which sets USAGE (and TAKES_TASK if its arguments are a task's) and sources this file,
# which parses the arguments. POSIX shell only.
# shellcheck shell=sh disable=SC2034 # the scripts that source this file use the variables

set -eu
LC_ALL=C

ME=tpu/$(basename "$0")
ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
DRY_RUN=false
QUIET=false
CONFIRM=
RETRIES=
EXIT_BAD_INPUT=2
EXIT_QUOTA=3
EXIT_GONE=4

if [ -n "${POD_ENV:-}" ]; then
  [ -r "$POD_ENV" ] || { echo "error: $ME: POD_ENV=$POD_ENV cannot be read" >&2; exit 2; }
  case $POD_ENV in */*) ;; *) POD_ENV=./$POD_ENV ;; esac
  # A variable of the environment overrides the file: `RUN=corpus tpu/launch.sh …`.
  exported=$(export -p)
  # shellcheck disable=SC1090 # the user's file
  . "$POD_ENV"
  eval "$exported"
fi

BACKEND=${BACKEND:-gcloud}
NUM_SLICES=${NUM_SLICES:-1}
PROVISIONING=${PROVISIONING:-spot}
INTERNAL_IPS=${INTERNAL_IPS:-false}
SSH_TUNNEL=${SSH_TUNNEL:-false}
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

# option WORD: takes an option of the script; false if it is none.
option() {
  case $1 in
    --dry-run) DRY_RUN=true ;;
    --confirm=*) CONFIRM=${1#--confirm=} ;;
    --retries=*)
      RETRIES=${1#--retries=}
      case $RETRIES in '' | *[!0-9]*) fail "$EXIT_BAD_INPUT" "$1: must be a number of restarts" ;; esac ;;
    --help) echo "$USAGE" && exit 0 ;;
    *) return 1 ;;
  esac
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
    reserved) [ "$BACKEND" = gcloud ] || need RESERVATION ;;
    *) fail "$EXIT_BAD_INPUT" "PROVISIONING=$PROVISIONING: must be spot, on-demand or reserved" ;;
  esac
  case $NUM_SLICES in
    '' | *[!0-9]* | 0*) fail "$EXIT_BAD_INPUT" "NUM_SLICES=$NUM_SLICES: must be 1 or more" ;;
  esac
  for switch in INTERNAL_IPS SSH_TUNNEL; do
    eval "value=\$$switch"
    case $value in true | false) ;; *) fail "$EXIT_BAD_INPUT" "$switch=$value: must be true or false" ;; esac
  done
  case ${SSH_BATCH:-1} in *[!0-9]* | 0*) fail "$EXIT_BAD_INPUT" "SSH_BATCH=$SSH_BATCH: must be 1 or more" ;; esac
  # The rules of XPK and Compute Engine. A workload is called NAME-RUN.
  whole=${NAME:-n}-$RUN
  case ${NAME:-n} in
    [!a-z]* | *[!a-z0-9-]* | *-)
      fail "$EXIT_BAD_INPUT" "NAME=$NAME: only small letters, digits and dashes; a letter first, no dash last" ;;
  esac
  case $RUN in
    *[!a-z0-9-]* | *-) fail "$EXIT_BAD_INPUT" "RUN=$RUN: only small letters, digits and dashes, no dash last" ;;
  esac
  [ ${#whole} -le 40 ] || fail "$EXIT_BAD_INPUT" "NAME=${NAME:-} RUN=$RUN: $whole must have at most 40 characters"
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
  $QUIET || printf '%s\n' "$(quote "$@")"
  $DRY_RUN || "$@"
}

# retried WORD…: runs a function or command up to three times: hosts that have just booted refuse connections. Then its
# status is 4.
retried() {
  attempt=1
  until "$@"; do
    [ $attempt -lt 3 ] || return $EXIT_GONE
    attempt=$((attempt + 1))
    sleep "${RETRY_SECONDS:-15}"
  done
}

# explained WORD…: like `run`, and explains a refusal by the cloud. Exits with 3 if quota or capacity is missing.
explained() {
  printf '%s\n' "$(quote "$@")"
  $DRY_RUN && return 0
  said=$(mktemp)
  { code=0; "$@" 2>&1 || code=$?; echo $code >"$said.code"; } | tee "$said"
  status=$(cat "$said.code")
  # XPK leaves what gcloud said in files: "Failure is NAME and logfile PATH".
  sed -n 's/.* logfile \([^ ,]*\).*/\1/p' "$said" | sort -u | while read -r log; do
    [ ! -f "$log" ] || cat "$log"
  done >"$said.logs"
  refusal=
  EXISTS=false
  if [ "$status" -ne 0 ]; then
    refusal=$(cat "$said" "$said.logs" | grep -E 'RESOURCE_EXHAUSTED|[Qq]uota|STOCKOUT|does not have enough resources' |
      head -n 3) || :
    if grep -qE 'ALREADY_EXISTS|already exists' "$said"; then EXISTS=true; fi
  fi
  rm -f "$said" "$said.code" "$said.logs"
  [ -z "$refusal" ] || fail "$EXIT_QUOTA" "no quota or capacity for ${ACCELERATOR:-this} in $ZONE: ask for it in the" \
    "console (IAM & Admin, Quotas), or take another ZONE, ACCELERATOR or PROVISIONING. The cloud said: $refusal"
  return "$status"
}

# nodes: prints the TPU VMs of the pod, one for each slice, or those that NODES names.
nodes() {
  if [ -n "${NODES:-}" ]; then
    printf '%s\n' "$NODES"
    return
  fi
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

# tpu_vm VERB WORKERS WORD…: gcloud's `ssh` or `scp` on hosts of a slice (`all`, or the number of one). A command line
# to run there is in REMOTE. Tunnels and batches are in gcloud's alpha commands only.
tpu_vm() {
  verb=$1
  workers=$2
  shift 2
  set -- compute tpus tpu-vm "$verb" "$@" --project="$PROJECT" --zone="$ZONE" --worker="$workers"
  [ -z "$REMOTE" ] || set -- "$@" --command="$REMOTE"
  [ -z "${SSH_FLAG:-}" ] || set -- "$@" --ssh-flag="$SSH_FLAG"
  if $SSH_TUNNEL; then
    set -- "$@" --tunnel-through-iap
  elif $INTERNAL_IPS; then
    set -- "$@" --internal-ip
  fi
  [ -z "${SSH_BATCH:-}" ] || set -- "$@" --batch-size="$SSH_BATCH"
  if $SSH_TUNNEL || [ -n "${SSH_BATCH:-}" ]; then set -- alpha "$@"; fi
  run gcloud "$@"
}

# on_workers NODE WORKERS COMMAND: runs a command line on hosts of a slice, which may be repeated.
on_workers() {
  REMOTE=$3
  retried tpu_vm ssh "$2" "$1"
}

# copy_to NODE WORKERS FILE NAME: copies a file into the home directory of hosts.
copy_to() {
  REMOTE=
  retried tpu_vm scp "$2" "$3" "$1:$4"
}

# read_state: sets STATE to that of the queued resource (ACTIVE, SUSPENDED, …), NOT_FOUND if it does not exist. False
# after an error, which may pass.
read_state() {
  said=$(mktemp)
  status=0
  STATE=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)' 2>"$said") || status=$?
  if [ $status -ne 0 ] && grep -q NOT_FOUND "$said"; then
    STATE=NOT_FOUND
    status=0
  fi
  [ $status -eq 0 ] || cat "$said" >&2
  rm -f "$said"
  return $status
}

# reason: prints why the request for the hardware failed.
reason() {
  gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.failedData.error.message)' || :
}

# host_states NODE: sets STATES to what tpu/host/task.sh says of the task on each host that runs it, a line each:
# running, ended CODE, dead, idle, other or missing (nothing installed). False if a host cannot be reached.
host_states() {
  REMOTE="if [ -f illada/installed ]; then sh illada/tpu/host/task.sh status $COMMAND; else echo state missing; fi"
  # A connection to a host that has died must end.
  STATES=$(QUIET=true && SSH_FLAG='-o ServerAliveInterval=30' && tpu_vm ssh "$WORKERS" "$1" </dev/null) || return 1
  STATES=$(printf '%s\n' "$STATES" | sed -n 's/^state //p')
  [ -n "$STATES" ]
}

# image: prints the name of the image; without a tag of its own it has that of the commit.
image() {
  case ${IMAGE##*/} in
    *:*) echo "$IMAGE" ;;
    *)
      tag=$(git -C "$ROOT" rev-parse --short=12 "${COMMIT:-HEAD}") || fail "$EXIT_BAD_INPUT" "$ROOT: no git checkout"
      echo "$IMAGE${tag:+:$tag}" ;;
  esac
}

# environment_file: writes the variables that FORWARD names to $FORWARDED, which only this user can read.
environment_file() {
  FORWARDED=${TMPDIR:-/tmp}/illada-$NAME.env
  # shellcheck disable=SC2086,SC2153 # a list of names, from the user
  need $FORWARD
  $DRY_RUN && return
  rm -f "$FORWARDED"
  for variable in $FORWARD; do
    eval "value=\$$variable"
    case $value in
      *[\"\'\\]* | *"
"*) fail "$EXIT_BAD_INPUT" "$variable: quotes, backslashes and line breaks cannot be forwarded" ;;
    esac
    (umask 077 && printf '%s=%s\n' "$variable" "$value" >>"$FORWARDED")
  done
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

# python_command TASK ARGUMENT…: sets COMMAND, the output directory and command line of a task, for restart.sh, and
# WORKERS, the hosts that run it: a single one prepares a corpus.
python_command() {
  task=$1
  shift
  case $* in *"
"*) fail "$EXIT_BAD_INPUT" "a flag contains a line break" ;; esac
  WORKERS=all
  case $task in
    pretrain | sft)
      set -- python -m illada_jax.main --processes=auto --workdir="$BUCKET/$RUN" \
        --compilation_cache="$BUCKET/compiled" "$@" ;;
    evaluate) set -- python -m illada_jax.evaluate --processes=auto --output_dir="$BUCKET/$RUN" "$@" ;;
    prepare)
      WORKERS=0
      [ "$BACKEND" = xpk ] || NODES=$(nodes | head -n 1)
      set -- python -m illada_jax.prepare --target="$MOUNT/$RUN" "$@" ;;
  esac
  COMMAND=$(quote "$MOUNT/$RUN" "$@")
}

# Options may stand anywhere on the command line; all other arguments are those of the task.
for argument in "$@"; do
  shift
  option "$argument" || set -- "$@" "$argument"
done
if ${TAKES_TASK:-false}; then
  check_task "$@"
else
  [ $# -eq 0 ] || fail "$EXIT_BAD_INPUT" "unexpected argument '$1'; $USAGE"
fi
check_settings
