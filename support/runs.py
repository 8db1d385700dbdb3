"""Folders that commands make: what is done is not done again, and one process works at a time.

A folder's config.json says which command made it, with which options (that command's dataclass),
from what content (fingerprints), which files are its own, and whether the work is done.
"""

import json
import os
import re
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from filelock import FileLock, Timeout

from support.files import HALF_WRITTEN, UserError, fingerprint, fingerprint_of_file
from support.files import read_json, read_json_if_whole, write_json, writing
from support.options import names_in
from support.processes import MAIN, wait

NEWER = {"llm_files"}  # fingerprints that folders of before 2026-11-30 do not have
IS_PERCENT = re.compile("[1-9][0-9]?")  # of the speech, in the name of a recipe: mtbi@10
CHOOSE_ANOTHER = "choose another folder, or --force to redo it"


def settings_of(options, content):
    """What the result depends on: the options that change it, and the fingerprints."""
    kept = asdict(options)
    for name in without_effect(options):
        kept.pop(name, None)
    return json.loads(json.dumps({"options": kept, "content": content}))


def without_effect(options):
    """The names of the options that change nothing in the result."""
    return ("force", *getattr(options, "CHANGES_NOTHING", ()))


def begin(folder, command, options, content, config="config.json"):
    """Write into the folder what its work is made with; `finish` writes it again at the end."""
    forget_half_written(folder, options.MAKES)
    write_config(Path(folder) / config, command, options, content, done=False)


def finish(folder, command, options, content, config="config.json"):
    """The same with done: true, once every process has come so far."""
    write_config(Path(folder) / config, command, options, content, done=True)


def write_config(path, command, options, content, done):
    wait()
    config = {
        "command": command,
        "done": done,
        "options": asdict(options),
        "content": content,
        "makes": list(options.MAKES),
    }
    write_json(path, config)


def option_before(folder, options, name):
    """The text that an option had in the earlier work in a folder, unless it is to be redone."""
    if options.force:
        return ""
    before = (read_json_if_whole(Path(folder) / "config.json") or {}).get("options")
    value = before.get(name) if isinstance(before, dict) else ""
    return value if isinstance(value, str) else ""


# ---- whose a file is ----


def refuse_foreign(folder, command, makes, config="config.json"):
    """UserError if a name that `command` needs in a folder is that of somebody else's file.

    makes: these names, or patterns of them. Those that the folder's config lists were free when
    an earlier run of the command listed them, so what bears them now is its own.
    """
    folder = Path(folder)
    path = folder / config
    own = []
    if path.exists() or path.is_symlink():
        old = read_json_if_whole(path, "command", "makes")
        if not old or not has(old, {"command": str, "makes": list}):
            raise UserError(
                f"{path}: is damaged, edited, or not made by this program (or by an earlier "
                "version of it), so nothing here is overwritten; choose another folder"
            )
        if old["command"] != command:
            raise UserError(f"{folder}: was made by `{old['command']}`; choose another folder")
        own = old["makes"]
    for name in makes:
        if name in own:
            continue
        links = [folder / name] if os.path.lexists(folder / name) else []  # a broken one, too
        for there in links + sorted(folder.glob(name)):
            raise UserError(
                f"{there}: was not made by `{command}`, which needs this name; move it away, or "
                "choose another folder"
            )


def forget_half_written(folder, makes):
    """Delete what a process was writing under one of these names when it was killed."""
    if not MAIN:
        return
    for name in makes:
        place = Path(folder) / name
        for half_written in place.parent.glob(f"{HALF_WRITTEN}[0-9]*-{place.name}"):
            half_written.unlink(missing_ok=True)


def delete_made(folder, makes):
    """Delete a command's own files in its folder, and folders that this leaves empty."""
    for name in makes:
        place = Path(folder) / name
        for path in place.parent.glob(place.name):
            path.unlink(missing_ok=True)
        if place.parent != Path(folder) and place.parent.is_dir():
            if not any(place.parent.iterdir()):
                place.parent.rmdir()


def is_done(folder, command, options, content, output, *, half_way, advice=CHOOSE_ANOTHER):
    """True if the command with these settings is finished in `folder` and its output is there.

    A folder with work of other settings, finished or kept half-way (files that match `half_way`),
    is refused, unless options.force; one that another command made, or that holds somebody else's
    files, is refused in any case.
    """
    path = Path(folder) / "config.json"
    refuse_foreign(folder, command, options.MAKES)
    if options.force or not path.exists():
        return False
    old = read_json(path, "command", "options", "content", "done")
    if isinstance(old["options"], dict):  # an option that is newer than the folder was not given
        old["options"] = {**defaults(options), **old["options"]}
    if isinstance(old["content"], dict):  # nor was a fingerprint taken that is newer
        for name in NEWER & set(content):
            old["content"].setdefault(name, content[name])
    if not old["done"] and not any(Path(folder).glob(half_way)):
        return False  # nothing was kept of it
    refuse_changes(folder, old, settings_of(options, content), without_effect(options), advice)
    return bool(old["done"]) and (Path(folder) / output).exists()


def defaults(options):
    """{name: default} of the options that have one."""
    return {f.name: f.default for f in fields(options) if f.default is not MISSING}


