"""Readers of the common corpora as they are on disk.

A reader yields rows of the manifest format, (line number or name, row); where a row cannot be read,
a string in its place says why. One piece of code, data.read_manifest, checks them all.
"""

import os
import shutil
import tarfile
import zlib
from pathlib import Path

from support.console import timed
from support.files import UserError, read_jsonl, read_lines, relative
from support.runs import lock_folder

AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")
TRANSCRIPT_BYTES = 2**16  # of a file with one transcript: four times what a recording may have
LIBRISPEECH_PARTS = (
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
)


# ---- which corpus is it? ----


def find_rows(source):
    """(what the corpus is, the path its rows are relative to, its rows) of whatever `source` is.

    The rows are a list of (line number or name, row). UserError if it is nothing that is known.
    """
    path = Path(source)
    for name in ("manifest.jsonl", "metadata.csv"):
        if (path / name).is_file():
            path = path / name
            break
    what, reader = reader_of_folder(path) if path.is_dir() else reader_of_file(path)
    rows = list(reader(path))
    if not rows:
        raise UserError(
            f"{path}: holds no speech in a form that is known: a JSONL manifest, a Common Voice "
            "TSV, LJSpeech's metadata.csv, LibriSpeech, a Kaldi folder, or sound files with .txt "
            "beside"
        )
    return what, path, rows


def reader_of_file(path):
    """(what it is, its reader), by the file's ending."""
    ending = path.suffix.lower()
    if ending == ".tsv":
        return "a Common Voice table", common_voice
    if ending == ".csv":
        return "LJSpeech's metadata", ljspeech
    return "a JSONL manifest", read_jsonl


def reader_of_folder(path):
    """(what it is, its reader), by the files that are in the folder."""
    if (path / "clips").is_dir():
        raise UserError(
            f"{path}: holds a Common Voice language; name one of its tables, like "
            f"{path / 'validated.tsv'}"
        )
    if (path / "wav.scp").exists():
        return "a Kaldi folder", kaldi
    if any(found.name.endswith(".trans.txt") for found in files_below(path)):
        return "LibriSpeech", librispeech
    return "sound files with .txt beside", text_beside


