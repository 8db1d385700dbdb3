"""Files and steps: files are written whole or not at all, a step that is done is not done again, and what went wrong is said in one line."""

import hashlib
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from parallel import MAIN


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line on stderr and exits with code 2."""


@contextmanager
def whole_file(path):
    """Yields a temporary path beside `path`; renames it on success, removes it on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")     # the ending stays: matplotlib and soundfile go by it
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path, rows):
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_json(path, *keys):
    """The object of a JSON file, which must have these keys."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no readable JSON ({error})") from None
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise UserError(f"{path}: is not what this program writes there; make it again with --force")
    return value


def read_json_if_whole(path, *keys):
    """The same, or None: for what only saves time, and is made again if it is lost or damaged."""
    try:
        return read_json(path, *keys)
    except UserError:
        return None


def name_of(settings):
    """Names a set of settings, or of anything that has a repr."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def read_lines(path):
    """The lines of a UTF-8 text file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None


def read_jsonl(path):
    """Yields (line number, the line's object, or a string that says why it is none) of a JSONL file."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()       # a lone surrogate is no text
                row = row if isinstance(row, dict) else "is no JSON object"
            except (ValueError, RecursionError) as error:
                row = f"is no JSON ({error})"
            yield number, row


def mend_jsonl(path):
    """Cut off the half-written last line of a JSONL file that rows were being appended to."""
    with open(path, "rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


MADE_BY = {"source": "prepare", "task_table": "imitate", "recipe": "train", "per_prompt": "compare"}      # a setting that no other command has


def is_done(folder, settings, output, force=False, half_way="state/[0-9]*", advice="choose another folder, or --force to redo it"):
    """True if the step with these settings is finished in `folder` and its output is there.

    A folder with work of other settings, finished or kept half-way (files that match `half_way`), is refused, unless `force`; one that another command
    made is refused in any case.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        return False
    old, settings = (read_json_if_whole if force else read_json)(path, "settings", "done"), json.loads(json.dumps(settings))
    before = old["settings"] if old and isinstance(old["settings"], dict) else {}
    if other := next((MADE_BY[key] for key in MADE_BY if key in before and key not in settings), None):
        raise UserError(f"{folder}: was made by `{other}`; choose another folder")
    if force or not old["done"] and not any(Path(folder).glob(half_way)):
        return False                                               # nothing was kept of it
    changed = [f"{k} was {before.get(k)}, now {settings.get(k)}" for k in sorted({*before, *settings}) if before.get(k) != settings.get(k)]
    if changed:
        raise UserError(f"{folder}: was made with other settings ({'; '.join(changed)}); {advice}")
    return bool(old["done"]) and (Path(folder) / output).exists()


def read_config(folder, made_by, **kinds):
    """(settings, done) of a folder that the command `made_by` wrote; `kinds` are settings it must have, with their types."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: there is no run folder made by `{made_by}` (no config.json in it)")
    settings, done = map(read_json(path, "settings", "done").get, ("settings", "done"))
    if not isinstance(settings, dict) or not all(isinstance(settings.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path}: this is no run folder made by `{made_by}`; name that, or, if this was one and is damaged, make it again with --force")
    return settings, bool(done)


def claim(folder, settings, done=False):
    """Write a step's settings into its folder: when its work begins, and again, with done=True, when it is finished."""
    write_json(Path(folder) / "config.json", {"settings": settings, "done": done})


@contextmanager
def alone(folder, wait_for=""):
    """While a step works in `folder`, no other process does; the operating system forgets the lock of a process that was killed.

    If one does: UserError, or, if `wait_for` says what it does there, wait until it has ended.
    """
    if not MAIN:                                                   # the first of several processes speaks for all
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait_for:
            raise UserError(f"{folder}: another process is at work in this folder; wait for it, or choose another folder") from None
        print(f"{folder}: waiting for another process, which {wait_for}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def relative(path, folder):
    """`path` as seen from `folder`, so that both can be moved together; on another Windows drive the whole path."""
    try:
        return os.path.relpath(path, folder).replace(os.sep, "/")
    except ValueError:
        return str(Path(path).resolve())


TIMES = {}                   # what each step of this process took, in seconds: `demo --profile` prints it


@contextmanager
def timed(name):
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    TIMES[name] = TIMES.get(name, 0) + seconds
    print(f"{name}: {seconds:.1f} s", flush=True)


@contextmanager
def one_thread():
    """numpy's threads and torch's, taking turns at one short clip, wait for each other: 88 ms a clip on two cores, 14 with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
