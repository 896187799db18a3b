"""Names become file names and URIs, addresses become certificates: what may be one."""

import pytest

from fedclaw.identity.names import check_address, check_name, is_loopback, site_uri, split_address


@pytest.mark.parametrize("name", ["a", "heart", "hospital-a", "h1", "a" * 63])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "1a",
        "-a",
        "a-",
        "a" * 64,
        "a/b",
        "../a",
        "..",
        ".",
        "a.b",
        "a b",
        "a\n",
        "a\0",
        "hôpital",
        "a_b",
        "a\\b",
    ],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        check_name(name)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("fl.example.org:9443", ("fl.example.org", 9443)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("Server-1:80", ("Server-1", 80)),
    ],
)
def test_good_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(check_address(address)) == parts


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:",
        ":80",
        "host:0",
        "host:65536",
        "host:-1",
        "host:8o",
        "::1:80",
        "[::1:80",
        "[host]:80",
        "[127.0.0.1]:80",
        "http://host:80",
        "a b:80",
        "0.0.0.0:80",
        "[::]:80",
        "-a:80",
        "a..b:80",
        "host:٣",
        "h\n:80",
        "10.0.0.999:80",
        "\u017f.org:80",
    ],
)
def test_bad_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|IPv6|listen"):
        check_address(address)


@pytest.mark.parametrize(
    ("host", "answer"), [("localhost", True), ("127.0.0.2", True), ("::1", True), ("a.org", False)]
)
def test_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


def test_site_uri() -> None:
    assert site_uri("heart", "hospital-a") == "fedclaw://heart/site/hospital-a"
