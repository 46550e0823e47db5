"""The scripts of tpu/host, which run on TPU VMs and in pods, with fakes of systemd and of what needs root."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.tpu.conftest import ROOT

# systemd as far as task.sh uses it: runs the unit's ExecStart, once, with the log and the conditions of the unit.
SYSTEMCTL = r"""#!/bin/sh
alive() { [ -f "$FAKE/pid" ] && kill -0 "$(cat "$FAKE/pid")" 2>/dev/null; }
of_unit() { sed -n "s/^$1=//p" "$FAKE/unit"; }
echo "$*" >>"$FAKE/calls"
case $1 in
  is-active) if alive; then echo active; else echo inactive; exit 3; fi ;;
  start)
    alive && exit
    cd "$(of_unit WorkingDirectory)"
    [ ! -e "$(of_unit 'ConditionPathExists' | tr -d '!')" ] || exit 0
    export "$(of_unit Environment)"
    nohup $(of_unit ExecStart) >>log 2>&1 </dev/null &
    echo $! >"$FAKE/pid" ;;
  disable) kill "$(cat "$FAKE/pid")" ;;
esac
"""
SUDO = r"""#!/bin/sh
case "$*" in
  'tee /etc/systemd/system/illada.service') cat >"$FAKE/unit" ;;
  'tee '*) cat >>"$FAKE/$(basename "$(eval "echo \${$#}")")" ;;
  systemctl*) exec "$@" ;;
  *) echo "sudo $*" >>"$FAKE/calls" ;;
