"""The Free Spoken Digit Dataset: six people say the digits, fifty times each; downloaded once.

By Zohar Jackson and others, CC BY-SA 4.0: github.com/Jakobovski/free-spoken-digit-dataset
"""

import http.client
import re
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from data import SAMPLE_RATE, load_audio
from support.console import progress_bar
from support.files import HALF_WRITTEN, UserError, first_line, whole_file, write_jsonl
from support.runs import lock_folder

URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
NAMES = "zero one two three four five six seven eight nine".split()
RECORDING = re.compile(r"[^/]+/recordings/(\d)_([a-z]+)_(\d+)\.wav")
CHUNK = 2**16  # bytes


def download_digits(root, url=URL):
    """The manifest of the recordings, downloaded to ROOT/fsdd unless they are there.

    A download that was cut off goes on where it was; an archive that is damaged, by the checksum in
    it, is deleted. UserError if it cannot be had.
    """
    folder = Path(root) / "fsdd"
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        archive = folder / f"{HALF_WRITTEN}archive.tar.gz"
        fetch(url, archive)
        try:
            rows = unpack(archive, folder)
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            archive.unlink(missing_ok=True)
            raise UserError(
                f"{url}: the archive was damaged ({first_line(error)}) and is deleted; run the "
                "same command again"
            ) from None
        write_jsonl(manifest, rows)
        archive.unlink()
    return manifest


def fetch(url, path):
    """Download to a file, from where an earlier download stopped."""
    done = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            goes_on = answer.status == 206  # partial content: the server knows ranges
            total = int(answer.headers.get("Content-Length") or 0) + (done if goes_on else 0)
            bar = progress_bar(
                desc="download digits", unit="B", unit_scale=True, total=total or None
            )
            with bar, open(path, "ab" if goes_on else "wb") as file:
                bar.update(done if goes_on else 0)
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            if total and path.stat().st_size < total:
                raise ConnectionError(f"the connection ended after {path.stat().st_size} bytes")
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # it is whole already
            return
        raise UserError(f"{url}: cannot be downloaded ({first_line(error)})") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url}: cannot be downloaded ({first_line(error)}); the same command goes on, or name "
            "recordings of your own with --speech"
        ) from None


def unpack(archive, folder):
    """Manifest rows of the recordings of the archive, which go into the folder."""
    rows = []
    with tarfile.open(archive) as tar:
        for member in tar:
            found = RECORDING.fullmatch(member.name)
            if not found or not member.isfile():
                continue
            digit, speaker, number = found.groups()
            name = f"{digit}_{speaker}_{number}.wav"
            recording = tar.extractfile(member).read()
            if (folder / name).exists() and (folder / name).read_bytes() != recording:
                raise UserError(f"{folder / name}: is there already, and is another recording")
            with whole_file(folder / name, lasting=False) as temporary:
                temporary.write_bytes(recording)
            seconds = len(load_audio(folder / name)) / SAMPLE_RATE
            rows.append(
                {
                    "audio_filepath": name,
                    "duration": round(seconds, 3),
                    "text": NAMES[int(digit)],
                    "speaker": speaker,
                }
            )
        while tar.fileobj.read(CHUNK):
            pass  # to its end, where the checksum is compared
    if not rows:
        raise tarfile.TarError("it holds no recordings")
    return rows
