"""Scripts and manifests: linters accept them, their parts agree, and nanofed's own parsers read their commands."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from nanofed.federated.deploy import keys
from tests.commands import parse
from tests.support import REPOSITORY, ended

CLUSTER = REPOSITORY / "configs" / "cluster"
MANIFESTS = sorted(CLUSTER.glob("*.yaml"))
JOBS = sorted(CLUSTER.glob("*.sbatch"))
SCRIPTS = [path for path in (REPOSITORY / "bin").iterdir() if path.read_text().startswith("#!/usr/bin/env bash")]
PODS = ("Job", "Deployment")


def objects(manifest: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest.read_text()))


def words_of(job: Path) -> list[str]:
    """Return the command of a SLURM script that runs nanofed."""
    (command,) = re.findall(r"^(?:exec|srun [\w=-]+) (nanofed .*)$", job.read_text(), re.MULTILINE)
    return shlex.split(command)


@pytest.mark.parametrize("script", [*SCRIPTS, *JOBS], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    checked = ended([Path(sys.executable).with_name("shellcheck"), script])
    assert checked.returncode == 0, checked.stdout


def test_the_speedrun_says_what_it_would_do_and_leaves_out_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    command = ["bin/speedrun", "--dry-run"]
    first = ended(command).stdout.splitlines()
    assert first[0] == "$ bin/setup"
    for line in first[1:]:
        parse(shlex.split(line.removeprefix("$ ")))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    again = ended(command).stdout.splitlines()
    assert set(first) - set(again) == {"$ nanofed tokenizer train"}
    assert ended(["bin/speedrun", "--dry"]).returncode == 2


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_a_slurm_script_asks_for_what_its_command_takes(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    sbatch = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for option in ("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task"):
        sbatch.add_argument(f"--{option}", type=int)
    for option in ("job-name", "time", "signal", "output", "open-mode"):
        sbatch.add_argument(f"--{option}", required=True)
    sbatch.add_argument("--requeue", action="store_true", required=True)
    lines = job.read_text().splitlines()
    asked = sbatch.parse_args([word for line in lines if line.startswith("#SBATCH ") for word in line.split()[1:]])
    config, words = parse(words_of(job)), words_of(job)
    if "site" in words:
        assert (asked.nodes, asked.ntasks, asked.signal) == (1, 1, "B:TERM@120")
        assert words[words.index("--devices") + 1] == str(asked.gpus_per_node)
    else:
        assert (asked.nodes, asked.signal) == (config.trainer.num_nodes, "TERM@120")
        assert asked.ntasks_per_node == asked.gpus_per_node == int(config.trainer.devices)


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_keeps_to_the_schema_of_kubernetes(manifest: Path, version: str) -> None:
    for content in objects(manifest):
        kubernetes_validate.validate(content, version, strict=True)


def test_the_schema_is_strict() -> None:
    content = objects(CLUSTER / "site.yaml")[0]
    content["spec"]["acessModes"] = content["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError, match="acessModes"):
        kubernetes_validate.validate(content, "1.37", strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_the_parts_of_a_manifest_agree(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    by_kind = {content["kind"]: content for content in objects(manifest)}
    (kind,) = set(PODS) & set(by_kind)
    spec = by_kind[kind]["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            claimed = volume["persistentVolumeClaim"]["claimName"]
            assert claimed == by_kind["PersistentVolumeClaim"]["metadata"]["name"]
    if kind != "Job":
        assert spec["selector"]["matchLabels"] == labels
    if "Service" in by_kind:
        service = by_kind["Service"]
        assert service["spec"]["selector"] == labels
        assert service["metadata"]["name"] == pod.get("subdomain", by_kind[kind]["metadata"]["name"])
    command, config = container["command"], parse(container["command"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    if "torchrun" in command:
        port = by_kind["Service"]["spec"]["ports"][0]["port"]
        assert f"--rdzv_endpoint={by_kind[kind]['metadata']['name']}-0.{pod['subdomain']}:{port}" in command
        assert {f"--nnodes={config.trainer.num_nodes}", f"--nproc_per_node={gpus}"} < set(command)
        assert spec["completions"] == spec["parallelism"] == config.trainer.num_nodes
    elif "site" in command:
        assert f"--devices={gpus}" in command
    else:
        assert f"--listen=0.0.0.0:{container['ports'][0]['containerPort']}" in command


def test_the_server_finds_its_keys_in_the_secret(tmp_path: Path) -> None:
    made = keys.init(tmp_path / "keys", ["server.example.org"], ["lab-a", "lab-b"]).folder
    server = next(content for content in objects(CLUSTER / "server.yaml") if content["kind"] == "Job")
    volumes = server["spec"]["template"]["spec"]["volumes"]
    (secret,) = [volume["secret"] for volume in volumes if "secret" in volume]
    hidden = tmp_path / "mount" / "..data"  # Kubernetes links to files and folders in there
    for item in secret["items"]:
        (source,) = made.rglob(item["key"]) if item["key"] != "ca.pem" else [made / "ca.pem"]
        target = hidden / item["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(secret["defaultMode"])
    for name in {Path(item["path"]).parts[0] for item in secret["items"]}:
        (tmp_path / "mount" / name).symlink_to(hidden / name)
    assert keys.load(tmp_path / "mount").names() == ["lab-a", "lab-b"]
