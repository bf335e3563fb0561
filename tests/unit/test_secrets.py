"""What counts as a secret, and that its value is found in every form in which a message may hold it."""

import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from descent.config import compose, flatten
from descent.config.secrets import hide, is_secret, masked, redact

SECRET = [
    "PGPASSWORD",
    "MYSQL_PWD",
    "DB_PASS",
    "OPENAI_KEY",
    "GITHUB_PAT",
    "passwords",
    "credentials",
    "pwd",
    "Authorization",
    "api_key",
    "apiKey",
    "APIKEY",
    "hf_token",
    "authToken",
    "client_secret",
    "SSHPASS",
    "private_key",
    "headers.Authorization",
    "passwords.db",
    "AWS_SESSION_TOKEN",
    "MYSQL_ROOT_PASSWORD",
    "AZURE_STORAGE_CONNECTION_STRING",
    "SENTRY_DSN",
    "jwt",
    "session_cookie",
    "basic_auth",
    "wandb_key",
]
HARMLESS = [
    "model.tokens",
    "num_tokens",
    "pad_token",
    "eos_token",
    "image_token",
    "key",
    "data.inputs_key",
    "target_key",
    "PWD",
    "OLDPWD",
    "path",
    "pattern",
    "patience",
    "pass_through",
    "low_pass",
    "forward_pass",
    "bypass",
    "RAY_AUTH_MODE",
    "SSH_AUTH_SOCK",
    "author",
    "sigma",
    "model.activation",
    "regroup.wait_s",
    "tracking.uri",
    "tokenizer",
    "key_padding_mask",
    "HOME",
]


@pytest.mark.parametrize("key", SECRET)
def test_names_of_secrets(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize("key", HARMLESS)
def test_names_that_are_harmless(key: str) -> None:
    assert not is_secret(key)


def test_no_key_of_descents_own_configs_is_taken_for_a_secret() -> None:
    from descent.config import groups

    for group, options in groups().items():
        for option in options:
            if option != "custom":
                flat = flatten(compose([f"{group}={option}"]).config.to_dict())
                assert [key for key in flat if is_secret(key)] == []


ADDRESSES = [
    "http://me:hunter2@host/x",
    "http://me:hunter2/a@host/x",
    "http://me:a@hunter2@host/x",
    "http://me:1234/hunter2@host",
    "http://:hunter2@host",
    "https://hunter2@host/x.git",
    "https://host/x?pwd=hunter2",
    "https://host/x?a=1&sig=hunter2&b=2",
    "https://host/x?X-Amz-Signature=hunter2",
    "https://host/x?api_key=hunter2",
    "postgresql+psycopg://me:hunter2@db:5432/mlflow refused",
]
TEXTS = [
    "host=db password=hunter2 user=x",
    "password='hunter2 and more'",
    '{"password":"hunter2"}',
    "{'token': 'hunter2', 'n': 1}",
    "Authorization: Bearer hunter2hunter2",
    "PGPASSWORD=hunter2",
    "pwd: hunter2",
    "${oc.env:NAME,hunter2}",
    "passwords=hunter1,hunter2",
]


@pytest.mark.parametrize("text", [*ADDRESSES, *TEXTS])
def test_no_secret_is_left_in_a_text(text: str) -> None:
    assert "hunter2" not in redact(text)


@pytest.mark.parametrize("text", ADDRESSES)
def test_the_rest_of_an_address_is_left(text: str) -> None:
    assert "host" in redact(text) or "db:5432" in redact(text)


PLAIN = [
    "http://127.0.0.1:5000/#/experiments/1/runs/ab?workflowType=machine_learning",
    "s3://bucket/img@2x.png: there is no such object",
    "steps=10 and epochs=30.0 (in configs/config.yaml): a run has one length; add epochs=null",
    "model.heads=5: doesn't divide model.width=128; 4 would",
    "override 'optimizer.lrr=0.1': there is no key 'optimizer.lrr'",
    "trusted_modules=[a]",
    "key: value",
]


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_messages_are_left_alone(text: str) -> None:
    assert redact(text) == text


@given(st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=8, max_size=20))
def test_a_hidden_value_is_found_in_every_form(value: str) -> None:
    from descent.config import secrets

    before = dict(secrets._hidden)
    try:
        hide(value, "${oc.env:X}")
        for form in (value, json.dumps(value), repr(value), quote(value, ""), f"a{value}b"):
            if value.lower() not in secrets._ORDINARY and not value.isdigit():
                assert value not in redact(f"x {form} y") or value in "x ${oc.env:X} y"
    finally:
        secrets._hidden.clear()
        secrets._hidden.update(before)


def test_the_origin_of_a_value_is_followed_through_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABOUT_US", "hunter2hunter2")
    monkeypatch.setenv("ITS_SIZE", "77777")
    composed = compose(
        [
            "+model.word=${oc.env:ABOUT_US}",
            "+model.again=${model.word}",
            "+model.part=s3://${model.again}/x",
            "+model.list=[a,${model.part}]",
            '+model.size="${oc.decode:${oc.env:ITS_SIZE}}"',
            "+model.default=${oc.env:NOT_SET,hunter2default}",
            "+model.plain=7",
        ]
    )
    assert composed.config.model["part"] == "s3://hunter2hunter2/x" and composed.config.model["size"] == 77777
    kept = composed.without_secrets()["model"]
    assert kept["word"] == kept["again"] == "${oc.env:ABOUT_US}"
    assert kept["part"] == "s3://${oc.env:ABOUT_US}/x" and kept["list"] == ["a", "s3://${oc.env:ABOUT_US}/x"]
    assert kept["size"] == "${oc.env:ITS_SIZE}" and kept["default"] == "${oc.env:NOT_SET}" and kept["plain"] == 7
    for text in (composed.yaml, json.dumps(composed.without_secrets()), redact("no hunter2hunter2, no hunter2default")):
        assert "hunter2" not in text and "77777" not in text
    assert kept["depth"] == composed.config.model["depth"]


def test_all_below_a_secret_name_is_masked() -> None:
    tree = {"credentials": {"user": "a", "keys": ["b", {"c": "d"}]}, "n": {"passwords": ["e", "f"]}, "x": 1}
    assert masked(tree) == {
        "credentials": {"user": "***", "keys": ["***", {"c": "***"}]},
        "n": {"passwords": ["***", "***"]},
        "x": 1,
    }
