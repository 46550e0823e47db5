"""tpu/README.md from its first command to its last, in one shell, as in a new project: a fake cloud refuses what a real
one would refuse, because nothing of it exists before a command of the page makes it."""

import ast
import os
import re
import shlex
import subprocess
import tarfile

from illada_jax import aot
from illada_jax import config as config_lib
from illada_jax.evaluation import presets
from tests.tpu.conftest import ROOT
from tests.tpu.simulation import FAKES, GCLOUD
from tests.tpu.test_host import SUDO, SYSTEMCTL

README = (ROOT / "tpu" / "README.md").read_text()
# All commands of a new user's machine, TPU VMs and pods. `needs` refuses a command unless commands before it have made
# something, by name, in $WORLD/facts. TPU VMs are those of the simulation.
NEW = r"""#!/bin/sh
line="$(basename "$0") $*"
needs() {
  for fact; do
    grep -qxF -e "$fact" "$WORLD/facts" || { echo "$fact is missing: $line" | tee -a "$WORLD/violations" >&2; exit 2; }
  done
}
makes() { printf '%s\n' "$@" >>"$WORLD/facts"; }
of() { printf '%s\n' "$line" | tr ' ' '\n' | sed -n "s|^--$1=||p"; }
paths() { of "$1" | sed 's|gs://my-bucket/|/mnt/bucket/|' | grep -oE '/mnt/bucket/[a-z0-9-]+'; }
case $line in
  gcloud\ auth\ login) makes login ;;
  gcloud\ auth\ application-default\ login) makes credentials ;;
  gcloud\ components\ install*) shift 2; makes "$@" ;;
  gcloud\ services\ enable*) needs login; makes $(echo "$*" | grep -oE '[a-z]+\.googleapis') ;;
  gcloud\ storage\ buckets\ create\ gs://my-bucket\ *) needs login storage.googleapis; makes bucket ;;
  gcloud\ projects\ describe*) needs login; echo 123 ;;
  gcloud\ storage\ buckets\ add*) needs bucket compute.googleapis; makes "$(of member)" ;;
  gcloud\ storage\ cp\ *.zst\ gs://my-bucket/*) needs bucket; makes "/mnt/bucket/$(basename "$4")" ;;
  gcloud\ storage\ cp*logs/*) needs bucket ;;
  gcloud\ storage\ rsync*) needs "/mnt/bucket/${3#gs://my-bucket/}" ;;
  gcloud\ storage\ ls*) cat "$WORLD/facts" ;;
  gcloud\ artifacts*create*)
    needs login artifactregistry.googleapis
    makes "$(of location)-docker.pkg.dev/my-project/$4" ;;
  gcloud\ builds\ submit*)
    image=$(of substitutions)
    image=${image#*=}
    needs cloudbuild.googleapis "${image%/*}"
    makes "$image" ;;
  gcloud\ container*) needs "cluster illada" kubectl gke-gcloud-auth-plugin; makes "access to the cluster" ;;
  gcloud\ logging*) needs "cluster illada" ;;
  gcloud\ *tpus*)
    needs login compute.googleapis tpu.googleapis
    case $line in
      *\ create\ *) of accelerator-type >"$WORLD/accelerator" ;;
      *\ describe*) [ "$(cat "$WORLD/state")" != ACCEPTED ] || {
        hosts=0
        case $(cat "$WORLD/accelerator") in *-[48]) ;; *) hosts='0 1' ;; esac
        for host in $hosts; do mkdir -p "$WORLD/hosts/illada/$host"; done
        echo ACTIVE >"$WORLD/state"; } ;;
      *tpu-vm*) [ ! -d "$WORLD/hosts/illada/1" ] || needs "key in an agent" ;;
    esac
    exec sh "$WORLD/cloud" "$@" ;;
  ssh-keygen*) makes "$4" ;;
  ssh-agent*) makes agent; echo 'echo Agent pid 1' ;;
  ssh-add*) needs agent "$1"; makes "key in an agent" ;;
  pip\ install\ xpk*) makes xpk ;;
  xpk\ cluster\ create*) needs xpk credentials container.googleapis; makes "cluster $(of cluster)" ;;
  xpk\ cluster\ delete*) sed -i '/cluster/d' "$WORLD/facts" ;;
  xpk\ storage\ attach*) needs xpk "cluster illada" bucket ;;
  xpk\ workload\ create*)
    needs xpk "cluster illada" "$(of docker-image)"
    for command; do :; done
    for pod in 0 1; do
      rm -rf "$WORLD/pod"
      mkdir "$WORLD/pod"
      cd "$WORLD/pod"
      tar -xzf "$WORLD/code.tar.gz"
      sed -i 's|>/sys/|>sys/|' tpu/host/restart.sh
      JOB_COMPLETION_INDEX=$pod bash -c "${command#--command=}" || exit
    done
    makes "workload $(of workload)" ;;
  kubectl\ wait*) needs "access to the cluster" ;;
  kubectl\ get\ jobset*)
    needs "access to the cluster"
    ! grep -qx "workload $3" "$WORLD/facts" || printf %s "$3=Completed" ;;
  kubectl\ logs*) needs "workload $(of selector | sed 's|.*jobset-name=||; s|,.*||')" ;;
  python\ -m\ *)
    echo "$line" | sed 's/^python -m //' >>"$WORLD/tasks"
    needs serviceAccount:123-compute@developer.gserviceaccount.com
    for option in source config.data.sources config.init.checkpoint checkpoint; do needs $(paths $option); done
    makes $(paths target) $(paths workdir) $(paths output_dir) ;;
  python*) ;;
  mountpoint*) needs bucket ;;
  uv*) mkdir -p .venv/bin; ln -sf "$(dirname "$0")/python" .venv/bin/python ;;
  tail*) until grep 'exit code' illada/log; do /bin/sleep 0.05; done ;;
  sleep*) exec /bin/sleep 0.05 ;;
  *) needs "a meaning" ;;
esac
"""
COMMANDS = ("gcloud", "kubectl", "xpk", "pip", "ssh-keygen", "ssh-agent", "ssh-add", "python", "mountpoint", "uv",
            "tail", "sleep", "gcsfuse")


