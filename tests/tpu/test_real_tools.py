"""Every command line of tpu/: gcloud's flags against a table, XPK's through its own parser and dry run."""

import contextlib
import io
import itertools
import json
import pathlib
import re
import shlex
import sys

import pytest

from tests.tpu.conftest import ROOT

README = (ROOT / "tpu" / "README.md").read_text()
# (ACCELERATOR, RUNTIME_VERSION or "" for GKE only), from the table of tpu/README.md.
HARDWARE = re.findall(r"^\|[^|]*\| `([a-z0-9]+-\d+)` \| (?:`([^`]+)`|GKE only) \|", README, re.M)
TASKS = [["pretrain", "--config=experiments/pretrain_1b.py:v5e-8", "--config.data.sources=(\"prepared:/a b's\",)"],
         ["sft", "--retries=3"], ["evaluate", "--preset=illada/math"], ["prepare", "--source=text:a"]]
NETWORKED = {"NUM_SLICES": "2", "PROVISIONING": "on-demand", "INTERNAL_IPS": "true", "NETWORK": "n", "SUBNETWORK": "s",
             "SERVICE_ACCOUNT": "a@b", "FORWARD": "TOKEN", "TOKEN": "x"}
WAYS = {
    "gcloud": [{}, NETWORKED, {"PROVISIONING": "reserved", "RESERVATION_PROJECT": "other", "SSH_TUNNEL": "true",
                               "SSH_BATCH": "8"}],
    "xpk": [{}, NETWORKED, {"PROVISIONING": "reserved", "RESERVATION": "ours"}],
}


def lines(pod, backend):
    """All distinct command lines that the scripts print, as words, on all hardware and in all modes."""
    found = set()
    for way in WAYS[backend]:
        every = [("create",), ("delete", "--confirm=pod"), ("wait",), ("install",), ("stop",), ("tail",), ("collect",),
                 *(("launch", *task) for task in TASKS), ("resume", "--confirm=pod", *TASKS[0])]
        runs = [(arguments, HARDWARE[0]) for arguments in every]
        runs += itertools.product([("create",), ("launch", *TASKS[0])], HARDWARE[1:])
        for (script, *arguments), (accelerator, runtime) in runs:
            if backend == "gcloud" and not runtime:
                continue
            result, _ = pod(script, "--dry-run", *arguments, BACKEND=backend, ACCELERATOR=accelerator,
                            RUNTIME_VERSION=runtime, **way)
            assert result.returncode == 0, result.stderr
            found |= {tuple(shlex.split(line)) for line in result.stdout.splitlines()}
    return sorted(found)


def of_readme():
    """The gcloud commands of tpu/README.md, as words."""
    text = README.replace("\\\n", " ")
    commands = re.findall(r"^(gcloud .*)$", text, re.M) + re.findall(r"`(gcloud [^`]*)`", text)
    return [tuple(shlex.split(" ".join(command.split()), comments=True)) for command in commands]


def check(words, table):
    """Raises AssertionError unless `words` is a gcloud command of the table with its flags only."""
    known = table["commands"] | table["from the documentation"]
    begins = (" ".join(words[1:end]) for end in range(len(words), 1, -1))
    command = next((begin for begin in begins if begin in known), None)
    assert command, f"unknown command: {' '.join(words)}"
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    allowed = set(known[command].split()) | set(table["every command"].split())
    assert flags <= allowed, f"{command}: unknown {flags - allowed}"


def test_every_gcloud_line_has_only_flags_of_its_command(pod):
    table = json.loads((pathlib.Path(__file__).parent / "gcloud_flags.json").read_text())
    assert len(HARDWARE) >= 9
    printed = {line[line.index("gcloud"):] for backend in WAYS for line in lines(pod, backend) if "gcloud" in line}
    for words in printed.union(of_readme()):
        check(words, table)
    print(f"{len(printed)} distinct gcloud lines of scripts and {len(set(of_readme()))} of tpu/README.md allowed, "
          f"{len(HARDWARE)} rows of hardware, backends {', '.join(WAYS)}")
    for wrong in ("gcloud compute tpus queued-resources create pod --reservation=ours",
                  "gcloud compute tpus tpu-vm ssh pod --tunnel-through-iap", "gcloud compute tpus pods list"):
        with pytest.raises(AssertionError):
            check(wrong.split(), table)


def dry_run(words, monkeypatch):
    """What `xpk WORDS --dry-run` prints. Raises AssertionError if its parser refuses them or the dry run fails."""
    from xpk import main

    monkeypatch.setattr(sys, "argv", [*words, "--dry-run"])
    monkeypatch.setattr(main, "should_send_telemetry", lambda: False)
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main.main()
            code = 0
        except SystemExit as end:
            code = end.code
    assert not code, f"{' '.join(words)}\n{said.getvalue()[-2000:]}"
    return said.getvalue()


def test_every_xpk_line_passes_its_parser_and_its_dry_run(pod, tmp_path, monkeypatch):
    pytest.importorskip("xpk", reason="needs xpk (pip install xpk)")
    yaml = pytest.importorskip("yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "illada-pod.env").write_text("TOKEN=x\nLIBTPU_INIT_ARGS=--a=1 --b=2\n")
    printed = [line for line in lines(pod, "xpk") if line[0] == "xpk"]
    count = 0
    for words in printed:
        if words[1:3] == ("storage", "attach") or "--reservation=ours" in words:
            continue  # below; the one has no dry run, the other asks the cloud for the capacity of the reservation
        said = dry_run(words, monkeypatch)
        if words[1:3] == ("workload", "create"):
            # The manifest is YAML, and its command is the one that was given.
            manifest = yaml.safe_load(re.search(r"content: \n(apiVersion.*?)\n\[XPK\]", said, re.S)[1])
            container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
            assert words[-1].removeprefix("--command=") in container["command"][-1]
            if f"--env-file={tmp_path / 'illada-pod.env'}" in words:
                assert {"name": "LIBTPU_INIT_ARGS", "value": "--a=1 --b=2"} in container["env"]
        count += 1
    import argparse

    from xpk.parser.core import set_parser
    parser = argparse.ArgumentParser()
    set_parser(parser)
    for words in printed:
        parser.parse_args(words[1:])
    print(f"{len(printed)} distinct xpk lines parsed, {count} of them through the dry run")
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        parser.parse_args([*printed[0][1:], "--no-such-flag"])