def refuse_changes(folder, old, new, ignored, advice):
    """UserError that names every setting in which the two differ, but for those ignored."""
    changed = []
    for part in ("options", "content"):
        before = old[part] if isinstance(old[part], dict) else {}
        for name in sorted({*before, *new[part]}):
            if name not in ignored and before.get(name) != new[part].get(name):
                changed.append(f"{name} was {before.get(name)}, now {new[part].get(name)}")
    if changed:
        raise UserError(f"{folder}: was made with other settings ({'; '.join(changed)}); {advice}")


CONTENT = {  # what a command's folder was made from, as far as others ask for it
    "behaviors": {"utterances": str, "llm": str, "task_table": str},
    "train": {"recipe": dict, "behaviors": str},
}


def read_config(folder, command, **kinds):
    """(options, content, done) of a folder that `command` made; `kinds`: types of some options."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: there is no folder made by `{command}` (no config.json in it)")
    config = read_json(path, "command", "options", "content", "done")
    options, content = config["options"], config["content"]
    whole = config["command"] == command and has(options, kinds)
    if not whole or not has(content, CONTENT.get(command, {})):
        raise UserError(
            f"{path}: this is no folder made by `{command}`; name one, or, if this was one and is "
            "damaged, make another"
        )
    return options, content, bool(config["done"])


SPEC = {  # what a trained recipe's model.json says
    "llm": str,
    "bits": int,
    "encoder": str,
    "pad_whisper": bool,
    "connector": str,
    "k": int,
    "hidden": int,
    "lora": (int, str),
    "llm_fingerprint": str,
    "encoder_fingerprint": str,
    "weights_fingerprint": str,
    "trained_parameters": int,
}


def read_spec(folder):
    """The model.json of a trained recipe; UserError if it is not what training writes there."""
    path = Path(folder) / "model.json"
    spec = read_json(path)
    if not has(spec, SPEC):
        raise UserError(f"{path}: is not what training writes there; train again with --force")
    return spec


def has(found, kinds):
    """Is it a dictionary with values of these types?"""
    if not isinstance(found, dict):
        return False
    return all(isinstance(found.get(name), kind) for name, kind in kinds.items())


@contextmanager
def lock_folder(folder, wait_for=""):
    """While a command works in `folder`, no other process does.

    If one does: UserError, or, if `wait_for` says what it does there, wait until it has ended. The
    operating system forgets the lock of a process that was killed.
    """
    if not MAIN:  # the first of several processes speaks for all
        yield
        return
    lock = FileLock(Path(folder) / f"{HALF_WRITTEN}lock")
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            pass
    if not lock.is_locked:
        if not wait_for:
            raise UserError(
                f"{folder}: another process is at work in this folder; wait for it, or choose "
                "another folder"
            )
        print(f"{folder}: waiting for another process, which {wait_for}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# ---- the recipes in a run folder ----


def recipe_folders(run, table):
    """{recipe: its folder} of the recipes whose training was begun, in the order of the table."""
    found = []
    for path in Path(run).glob("*/config.json"):
        name = path.parent.name
        row, at, percent = name.partition("@")
        if row in table and (not at or IS_PERCENT.fullmatch(percent)):
            found.append((list(table).index(row), len(name), name))
    return {name: Path(run) / name for _, _, name in sorted(found)}


def trained_recipes(run, table, wanted=()):
    """{recipe: (options, content)} of the recipes, or of those wanted, that are trained."""
    kinds, trained = {"encoder": str, "pad_whisper": bool, "recipe": str}, {}
    for name, folder in recipe_folders(run, table).items():
        if wanted and name not in wanted:
            continue
        options, content, done = read_config(folder, "train", **kinds)
        if options["recipe"] != name:
            raise UserError(
                f"{folder}: holds the recipe {options['recipe']} under another name; move it away"
            )
        if done and (folder / "connector.safetensors").exists():
            trained[name] = (options, content)
    return trained


def recipes_to_bench(run, chosen, table):
    """{recipe: options} of the trained recipes of a run, or of those among them that are named.

    UserError if they did not train on its behaviors: others may hold what is tested now.
    """
    wanted = names_in(chosen)
    trained = trained_recipes(run, table, wanted)
    missing = [name for name in wanted if name not in trained]
    if not trained and not missing:
        missing = ["mtbi"]
    if missing:
        raise UserError(
            f"{run}: holds no trained recipe {missing[0]!r}; run `train {run} "
            f"--recipe {missing[0]}` first"
        )
    behaviors = fingerprint_of_file(run / "behaviors.jsonl")
    for name, (_, content) in trained.items():
        if content["behaviors"] != behaviors:
            raise UserError(
                f"{run / name}: was trained on other behaviors than those in {run} "
                f"now; run `train {run} --recipe {name}` again with --force"
            )
    return {name: options for name, (options, _) in trained.items()}


def fingerprint_of_training(folder):
    """Names what was trained: the connector, and the adapter if there is one."""
    weights = (folder / "connector.safetensors", folder / "adapter" / "adapter_model.safetensors")
    return fingerprint([fingerprint_of_file(path) for path in weights if path.exists()])