def script():
    """All blocks of the page in order; settings go to pod.env, and placeholders have the values of the examples."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
    is_settings = [bool(re.match(r"[A-Z_]+=\S+( +#.*)?\n", block)) for block in blocks]
    places = {"PROJECT": "my-project", "BUCKET": "my-bucket", "REGION": "us-west4", "NUMBER": "123"}
    once = re.compile(r"\b(PROJECT|BUCKET|REGION|NUMBER)\b(?!=)")
    texts = [f"cat >>pod.env <<'END'\n{block}END\n" if settings else once.sub(lambda found: places[found[0]], block)
             for block, settings in zip(blocks, is_settings, strict=True)]
    one_host = next(text for text in texts if "POD_ENV" in text)
    assert is_settings[-1] and "BACKEND=xpk" in blocks[-1], "the page ends with GKE, on which the commands are the same"
    return "set -e\n" + "\n".join([*texts, one_host])


def test_every_command_of_the_page_works_in_a_new_project(tmp_path):
    path, world = tmp_path / "fakes", tmp_path / "world"
    for directory in (path, world, world / "hosts", tmp_path / "raw", tmp_path / "sft"):
        directory.mkdir()
    for directory in ("raw", "sft"):
        (tmp_path / directory / "a.jsonl.zst").touch()
    fakes = {**dict.fromkeys(COMMANDS, NEW), "git": FAKES["git"], "sudo": SUDO, "systemctl": SYSTEMCTL}
    for name, text in fakes.items():
        (path / name).write_text(text.replace("$FAKE", "$HOST"))
        (path / name).chmod(0o755)
    for name, text in (("cloud", GCLOUD), ("state", "NOT_FOUND\n"), ("facts", ""), ("violations", ""), ("tasks", "")):
        (world / name).write_text(text)
    (tmp_path / "tpu").symlink_to(ROOT / "tpu")
    with tarfile.open(world / "code.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "tpu" / "host", "tpu/host")

    result = subprocess.run(
        ["bash", "-c", script()], cwd=tmp_path, input="illada\n" * 9, capture_output=True, text=True, timeout=100,
        env={"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(tmp_path), "WORLD": str(world),
             "TMPDIR": str(tmp_path)})
    violations = (world / "violations").read_text()
    assert result.returncode == 0 and not violations, f"{violations}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert not any(world.glob("hosts/*")) and "cluster" not in (world / "facts").read_text(), "all is deleted"
    tasks = dict.fromkeys((world / "tasks").read_text().splitlines())
    check_tasks([shlex.split(task.replace('"', "'\"'")) for task in tasks])
    commands = re.findall(r"^(?:[A-Z]+=\S+ )?(?:gcloud|pip|tpu/|ssh-|eval|export).*", script(), re.M)
    print(f"{len(commands)} lines of the page executed, {len(tasks)} distinct tasks")


def check_tasks(tasks):
    """Raises unless every task is one that this package accepts, and a model is continued with its architecture."""
    architectures = {}
    for module, *words in tasks:
        flags = dict(word.removeprefix("--").split("=", 1) for word in words)
        if module == "illada_jax.evaluate":
            assert presets.find_preset(flags["preset"])
        if module != "illada_jax.main":
            continue
        changes = {key.removeprefix("config."): literal(value) for key, value in flags.items() if "config." in key}
        config = aot.load_config(str(ROOT / flags["config"]), changes)
        architectures[flags["workdir"]] = config_lib.architecture(config.model)
        if config.init.checkpoint:
            assert architectures[config.init.checkpoint] == architectures[flags["workdir"]], flags["workdir"]
    assert len(architectures) == 3


def literal(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
