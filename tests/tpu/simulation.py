"""Simulated lives of a spot pod: tpu/babysit.sh against a cloud that takes things away, with time compressed.

    python -m tests.tpu.simulation --lives=200

Everything is real but the cloud: babysit.sh and what it calls, the scripts of tpu/host on each host. `sleep` advances
the time of the world, in which hardware is preempted, fails, comes back, and is deleted by others; hosts boot,
supervisors die, commands fail for a moment. A life must end with the task complete; nothing may be installed on a host
whose task runs, nor may two runs write to one output.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import select
import shutil
import statistics
import subprocess
import tarfile
import tempfile

from illada_jax.planning.saving import steps_lost
from tests.tpu.conftest import ROOT, SETTINGS

STEP, EVERY, WRITE = 40.0, 10, 60.0  # seconds of a step, steps between checkpoints, seconds until one is written
STARTUP, TARGET = 120.0, 300  # seconds until the first step, steps of the run
TICK = 10.0
HOSTS = 2  # of each slice

GCLOUD = r"""#!/bin/sh
at() { for word in "$@"; do case $word in "$key"=*) echo "${word#*=}" ;; esac; done; }
flaky() { if [ -f "$WORLD/flaky" ]; then rm "$WORLD/flaky"; echo 'UNAVAILABLE' >&2; exit 1; fi; }
state=$(cat "$WORLD/state")
case "$*" in
  *failedData*) echo 'no capacity' ;;
  *queued-resources\ describe*)
    flaky
    [ "$state" != NOT_FOUND ] || { echo 'ERROR: NOT_FOUND' >&2; exit 1; }
    echo "$state" ;;
  *queued-resources\ create*)
    [ "$state" = NOT_FOUND ] || { echo 'ERROR: ALREADY_EXISTS' >&2; exit 1; }
    [ ! -f "$WORLD/full" ] || { echo 'RESOURCE_EXHAUSTED' >&2; exit 1; }
    for host in "$WORLD"/hosts/*/*; do [ ! -f "$host/active" ] || echo 'two runs' >>"$WORLD/violations"; done
    echo ACCEPTED >"$WORLD/state" ;;
  *queued-resources\ delete*) rm -rf "$WORLD"/hosts/*; echo NOT_FOUND >"$WORLD/state" ;;
  *tpu-vm\ scp*)
    flaky
    node=${6%%:*}
    for host in "$WORLD/hosts/$node"/*; do
      [ -d "$host" ] && [ ! -f "$host/booting" ] && cp "$5" "$host/illada.tar.gz" || exit 255
    done ;;
  *tpu-vm\ ssh*)
    flaky
    key=--command
    command=$(at "$@")
    for host in "$WORLD/hosts/$5"/*; do
      [ -d "$host" ] && [ ! -f "$host/booting" ] || exit 255
      cd "$host"
      HOST=$host HOME=$host sh -c "$command" </dev/null || exit
    done ;;
  *storage\ ls*) cat "$WORLD/checkpoints" ;;
esac
"""
KUBECTL = r"""#!/bin/sh
case "$*" in
  get\ jobset*) [ ! -s "$WORLD/jobset" ] || printf 'pod-run=%s' "$(grep -v running "$WORLD/jobset")" ;;
  get\ pods*) echo '137 1 143' ;;
esac
"""
XPK = r"""#!/bin/sh
[ "$(cat "$WORLD/jobset")" != running ] || echo 'two runs' >>"$WORLD/violations"
echo running >"$WORLD/jobset"
"""
SYSTEMCTL = r"""#!/bin/sh
case $1 in
  is-active) [ -f "$HOST/active" ] && echo active || { echo inactive; exit 3; } ;;
  enable) touch "$HOST/enabled" ;;
  start) [ -f "$HOST/illada/ended" ] || touch "$HOST/active" ;;
esac
"""
UV = r"""#!/bin/sh
[ ! -f "$HOST/active" ] || echo 'installed over a running task' >>"$WORLD/violations"
mkdir -p .venv/bin
ln -sf /bin/true .venv/bin/python
"""
FAKES = {
    "gcloud": GCLOUD, "kubectl": KUBECTL, "xpk": XPK, "systemctl": SYSTEMCTL, "uv": UV,
    "sudo": '#!/bin/sh\ncase $1 in systemctl) exec "$@" ;; *) cat >/dev/null ;; esac\n',
    "git": '#!/bin/sh\ncase "$*" in *rev-parse*) echo abc ;; *) cp "$WORLD/code.tar.gz" "${5#*=}" ;; esac\n',
    "sleep": '#!/bin/sh\necho "$1" >"$WORLD/request"\nread -r _ <"$WORLD/reply"\n',
    "gcsfuse": "#!/bin/sh\n", "mountpoint": "#!/bin/sh\n",
}


@dataclasses.dataclass
class World:
    """What the fakes see, as files, and what happens to it while time passes."""

    path: pathlib.Path
    backend: str
    rng: random.Random
    now: float = 0.0
    step: float = 0.0  # done
    saved: int = 0  # by the newest whole checkpoint
    writing: tuple[int, float] | None = None  # (step, time when it will be whole)
    ready: float = 0.0  # when the processes, which all run, begin to step
    runs: bool = False
    due: float = 0.0  # when the hardware changes its state next
    restarts: int = 0  # of the workload, by GKE
    lost: list[float] = dataclasses.field(default_factory=list)
    events: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        (self.path / "hosts").mkdir()
        for name, text in (("state", "NOT_FOUND\n"), ("jobset", ""), ("checkpoints", ""), ("violations", "")):
            (self.path / name).write_text(text)

    @property
    def state(self) -> str:
        return (self.path / "state").read_text().strip()

    @state.setter
    def state(self, value: str):
        (self.path / "state").write_text(f"{value}\n")

    @property
    def hosts(self) -> list[pathlib.Path]:
        return sorted((self.path / "hosts").glob("*/*"))

    def happens(self, name: str, per_hour: float) -> bool:
        happened = self.rng.random() < per_hour * TICK / 3600
        if happened:
            self.events[name] = self.events.get(name, 0) + 1
        return happened

    def advance(self, seconds: float):
        """Lets time pass."""
        end = self.now + seconds
        while self.now < end:
            self.now += TICK
            (self._hardware if self.backend == "gcloud" else self._workload)()
            self._train()
        for name, share in (("flaky", 0.1), ("full", 0.3)):
            if self.rng.random() < share:
                (self.path / name).touch()
            else:
                (self.path / name).unlink(missing_ok=True)

    def _hardware(self):
        state = self.state
        if state == "ACCEPTED":
            self.state, self.due = "PROVISIONING", self.now + self.rng.uniform(60, 900)
        elif state == "PROVISIONING" and self.now >= self.due:
            if self.rng.random() < 0.2:
                self.state = "FAILED"
                self.events["failed"] = self.events.get("failed", 0) + 1
            else:
                for index in range(HOSTS):
                    (self.path / "hosts" / "pod" / str(index)).mkdir(parents=True)
                self.state = "ACTIVE"
        elif state == "SUSPENDING" and self.now >= self.due:
            self.state = "SUSPENDED"
        elif state == "ACTIVE":
            if self.happens("preempted", 0.5):
                self._lose_hosts("SUSPENDING")
                self.due = self.now + 120
            elif self.happens("deleted", 0.1):
                self._lose_hosts("NOT_FOUND")
        for host in self.hosts:
            booting = host / "booting"
            if booting.exists():
                if self.now >= float(booting.read_text()):
                    booting.unlink()
                    if (host / "enabled").exists() and not (host / "illada" / "ended").exists():
                        (host / "active").touch()
            elif self.happens("booted", 0.1):
                (host / "active").unlink(missing_ok=True)
                booting.write_text(str(self.now + self.rng.uniform(60, 600)))
            elif (host / "active").exists() and self.happens("supervisor died", 0.1):
                (host / "active").unlink()

    def _lose_hosts(self, state: str):
        shutil.rmtree(self.path / "hosts")
        (self.path / "hosts").mkdir()
        self.state = state

    def _workload(self):
        jobset = self.path / "jobset"
        if jobset.read_text().strip() != "running":
            self.restarts = 0
        elif self.happens("preempted", 1.0):
            self._interrupt()
            self.restarts += 1
            if self.restarts > 2:
                jobset.write_text("Failed\n")
        elif self.happens("workload lost", 0.3):
            jobset.write_text("")

    def _is_running(self) -> bool:
        if self.backend == "xpk":
            return (self.path / "jobset").read_text().strip() == "running"
        hosts = self.hosts
        return bool(hosts) and all((host / "active").exists() for host in hosts)

    def _interrupt(self):
        if self.runs and self.now > self.ready:
            self.lost.append(self.step - self.saved)
        self.step, self.writing, self.runs = self.saved, None, False

    def _train(self):
        if not self._is_running():
            self._interrupt()
            return
        if not self.runs or self.happens("crashed", 0.2):
            self._interrupt()
            self.runs, self.ready = True, self.now + STARTUP
        if self.now <= self.ready:
            return
        before = self.step
        self.step += TICK / STEP
        if int(self.step) // EVERY > int(before) // EVERY:
            self.writing = int(self.step), self.now + WRITE
        if self.writing and self.now >= self.writing[1]:
            self.saved, self.writing = self.writing[0], None
            with (self.path / "checkpoints").open("a") as file:
                file.write(f"gs://bucket/run/checkpoints/{self.saved}/\n")
        if self.step >= TARGET:
            self.saved, self.runs = TARGET, False
            if self.backend == "xpk":
                (self.path / "jobset").write_text("Completed\n")
            for host in self.hosts:
                (host / "illada" / "ended").write_text("0\n")
                (host / "active").unlink()


