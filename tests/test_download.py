"""Downloads against a server on this machine that misbehaves as each test tells it to."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from commands import failed

from npgpt2.convert import download

BODY = bytes(range(256)) * 40
NAME = "model.ckpt.meta"
Answer = Callable[[BaseHTTPRequestHandler], None]
Fetch = Callable[..., None]
Run = Callable[..., tuple[int, str, str]]
MonkeyPatch = pytest.MonkeyPatch


class Handler(BaseHTTPRequestHandler):
    """Answers the first request with the first of `script`, and so on; the last of them answers for ever."""

    script: ClassVar[list[Answer]] = []
    paths: ClassVar[list[str]] = []
    ranges: ClassVar[list[str | None]] = []
    agents: ClassVar[set[str | None]] = set()

    def do_GET(self) -> None:
        answer = self.script[min(len(self.paths), len(self.script) - 1)]
        self.paths.append(self.path)
        self.ranges.append(self.headers["Range"])
        self.agents.add(self.headers["User-Agent"])
        answer(self)

    def log_message(self, *args: object) -> None:
        pass


Server = type[Handler]


def reply(status: int, body: bytes = b"", **headers: Any) -> Answer:
    """An answer with exactly these headers, underscores standing for hyphens; the connection is closed after it."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def serve(body: bytes = BODY, at_most: int | None = None, ranges: bool = True) -> Answer:
    """What a good server does; with `at_most`, the connection breaks after so many bytes."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers["Range"] if ranges else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start and start >= len(body):
            return reply(416, Content_Range=f"bytes */{len(body)}")(handler)
        headers: dict[str, Any] = {"Content_Length": len(body) - start}
        if asked:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        reply(206 if asked else 200, body[start:][:at_most], **headers)(handler)

    return answer


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(address: str, monkeypatch: MonkeyPatch) -> Server:
    monkeypatch.setenv("no_proxy", "*")
    for log in (Handler.script, Handler.paths, Handler.ranges, Handler.agents):
        log.clear()
    return Handler


@pytest.fixture
def pauses(monkeypatch: MonkeyPatch) -> list[float]:
    """The seconds that were slept; none are."""
    slept: list[float] = []
    monkeypatch.setattr(download, "sleep", slept.append)
    return slept


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / NAME


@pytest.fixture
def part(path: Path) -> Path:
    return path.with_name(f"{NAME}.part")


@pytest.fixture
def fetch(server: Server, address: str, path: Path, pauses: list[float]) -> Fetch:
    """fetch(answer, answer, ...): download one file from a server that answers like that."""

    def fetch(*script: Answer, **options: Any) -> None:
        server.script[:] = script
        server.paths.clear()
        server.ranges.clear()
        download.fetch_file(f"{address}/{NAME}", path, **options)

    return fetch


def folder_of(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


# Whole checkpoints


@pytest.fixture
def known_hash(monkeypatch: MonkeyPatch) -> None:
    """Make BODY the one right content of the vocabulary's files, and of NAME."""
    digest = hashlib.sha256(BODY).hexdigest()
    monkeypatch.setattr(download, "SHA256", dict.fromkeys(("encoder.json", "vocab.bpe", NAME), digest))


OPENAI_FILES = {
    "checkpoint",
    "encoder.json",
    "hparams.json",
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.ckpt.meta",
    "vocab.bpe",
}


@pytest.fixture
def released(fixtures: Path, monkeypatch: MonkeyPatch) -> dict[str, bytes]:
    """A small checkpoint's files, whose vocabulary is taken for OpenAI's."""
    bodies = {name: (fixtures / "tiny" / name).read_bytes() for name in OPENAI_FILES - {NAME}} | {NAME: BODY}
    hashes = {name: hashlib.sha256(bodies[name]).hexdigest() for name in download.SHA256}
    monkeypatch.setattr(download, "SHA256", hashes)
    return bodies


def serve_by_name(bodies: dict[str, bytes]) -> Answer:
    return lambda handler: serve(bodies[handler.path.rpartition("/")[2]])(handler)