def files_below(folder):
    """Yields the files in a folder and its sub-folders, links among them, each folder once.

    UserError if one cannot be read: its recordings would be missing, and nobody would know.
    """

    def refuse(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    seen = set()
    for where, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # two links to it, or one that leads up
            below.clear()
            continue
        seen.add(real)
        for name in names:
            yield Path(where, name)


# ---- the readers ----


def librispeech(folder):
    """LibriSpeech, any part of it (Panayotov et al., ICASSP 2015).

    Lines "ID TRANSCRIPT" in *.trans.txt, with ID.flac beside; the ID begins with the speaker.
    """
    for path in sorted(p for p in files_below(folder) if p.name.endswith(".trans.txt")):
        table = relative(path, folder)
        try:
            lines = read_lines(path)
        except UserError as error:
            yield table, str(error)
            continue
        for number, line in enumerate(lines, 1):
            name, _, text = line.partition(" ")
            if not name:
                continue
            audio = relative(path.parent / f"{name}.flac", folder)
            speaker = name.split("-")[0]
            yield f"{table}:{number}", {"audio_filepath": audio, "text": text, "speaker": speaker}


def common_voice(path):
    """A Common Voice TSV (train.tsv, validated.tsv, …; Ardila et al., LREC 2020).

    Columns path, sentence and client_id; the audio is in clips/.
    """
    header, *lines = (line.rstrip("\r").split("\t") for line in read_lines(path))
    if not {"path", "sentence"} <= set(header):
        raise UserError(
            f"{path}: is no Common Voice table; its first line has no columns path and sentence"
        )
    for number, fields in enumerate(lines, 2):
        line = dict(zip(header, fields))
        if "path" in line and "sentence" in line and len(fields) <= len(header):
            row = {"audio_filepath": f"clips/{line['path']}", "text": line["sentence"]}
            yield number, {**row, "speaker": line.get("client_id", "")}
        elif fields != [""]:
            yield number, f"has {len(fields)} columns, not {len(header)}"


def ljspeech(path):
    """LJSpeech's metadata.csv (Ito and Johnson, 2017).

    Lines "ID|text" or "ID|text|text as spoken"; the audio is in wavs/.
    """
    for number, line in enumerate(read_lines(path), 1):
        name, *texts = line.rstrip("\r").split("|")
        if len(texts) > 2:
            yield number, f"has {len(texts) + 1} columns; ID|text|text as spoken are known"
        elif texts:
            audio = recording(path.parent, f"wavs/{name}")
            yield number, {"audio_filepath": audio, "text": texts[-1]}
        elif name:
            yield number, "is no line of the form ID|text"


def recording(folder, stem):
    """The sound file of this name, whatever its ending; .wav if there is none."""
    for ending in AUDIO_ENDINGS:
        if (folder / f"{stem}{ending}").exists():
            return f"{stem}{ending}"
    return f"{stem}.wav"


def kaldi(folder):
    """A Kaldi data folder (speechocean762 and many others; Povey et al., ASRU 2011).

    wav.scp, text, and utt2spk if it is there. Paths are relative to it or to the folder above.
    """
    if (folder / "segments").exists():
        raise UserError(
            f"{folder}: has a file `segments`: its utterances are parts of longer recordings; cut "
            "them into files of their own first"
        )
    texts = kaldi_table(folder / "text")
    speakers = kaldi_table(folder / "utt2spk")
    for name, path in kaldi_table(folder / "wav.scp").items():
        path = path.strip()
        if path.endswith("|"):
            yield name, "is made by a command, not read from a file"
            continue
        if not path:
            yield name, "has no path in wav.scp"
            continue
        if not os.path.exists(folder / path) and not os.path.isabs(path):
            path = f"../{path}"
        speaker = speakers.get(name, "").strip()
        yield name, {"audio_filepath": path, "text": texts.get(name), "speaker": speaker}


def kaldi_table(path):
    """{the first word of a line: the rest of it} of a Kaldi table; {} if it is not there."""
    if not path.exists():
        return {}
    table = {}
    for line in read_lines(path):
        fields = line.split(None, 1)
        if fields and fields[0] in table:
            raise UserError(f"{path}: {fields[0]} stands in it twice")
        if fields:
            table[fields[0]] = fields[1] if len(fields) > 1 else ""
    return table


def text_beside(folder):
    """A folder of sound files, each with its transcript in a .txt of the same name beside it.

    In sub-folders the sub-folder's name is the speaker.
    """
    for path in sorted(files_below(folder)):
        # "._" begins what macOS leaves beside a file on foreign disks
        if path.suffix.lower() not in AUDIO_ENDINGS or path.name.startswith("._"):
            continue
        name, transcript = relative(path, folder), path.with_suffix(".txt")
        try:
            text = " ".join(read_lines(transcript, TRANSCRIPT_BYTES))
        except UserError as error:
            missing = not transcript.exists()
            yield name, f"has no {transcript.name} beside it" if missing else str(error)
            continue
        speaker = "" if path.parent == folder else path.parent.name
        yield name, {"audio_filepath": name, "text": text, "speaker": speaker}


# ---- a corpus that is downloaded ----


def download_librispeech(part, root):
    """The folder of a part of LibriSpeech, downloaded to `root` unless it is there.

    UserError if there is no such part, or no whole archive.
    """
    if part not in LIBRISPEECH_PARTS:
        raise UserError(
            f"LibriSpeech has no part {part!r}; its parts are {', '.join(LIBRISPEECH_PARTS)}"
        )
    folder = Path(root) / "LibriSpeech" / part
    if not folder.exists():
        with lock_folder(root, "downloads LibriSpeech"):
            if not folder.exists():  # nor came while this process waited
                fetch_librispeech(part, Path(root), folder)
    return folder


def fetch_librispeech(part, root, folder):
    """Download a part of LibriSpeech, by torchaudio.datasets.LIBRISPEECH.

    `folder` is never half-unpacked: it arrives beside, and moves to its place when it is whole.
    """
    from torchaudio.datasets import LIBRISPEECH

    arriving = root / f".arriving-{part}"
    shutil.rmtree(arriving / "LibriSpeech", ignore_errors=True)  # half-unpacked
    arriving.mkdir(parents=True, exist_ok=True)
    try:
        with timed(f"download LibriSpeech {part}"):
            LIBRISPEECH(arriving, part, download=True)
    except (EOFError, tarfile.TarError, zlib.error) as error:
        shutil.rmtree(arriving)
        raise UserError(
            f"LibriSpeech {part}: the archive was damaged ({error}) and is deleted; run the same "
            "command again"
        ) from None
    except (RuntimeError, OSError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"LibriSpeech {part}: cannot be downloaded ({why})") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    (arriving / "LibriSpeech" / part).rename(folder)
    shutil.rmtree(arriving)