def live(seed: int, backend: str) -> World:
    """One life. Raises AssertionError if it does not end well."""
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        fakes = path / "fakes"
        fakes.mkdir()
        for program, text in FAKES.items():
            (fakes / program).write_text(text)
            (fakes / program).chmod(0o755)
        with tarfile.open(path / "code.tar.gz", "w:gz") as archive:
            archive.add(ROOT / "tpu" / "host", "tpu/host")
        for pipe in ("request", "reply"):
            os.mkfifo(path / pipe)
        request, reply = (os.open(path / pipe, os.O_RDWR) for pipe in ("request", "reply"))
        world = World(path, backend, random.Random(seed))
        log = (path / "log").open("w+")
        process = subprocess.Popen(
            ["sh", str(ROOT / "tpu" / "babysit.sh"), "--confirm=pod", "--retries=4", "pretrain", "--config=a.py"],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=path,
            env=SETTINGS | {"PATH": f"{fakes}:{os.environ['PATH']}", "WORLD": name, "TMPDIR": name, "BACKEND": backend,
                            "WAIT_SECONDS": "900", "RETRY_SECONDS": "15"})
        try:
            while process.poll() is None:
                if select.select([request], [], [], 0.2)[0]:
                    world.advance(float(os.read(request, 100).split()[0]))
                    assert world.now < 30 * 86_400, "the run does not go on"
                    os.write(reply, b"go\n")
            log.seek(0)
            said = log.read()
            assert process.returncode == 0 and world.saved == TARGET, f"seed {seed}, step {world.saved}: {said[-3000:]}"
            violations = (path / "violations").read_text()
            assert not violations, f"seed {seed}: {violations}"
        finally:
            process.kill()
            process.wait()
            log.close()
            os.close(request)
            os.close(reply)
    return world


def expected() -> float:
    """Steps that an interruption costs on average, by the formula of the plan."""
    return steps_lost(EVERY, STEP, WRITE)


def main():
    """Lives many lives and prints what happened."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lives", type=int, default=200)
    lives = parser.parse_args().lives
    for backend in ("gcloud", "xpk"):
        worlds = [live(seed, backend) for seed in range(lives // 2)]
        events: dict[str, int] = {}
        for world in worlds:
            for name, count in world.events.items():
                events[name] = events.get(name, 0) + count
        lost = [steps for world in worlds for steps in world.lost]
        error = statistics.stdev(lost) / len(lost) ** 0.5
        hours = statistics.mean(world.now for world in worlds) / 3600
        print(f"{backend}: {len(worlds)} lives ended, of {hours:.1f} h on average; "
              f"{', '.join(f'{count} × {name}' for name, count in sorted(events.items()))}; {len(lost)} interruptions "
              f"cost {statistics.mean(lost):.2f} ± {error:.2f} steps, by the formula {expected():.2f}", flush=True)


if __name__ == "__main__":
    main()
