"""A fake cloud for the scripts of tpu/: commands that record their arguments and answer as the real ones do."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {"PROJECT": "project", "ZONE": "us-east5-a", "NAME": "pod", "ACCELERATOR": "v5p-128",
            "RUNTIME_VERSION": "v2-alpha-tpuv5", "BUCKET": "gs://bucket", "IMAGE": "us-docker.pkg.dev/p/r/illada",
            "WAIT_SECONDS": "0", "RETRY_SECONDS": "0"}
# Records its arguments. Answers with the next line of $FAKE/states, $FAKE/hosts or $FAKE/jobsets where the script asks
# for the state of the hardware, of the hosts (`;` between them) or of a workload. Fails where a line of $FAKE/failures
# says so: PATTERN|MESSAGE, or PATTERN|MESSAGE|once.
FAKE = r"""#!/bin/sh
me=$(basename "$0")
{ printf '%s\0' "$me" "$@"; printf '\n'; } >>"$FAKE/calls"
next() { head -n 1 "$FAKE/$1"; sed -i 1d "$FAKE/$1"; }
if [ -s "$FAKE/failures" ]; then
  while IFS='|' read -r pattern message often; do
    case "$me $*" in *$pattern*)
      [ "$often" != once ] || sed -i "\\%^$pattern|%d" "$FAKE/failures"
      echo "$message" >&2
      exit 1 ;;
    esac
  done <"$FAKE/failures"
fi
case "$me $*" in
  *failedData*) echo 'no capacity in the zone' ;;
  *queued-resources\ describe*)
    state=$(next states)
    case $state in ERROR*) echo "$state" >&2; exit 1 ;; esac
    echo "$state" ;;
  *task.sh\ status*)
    state=$(next hosts)
    case $state in ERROR*) echo "$state" >&2; exit 255 ;; esac
    echo "SSH: Attempting to connect to worker 0..." >&2
    [ -z "$state" ] || echo "$state" | tr ';' '\n' | sed 's/^/state /' ;;
  kubectl\ get\ jobset*) next jobsets | tr -d '\n' ;;
  kubectl\ get\ pods*) next codes ;;
  *rev-parse*) echo abc123 ;;
esac
exit 0
"""


@pytest.fixture
def pod(tmp_path):
    """pod(script, *arguments, **more): runs a script; (finished process, commands that it ran)."""
    path, fake = tmp_path / "bin", tmp_path / "fake"
    for directory in (path, fake):
        directory.mkdir()
    for name in ("gcloud", "kubectl", "xpk", "git"):
        (path / name).write_text(FAKE)
        (path / name).chmod(0o755)

    def pod(script, *arguments, states=(), hosts=(), jobsets=(), codes=(), failures=(), typed="", unset=(), **more):
        (fake / "calls").write_text("")
        for name, lines in (("states", states), ("hosts", hosts), ("jobsets", jobsets), ("codes", codes),
                            ("failures", failures)):
            (fake / name).write_text("".join(f"{line}\n" for line in lines))
        environment = {"PATH": f"{path}:{os.environ['PATH']}", "FAKE": str(fake), "TMPDIR": str(tmp_path), **SETTINGS,
                       **more}
        result = subprocess.run(
            ["sh", str(ROOT / "tpu" / f"{script}.sh"), *arguments], capture_output=True, text=True, input=typed,
            env={key: value for key, value in environment.items() if key not in unset}, cwd=tmp_path, timeout=60)
        calls = (fake / "calls").read_text().split("\n")[:-1]
        return result, [call.split("\0")[:-1] for call in calls]

    return pod