@pytest.mark.parametrize(("name", "directory"), [("124M", "124M"), ("117M", "124M"), ("345M", "355M")])
def test_checkpoint_arrives_as_its_seven_files(
    server: Server, address: str, tmp_path: Path, released: dict[str, bytes], name: str, directory: str
) -> None:
    server.script[:] = [serve_by_name(released)]
    folder = tmp_path / "new" / "folder"
    download.fetch_checkpoint(name, folder, f"{address}/models/")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == released
    assert sorted(server.paths) == sorted(f"/models/{directory}/{file}" for file in OPENAI_FILES)
    assert server.agents == {"npgpt2"}


def test_scheme_may_be_in_capitals(server: Server, address: str, tmp_path: Path, released: dict[str, bytes]) -> None:
    server.script[:] = [serve_by_name(released)]
    download.fetch_checkpoint("124M", tmp_path, address.upper())
    assert set(os.listdir(tmp_path)) == OPENAI_FILES


@pytest.mark.usefixtures("known_hash")
def test_login_page_in_place_of_the_server_leaves_nothing_behind(server: Server, address: str, tmp_path: Path) -> None:
    server.script[:] = [serve(b"<!doctype html><title>Log in</title>")]
    with pytest.raises(ValueError, match=r"^encoder\.json: SHA-256 is"):
        download.fetch_checkpoint("124M", tmp_path, address)
    assert os.listdir(tmp_path) == []


def test_second_call_fetches_only_what_is_missing(
    server: Server, address: str, tmp_path: Path, released: dict[str, bytes]
) -> None:
    server.script[:] = [serve_by_name(released)]
    download.fetch_checkpoint("124M", tmp_path, address)
    (tmp_path / NAME).unlink()
    server.paths.clear()
    download.fetch_checkpoint("124M", tmp_path, address)
    assert server.paths == [f"/124M/{NAME}"]


def test_unknown_name_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'gpt3'; choose from 124M, 355M, 774M, 1558M, .* 117M, 345M$"):
        download.fetch_checkpoint("gpt3", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    "base_url", ["file:///etc", "ftp://example.org", "example.org/models", "http://", "", "xhttp://a"]
)
def test_only_http_urls_are_fetched_from(tmp_path: Path, base_url: str) -> None:
    with pytest.raises(ValueError, match="can't be downloaded from; give a URL like https://"):
        download.fetch_checkpoint("124M", tmp_path / "folder", base_url)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:port", "http://127.0.0.1/a b", "http://127.0.0.1/\u00e9"])
def test_malformed_url_is_not_tried_again(server: Server, tmp_path: Path, pauses: list[float], base_url: str) -> None:
    with pytest.raises(ValueError, match=r"is not a valid URL .*; check the base URL"):
        download.fetch_checkpoint("124M", tmp_path, base_url)
    assert pauses == []


def test_removal_deletes_the_seven_files_and_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "124M"
    folder.mkdir()
    for name in OPENAI_FILES:
        (folder / name).touch()
    download.remove_checkpoint(folder)
    assert os.listdir(tmp_path) == []


