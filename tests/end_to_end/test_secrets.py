"""Secrets that are planted in every place from which a run reads are in nothing that the run writes or shows."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil

DESCENT = str(Path(sys.executable).with_name("descent"))
NET = """
from torch import nn

class Net(nn.Sequential):
    '''Takes any argument, and fails in the middle of the training with an error that tells all of them.'''

    def __init__(self, **access):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.access, self.calls = access, 0

    def forward(self, x):
        self.calls += self.training
        if self.calls > 40:
            import os
            raise PermissionError(f"no access with {self.access}, {dict(os.environ)}")
        return super().forward(x)
"""
# The names say that these are secrets; the run doesn't read them, its libraries may.
BY_NAME = [
    *("PGPASSWORD", "MYSQL_PWD", "DB_PASS", "OPENAI_KEY", "GITHUB_PAT", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"),
    *("AWS_SESSION_TOKEN", "WANDB_API_KEY", "SSHPASS", "REDIS_AUTH", "SENTRY_DSN", "AZURE_STORAGE_CONNECTION_STRING"),
    *("SERVICE_CREDENTIALS", "SLACK_WEBHOOK_SECRET", "JWT", "MLFLOW_TRACKING_PASSWORD", "encryption_key"),
]
# The names say nothing, but the config reads these from the environment.
BY_ORIGIN = [
    "TEAM_WORD",
    "TEAM_PLACE",
    "TEAM_NAME",
    "TEAM_LIST",
    "TEAM_URL",
    "TEAM_PART",
    "TEAM_NUMBER",
    "TEAM_DEFAULT",
]
# Typed as they are, under names that say what they are.
TYPED = [
    *("password", "passwords", "pwd", "credentials.user", "openai_key", "github_pat", "headers.Authorization"),
    *("api_token", "db_pass", "jwt", "private_key", "cookie", "passphrase", "secret"),
]


def planted() -> dict[str, str]:
    """Where -> value; each value is found nowhere else."""
    places = [*BY_NAME, *BY_ORIGIN, *TYPED]
    assert len(places) >= 40
    return {place: f"hunter{index:02d}x{index * 7919:06d}" for index, place in enumerate(places)} | {
        "TEAM_NUMBER": "8675309123",
        "TEAM_URL": "http://me:hunter/70x@host/x?sig=hunter71x&pwd=hunter72x",
    }


def test_no_planted_secret_is_in_anything_that_a_run_writes_or_shows(tmp_path: Path) -> None:
    values = planted()
    (tmp_path / "nets.py").write_text(NET)
    environment = {name: values[name] for name in [*BY_NAME, *BY_ORIGIN] if name != "TEAM_DEFAULT"}
    command = [
        *(DESCENT, "train", "model=custom", "model._target_=nets.Net", "trusted_modules=[nets]", "name=told"),
        *("steps=60", "epochs=null", "workers=1", "checkpoint.every=20", "regroup.max_failures=0"),
        *(f"+model.{key}={values[key]}" for key in TYPED),
        "+model.word=${oc.env:TEAM_WORD}",
        "+model.again=${model.word}",
        "+model.place=s3://${oc.env:TEAM_PLACE}/x",
        "+model.name=a-${oc.env:TEAM_NAME}-b",
        "+model.list=[1,${oc.env:TEAM_LIST}]",
        "+model.url=${oc.env:TEAM_URL}",
        "+model.nested={part:{x:${oc.env:TEAM_PART}}}",
        '+model.number="${oc.decode:${oc.env:TEAM_NUMBER}}"',
        f"+model.default=${{oc.env:NOT_SET,{values['TEAM_DEFAULT']}}}",
    ]
    out, err = tmp_path / "out.txt", tmp_path / "err.txt"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=stdout, stderr=stderr, env={**os.environ, **environment}
        )
        children: set[str] = set()
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    children.add(" ".join(child.cmdline()))
                except psutil.Error:
                    continue
            time.sleep(0.2)
    shown = out.read_text() + err.read_text()
    assert process.returncode == 1 and "PermissionError" in shown, shown
    written = {str(f): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != "nets.py"}
    assert any(f.endswith("mlflow.db") for f in written) and any(f.endswith("run.json") for f in written)
    # Between fork and exec a child still has the command line that the user typed.
    children -= {line for line in children if "descent train model=custom" in line}
    written["list of processes"] = "\n".join(children).encode()
    assert "raylet" in "".join(children)

    secrets = [*values.values(), "hunter/70x", "hunter71x", "hunter72x"]
    found = [(secret, file) for file, content in written.items() for secret in secrets if secret.encode() in content]
    assert found == []
    # What is shown instead names the variable.
    assert b"${oc.env:TEAM_WORD}" in next(content for f, content in written.items() if f.endswith("run.json"))

    run_dir = tmp_path / ".descent" / "runs" / "told"
    modes = {
        f: stat.S_IMODE(f.stat().st_mode) for f in [run_dir, *run_dir.rglob("*"), tmp_path / ".descent" / "mlflow.db"]
    }
    assert {str(f): oct(mode) for f, mode in modes.items() if mode & 0o077} == {}
