"""What is taken for a request, how a plain one is written anew, and where its body ends."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsec.edge.network.dialects import Body, Request, copy_body, parse_http
from dsec.errors import InvalidArgumentError


def head(line: str, *fields: str) -> bytes:
    return "\r\n".join((line, *fields, "", "")).encode()


def test_connect_names_a_host_and_a_port() -> None:
    request = parse_http(head("CONNECT A.Example.:443 HTTP/1.1", "Host: whatever"))
    assert (request.host, request.port, request.head, request.body) == ("a.example", 443, b"", "tunnel")
    assert str(parse_http(head("CONNECT [2001:4860::1]:443 HTTP/1.1")).host) == "2001:4860::1"


def test_a_plain_request_is_rewritten_to_one_request_of_its_host() -> None:
    request = parse_http(
        head(
            "POST http://A.example:8080/p?q=1 HTTP/1.1", "host:a.example:8080", "Accept:  */* ",
            "Connection: X-Hop, close", "X-Hop: 1", "Proxy-Authorization: secret", "Upgrade: h2c", "Content-Length: 3",
        )
    )  # fmt: skip
    assert request == Request(
        "a.example",
        8080,
        head=b"POST /p?q=1 HTTP/1.1\r\nHost: A.example:8080\r\naccept: */*\r\n"
        b"content-length: 3\r\nConnection: close\r\n\r\n",
        body=3,
    )


def test_a_url_without_a_path_asks_for_the_root() -> None:
    assert parse_http(head("GET http://a.example HTTP/1.0")).head.startswith(b"GET / HTTP/1.0\r\n")
    assert parse_http(head("GET http://a.example?q HTTP/1.0")).head.startswith(b"GET /?q HTTP/1.0\r\n")


@pytest.mark.parametrize(
    "request_head",
    [
        head("GET / HTTP/1.1", "Host: a.example"),
        head("GET https://a.example/ HTTP/1.1", "Host: a.example"),
        head("GET http://a.example/ HTTP/1.1"),
        head("GET http://a.example/ HTTP/1.1", "Host: b.example"),
        head("GET http://a.example/ HTTP/1.1", "Host: a.example:81"),
        head("GET http://a.example/ HTTP/1.1", "Host: a.example", "Host: a.example"),
        head("GET http://a.example/ HTTP/1.1", "Host: a.example", "Host : b.example"),
        head("GET http://a.example/ HTTP/1.1", "Host: a.example", " folded"),
        head("GET http://user@a.example/ HTTP/1.1", "Host: a.example"),
        head("GET http://b.example@a.example/ HTTP/1.1", "Host: a.example"),
        head("GET http://a.example/#f HTTP/1.1", "Host: a.example"),
        head("GET http://a.example/ HTTP/1.1\nX: 1", "Host: a.example"),
        head("GET http://a.example/ HTTP/1.1", "Host: a.example", "X: a\rY: b"),
        head("GET http://a.example/ HTTP/1.1", "Host: a.example", "X: a\nHost: b.example"),
        head("GET http://a.example/ HTTP/1.1", "Host: a.example", "X: a\0"),
        head("GET http://a.example/ HTTP/2", "Host: a.example"),
        head("GET  http://a.example/ HTTP/1.1", "Host: a.example"),
        head("POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: 1", "Content-Length: 1"),
        head("POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: 1, 1"),
        head("POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: +1"),
        head("POST http://a.example/ HTTP/1.1", "Host: a.example", "Content-Length: 1", "Transfer-Encoding: chunked"),
        head("POST http://a.example/ HTTP/1.1", "Host: a.example", "Transfer-Encoding: gzip, chunked"),
        head("POST http://a.example/ HTTP/1.1", "Host: a.example", "Transfer-Encoding: chunked", "Transfer-Encoding:"),
        head("POST http://a.example/ HTTP/1.0", "Transfer-Encoding: chunked"),
        head("CONNECT a.example HTTP/1.1"),
        head("CONNECT http://a.example:443 HTTP/1.1"),
        head("CONNECT a.example:443:80 HTTP/1.1"),
        head("CONNECT 127.1:443 HTTP/1.1"),
        head("CONNECT [a.example]:443 HTTP/1.1"),
        "GET http://ä.example/ HTTP/1.1\r\n\r\n".encode(),
        b"\r\n\r\n",
    ],
)
def test_a_request_that_could_mean_two_things_is_refused(request_head: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_http(request_head)


@given(st.binary(max_size=400))
def test_any_head_is_a_request_or_refused(noise: bytes) -> None:
    for before in (b"", b"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n"):
        try:
            parse_http(before + noise + b"\r\n\r\n")
        except InvalidArgumentError:
            continue


def test_a_long_line_of_spaces_costs_no_more_than_its_length() -> None:
    with pytest.raises(InvalidArgumentError):
        parse_http(head("GET http://a.example/ HTTP/1.1", "X:" + " \t" * 30_000 + "\x01"))


async def copied(body: Body, data: bytes) -> bytes:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    pieces: list[bytes] = []

    async def send(piece: bytes) -> None:
        pieces.append(piece)

    await copy_body(reader, body, send)
    return b"".join(pieces)


async def test_a_body_ends_where_its_length_says() -> None:
    assert await copied(3, b"abcGET http://b.example/ HTTP/1.1\r\n\r\n") == b"abc"
    assert await copied(0, b"GET http://b.example/ HTTP/1.1\r\n\r\n") == b""
    with pytest.raises(EOFError):
        await copied(4, b"abc")


async def test_a_chunked_body_is_written_anew_without_extensions_and_trailers() -> None:
    sent = await copied("chunked", b"3;x=y\r\nabc\r\n0A \r\n0123456789\r\n0\r\nX: y\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert sent == b"3\r\nabc\r\na\r\n0123456789\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [b"x\r\n", b"-1\r\n", b"3\nabc\r\n0\r\n\r\n", b"3\r\nabcd\r\n0\r\n\r\n", b"0x3\r\nabc\r\n", b"3" * 300 + b"\r\n",
     b"f" * 16 + b"\r\n", b"0\r\n" + b"a: b\r\n" * 100, b"\r\n"],
)  # fmt: skip
async def test_a_chunked_body_that_could_mean_two_things_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        await copied("chunked", data)
