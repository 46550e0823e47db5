#!/bin/sh
# Runs on a TPU VM: starts a command with its restarts as the systemd unit `illada`, or says what became of it.
# usage: task.sh start|status OUTPUT COMMAND [ARGUMENT…]; OUTPUT and COMMAND as for restart.sh
#
# The unit starts again when the host boots or the supervisor is killed, unless `ended` holds the exit code of a task that
# is over. It runs once, however often it is started.
set -eu
cd -- "$(dirname -- "$0")/../.."
action=$1
output=$2
shift
task="PATH=\"$PWD/.venv/bin:\$PATH\" exec sh tpu/host/restart.sh"
for word in "$@"; do
  task="$task '$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
done

same=false
if [ -f task ] && [ "$(cat task)" = "$task" ]; then same=true; fi
is_active() {
  case $(systemctl is-active illada) in active | activating | reloading | deactivating) ;; *) return 1 ;; esac
}
# The unit of a task that is over is active until its log has been copied.
waited=0
while [ -f ended ] && [ $waited -lt 60 ] && is_active; do
  sleep 1
  waited=$((waited + 1))
done
if is_active; then
  if $same; then state=running; else state=other; fi
elif ! $same; then state=idle
elif [ -f ended ]; then state="ended $(cat ended)"
else state=dead; fi
if [ "$action" = status ]; then
  echo "state $state"
  exit
fi

case $state in
  running) echo 'already running; tpu/tail.sh shows its log' && exit ;;
  other) echo 'error: another task is running; tpu/stop.sh stops it' >&2 && exit 1 ;;
esac
printf '%s\n' "$task" >task
rm -f ended
# Transparent huge pages: JAX asks for them on v5e and newer chips. They do not outlast a boot.
sudo tee /etc/systemd/system/illada.service >/dev/null <<END
[Unit]
Description=A task of illada_jax and its restarts
Wants=network-online.target
After=network-online.target
RequiresMountsFor=$output
ConditionPathExists=!$PWD/ended
StartLimitIntervalSec=0

[Service]
User=$(id -un)
WorkingDirectory=$PWD
Environment=ILLADA_RESTARTS=${ILLADA_RESTARTS:-10}
EnvironmentFile=-$HOME/illada.env
ExecStartPre=-+/bin/sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled'
ExecStart=/bin/sh task
ExecStopPost=-/bin/sh -c 'mkdir -p $output/logs && cp log $output/logs/%H-%b.log'
StandardOutput=append:$PWD/log
StandardError=inherit
KillMode=mixed
TimeoutStopSec=600
OOMPolicy=continue
Restart=on-abnormal
RestartSec=20
LimitMEMLOCK=infinity
LimitNOFILE=1048576
TasksMax=infinity

[Install]
WantedBy=multi-user.target
END
sudo systemctl daemon-reload
sudo systemctl enable --quiet illada
sudo systemctl start illada
echo 'started; tpu/tail.sh shows its log'
