"""Files and errors: a file is written whole or not at all, and what went wrong is said in one line.

With several processes the first alone writes; see processes.py.
"""

import hashlib
import json
import os
import stat
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from soundfile import SoundFileError

from support.processes import MAIN

HALF_WRITTEN = ".mtbi-"  # how the name of a file begins while it is written
PROJECT = Path(__file__).resolve().parents[1]  # the folder with mtbi.py and tasks.toml
UMASK = os.umask(0)  # it can be read only by setting it: what new files forbid to others
os.umask(UMASK)
MOST_BYTES = 2**30  # of a text: a manifest of a million rows with word times has less


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with code 2."""


class WriteError(Exception):
    """A file that cannot be written. The command line prints it as one line and exits with 1."""


@contextmanager
def explained(what, *more):
    """Errors within become a UserError that begins with `what`; `more`: other errors to catch."""
    try:
        yield
    except (UserError, *more) as error:
        raise UserError(f"{what} ({first_line(error)})") from None


def first_line(error):
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)


# ---- writing ----


@contextmanager
def writing(path):
    """What goes wrong within, while `path` is written, becomes a WriteError that names it."""
    try:
        yield
    except (OSError, SafetensorError, SoundFileError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise WriteError(
            f"{path}: cannot be written ({why}); make room there, or choose another folder"
        ) from None


@contextmanager
def whole_file(path, lasting=True):
    """Yields a temporary path beside `path`; renames it on success, removes it on failure.

    lasting: also if the power fails at that moment; it takes some milliseconds.
    WriteError, and what was there before stays, if the disk is full or the folder read-only.
    """
    path = Path(path)
    # the ending stays: matplotlib and soundfile go by it
    temporary = path.with_name(f"{HALF_WRITTEN}{os.getpid()}-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~UMASK)  # safetensors would keep others from reading it
            if lasting:
                put_on_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def put_on_disk(path):
    """Have the system write a file out: without power a name may last longer than its content."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def unused(name, option=""):
    """The path of a new file or folder; UserError if something is there already.

    `..` is taken away first: of missing/../file nothing says that the file is there.
    """
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if os.path.lexists(path):
        raise UserError(f"{name}: is there already; name another {option or 'file'}")
    return path


def write_text(path, text):
    """The text as a UTF-8 file; the first process alone writes."""
    if MAIN:
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """An object as a JSON file that carries a checksum of itself, which read_json looks at."""
    whole = {**value, "checksum": checksum_of(value)}
    write_text(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def checksum_of(value):
    """Names the content of a JSON object, in whatever order its keys are."""
    same = json.loads(json.dumps(value))  # keys are texts, tuples are lists
    return fingerprint(json.dumps(same, sort_keys=True))


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


# ---- reading ----


def size_of_file(path, what="file"):
    """Bytes of a regular file; UserError for what is none: a pipe or a device may have no end."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such {what}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: is no {what}, but a folder, a pipe or a device")
    return status.st_size


def read_text(path, encoding, most):
    """The text of a regular file of at most so many bytes."""
    if size_of_file(path) > most:
        raise UserError(f"{path}: is larger than {most / 2**20:g} MB")
    return Path(path).read_text(encoding)


def read_lines(path, most=MOST_BYTES):
    """The lines of a UTF-8 text file of at most so many bytes."""
    try:
        return read_text(path, "utf-8-sig", most).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None


def lines_of_ours(path):
    """The lines of a UTF-8 text file that this program wrote, one by one, however many they are."""
    size_of_file(path)
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None


def read_json(path, *keys):
    """The object of a JSON file of this program's, which must have these keys.

    UserError if it is no such file, or if it was damaged or edited since.
    """
    try:
        value = json.loads(read_text(path, "utf-8", MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no readable JSON ({error})") from None
    if not isinstance(value, dict) or any(key not in value for key in (*keys, "checksum")):
        raise UserError(
            f"{path}: is not what this program writes there; make it again with --force"
        )
    if value.pop("checksum") != checksum_of(value):
        raise UserError(f"{path}: was changed since it was written; make it again with --force")
    return value


def read_json_if_whole(path, *keys, instead=""):
    """The same, or None: for what only saves time, and is made again if it is lost or damaged.

    instead: what is done then, which is said if the file is there and damaged.
    """
    try:
        return read_json(path, *keys)
    except UserError as error:
        if instead and Path(path).exists():
            print(f"{str(error).partition(';')[0]}; {instead}")
        return None


def read_jsonl(path, ours=False):
    """Yields (line number, the line's object, or a string that says why it is none).

    ours: this program wrote the file, so that it may have more than MOST_BYTES.
    """
    for number, line in enumerate(lines_of_ours(path) if ours else read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is no text
        except (ValueError, RecursionError) as error:
            row = f"is no JSON ({error})"
        else:
            row = row if isinstance(row, dict) else "is no JSON object"
        yield number, row


def mend_jsonl(path):
    """Cut off the half-written last line of a JSONL file that rows were being appended to."""
    with open(path, "rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        block = b""
        while end and b"\n" not in block:
            begin = max(0, end - 2**16)
            file.seek(begin)
            block = file.read(end - begin)
            end = begin
        whole = end + block.rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)


# ---- names ----


def fingerprint(value):
    """Twelve letters that name a content: settings, or anything else that has a repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def fingerprint_of_file(path):
    """Names the content of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def nearest_existing(path):
    """The path itself if it is there, else the nearest folder above it: on the same disk."""
    for folder in (Path(path), *Path(path).absolute().parents):
        if folder.exists():
            return folder
    raise UserError(f"{path}: not even its drive is there")


def relative(path, folder):
    """`path` as seen from `folder`, so that both can be moved; on another drive the whole path.

    Where a link leads to the folder, as seen from where it really is: `..` leads up from there.
    """
    real = os.path.realpath(folder)
    if real != os.path.abspath(folder):
        # a recording may be a link itself: it keeps its own name
        beside, name = os.path.split(os.path.abspath(path))
        path, folder = os.path.join(os.path.realpath(beside), name), real
    try:
        return os.path.relpath(path, folder).replace(os.sep, "/")
    except ValueError:
        return str(Path(path).resolve())
