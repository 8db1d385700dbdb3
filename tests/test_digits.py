"""The digits that are downloaded: from a server of the test, whole, cut off, damaged."""

import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import soundfile

from corpora.digits import download_digits
from data import read_manifest
from support.files import HALF_WRITTEN, UserError


def archive_of(names):
    """The bytes of a .tar.gz with half a second of noise under each name."""
    rng = np.random.default_rng(0)
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        for name in names:
            sound = io.BytesIO()
            soundfile.write(sound, rng.normal(0, 0.1, 4000), 8000, format="WAV")
            member = tarfile.TarInfo(name)
            member.size = len(sound.getvalue())
            sound.seek(0)
            tar.addfile(member, sound)
    return whole.getvalue()


RECORDINGS = [f"fsdd-1/recordings/{digit}_ann_{i}.wav" for digit in (0, 7) for i in range(3)]
OTHERS = ["fsdd-1/README.wav", "fsdd-1/recordings/../../../evil_ann_0.wav"]


@pytest.fixture
def server():
    """A server of one archive that knows ranges; .content is what it gives, .asked what for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            serving.asked.append(start)
            if start >= len(serving.content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(serving.content) - start))
            self.end_headers()
            self.wfile.write(serving.content[start : serving.cut_at])
            serving.cut_at = None  # the next time all of it

        def log_message(self, *_):
            """Quiet."""

    serving = HTTPServer(("127.0.0.1", 0), Handler)
    serving.content, serving.asked = archive_of(RECORDINGS + OTHERS), []
    serving.cut_at = None
    serving.url = f"http://127.0.0.1:{serving.server_port}/digits.tar.gz"
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield serving
    serving.shutdown()


def files_in(folder):
    """The names of all files there, but for the one by which processes keep out of each other."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".mtbi-lock")


def test_digits_are_downloaded_once_and_nothing_else_is_unpacked(server, tmp_path):
    manifest = download_digits(tmp_path, server.url)
    rows = read_manifest(manifest)
    assert sorted({u.text for u in rows}) == ["seven", "zero"] and len(rows) == 6
    assert {u.speaker for u in rows} == {"ann"}
    assert files_in(tmp_path) == sorted(
        [*(name.split("/")[-1] for name in RECORDINGS), "manifest.jsonl"]
    )
    download_digits(tmp_path, server.url)
    assert server.asked == [0]


@pytest.mark.parametrize("had", [100, None])
def test_a_download_that_was_cut_off_goes_on(server, tmp_path, had):
    had = len(server.content) if had is None else had
    (tmp_path / "fsdd").mkdir()
    half = tmp_path / "fsdd" / f"{HALF_WRITTEN}archive.tar.gz"
    half.write_bytes(server.content[:had])
    assert len(read_manifest(download_digits(tmp_path, server.url))) == 6
    assert server.asked == [had]


def test_a_connection_that_ends_early_is_said_and_the_same_command_goes_on(server, tmp_path):
    server.cut_at = 500
    with pytest.raises(UserError, match="ended after 500 bytes.*the same command goes on"):
        download_digits(tmp_path, server.url)
    assert len(read_manifest(download_digits(tmp_path, server.url))) == 6
    assert server.asked == [0, 500]


def test_a_recording_that_was_altered_on_the_way_is_noticed_by_the_checksum(server, tmp_path):
    altered = bytearray(server.content)
    altered[-6] ^= 1  # of the CRC-32, which comes last but for the length
    server.content = bytes(altered)
    with pytest.raises(UserError, match="damaged .*CRC.* and is deleted"):
        download_digits(tmp_path, server.url)
    assert not list((tmp_path / "fsdd").glob("*manifest*"))


def test_a_damaged_archive_is_deleted_and_said(server, tmp_path):
    server.content = b"no archive at all" * 100
    with pytest.raises(UserError, match="damaged .* and is deleted"):
        download_digits(tmp_path, server.url)
    assert files_in(tmp_path) == []
    server.content = archive_of(OTHERS)
    with pytest.raises(UserError, match="holds no recordings"):
        download_digits(tmp_path, server.url)


def test_without_a_network_it_is_said_in_a_line(tmp_path):
    with pytest.raises(UserError, match="--speech"):
        download_digits(tmp_path, "http://127.0.0.1:9/nothing.tar.gz")