def test_removal_leaves_what_it_did_not_fetch(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").touch()
    (tmp_path / "notes.txt").touch()
    download.remove_checkpoint(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


# One file, from a server that means well


def test_file_takes_its_name_when_complete(fetch: Fetch, path: Path, server: Server) -> None:
    fetch(serve())
    assert folder_of(path) == [NAME]
    assert path.read_bytes() == BODY
    assert server.ranges == [None]


def test_file_is_on_disk_before_it_takes_its_name(fetch: Fetch, path: Path, monkeypatch: MonkeyPatch) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    fetch(serve())
    assert synced == [False]


def test_empty_file_is_a_file(fetch: Fetch, path: Path) -> None:
    fetch(serve(b""))
    assert path.read_bytes() == b""


def test_file_that_is_there_is_kept(fetch: Fetch, path: Path, server: Server) -> None:
    path.write_bytes(b"here already")
    fetch(serve())
    assert path.read_bytes() == b"here already"
    assert server.paths == []


def test_broken_transfer_goes_on_where_it_stopped(
    fetch: Fetch, path: Path, server: Server, pauses: list[float]
) -> None:
    fetch(serve(at_most=1000), serve(at_most=500), serve())
    assert path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=1000-", "bytes=1500-"]
    assert pauses == [1, 2]


def test_later_call_goes_on_where_the_last_one_stopped(fetch: Fetch, path: Path, part: Path, server: Server) -> None:
    with pytest.raises(ConnectionError, match=r"broke after 1,000 of 10,240 bytes, .* run the same command again"):
        fetch(serve(at_most=1000), pauses=())
    assert folder_of(path) == [part.name]
    fetch(serve())
    assert server.ranges == ["bytes=1000-"]
    assert folder_of(path) == [NAME]
    assert path.read_bytes() == BODY


def test_stalled_transfer_is_broken_off_and_keeps_its_bytes(
    fetch: Fetch, path: Path, server: Server, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    over = threading.Event()
    waited_for: list[bool] = []

    def stall(handler: BaseHTTPRequestHandler) -> None:
        reply(200, BODY[:1000], Content_Length=len(BODY))(handler)
        waited_for.append(not over.wait(10))

    fetch(stall, serve())
    assert waited_for == []
    over.set()
    assert server.ranges == [None, "bytes=1000-"]
    assert path.read_bytes() == BODY


def test_server_that_sends_small_ranges_is_asked_for_the_next(fetch: Fetch, path: Path, server: Server) -> None:
    short = reply(206, BODY[1000:3000], Content_Length=2000, Content_Range=f"bytes 1000-2999/{len(BODY)}")
    fetch(serve(at_most=1000), short, serve())
    assert server.ranges == [None, "bytes=1000-", "bytes=3000-"]
    assert path.read_bytes() == BODY


def test_redirect_is_followed_with_the_range(fetch: Fetch, path: Path, part: Path, server: Server) -> None:
    part.write_bytes(BODY[:100])
    fetch(reply(302, Location="/elsewhere"), serve())
    assert server.paths == [f"/{NAME}", "/elsewhere"]
    assert server.ranges == ["bytes=100-", "bytes=100-"]
    assert path.read_bytes() == BODY


# Trying again


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_failure_is_tried_again(fetch: Fetch, path: Path, pauses: list[float], status: int) -> None:
    fetch(reply(status), reply(status), serve())
    assert path.read_bytes() == BODY
    assert pauses == [1, 2]


def test_server_that_stays_broken_is_given_up(
    fetch: Fetch, address: str, path: Path, pauses: list[float], server: Server
) -> None:
    with pytest.raises(ConnectionError) as caught:
        fetch(reply(500))
    assert str(caught.value) == (
        f"{address}/{NAME}: the server answered with status 500, after 6 tries; "
        "run the same command again to go on where it stopped"
    )
    assert len(server.paths) == 6
    assert pauses == [1, 2, 4, 8, 16]
    assert folder_of(path) == []


def test_pauses_start_anew_with_every_64_kilobytes(fetch: Fetch, path: Path, pauses: list[float]) -> None:
    body = os.urandom(5 * 2**16)
    fetch(*[serve(body, at_most=2**16)] * 3, reply(500), serve(body))
    assert path.read_bytes() == body
    assert pauses == [1, 1, 1, 2]


def test_server_that_sends_a_byte_at_a_time_is_given_up(fetch: Fetch, part: Path, server: Server) -> None:
    with pytest.raises(ConnectionError, match="broke after 6 of 10,240 bytes, after 6 tries"):
        fetch(serve(at_most=1))
    assert len(server.paths) == 6
    assert part.read_bytes() == BODY[:6]


def test_server_that_always_starts_over_and_breaks_is_given_up(fetch: Fetch, pauses: list[float]) -> None:
    body = os.urandom(2**18)
    with pytest.raises(ConnectionError, match="after 6 tries"):
        fetch(serve(body, at_most=2**17, ranges=False))
    assert pauses == [1, 2, 4, 8, 16]


def test_refused_connection_is_tried_again_and_then_named(server: Server, path: Path, pauses: list[float]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/{NAME}"
        with pytest.raises(
            ConnectionError, match=rf"^{url}: [^<]*refused[^>]*, after 3 tries; run the same command again"
        ):
            download.fetch_file(url, path, pauses=(0.1, 0.2))
    assert pauses == [0.1, 0.2]


def test_answer_that_is_not_http_is_tried_again(fetch: Fetch, path: Path) -> None:
    fetch(lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), serve())
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("status", [400, 403, 404, 410, 416])
def test_refusal_is_final(fetch: Fetch, address: str, path: Path, server: Server, status: int) -> None:
    with pytest.raises(OSError, match=f"^{address}/{NAME}: the server answered with status {status}") as caught:
        fetch(reply(status), serve())
    assert ("the name may be wrong on this mirror" in str(caught.value)) == (status == 404)
    assert len(server.paths) == 1
    assert folder_of(path) == []


def test_full_disk_is_not_tried_again(fetch: Fetch, part: Path, server: Server, monkeypatch: MonkeyPatch) -> None:
    class FullDisk(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "open", lambda *_: FullDisk(), raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(serve())
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(part))
    assert len(server.paths) == 1


def test_a_file_that_the_disk_has_no_room_for_is_named(
    server: Server, address: str, tmp_path: Path, run: Run, released: dict[str, bytes]
) -> None:
    resource = pytest.importorskip("resource", reason="needs a limit on the size of files")
    server.script[:] = [serve_by_name(released)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        result = run("download", "124M", "--models-dir", tmp_path, "--base-url", address)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    large = tmp_path / "124M.download" / "model.ckpt.data-00000-of-00001.part"
    assert result == (1, "", f"npgpt2: {large}: {os.strerror(errno.EFBIG)}\n")
    assert run("download", "124M", "--models-dir", tmp_path, "--base-url", address)[0] == 0
    assert server.ranges[-1] == "bytes=100000-"


# Answers that don't fit what is there


def test_complete_part_is_recognised(fetch: Fetch, path: Path, part: Path, server: Server) -> None:
    part.write_bytes(BODY)
    fetch(serve())
    assert server.ranges == [f"bytes={len(BODY)}-"]
    assert folder_of(path) == [NAME]
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("content_range", [f"bytes */{len(BODY)}", "bytes */*", "nonsense", None])
def test_part_that_is_too_long_is_fetched_anew(
    fetch: Fetch, path: Path, part: Path, server: Server, content_range: str | None
) -> None:
    part.write_bytes(BODY + b"more")
    headers: dict[str, Any] = {"Content_Range": content_range} if content_range else {}
    fetch(reply(416, **headers), serve())
    assert server.ranges == [f"bytes={len(BODY) + 4}-", None]
    assert path.read_bytes() == BODY


def test_part_is_not_complete_if_an_earlier_answer_promised_more(fetch: Fetch, path: Path, server: Server) -> None:
    fetch(serve(at_most=1000), reply(416, Content_Range="bytes */1000"), serve())
    assert server.ranges == [None, "bytes=1000-", None]
    assert path.read_bytes() == BODY


def test_server_that_ignores_ranges_sends_all_of_it_anew(fetch: Fetch, path: Path, part: Path, server: Server) -> None:
    part.write_bytes(b"x" * 1000)
    fetch(serve(ranges=False))
    assert server.ranges == ["bytes=1000-"]
    assert path.read_bytes() == BODY


@pytest.mark.parametrize(
    "content_range",
    [
        None,
        "nonsense",
        "bytes 0-10239/10240",
        "bytes 999-10238/10240",
        "bytes 1000-10239/*",
        "bytes 1000-10240/10240",
        "bytes 1000-10238/10240",
        "bytes 1000-999/10240",
        f"bytes 1000-10239/{'9' * 5000}",
        f"bytes 1000-{'9' * 5000}/10240",
        f"bytes {'9' * 5000}-10239/10240",
        "bytes 1000-10239/10239",
        "lines 1000-10239/10240",
    ],
)
def test_range_that_was_not_asked_for_is_not_used(
    fetch: Fetch, path: Path, part: Path, server: Server, content_range: str | None
) -> None:
    part.write_bytes(BODY[:1000])
    headers: dict[str, Any] = {"Content_Range": content_range} if content_range else {}
    fetch(reply(206, BODY[1000:], Content_Length=9240, **headers), serve())
    assert server.ranges == ["bytes=1000-", None]
    assert path.read_bytes() == BODY


def test_file_that_changed_its_length_is_fetched_anew(fetch: Fetch, path: Path, server: Server) -> None:
    newer = BODY[::-1] + b"longer"
    fetch(serve(at_most=1000), serve(newer))
    assert server.ranges == [None, "bytes=1000-", None]
    assert path.read_bytes() == newer


def test_length_that_changes_for_ever_is_given_up(fetch: Fetch, path: Path) -> None:
    bodies = [BODY[:length] for length in range(5000, 5020)]
    with pytest.raises(ConnectionError, match=r"byte 1000 of \d+, the server sent .bytes 1000-\d+/\d+., after 6 tries"):
        fetch(*(serve(body, at_most=1000) for body in bodies))
    assert folder_of(path) == []


def test_body_that_is_always_short_is_given_up(fetch: Fetch, path: Path, part: Path) -> None:
    with pytest.raises(ConnectionError, match="broke after 10,240 of 10,241 bytes, after 6 tries"):
        fetch(reply(200, BODY, Content_Length=len(BODY) + 1))
    assert folder_of(path) == [part.name]


def test_bytes_beyond_the_promised_length_are_not_read(fetch: Fetch, path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CHUNK", 1000)
    fetch(reply(200, BODY + b"more", Content_Length=len(BODY)))
    assert path.read_bytes() == BODY


def test_part_that_someone_else_wrote_to_is_fetched_anew(fetch: Fetch, path: Path, part: Path, server: Server) -> None:
    part.write_bytes(BODY[:1000])

    def meddle(handler: BaseHTTPRequestHandler) -> None:
        with open(part, "ab") as file:
            file.write(b"more")
        reply(206, BODY[1000:], Content_Length=9240, Content_Range="bytes 1000-10239/10240")(handler)

    fetch(meddle, serve())
    assert server.ranges == ["bytes=1000-", None]
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("headers", [{}, {"Content_Length": "many"}, {"Content_Length": -1}])
def test_length_must_be_known(fetch: Fetch, path: Path, server: Server, headers: dict[str, Any]) -> None:
    with pytest.raises(OSError, match=r"status 200 and Content-Length .*, where a file is expected"):
        fetch(reply(200, BODY, **headers))
    assert len(server.paths) == 1
    assert folder_of(path) == []


def test_success_without_content_is_an_error(fetch: Fetch, path: Path, server: Server) -> None:
    with pytest.raises(OSError, match="answered with status 204"):
        fetch(reply(204))
    assert len(server.paths) == 1
    assert folder_of(path) == []


# Hashes


def test_vocabulary_hashes_are_those_of_openai() -> None:
    assert download.SHA256 == {
        "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }
    assert set(download.FILES) == OPENAI_FILES


@pytest.mark.usefixtures("known_hash")
def test_right_hash_is_accepted(fetch: Fetch, path: Path) -> None:
    fetch(serve(at_most=1000), serve())
    assert path.read_bytes() == BODY


@pytest.mark.usefixtures("known_hash")
def test_wrong_hash_twice_is_refused_and_nothing_kept(fetch: Fetch, path: Path, address: str, server: Server) -> None:
    expected, found = hashlib.sha256(BODY).hexdigest(), hashlib.sha256(BODY[::-1]).hexdigest()
    with pytest.raises(ValueError, match="SHA-256") as caught:
        fetch(serve(BODY[::-1]))
    assert str(caught.value) == (
        f"{NAME}: SHA-256 is {found}, where {expected} is expected; {address}/{NAME} sent it damaged, and it was"
        " deleted; try again later, or another server (--base-url)"
    )
    assert len(server.paths) == 2
    assert folder_of(path) == []


@pytest.mark.usefixtures("known_hash")
def test_part_of_something_else_is_fetched_anew(fetch: Fetch, path: Path, part: Path, server: Server) -> None:
    part.write_bytes(b"x" * 1000)
    fetch(serve())
    assert path.read_bytes() == BODY
    assert server.ranges == ["bytes=1000-", None]


@pytest.mark.usefixtures("known_hash")
def test_file_that_is_there_with_a_wrong_hash_is_fetched_anew(fetch: Fetch, path: Path, server: Server) -> None:
    path.write_bytes(b"edited by hand")
    fetch(serve())
    assert path.read_bytes() == BODY
    assert server.ranges == [None]


# What arrives damaged, though it is as long as it should be


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE = {
    "encoder.json": (100, "encoder.json: SHA-256 is"),
    "vocab.bpe": (100, "vocab.bpe: SHA-256 is"),
    "checkpoint": (25, "checkpoint: doesn't name 'model.ckpt', which is beside it"),
    "hparams.json": (2, "hparams.json: n_vocab is missing"),
    "model.ckpt.index": (100, "model.ckpt.index: block at byte"),
    "model.ckpt.data-00000-of-00001": (300_000, "is damaged (its checksum is wrong)"),
}


@pytest.mark.parametrize("damaged", DAMAGE)
def test_what_arrives_damaged_is_fetched_again(
    server: Server, address: str, tmp_path: Path, run: Run, released: dict[str, bytes], damaged: str
) -> None:
    """Whether the server sent it damaged once, or a run before this one left it."""
    broken = released | {damaged: flipped(released[damaged], DAMAGE[damaged][0])}

    def first_damaged(handler: BaseHTTPRequestHandler) -> None:
        first = server.paths.count(handler.path) == 1
        serve_by_name(broken if first else released)(handler)

    download_to = ["download", "124M", "--base-url", address, "--models-dir"]
    server.script[:] = [first_damaged]
    assert run(*download_to, tmp_path / "sent")[0] == 0
    assert server.paths.count(f"/124M/{damaged}") == 2
    assert len(server.paths) == 8

    server.paths.clear()
    server.script[:] = [serve_by_name(released)]
    (tmp_path / "left" / "124M.download").mkdir(parents=True)
    for name, body in broken.items():
        (tmp_path / "left" / "124M.download" / name).write_bytes(body)
    assert run(*download_to, tmp_path / "left")[0] == 0
    assert server.paths == [f"/124M/{damaged}"]
    for folder in ("sent", "left"):
        assert run("generate", "A language", "-m", "124M", "--models-dir", tmp_path / folder, "--length", "1")[0] == 0


@pytest.mark.parametrize("damaged", DAMAGE)
def test_what_always_arrives_damaged_is_refused_until_the_server_is_whole(
    server: Server, address: str, tmp_path: Path, run: Run, released: dict[str, bytes], damaged: str
) -> None:
    at, words = DAMAGE[damaged]
    arguments = ["download", "124M", "--base-url", address, "--models-dir", tmp_path]
    server.script[:] = [serve_by_name(released | {damaged: flipped(released[damaged], at)})]
    for _ in range(2):
        server.paths.clear()
        advice = f"{address}/124M/{damaged} sent it damaged, and it was deleted; try again later, or another server"
        assert failed(run(*arguments), 1, words, damaged, advice)
        assert server.paths.count(f"/124M/{damaged}") == 2
    server.script[:] = [serve_by_name(released)]
    assert run(*arguments)[0] == 0
    assert os.listdir(tmp_path) == ["124M.npz"]


def test_files_that_contradict_each_other_are_refused_with_what_to_do(
    server: Server, address: str, tmp_path: Path, run: Run, released: dict[str, bytes]
) -> None:
    contradiction = released["hparams.json"].replace(b'"n_layer": 2', b'"n_layer": 3')
    server.script[:] = [serve_by_name(released | {"hparams.json": contradiction})]
    result = run("download", "124M", "--base-url", address, "--models-dir", tmp_path)
    assert failed(result, 1, "n_layer is 3", f"; delete {tmp_path / '124M.download'} and run the same command again")


# What the user sees


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_progress_and_why_it_waits(fetch: Fetch, part: Path, monkeypatch: MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    part.write_bytes(BODY[: len(BODY) // 2])
    fetch(reply(503), serve())
    lines = terminal.getvalue().split("\r")
    assert any("trying again in 1 s: the server answered with status 503" in line for line in lines)
    assert any(line.startswith(f"{NAME}:  50%") for line in lines)
    assert lines[-1].startswith(f"{NAME}: 100%")
    assert "503" not in lines[-1]


def test_without_a_terminal_nothing_is_printed(fetch: Fetch, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(reply(503), serve())
    assert capfd.readouterr() == ("", "")
