"""Which servers get the API key, and which key."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.models.engines.http.api_key import allow, authorization, check_recipe_hosts, checked_key, is_private


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIPE_API_KEY", "sk-secret-0123456789")
    monkeypatch.setenv("CAPIPE_API_HOSTS", "")


def resolved(address: str) -> Any:
    return lambda host, port: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]


@pytest.mark.parametrize("around", ["{}\n", " {}", "\t{}\r\n"])
def test_blanks_around_the_key_are_left_out(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIPE_API_KEY", around.format("sk-1"))
    assert authorization("https://host/v1/") == {"Authorization": "Bearer sk-1"}


@pytest.mark.parametrize("wrong", ["sk-1 sk-2", "sk-\u00e9", "sk\n1", "sk-\x011", "\u201csk-1\u201d"])
def test_a_key_that_is_none_is_named_by_its_variable_alone(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIPE_API_KEY", wrong)
    with pytest.raises(BadInput, match=r"^\$CAPIPE_API_KEY: ") as caught:
        checked_key()
    assert "sk" not in str(caught.value)


def test_no_key_needs_no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIPE_API_KEY", "\n")
    assert authorization("http://8.8.8.8/v1/") == {}
    check_recipe_hosts("recipe.yaml", ["http://8.8.8.8"])


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example.com/v1/",
        "http://127.0.0.1:8000/v1/",
        "http://[::1]:8000/v1/",
        "http://localhost:8000/v1/",
        "http://gpu-3:8000/v1/",
        "http://gpu.cluster.internal/v1/",
        "http://10.1.2.3/v1/",
        "http://192.168.1.5:8000/v1/",
        "http://100.80.1.2/v1/",
    ],
)
def test_the_key_goes_over_https_and_into_private_networks(url: str) -> None:
    assert authorization(url) == {"Authorization": "Bearer sk-secret-0123456789"}


def test_the_key_goes_over_plain_http_where_the_host_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolved("93.184.216.34"))
    for url in ("http://api.example.com/v1/", "http://93.184.216.34/v1/"):
        with pytest.raises(BadInput, match=r"no private address.*CAPIPE_API_HOSTS=") as caught:
            authorization(url)
        assert "sk-secret" not in str(caught.value)
    allow(["api.example.com"])
    assert authorization("http://api.example.com/v1/")
    monkeypatch.setattr(socket, "getaddrinfo", resolved("10.0.0.7"))
    assert is_private("gpu.lab.example.org") and authorization("http://gpu.lab.example.org/v1/")


def test_a_url_with_a_user_gets_that_instead() -> None:
    assert authorization("http://user:password@api.example.com/v1/") == {}
    check_recipe_hosts("recipe.yaml", ["https://user:password@api.example.com/v1"])


def test_a_recipes_host_is_to_be_named_once() -> None:
    engines = ["auto", "vllm", "http://127.0.0.1:8000,http://localhost:1", "https://api.example.com/v1"]
    with pytest.raises(BadInput, match=r"^recipe.yaml: asks api.example.com, .* add --allow-host api.example.com$"):
        check_recipe_hosts("recipe.yaml", engines)
    check_recipe_hosts("recipe.yaml", engines, ["stages.captions.config.engine=https://api.example.com/v1"])
    with pytest.raises(BadInput, match=r"asks api.example.com"):
        check_recipe_hosts("recipe.yaml", engines, ["a.b=https://api.example.com.other.org"])
    allow(["API.example.com"])
    check_recipe_hosts("recipe.yaml", engines)
    with pytest.raises(BadInput, match=r"asks other.example.com"):
        check_recipe_hosts("recipe.yaml", ["https://other.example.com"])


@pytest.mark.parametrize("wrong", ["https://api.example.com", "api.example.com:443", "", "a,b", "me@host"])
def test_a_host_is_named_alone(wrong: str) -> None:
    with pytest.raises(BadInput, match="--allow-host"):
        allow([wrong])