esac
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The directory of a TPU VM, and a function that waits for a text in its log."""
    shutil.copytree(ROOT / "tpu" / "host", tmp_path / "illada" / "tpu" / "host")
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, text in (("systemctl", SYSTEMCTL), ("sudo", SUDO)):
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fakes}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(fakes))
    monkeypatch.setenv("ILLADA_PAUSE", "0")

    def logged(text):
        deadline = time.monotonic() + 60
        log = tmp_path / "illada" / "log"
        while not log.exists() or text not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return log.read_text()

    return tmp_path / "illada", logged


def task(directory, verb, *command):
    return subprocess.run(["sh", "illada/tpu/host/task.sh", verb, "output", *command], cwd=directory.parent,
                          capture_output=True, text=True, timeout=60)


def state_of(directory, *command):
    return task(directory, "status", *command).stdout


def test_a_task_runs_until_the_command_succeeds(host):
    directory, logged = host
    (directory / "codes").write_text("75\n134\n1\n137\n139\n143\n0\n")
    command = ["sh", "-c", 'code=$(head -n 1 codes); sed -i 1d codes; echo "with $1"; exit "$code"', "sh", "a 'b'"]
    assert state_of(directory, *command) == "state idle\n"
    assert task(directory, "start", *command).stdout == "started; tpu/tail.sh shows its log\n"
    text = logged("exit code 0")
    assert [line for line in text.splitlines() if "==" not in line] == ["with a 'b'"] * 7
    assert text.count("exit code") == 7
    while state_of(directory, *command) == "state running\n":
        time.sleep(0.05)
    assert state_of(directory, *command) == "state ended 0\n"
    assert state_of(directory, "another") == "state idle\n"


LONG = ["sh", "-c", "trap 'sleep 0.3; echo saved; exit 75' TERM; echo $$ >child; echo ready; "
                    "while :; do sleep 0.05; done"]


def test_a_task_runs_once_and_stops_after_saving(host):
    directory, logged = host
    task(directory, "start", *LONG)
    logged("\nready\n")
    assert "already running" in task(directory, "start", *LONG).stdout
    another = task(directory, "start", "true")
    assert another.returncode == 1 and "another task is running" in another.stderr
    assert state_of(directory, *LONG) == "state running\n" and state_of(directory, "true") == "state other\n"
    subprocess.run(["systemctl", "disable"], check=True)
    text = logged("exit code 75")
    assert text.count("\nready\n") == 1 and "\nsaved\n" in text
    while state_of(directory, *LONG) == "state running\n":
        time.sleep(0.05)
    assert state_of(directory, *LONG) == "state dead\n", "a task that was stopped can be continued"


def test_the_unit_starts_again_after_a_boot_unless_the_task_is_over(host, tmp_path):
    directory, logged = host
    task(directory, "start", *LONG)
    logged("\nready\n")
    unit, pid = tmp_path / "fakes" / "unit", tmp_path / "fakes" / "pid"
    for victim in (pid, directory / "child"):  # a boot
        os.kill(int(victim.read_text()), signal.SIGKILL)
    while state_of(directory, *LONG) != "state dead\n":
        time.sleep(0.05)
    subprocess.run(["systemctl", "start"], check=True)
    assert state_of(directory, *LONG) == "state running\n"
    while logged("\nready\n").count("\nready\n") < 2:
        time.sleep(0.05)
    os.kill(int(pid.read_text()), signal.SIGTERM)
    logged("\nsaved\n")
    lines = unit.read_text().splitlines()
    assert {"Restart=on-abnormal", "KillMode=mixed", "WantedBy=multi-user.target", f"WorkingDirectory={directory}",
            f"ConditionPathExists=!{directory}/ended", "RequiresMountsFor=output"} <= set(lines)
    assert "enable --quiet illada" in (tmp_path / "fakes" / "calls").read_text()


def restart(directory, command, **environment):
    """(Exit code, number of runs, stderr) of restart.sh in the foreground."""
    result = subprocess.run(["sh", "tpu/host/restart.sh", "output", *command], cwd=directory, capture_output=True,
                            text=True, env={**os.environ, "ILLADA_PAUSE": "0", **environment}, timeout=60)
    return result.returncode, result.stdout.count("exit code"), result.stderr


@pytest.mark.parametrize("code", [0, 2, 3, 127])
def test_restart_ends_with_other_codes(host, code):
    assert restart(host[0], ["sh", "-c", f"exit {code}"]) == (code, 1, "")
    assert (host[0] / "ended").read_text() == f"{code}\n"


@pytest.mark.parametrize("end", ["exit 1", "exit 75", "kill -ABRT $$", "kill -KILL $$"])
def test_restart_gives_up_without_progress(host, end):
    code, runs, error = restart(host[0], ["sh", "-c", f"mkdir -p output/logs; touch output/logs/$$; {end}"])
    assert (code, runs) == (70, 11) and (host[0] / "ended").read_text() == "70\n"
    assert "error: 10 restarts without progress in output" in error


def test_restart_counts_from_the_last_progress(host):
    """New checkpoints are progress; metrics, unfinished checkpoints and event files are not."""
    directory, _ = host
    command = """
        n=$(cat runs 2>/dev/null || echo 0); n=$((n + 1)); echo $n >runs
        mkdir -p output/checkpoints/$n.orbax-checkpoint-tmp-$n
        echo $n >>output/metrics.jsonl; touch output/events.$n
        if [ $n -le 4 ]; then mkdir output/checkpoints/$n; fi
        exit 75"""
    code, runs, _ = restart(directory, ["sh", "-c", command], ILLADA_RESTARTS="3")
    assert (code, runs) == (70, 4 + 3)


def test_restart_stops_while_it_pauses(host):
    process = subprocess.Popen(["sh", "tpu/host/restart.sh", "output", "sh", "-c", "exit 75"], cwd=host[0], text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "ILLADA_PAUSE": "1000"})
    while "exit code 75" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert not (host[0] / "ended").exists(), "stopped, not over"


def test_setup_installs_python_and_mounts_the_bucket(host, tmp_path):
    directory, _ = host
    fakes = tmp_path / "fakes"
    recorder = '#!/bin/sh\necho "$(basename "$0") $*" >>"$FAKE/calls"\n[ "$(basename "$0")" != mountpoint ]\n'
    for name in ("gcsfuse", "mountpoint", "uv"):
        (fakes / name).write_text(recorder)
        (fakes / name).chmod(0o755)
    (directory / ".venv" / "bin").mkdir(parents=True)
    (directory / ".venv" / "bin" / "python").symlink_to("/bin/true")
    subprocess.run(["sh", "tpu/host/setup.sh", "bucket", "/mnt/bucket"], cwd=directory, check=True, timeout=60)
    assert (fakes / "calls").read_text().splitlines() == [
        "mountpoint -q /mnt/bucket", "sudo mkdir -p /mnt/bucket", "sudo mount /mnt/bucket",
        "uv pip install -q --python .venv/bin/python .[tpu,eval]"]
    assert (fakes / "fstab").read_text() == (
        f"bucket /mnt/bucket gcsfuse rw,_netdev,nofail,allow_other,uid={os.getuid()},gid={os.getgid()},implicit_dirs,"
        "rename_dir_limit=100000 0 0\n")
    assert (directory / "installed").exists()


def test_setup_waits_until_the_image_has_updated_itself(host, tmp_path):
    directory, _ = host
    fakes = tmp_path / "fakes"
    (fakes / "sudo").write_text('#!/bin/sh\necho "$*" >>"$FAKE/calls"\n'
                                'case "$*" in *update*) [ "$(grep -c update "$FAKE/calls")" -ge 3 ] ;; '
                                "*install*) exit 7 ;; esac\n")
    for name in ("curl", "lsb_release", "sleep"):
        (fakes / name).write_text("#!/bin/sh\n")
        (fakes / name).chmod(0o755)
    result = subprocess.run(["sh", "tpu/host/setup.sh", "bucket", "/mnt/bucket"], cwd=directory, timeout=60,
                            capture_output=True, text=True)
    said = (fakes / "calls").read_text()
    assert said.count("apt-get update") == 3 and said.count("install -qy gcsfuse") == 1 and result.returncode == 7
    assert not (directory / "installed").exists()
