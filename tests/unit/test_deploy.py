"""The deployment files: valid, and naming only what exists.

Nothing here can be started without Docker or Kubernetes, so each name is held against the thing
that has to know it: fields against schemas, options against the real command lines, variables
against their readers, overrides against the real composition.
"""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from jsonschema import Draft202012Validator

from tests.unit.deploy_files import (
    CLAIM,
    CLUSTER,
    COMPOSE,
    COMPOSE_TEXT,
    DEPLOY,
    IMAGE,
    LOCK,
    RAYJOB,
    README,
    ROOT,
    SERVICES,
    run,
)

# --- schemas ----------------------------------------------------------------------------------


def _check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    schema = ("--builtin-schema", "vendor.compose-spec")
    return run(sys.executable, "-m", "check_jsonschema", *schema, str(path))


def test_compose_follows_the_compose_specification(tmp_path: Path) -> None:
    result = _check_compose(DEPLOY / "compose.yaml")
    assert result.returncode == 0, result.stdout + result.stderr

    misspelt = tmp_path / "compose.yaml"
    misspelt.write_text(COMPOSE_TEXT.replace("healthcheck:", "helthcheck:", 1))
    assert _check_compose(misspelt).returncode == 1


@pytest.mark.parametrize(("name", "document"), [("rayjob", RAYJOB), ("claim", CLAIM)])
def test_kubernetes_file_follows_its_schema(name: str, document: dict[str, Any]) -> None:
    schema = json.loads((DEPLOY / "schemas" / f"{name}.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    errors = [e.message for e in Draft202012Validator(schema).iter_errors(document)]
    assert errors == []


def _keys(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        if isinstance(node, dict):
            yield (*path, key)
        if isinstance(child, dict | list):
            yield from _keys(child, (*path, key))


@pytest.mark.parametrize(("name", "document"), [("rayjob", RAYJOB), ("claim", CLAIM)])
def test_any_misspelt_kubernetes_field_is_refused(name: str, document: dict[str, Any]) -> None:
    schema = json.loads((DEPLOY / "schemas" / f"{name}.schema.json").read_text())
    validator = Draft202012Validator(schema)
    # rayStartParams is a free table in KubeRay too; its keys are held against `ray start` below.
    paths = [p for p in _keys(document) if "rayStartParams" not in p[:-1]]
    assert len(paths) > 8
    for *parents, key in paths:
        wrong = copy.deepcopy(document)
        node: Any = wrong
        for part in parents:
            node = node[part]
        node[f"{key}x"] = node.pop(key)
        assert not validator.is_valid(wrong), f"{'.'.join(map(str, parents))}.{key}x passed"


# --- commands ---------------------------------------------------------------------------------


def _readme_commands() -> list[str]:
    lines = []
    for block in re.findall(r"```sh\n(.*?)```", README, re.S):
        lines += block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def _compose_commands() -> list[list[str]]:
    """Each service's command on our own image, variables replaced by their defaults."""
    own = [s["command"] for s in SERVICES.values() if s["image"] == IMAGE]
    return [[re.sub(r"\$\{\w+:-(\w*)\}", r"\1", word) for word in command] for command in own]


def _descent_commands() -> list[list[str]]:
    found = [shlex.split(RAYJOB["spec"]["entrypoint"])]
    for line in _readme_commands():
        words = shlex.split(line, comments=True)
        if "descent" in words:
            found.append(words[words.index("descent") :])
    return found


def _assert_parses(command: click.Command, args: list[str]) -> None:
    """Let click itself read the arguments, types and required options included."""
    command.make_context(command.name, list(args))


def test_every_ray_and_mlflow_command_is_accepted_by_the_real_program() -> None:
    from mlflow.cli import cli as mlflow_cli
    from ray.scripts.scripts import cli as ray_cli

    programs = {"ray": ray_cli, "mlflow": mlflow_cli}
    commands = _compose_commands()
    assert [c[:2] for c in commands] == [["ray", "start"], ["ray", "start"], ["mlflow", "server"]]
    for program, verb, *args in commands:
        _assert_parses(programs[program].commands[verb], args)
        with pytest.raises(click.NoSuchOption):
            _assert_parses(programs[program].commands[verb], [*args, "--no-such-option=1"])


def test_ray_start_parameters_are_options_of_ray_start() -> None:
    from ray.scripts.scripts import start

    for group in [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]:
        parameters = group["rayStartParams"]
        _assert_parses(start, [f"--{key}={value}" for key, value in parameters.items()])


def test_every_descent_command_exists() -> None:
    commands = _descent_commands()
    assert {c[1] for c in commands} == {"train", "submit"}
    for _, verb, *args in commands:
        entry = "from descent.cli.main import main; main()"
        plain = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
        result = run(sys.executable, "-c", entry, verb, "--help", env=plain)
        assert result.returncode == 0, result.stderr
        for option in (a.split("=")[0] for a in args if a.startswith("--")):
            assert option in result.stdout


def _overrides() -> list[list[str]]:
    return [[w for w in c[2:] if re.match(r"[a-z_.]+=", w)] for c in _descent_commands()]


def test_every_override_composes() -> None:
    from descent.config import compose

    for overrides in _overrides():
        config = compose(overrides).config
        assert config.ray.address == "auto"
        assert str(config.output_dir) == "/runs"


def test_readme_paths_and_services_exist() -> None:
    for line in _readme_commands():
        words = shlex.split(line, comments=True)
        for word in words:
            if word.startswith("deploy/") and word != "deploy/.env":
                assert (ROOT / word).is_file(), line
        if "exec" in words:
            assert words[words.index("exec") + 1] in SERVICES
        for scaled in (words[i + 1] for i, w in enumerate(words) if w == "--scale"):
            assert scaled.split("=")[0] in SERVICES
    for file in re.findall(r"^\| `([^`]+)` \|", README, re.M):
        assert (DEPLOY / file).exists(), file


# --- variables and secrets --------------------------------------------------------------------


def test_compose_variables_are_those_of_the_example() -> None:
    example = (DEPLOY / ".env.example").read_text()
    offered = dict(re.findall(r"^(\w+)=(.*)$", example, re.M))
    used = dict(re.findall(r"\$\{(\w+)(:[-?])", COMPOSE_TEXT))
    assert set(used) == set(offered)
    assert len(re.findall(r"\$\{", COMPOSE_TEXT)) == len(re.findall(r"\$\{\w+:[-?]", COMPOSE_TEXT))

    required = {name for name, kind in used.items() if kind == ":?"}
    assert required == {"RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert all(offered[name] == "" for name in required), "an example holds no secret"
    for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE_TEXT):
        assert offered[name] == default
    ignored = run("git", "check-ignore", "-q", "deploy/.env").returncode
    assert ignored == 0 or not (ROOT / ".git").exists()


def test_no_secret_stands_in_a_file() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("TOKEN|PASSWORD|KEY|SECRET", name):
                assert str(value).startswith("${"), name
    assert CLUSTER["authOptions"] == {"mode": "token", "secretName": "descent-ray-token"}
    secret = next(line for line in _readme_commands() if "create secret" in line)
    assert "descent-ray-token" in secret
    assert "auth_token=" in secret


def test_mlflow_reads_the_variables_that_it_is_given() -> None:
    import mlflow.environment_variables as known

    given = set(SERVICES["mlflow"]["environment"])
    elsewhere = {"PGPASSWORD"}  # libpq's
    elsewhere |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"}  # boto3's
    assert given - elsewhere == {n for n in given if hasattr(known, n)}
    assert hasattr(known, "MLFLOW_DISABLE_TELEMETRY")


def test_boto3_reads_the_variables_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    session = boto3.session.Session()
    assert session.get_credentials().secret_key == "the-secret"
    assert session.region_name == "us-east-1"


def test_libpq_takes_the_password_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from psycopg.pq import Conninfo
    from sqlalchemy import make_url

    monkeypatch.setenv("PGPASSWORD", "p@ss/w:rd")
    found = {o.keyword: o.val or o.envvar for o in Conninfo.get_defaults()}
    assert found[b"password"] == b"p@ss/w:rd"

    address = next(w for w in SERVICES["mlflow"]["command"] if w.startswith("--backend-store-uri="))
    url = make_url(address.split("=", 1)[1])
    assert url.get_dialect().driver == "psycopg"
    postgres = SERVICES["postgres"]["environment"]
    assert (url.username, url.database) == (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"])
    assert url.password is None


def test_ray_reads_its_token_from_the_environment(tmp_path: Path) -> None:
    ask = (
        "from ray._raylet import AuthenticationMode as M, AuthenticationTokenLoader as L;"
        "from ray._raylet import get_authentication_mode as mode;"
        "print(mode() == M.TOKEN, L.instance().has_token(ignore_auth_mode=True))"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    without = {**kept, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    assert run(sys.executable, "-c", ask, env=without).stdout.split() == ["True", "False"]
    given = SERVICES["worker"]["environment"]
    assert given == SERVICES["head"]["environment"]
    answer = run(sys.executable, "-c", ask, env={**without, **given}).stdout
    assert answer.split() == ["True", "True"]


# --- what refers to what ----------------------------------------------------------------------


def _port(command: list[str], option: str) -> int:
    return next(int(w.split("=")[1]) for w in command if w.startswith(f"--{option}="))


def test_addresses_name_services_that_listen_and_share_a_network() -> None:
    from ray._private import ray_constants

    listening = {
        ("head", _port(SERVICES["head"]["command"], "port")),
        ("head", ray_constants.DEFAULT_DASHBOARD_PORT),
        ("mlflow", _port(SERVICES["mlflow"]["command"], "port")),
        ("postgres", 5432),
        ("s3", 8333),  # SeaweedFS's default for S3
    }
    used: set[tuple[str, str, int]] = {("worker", "head", 6379)}
    assert "--address=head:6379" in SERVICES["worker"]["command"]
    text = json.dumps([SERVICES["mlflow"]["command"], SERVICES["mlflow"]["environment"]])
    for host, port in re.findall(r"(?://|@)(postgres|s3):(\d+)", text):
        used.add(("mlflow", host, int(port)))
    for overrides in _overrides():
        for host, port in re.findall(r"=http://(\w+):(\d+)", " ".join(overrides)):
            used |= {("head", host, int(port)), ("worker", host, int(port))}
    assert len(used) == 5
    for source, host, port in used:
        assert (host, port) in listening
        assert set(SERVICES[source]["networks"]) & set(SERVICES[host]["networks"]), (source, host)

    allowed = next(w for w in SERVICES["mlflow"]["command"] if w.startswith("--allowed-hosts="))
    from mlflow.server.security_utils import is_allowed_host_header

    hosts = allowed.split("=", 1)[1].split(",")
    assert is_allowed_host_header(hosts, "mlflow:5000")
    assert is_allowed_host_header(hosts, "localhost:5000")
    assert not is_allowed_host_header(hosts, "elsewhere:5000")


def test_services_are_published_on_this_machine_only_and_wait_for_each_other() -> None:
    for name, service in SERVICES.items():
        assert all(str(p).startswith("127.0.0.1:") for p in service.get("ports", [])), name
        assert service["restart"] == "unless-stopped"
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]
        for other, wait in service.get("depends_on", {}).items():
            assert wait["condition"] == "service_healthy"
            assert "healthcheck" in SERVICES[other]
    for name in ("head", "worker"):
        assert SERVICES[name]["volumes"] == ["runs:/runs"]
        assert SERVICES[name]["shm_size"] == "2gb"
    assert f"s3://{SERVICES['s3']['environment']['S3_BUCKET']}/" in COMPOSE_TEXT


def _agent_and_dashboard_health_paths() -> set[str]:
    """The paths that Ray serves without a token, from its own lists."""
    import ray.dashboard.http_server_agent as agent
    import ray.dashboard.http_server_head as head

    sources = "".join(Path(str(m.__file__)).read_text() for m in (agent, head))
    return set(re.findall(r'"(/api/\w*healthz)"', sources))


def test_health_is_asked_where_ray_and_mlflow_answer() -> None:
    from mlflow.server.security_utils import HEALTH_ENDPOINTS
    from ray._private import ray_constants

    agent_port = ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    paths = _agent_and_dashboard_health_paths()
    asked = {
        name: re.search(r"127\.0\.0\.1:(\d+)(/[\w/]+)", " ".join(service["healthcheck"]["test"]))
        for name, service in SERVICES.items()
    }
    head, worker, mlflow = (asked[n] for n in ("head", "worker", "mlflow"))
    assert head is not None
    assert worker is not None
    assert mlflow is not None
    assert (int(head[1]), head[2]) == (ray_constants.DEFAULT_DASHBOARD_PORT, "/api/gcs_healthz")
    assert int(worker[1]) == agent_port
    assert {head[2], worker[2]} <= paths
    assert int(mlflow[1]) == 5000
    assert mlflow[2] in HEALTH_ENDPOINTS

    for group in [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]:
        container = group["template"]["spec"]["containers"][0]
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == agent_port
            assert container[probe]["httpGet"]["path"] in paths


def test_the_rayjob_agrees_with_itself_and_with_the_lock() -> None:
    assert CLUSTER["rayVersion"] == LOCK["ray"]
    (group,) = CLUSTER["workerGroupSpecs"]
    assert f"workers={group['replicas']}" in RAYJOB["spec"]["entrypoint"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]

    submitter = RAYJOB["spec"]["submitterPodTemplate"]["spec"]
    pods = [CLUSTER["headGroupSpec"]["template"]["spec"], group["template"]["spec"]]
    for pod in [submitter, *pods]:
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert f"USER {pod['securityContext']['runAsUser']}:" in (ROOT / "Dockerfile").read_text()
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["limits"]
    for pod in pods:
        (mount,) = pod["containers"][0]["volumeMounts"]
        (volume,) = pod["volumes"]
        assert mount["name"] == volume["name"]
        assert f"output_dir={mount['mountPath']}" in RAYJOB["spec"]["entrypoint"]
        assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
