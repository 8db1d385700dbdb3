"""The support: files, options, run folders, kept frames and answers, damaged checkpoints."""

import builtins
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, ClassVar, get_type_hints

import pytest
import torch
from checkpoints import change_weights, save_encoder, save_in_hub_cache, save_llm, tokenizer_of
from conftest import A_SMALL_BENCH, FEW_TASKS, ROOT
from docstring_parser import parse_from_object
from hypothesis import given
from hypothesis import strategies as st
from programs import begun_anew, free_port, one_line, program, python
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from soundfile import SoundFileError as LibError

import mtbi
from app.generate import GenerateOptions
import support.console
import support.frames
import train
from data import load_audio, open_run, read_manifest, write_audio
from model import HuggingFaceEncoder, SpeechLLM, encode_all, llm_of, load_llm
from model import pinned_encoder
from support.answers import answer_all, answer_in_memory
from support.console import NARROW, TIMES, threads_for, timed
from support.processes import has_kernels
from support.files import UserError, WriteError, explained, fingerprint, fingerprint_of_file
from support.files import HALF_WRITTEN, mend_jsonl, nearest_existing
from support.files import read_json, read_jsonl, relative, whole_file, write_json, write_jsonl
from support.frames import fingerprint_of_audio
from support.hub import fingerprint_of_beginnings, fingerprint_of_llm, fingerprint_of_weights
from support.hub import pinned
from support.options import Between, command_words, parse_options
from support.runs import begin, delete_made, fingerprint_of_training, finish, is_done, lock_folder
from support.runs import read_config, recipe_folders

SMALL = ["--steps", "2", "--batch-size", "4", "--hidden", "16"]


@pytest.fixture(scope="module")
def few(utterances, tmp_path_factory):
    """A manifest of 12 training and 4 test utterances."""
    folder = tmp_path_factory.mktemp("few")
    rows = [u for u in utterances if u.split == "train"][:12]
    rows += [u for u in utterances if u.split == "test"][:4]
    write_jsonl(folder / "manifest.jsonl", [u.row(folder) for u in rows])
    return folder


def ask_few(few, out, *more):
    """The command `behaviors`, in batches of 8."""
    words = ["behaviors", few, "--out", out, "--per-utterance", 2, "--batch-size", 8, *more]
    return mtbi.main([str(word) for word in words])


@pytest.fixture(scope="module")
def few_behaviors(few, tmp_path_factory):
    run = tmp_path_factory.mktemp("few-behaviors") / "run"
    assert ask_few(few, run) == 0
    return run


# ---- files ----


def test_whole_files_are_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError):
        with whole_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_file(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("whole")
    assert [p.read_text() for p in (tmp_path / "new").iterdir()] == ["whole"]


@pytest.mark.parametrize(
    "content, mended",
    [
        (b"", b""),
        (b"{}\n", b"{}\n"),
        (b'{}\n{"a', b"{}\n"),
        (b'{"a', b""),
        ('{}\n{"ñ'.encode()[:-1], b"{}\n"),
        (b"{}\n" + b"a" * 200_000, b"{}\n"),
        (b"a" * 200_000, b""),
        (b"a" * 200_000 + b"\n", b"a" * 200_000 + b"\n"),
    ],
)
def test_only_a_half_written_last_line_is_cut_off(tmp_path, content, mended):
    (tmp_path / "a").write_bytes(content)
    mend_jsonl(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mended


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="none.json: there is no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{half")
    with pytest.raises(UserError, match="a.json: is no readable JSON"):
        read_json(tmp_path / "a.json")
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json", "a") == {"a": 1}
    with pytest.raises(UserError, match="a.json: is not what this program writes there"):
        read_json(tmp_path / "a.json", "a", "b")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n[1]\n{\n"\\ud800"\n')
    rows = list(read_jsonl(tmp_path / "a.jsonl"))
    assert [number for number, _ in rows] == [1, 3, 4, 5] and rows[0][1] == {"a": 1}
    assert all(row.startswith("is no JSON") for _, row in rows[1:])


def test_what_this_program_wrote_is_read_however_long_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("support.files.read_lines.__defaults__", (100,))
    rows = [{"text": f"größer {i}"} for i in range(20)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="a.jsonl: is larger than"):
        list(read_jsonl(tmp_path / "a.jsonl"))
    assert [row for _, row in read_jsonl(tmp_path / "a.jsonl", ours=True)] == rows


def test_errors_within_become_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^it fails \(the first line\)$"):
        with explained("it fails", ValueError):
            raise ValueError("the first line\nand a second")
    with pytest.raises(UserError, match=r"^it fails \(KeyError\)$"):
        with explained("it fails", KeyError):
            raise KeyError
    with pytest.raises(KeyError), explained("it fails", ValueError):
        raise KeyError


def test_a_fingerprint_names_a_content(tmp_path):
    assert fingerprint({"a": 1}) == fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint([])) == 12
    for name, content in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(content)
    a, b, c = (fingerprint_of_file(tmp_path / name) for name in "abc")
    assert a == b != c and len(a) == 12
    with pytest.raises(UserError, match="none: cannot be read"):
        fingerprint_of_file(tmp_path / "none")


def test_the_folder_that_a_file_will_be_in_has_the_disk_of_the_nearest_that_is_there(
    tmp_path, monkeypatch
):
    assert nearest_existing(tmp_path) == tmp_path
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert nearest_existing("a/b") == tmp_path


def test_paths_are_kept_relative_so_that_folders_can_be_moved_together(tmp_path):
    assert relative(tmp_path / "data", tmp_path / "run") == "../data"


def test_a_recording_that_is_a_link_keeps_its_name_where_a_link_leads_to_the_folder(tmp_path):
    (tmp_path / "far" / "run").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far")
    (tmp_path / "link.wav").symlink_to(tmp_path / "a.wav")
    seen = relative(tmp_path / "link.wav", tmp_path / "near" / "run")
    assert seen == "../../link.wav"


def test_a_step_says_what_it_took_and_is_kept(capsys, monkeypatch):
    clock = iter((1.0, 3.5))
    monkeypatch.setattr("support.console.time.perf_counter", lambda: next(clock))
    with timed("a step"):
        pass
    assert TIMES.pop("a step") == 2.5 and capsys.readouterr().out == "a step: 2.5 s\n"


# ---- options ----

REQUIRED = {  # what a command cannot do without
    "prepare": ["tiny", "--out", "x"],
    "word-times": ["x"],
    "encode": ["x"],
    "recognizer": ["x"],
    "behaviors": ["x", "--out", "x"],
    "train": ["x"],
    "bench": ["x"],
    "generate": ["x", "x", "x"],
    "info": ["x"],
    "compare": ["--out", "x"],
    "chat": ["x"],
    "inspect": ["x"],
    "serve": ["x"],
    "export": ["x", "--out", "x"],
}
TAKE_MANY = ("generate", "inspect", "demo")  # words in their places, or one of some


def bounds_in(hint):
    """The Between marks of an option's type, also of one that may be None."""
    found = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Between)]
    for part in get_args(hint):
        found += bounds_in(part)
    return found


def bounded_options(kind):
    """(option, bounds) of the fields of a dataclass of options that have any."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        for bounds in bounds_in(hints[field.name]):
            yield f"--{field.name.replace('_', '-')}", bounds


@pytest.mark.parametrize("command", mtbi.COMMANDS)
def test_every_option_error_of_a_command_is_one_line_and_exit_code_2(command, capsys):
    kind, needed = mtbi.COMMANDS[command][0], [command, *REQUIRED.get(command, [])]
    wrong = [[*needed, "--nosuch", "1"], [*needed, "too", "many", "of", "them"]]
    for words in wrong[:1] if command in TAKE_MANY else wrong:
        assert mtbi.main(words) == 2
        one_line(capsys, "Unrecognized options", f"(see mtbi.py {command} --help)")
    if command in REQUIRED:
        assert mtbi.main([command]) == 2
        one_line(capsys, f"Missing from mtbi.py {command}", "--help")
    for option, bounds in bounded_options(kind):
        for value in (bounds.low - 1, bounds.high + 1, "9" * 30):
            assert mtbi.main([*needed, option, str(value)]) == 2
            one_line(capsys, f"{option} ", "is no ", "number from ")
        for value in ("x", ""):
            assert mtbi.main([*needed, option, value]) == 2
            one_line(capsys, option)


@pytest.mark.parametrize("command", mtbi.COMMANDS)
def test_the_help_of_every_option_is_one_paragraph_and_names_no_default_of_none(
    command, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "1000")  # so that a paragraph is a line
    with pytest.raises(SystemExit):
        mtbi.main([command, "--help"])
    said = capsys.readouterr().out
    assert "default: None" not in said and "default: False" not in said
    kind = mtbi.COMMANDS[command][0]
    for option in parse_from_object(kind).params:
        assert " ".join(option.description.split()) in said


@pytest.mark.parametrize(
    "words, reason",
    [
        (["prepare", "tiny", "--out", ""], "--out: names no folder"),
        (["train", ""], "names no folder"),
        (["bench", "run", "--data", ""], "--data: names no folder"),
        (["prepare", "tiny", "--out", "k\udcff"], "is not in UTF-8"),
        (["behaviors", "data", "--out", "run", "--llm", "\udcff"], "is not in UTF-8"),
        (["generate", "run", "a.wav", "who\0"], "holds a NUL character"),
    ],
)
def test_a_text_that_can_be_no_name_is_refused_in_one_line(words, reason, capsys):
    assert mtbi.main(words) == 2
    one_line(capsys, reason)


ODD_TEXTS = ("--", "k\udcff", "\ud800", "a\0b")


@pytest.mark.parametrize("command", mtbi.COMMANDS)
def test_no_command_takes_an_odd_text(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # if one is taken after all, its command runs there
    kind, needed = mtbi.COMMANDS[command][0], [command, *REQUIRED.get(command, [])]
    hints = get_type_hints(kind, include_extras=True)  # a text by its place is no plain str
    for field in fields(kind):
        option, hint = f"--{field.name.replace('_', '-')}", hints[field.name]
        if hint is str or hint == str | None:
            for odd in ODD_TEXTS if field.default == "" else ("", *ODD_TEXTS):
                assert mtbi.main([*needed, f"{option}={odd}"]) == 2
                one_line(capsys, f"mtbi: {option}")
        if hint is bool:
            written = f"--{field.name}"  # with _, as tyro takes it, too
            for word in (f"{option}=--", f"{option}=", f"{option}=no", f"{written}=no"):
                assert mtbi.main([*needed, word]) == 2
                one_line(capsys, ": is a switch, it takes no value")
    for place, word in enumerate(needed):
        if place and word != "--out":
            for odd in ("", *ODD_TEXTS):
                assert mtbi.main([*needed[:place], odd, *needed[place + 1 :]]) == 2
                one_line(capsys)


def test_an_options_class_stays_as_it_is_when_words_are_read():
    before = [field.type for field in fields(mtbi.BehaviorsOptions)]
    parse_options(mtbi.BehaviorsOptions, ["data", "--out", "run"], "behaviors", "")
    assert [field.type for field in fields(mtbi.BehaviorsOptions)] == before


def test_a_word_that_only_looks_like_a_switch_is_taken():
    assert parse_options(train.TrainOptions, ["a_force=1"], "train", "").run == "a_force=1"
    assert parse_options(train.TrainOptions, ["xxforce=1"], "train", "").run == "xxforce=1"


def test_an_empty_text_is_right_where_it_is_the_default():
    words = ["run", "a.wav", "Who?", "--system", ""]
    assert parse_options(GenerateOptions, words, "generate", "").system == ""


SEES_WHAT_TORCH_READS = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("TOKENIZERS_PARALLELISM"))

sys.meta_path.insert(0, Watch())
import {script}
"""


@pytest.mark.parametrize("script", ["mtbi", "train", "eval"])
def test_every_script_makes_its_settings_before_torch_is_loaded(script, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    said = python(SEES_WHAT_TORCH_READS.format(script=script)).said
    assert set(said.splitlines()) == {"PASSIVE false"}


def test_options_become_the_words_of_a_command_and_options_again():
    options = train.TrainOptions("runs/a", steps=7, lora=0, precision="fp32")
    words = command_words(options, "steps", "lora", "k", "batch_size", "precision")
    assert words == "--steps 7 --lora 0 --batch-size 32 --precision fp32".split()
    assert parse_options(train.TrainOptions, ["runs/a", *words], "train", "") == options


@pytest.mark.parametrize(
    "words, reason",
    [
        ("nosuch", "there is no command 'nosuch'; there are prepare, "),
        ("train {run} --recipe nosuch", "no recipe 'nosuch'"),
        ("train {run} --connector nosuch", "no connector 'nosuch'; there are stack-mlp, conv"),
        ("train {run} --loss nosuch", "no loss 'nosuch'; there are ce, kl"),
        ("train {tmp}", "no config.json in it"),
        ("train {run} --nosuch 1", "Unrecognized options: --nosuch"),
        ("train {run} --steps x", "--steps"),
        ("train {run} --steps 0", "--steps 0: is no whole number from 1 to"),
        ("train {run} --lr nan", "--lr nan"),
        ("train {run} --lr -1", "--lr -1"),
        ("train {run} --precision fp8", "--precision"),
        ("train {run} --recipe blsp --k 6", "power of two"),
        ("train {run} --recipe vanilla-it --hidden 20", "multiple of 8"),
        ("train {run} --recipe vtb --lora 0", "text-only examples trains an adapter"),
        ("train {run} --lora full", "its LLM with --bits 4; make another RUN"),
        ("train {run} --encoder {tmp}", "speech encoder"),
        ("train {run} --recipe mtbi-kl --batch-size 4000", "lower --batch-size"),
        ("behaviors {data} --out {tmp}/r --llm {tmp}", "LLM"),
        ("behaviors {data} --out {tmp}/r --bits 5", "--bits"),
        ("behaviors {tmp} --out {tmp}/r", "manifest.jsonl"),
        ("behaviors {data} --out {run} --bits 16", "bits was 4, now 16"),
        ("behaviors {data} --out {tmp}/r --tasks {tmp}/no.toml", "no.toml"),
        ("bench {tmp}", "config.json"),
        ("bench {run} --recipes nosuch", "no recipe 'nosuch'"),
        ("generate {tmp} a.wav Who?", "no trained recipe"),
        ("info {tmp}", "config.json"),
        ("encode {tmp}", "manifest.jsonl: there is no such file"),
        ("word-times {tmp}", "manifest.jsonl: there is no such file"),
        ("prepare {tmp}/none.jsonl --out {tmp}/d", "none.jsonl"),
        ("prepare {tmp} --out {tmp}/d", "no speech in a form that is known"),
        (
            "prepare tiny --out {data} --train 7",
            "train was 48, now 7); choose another folder, or --force",
        ),
        ("prepare tiny --out {tmp}/d --train -1", "--train -1"),
        ("prepare tiny --out {tmp}/d --join 3:4", "are for recordings"),
        ("prepare x.jsonl --join 6:3 --out {tmp}/d", "--join 6:3"),
        ("prepare x.jsonl --join ²:3 --out {tmp}/d", "--join"),
    ],
)
def test_bad_commands_end_with_one_line_and_code_2(words, reason, run, data, tmp_path, capsys):
    assert mtbi.main(words.format(run=run, data=data, tmp=tmp_path).split()) == 2
    one_line(capsys, reason)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_commands_that_cannot_be_shared_by_processes_say_so(monkeypatch, capsys):
    monkeypatch.setattr(mtbi, "WORLD", 2)
    assert mtbi.main(["info", "runs/none"]) == 2
    one_line(capsys, "info runs in one process; encode, behaviors, train, bench are what torchrun")


# ---- config.json: which command made a folder, with what, and is it done? ----


@dataclass
class Options:
    out: str
    steps: int = 3
    batch_size: int = 8
    force: bool = False

    MAKES: ClassVar = ("result.txt", "half-*")
    CHANGES_NOTHING: ClassVar = ("out", "batch_size")


def done(folder, options, content, command="try"):
    return is_done(folder, command, options, content, "result.txt", half_way="half-*")


def test_config_json_names_the_command_its_options_its_content_and_whether_it_is_done(tmp_path):
    options, content = Options(str(tmp_path)), {"words": "abc"}
    whole = asdict(options)
    made = {"command": "try", "options": whole, "content": content}
    made["makes"] = ["result.txt", "half-*"]
    begin(tmp_path, "try", options, content)
    assert read_json(tmp_path / "config.json") == {**made, "done": False}
    finish(tmp_path, "try", options, content)
    assert read_json(tmp_path / "config.json") == {**made, "done": True}
    assert read_config(tmp_path, "try", steps=int) == (whole, content, True)
    for command, kinds in (("other", {}), ("try", {"steps": str}), ("try", {"nosuch": int})):
        with pytest.raises(UserError, match=f"no folder made by `{command}`; name one"):
            read_config(tmp_path, command, **kinds)
    with pytest.raises(UserError, match="no folder made by `try` .no config.json in it"):
        read_config(tmp_path / "none", "try")


def test_the_commands_write_their_names_into_config_json(data, run, few_behaviors, tmp_path):
    assert read_json(data / "config.json")["command"] == "prepare"
    config = read_json(run / "config.json")
    assert config["command"] == "behaviors" and config["done"]
    assert {"llm", "bits", "precision", "max_new_tokens", "tasks"} <= set(config["options"])
    assert set(config["content"]) == {"llm", "llm_files", "task_table", "utterances"}
    new = begun_anew(few_behaviors, tmp_path)
    assert mtbi.main(["train", str(new), "--recipe", "asr", *SMALL]) == 0
    config = read_json(new / "asr" / "config.json")
    assert config["command"] == "train" and config["options"]["steps"] == 2
    assert config["content"]["recipe"]["tasks"] == ["repeat"]


def test_what_is_done_with_the_same_settings_is_not_done_again(tmp_path):
    options, content = Options(str(tmp_path)), {"words": "abc"}
    assert not done(tmp_path, options, content)
    begin(tmp_path, "try", options, content)
    assert not done(tmp_path, replace(options, steps=4), content), "nothing was kept of it"
    finish(tmp_path, "try", options, content)
    assert not done(tmp_path, options, content), "its result is lost"
    (tmp_path / "result.txt").touch()
    assert done(tmp_path, options, content)
    assert done(tmp_path, Options("elsewhere", batch_size=1), content), "which changes nothing"
    assert done(tmp_path, options, {**content, "llm_files": "b"}), "none was taken then"
    assert not done(tmp_path, replace(options, force=True), content)


def test_work_of_other_settings_is_refused_and_what_changed_is_said(tmp_path):
    options, content = Options(str(tmp_path)), {"words": "abc"}
    begin(tmp_path, "try", options, content)
    (tmp_path / "half-way").touch()
    for _ in ("half-way", "done"):
        for changed, said in (
            ((replace(options, steps=4), content), "steps was 3, now 4"),
            ((options, {"words": "abd"}), "words was abc, now abd"),
            ((options, {"more": 1}), "more was None, now 1; words was abc, now None"),
        ):
            with pytest.raises(UserError, match=f"made with other settings .{said}.; choose"):
                done(tmp_path, *changed)
        finish(tmp_path, "try", options, content)
    assert not done(tmp_path, replace(options, steps=4, force=True), content)


def test_the_folder_of_another_command_is_refused_even_by_force(tmp_path):
    begin(tmp_path, "try", Options("x"), {})
    for force in (False, True):
        with pytest.raises(UserError, match="was made by `try`; choose another folder"):
            done(tmp_path, Options("x", force=force), {}, command="other")


@pytest.mark.parametrize("command", ["behaviors", "train"])
def test_a_config_without_what_others_ask_for_is_refused(tmp_path, command):
    whole = {"command": command, "options": {}, "done": True}
    write_json(tmp_path / "config.json", {**whole, "content": {"recipe": None, "llm": 5}})
    with pytest.raises(UserError, match=f"no folder made by `{command}`"):
        read_config(tmp_path, command)


@pytest.mark.parametrize("makes", [0, None, {}, "result.txt"])
def test_a_list_of_own_files_that_is_none_makes_no_file_ones_own(tmp_path, makes):
    write_json(tmp_path / "config.json", {"command": "try", "makes": makes, "done": True})
    with pytest.raises(UserError, match="config.json: is damaged"):
        done(tmp_path, Options("x", force=True), {})


@pytest.mark.parametrize("content", ["{half", "[]", "{}", '{"settings": {}, "done": true}'])
def test_a_damaged_or_foreign_config_is_refused_even_by_force(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for force in (False, True):
        with pytest.raises(UserError, match="config.json: is damaged, .*choose another folder"):
            done(tmp_path, Options("x", force=force), {})
    assert (tmp_path / "config.json").read_text() == content


def test_a_folder_with_somebody_elses_file_under_a_name_that_is_needed_is_refused(tmp_path):
    for name in ("result.txt", "half-made"):
        (tmp_path / name).write_text("mine")
        for force in (False, True):
            with pytest.raises(UserError, match=f"{name}: was not made by `try`"):
                done(tmp_path, Options("x", force=force), {})
        (tmp_path / name).unlink()
    (tmp_path / "result.txt").symlink_to("/mnt/unplugged/result.txt")
    with pytest.raises(UserError, match="result.txt: was not made by `try`"):
        done(tmp_path, Options("x"), {})
    (tmp_path / "result.txt").unlink()
    begin(tmp_path, "try", Options("x"), {})
    (tmp_path / "half-made").write_text("by an earlier run")
    assert not done(tmp_path, Options("x", force=True), {})


def test_only_a_commands_own_files_are_deleted(tmp_path):
    own = ("state/[0-9][0-9].txt", "adapter/weights", "log")
    theirs = ("state/mine.txt", "log-of-mine")
    for name in ("state/01.txt", "adapter/weights", "log", *theirs):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    delete_made(tmp_path, own)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {*theirs, "state"}, "and no folder that is empty now"


def test_what_cannot_be_written_is_one_line_that_names_the_file_and_the_old_one_stays(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    for error in (OSError(28, "No space left on device"), SafetensorError("full"), LibError("x")):
        with pytest.raises(WriteError, match="a.json: cannot be written"), whole_file(path):
            raise error
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@given(st.dictionaries(st.text(max_size=5), st.floats() | st.text() | st.lists(st.integers())))
def test_json_of_ours_carries_a_checksum_of_itself(value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        write_json(path, value)
        assert repr(read_json(path)) == repr({**value})
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"checksum": "', '"more": 1, "checksum": "'), "utf-8")
        with pytest.raises(UserError, match="was changed since it was written"):
            read_json(path)


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace_file = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("on disk") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *to: done.append("named") or replace_file(*to))
    write_json(tmp_path / "a.json", {"a": 1})
    assert done == ["on disk", "named"]


def test_no_command_overwrites_the_folder_of_another_not_even_by_force(data, run, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(run, tmp_path / "run")
    for folder, words, owner in (
        ("data", ["behaviors", str(data), "--out"], "prepare"),
        ("run", ["prepare", "tiny", "--train", "1", "--test", "1", "--out"], "behaviors"),
    ):
        before = (tmp_path / folder / "config.json").read_bytes()
        for more in ([], ["--force"]):
            assert mtbi.main([*words, str(tmp_path / folder), *more]) == 2
            one_line(capsys, f"was made by `{owner}`")
        assert (tmp_path / folder / "config.json").read_bytes() == before


def test_a_folder_of_the_wrong_kind_is_no_run_folder(data, few_behaviors, capsys):
    for command in ("train", "bench", "info"):
        assert mtbi.main([command, str(data)]) == 2
        one_line(capsys, "no folder made by `behaviors`")
    assert mtbi.main(["generate", str(few_behaviors), "a.wav", "Who?"]) == 2
    one_line(capsys, "holds no trained recipe")


def test_the_recipes_of_a_run_come_in_the_order_of_the_table(tmp_path):
    for name in ("mtbi@30", "asr", "strange", "mtbi", "mtbi@1"):
        write_json(tmp_path / name / "config.json", {})
    (tmp_path / "text").mkdir()
    found = recipe_folders(tmp_path, ["text", "mtbi", "asr"])
    assert list(found) == ["mtbi", "mtbi@1", "mtbi@30", "asr"]
    assert found["asr"] == tmp_path / "asr"


# ---- locks ----

HOLDS = """
import sys, time
from contextlib import ExitStack
from support.runs import lock_folder
with ExitStack() as locks:
    for folder in sys.argv[1:]:
        locks.enter_context(lock_folder(folder))
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_for_one_process_at_a_time(few, few_behaviors, tmp_path, capsys):
    new, behaviors = begun_anew(few_behaviors, tmp_path), tmp_path / "behaviors"
    argv = ["train", str(new), *SMALL]
    other = python(HOLDS, new / "mtbi", behaviors, wait=False)
    while other.stdout.readline() != "in\n":
        assert other.poll() is None
    assert mtbi.main(argv) == 2
    one_line(capsys, "another process is at work in this folder")
    assert ask_few(few, behaviors) == 2
    one_line(capsys, "another process is at work in this folder")
    other.kill()
    other.communicate()
    assert mtbi.main(argv) == 0, "a lock dies with its process"


def test_who_may_wait_says_so_and_waits(tmp_path, capsys):
    entered = threading.Event()

    def enter():
        with lock_folder(tmp_path, "encodes speech"):
            entered.set()

    with ThreadPoolExecutor(1) as pool, lock_folder(tmp_path):
        with pytest.raises(UserError, match="another process is at work in this folder"):
            with lock_folder(tmp_path):
                pytest.fail("two at once")
        waiting = pool.submit(enter)
        assert not entered.wait(0.2)
        assert "waiting for another process, which encodes speech" in capsys.readouterr().out
        # the lock is let go when this block ends, before the pool waits for its thread
    waiting.result()
    assert entered.is_set()


# ---- kept frames ----


@pytest.fixture
def copies(utterances, tmp_path):
    """Three recordings under names of their own."""
    rows = []
    for i, u in enumerate(utterances[:3]):
        rows.append(replace(u, audio=tmp_path / f"{i}.wav", id=str(i)))
        shutil.copy(u.audio, rows[-1].audio)
    return rows


class Hearing:
    """What the encoder hears; interrupted once it has heard so many."""

    def __init__(self):
        self.files, self.stop_after, self.real = [], None, HuggingFaceEncoder.forward

    def __call__(self, encoder, samples, name=""):
        if len(self.files) == self.stop_after:
            raise KeyboardInterrupt
        self.files.append(str(name))
        return self.real(encoder, samples, name)


@pytest.fixture
def heard(encoder, monkeypatch):
    hearing = Hearing()
    monkeypatch.setattr(HuggingFaceEncoder, "forward", lambda *args: hearing(*args))
    return hearing


def test_a_recording_is_encoded_once_whatever_its_name_and_again_when_it_changes(
    encoder, copies, heard, tmp_path
):
    first = encode_all(encoder, copies, tmp_path / "features")
    again = encode_all(encoder, copies, tmp_path / "features")
    assert len(heard.files) == 3 and len(first) == 3
    assert all(torch.equal(first[u.id], again[u.id]) for u in copies)

    moved = replace(copies[0], audio=tmp_path / "elsewhere.wav", id="elsewhere")
    shutil.copy(copies[0].audio, moved.audio)
    frames = encode_all(encoder, [moved], tmp_path / "features")
    assert torch.equal(frames["elsewhere"], first["0"]) and len(heard.files) == 3

    before = fingerprint_of_audio(copies, tmp_path / "features")
    shutil.copy(copies[1].audio, copies[0].audio)
    os.utime(copies[0].audio, (1, 1))
    frames = encode_all(encoder, copies, tmp_path / "features")
    assert torch.equal(frames["0"], first["1"]) and len(heard.files) == 3
    assert fingerprint_of_audio(copies, tmp_path / "features") != before
    write_audio(copies[2].audio, load_audio(copies[2].audio) / 2)
    encode_all(encoder, copies, tmp_path / "features")
    assert heard.files[3:] == [str(copies[2].audio)]


def test_what_a_killed_process_left_half_written_is_taken_away(encoder, copies, tmp_path):
    folder = tmp_path / "features" / encoder.fingerprint
    folder.mkdir(parents=True)
    left = folder / f"{HALF_WRITTEN}1-abc.safetensors"
    left.write_bytes(b"half")
    encode_all(encoder, copies, tmp_path / "features")
    assert not left.exists() and list(folder.glob("*.safetensors"))


def test_another_encoder_has_another_fingerprint(encoder):
    other = HuggingFaceEncoder("tiny")
    assert other.fingerprint == encoder.fingerprint
    other = HuggingFaceEncoder("tiny")  # a fingerprint is taken once
    with torch.no_grad():
        other.model.encoder.layers[0].ffn1.intermediate_dense.weight += 1.0
    assert other.fingerprint != encoder.fingerprint


def test_another_ctc_head_on_the_same_encoder_is_another_recognizer(encoder):
    other = HuggingFaceEncoder("tiny")
    with torch.no_grad():
        other.head.bias += 1.0
    assert other.fingerprint == encoder.fingerprint
    assert other.ctc_fingerprint != encoder.ctc_fingerprint


@pytest.mark.parametrize("keep", ["disk", "ram", "off"])
def test_kept_on_disk_in_ram_or_not_at_all_the_frames_are_the_same(
    encoder, copies, heard, tmp_path, keep
):
    frames = encode_all(encoder, copies, tmp_path / "features", keep)
    alone = {u.id: encoder(load_audio(u.audio), u.audio) for u in copies}
    heard.files.clear()
    for _ in range(2):
        assert all(torch.equal(frames[u.id], alone[u.id]) for u in copies)
    assert len(heard.files) == (6 if keep == "off" else 0)
    assert (tmp_path / "features" / encoder.fingerprint).exists() == (keep == "disk")


def test_frames_on_disk_are_taken_into_memory_where_that_is_asked_for(
    encoder, copies, heard, tmp_path
):
    on_disk = encode_all(encoder, copies[:2], tmp_path / "features")
    in_ram = encode_all(encoder, copies, tmp_path / "features", "ram")
    assert len(heard.files) == 3, "what is on disk is not encoded again"
    assert all(torch.equal(in_ram[u.id], on_disk[u.id]) for u in copies[:2])


def test_interrupted_encoding_goes_on_from_the_last_whole_file(
    encoder, copies, heard, tmp_path, monkeypatch
):
    monkeypatch.setattr(support.frames, "SHARD", 1)  # a file for each recording
    heard.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        encode_all(encoder, copies, tmp_path / "features")
    assert len(list((tmp_path / "features" / encoder.fingerprint).iterdir())) == 2
    heard.stop_after = None
    encode_all(encoder, copies, tmp_path / "features")
    assert len(heard.files) == 3


def test_a_command_waits_for_another_that_encodes_the_same_speech_and_takes_its_frames(
    encoder, copies, heard, tmp_path, capsys, monkeypatch
):
    real, begun = support.frames.write_shards, threading.Event()

    def slowly(*args):
        if not begun.is_set():
            begun.set()
            time.sleep(0.5)
        real(*args)

    monkeypatch.setattr(support.frames, "write_shards", slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(encode_all, encoder, copies, tmp_path / "features")
        assert begun.wait(10)
        second = encode_all(encoder, copies, tmp_path / "features")
        assert len(first.result()) == len(second) == 3
    assert len(heard.files) == 3 and "waiting for another process" in capsys.readouterr().out


def resident():
    """Bytes of memory that this process uses now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured as Linux tells it")
def test_frames_on_disk_are_mapped_not_read(tmp_path):
    """A data set larger than the memory: of 100 MB of frames on disk one utterance is read."""
    frames = {f"{i}": torch.zeros(1000, 1000, dtype=torch.float16) for i in range(50)}
    save_file(frames, tmp_path / "a.safetensors")
    del frames
    before = resident()
    shards = support.frames.kept_shards(tmp_path)
    assert len(shards) == 50 and shards["7"].get_tensor("7").sum() == 0
    assert resident() - before < 25e6


MEMORY_OF_ALL_STAGES = """
import sys
from pathlib import Path
from mtbi import main
n, folder = sys.argv[1:]
sizes = ["--per-utterance", "1", "--max-new-tokens", "8", "--batch-size", "8"]
for words in (
    ["prepare", "tiny", "--out", f"{folder}/data", "--train", n, "--test", "5"],
    ["encode", f"{folder}/data"],
    ["behaviors", f"{folder}/data", "--out", folder, "--tasks", "tests/few_tasks.toml", *sizes],
    ["train", folder, "--recipe", "mtbi", "--steps", "4", "--batch-size", "8", "--hidden", "16"],
):
    assert main(words) == 0
status = Path("/proc/self/status").read_text()
print("peak", status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured as Linux tells it")
def test_ten_times_the_speech_takes_no_more_memory(tmp_path):
    peaks = []
    for n in (40, 400):
        (tmp_path / str(n)).mkdir()
        done = python(MEMORY_OF_ALL_STAGES, n, tmp_path / str(n))
        assert done.returncode == 0, done.said
        peaks.append(int(done.said.split("peak")[-1]))
    assert peaks[1] < 1.1 * peaks[0]


def test_a_disk_without_room_is_noticed_before_the_work(
    encoder, copies, heard, tmp_path, monkeypatch, capsys
):
    full = SimpleNamespace(free=10)
    monkeypatch.setattr(support.frames.shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match="make room, or say --cache-features ram"):
        encode_all(encoder, copies, tmp_path / "features")
    assert "values x 2 bytes" in capsys.readouterr().out and not heard.files


def test_damaged_frames_are_named(encoder, copies, tmp_path):
    encode_all(encoder, copies, tmp_path / "features")
    path = next((tmp_path / "features" / encoder.fingerprint).iterdir())
    shutil.copy(path, tmp_path / "whole")
    save_file({name: t[:, :5].clone() for name, t in load_file(path).items()}, path)
    with pytest.raises(UserError, match="0.wav: its kept frames are damaged .*DATA/features"):
        encode_all(encoder, copies, tmp_path / "features")["0"]
    flipped = bytearray((tmp_path / "whole").read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    damaged = encode_all(encoder, copies, tmp_path / "features")
    with pytest.raises(UserError, match="its kept frames are damaged"):
        [damaged[u.id] for u in copies]
    path.write_bytes((tmp_path / "whole").read_bytes()[:1000])
    with pytest.raises(UserError, match="delete it and run again"):
        encode_all(encoder, copies, tmp_path / "features")


def test_encode_makes_beforehand_what_training_and_benchmark_need(few, few_behaviors, tmp_path):
    shutil.copytree(few, tmp_path / "few")
    rows = read_manifest(few / "manifest.jsonl")
    write_jsonl(tmp_path / "few" / "manifest.jsonl", [u.row(tmp_path / "few") for u in rows])
    shutil.rmtree(tmp_path / "few" / "features", ignore_errors=True)
    assert mtbi.main(["encode", str(tmp_path / "few")]) == 0
    made = sorted((tmp_path / "few" / "features").rglob("*.safetensors"))
    assert sum(len(load_file(path)) for path in made) == 16
    assert mtbi.main(["encode", str(tmp_path / "few")]) == 0
    assert sorted((tmp_path / "few" / "features").rglob("*.safetensors")) == made


# ---- answers: each kept as soon as it is there ----


class Answering:
    """The batches that an LLM answers; interrupted once it has answered so many."""

    def __init__(self):
        self.sizes, self.stop_after, self.real = [], None, SpeechLLM.generate_rows

    def __call__(self, model, rows, max_new_tokens=64):
        if len(self.sizes) == self.stop_after:
            raise KeyboardInterrupt
        self.sizes.append(len(rows))
        return self.real(model, rows, max_new_tokens)


@pytest.fixture
def asked(monkeypatch):
    answering = Answering()
    monkeypatch.setattr(SpeechLLM, "generate_rows", lambda *args: answering(*args))
    return answering


def test_behaviors_interrupted_go_on_from_the_last_batch_and_mend_a_half_written_line(
    few, few_behaviors, tmp_path, asked, capsys
):
    asked.stop_after = 2
    assert ask_few(few, tmp_path) == 130
    part = tmp_path / "behaviors.part-0.jsonl"
    assert len(part.read_text().splitlines()) == 16
    assert not (tmp_path / "behaviors.jsonl").exists()
    with open(part, "a") as file:  # killed while it wrote
        file.write('{"asked": "' + "0" * 12 + '", "questi')
    of_the_user = Path(shutil.copy(part, tmp_path / "behaviors.part-backup.jsonl"))
    before = of_the_user.read_bytes()
    asked.stop_after = None
    asked.sizes.clear()
    capsys.readouterr()
    assert ask_few(few, tmp_path) == 0
    whole = list(read_jsonl(few_behaviors / "behaviors.jsonl"))
    one_turn = sum(not row["earlier"] for _, row in whole)
    said = capsys.readouterr().out
    assert f"16 of {one_turn} answers are there already" in said
    assert sum(asked.sizes) == len(whole) - 16
    assert (tmp_path / "behaviors.jsonl").read_bytes() == (
        few_behaviors / "behaviors.jsonl"
    ).read_bytes()
    assert list(tmp_path.glob("*.part-*")) == [of_the_user]
    assert of_the_user.read_bytes() == before


def test_half_done_behaviors_of_other_settings_are_refused_and_force_begins_anew(
    few, few_behaviors, tmp_path, asked, capsys
):
    asked.stop_after = 1
    assert ask_few(few, tmp_path) == 130
    asked.stop_after = None
    capsys.readouterr()
    assert ask_few(few, tmp_path, "--max-new-tokens", 5) == 2
    one_line(capsys, "max_new_tokens was 64, now 5")
    asked.sizes.clear()
    assert ask_few(few, tmp_path, "--max-new-tokens", 5, "--force") == 0
    assert "answers are there already" not in capsys.readouterr().out
    assert sum(asked.sizes) == len(list(read_jsonl(few_behaviors / "behaviors.jsonl")))


class Parrot:
    """Answers a question with itself."""

    def __init__(self, memory=99):
        self.memory, self.sizes = memory, []

    def check_finite(self, parts):
        """Nothing to be found."""

    def generate_rows(self, rows, max_new_tokens):
        if len(rows) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried …")
        self.sizes.append(len(rows))
        return [(f"{row}!", True) for row in rows]


def parrot_answers(parrot, kept, asked="a"):
    questions = ["ccc", "a", "dddd", "bb", "eeeee"]
    size = {"batch_size": 2, "max_new_tokens": 4}
    size |= {"sort_keys": list(map(len, questions)), "desc": ""}
    return answer_all(parrot, questions.__getitem__, kept=kept, asked=asked, **size)


def test_answers_come_in_the_order_of_their_questions_and_only_what_lacks_is_asked(tmp_path):
    parrot, kept = Parrot(), tmp_path / "new" / "answers"
    expected = [(f"{q}!", True) for q in ("ccc", "a", "dddd", "bb", "eeeee")]
    assert parrot_answers(parrot, kept) == expected == parrot_answers(parrot, kept)
    assert parrot.sizes == [2, 2, 1]
    assert parrot_answers(parrot, kept, asked="b") == expected and len(parrot.sizes) == 6
    part = next(kept.parent.iterdir())
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(line for line in lines if '"question": 1,' not in line))
    assert parrot_answers(parrot, kept) == expected
    assert parrot.sizes[6:] == [2], "whole batches, whose rounding is that of a run never cut off"
    text = part.read_text()
    assert "bb!" in text
    part.write_text(text.replace("bb!", "xx!"))  # and its checksum fits no more
    assert parrot_answers(parrot, kept) == expected and len(parrot.sizes) == 8


def test_where_the_memory_does_not_suffice_half_as_many_are_asked_at_once(capsys):
    parrot = Parrot(memory=2)
    answers = [(f"{q}!", True) for q in "abcdefg"]
    assert answer_in_memory(parrot, list("abcdefg"), 7, 4) == (answers, 1)
    assert max(parrot.sizes) <= 2 and "out of memory with 7 questions" in capsys.readouterr().err
    with pytest.raises(UserError, match="one question at a time is still too much for this GPU"):
        answer_in_memory(Parrot(memory=0), list("ab"), 2, 4)


def test_what_was_too_many_at_once_is_not_tried_again_with_the_next_batch(tmp_path, capsys):
    parrot, questions = Parrot(memory=2), list("abcdefghijkl")
    options = {"sort_keys": questions, "desc": "", "kept": tmp_path / "answers", "asked": "a"}
    answers = answer_all(parrot, questions.__getitem__, batch_size=4, max_new_tokens=4, **options)
    assert answers == [(f"{q}!", True) for q in questions]
    assert parrot.sizes == [2] * 6
    assert capsys.readouterr().err.count("out of memory") == 1


def test_where_the_embeddings_are_can_be_said_of_behaviors_that_are_done(
    few, few_behaviors, capsys
):
    before = read_json(few_behaviors / "config.json")
    for place in ("host", "gpu"):
        assert ask_few(few, few_behaviors, "--embeddings", place) == 0
        assert f"table of embeddings on the {place} from now on" in capsys.readouterr().out
        assert open_run(few_behaviors).options["embeddings"] == place
        assert ask_few(few, few_behaviors, "--embeddings", place) == 0
        assert "from now on" not in capsys.readouterr().out, "it is there already"
    assert read_json(few_behaviors / "config.json") == before


def test_behaviors_record_who_gave_them_and_another_llm_is_noticed(few_behaviors, tmp_path, capsys):
    new = begun_anew(few_behaviors, tmp_path)
    rows = [row for _, row in read_jsonl(new / "behaviors.jsonl")]
    assert len({row["llm"] for row in rows}) == 1
    assert all(len(row["llm"]) == 12 and row["prompt"] for row in rows)
    write_jsonl(new / "behaviors.jsonl", [{**row, "llm": "0" * 12} for row in rows])
    assert mtbi.main(["train", str(new), *SMALL]) == 2
    one_line(capsys, "was answered by another LLM (000000000000)")


def in_two_processes(file):
    """A program in two processes, as launchers start it; what the first one says."""
    processes, port = [], free_port()
    for rank in (0, 1):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(program([file], {**place, **address}, wait=False))
    first, second = processes
    said = first.communicate()[0]
    if first.returncode:
        second.kill()  # it would wait for the first one
    said_too = second.communicate()[0]
    assert (first.returncode, second.returncode) == (0, 0), said + said_too
    assert "report" not in said_too, "the first one talks"
    return said


@pytest.mark.parametrize("rank, world", [("1", None), ("2", "2"), ("0", ""), ("-1", "2")])
def test_a_place_among_processes_that_is_none_is_said_in_a_line(rank, world):
    environment = {"RANK": rank} | ({} if world is None else {"WORLD_SIZE": world})
    done = subprocess.run(
        [sys.executable, "-c", "import support.processes"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "torchrun sets both" in done.stderr


def test_more_processes_than_gpus_are_refused_in_a_line():
    two_gpus = "import torch; torch.cuda.is_available = lambda: True; "
    two_gpus += "torch.cuda.device_count = lambda: 2; import support.processes"
    done = subprocess.run(
        [sys.executable, "-c", two_gpus],
        cwd=ROOT,
        env={**os.environ, "LOCAL_RANK": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "process 3 of this machine finds 2 GPUs" in done.stderr


BUILT_FOR = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    "capability, architectures, runs",
    [
        ((6, 1), BUILT_FOR, False),  # GTX 1080
        ((7, 0), BUILT_FOR, False),  # V100
        ((7, 5), BUILT_FOR, True),  # T4
        ((8, 9), BUILT_FOR, True),  # RTX 4090
        ((9, 0), BUILT_FOR, True),  # H100
        ((12, 1), BUILT_FOR, True),
        ((13, 0), BUILT_FOR, True),  # compiles for itself what is not there
        ((13, 0), BUILT_FOR[:-1], False),
        ((9, 0), ["gfx90a"], True),  # AMD
        ((9, 0), [], True),
    ],
)
def test_a_card_for_which_torch_has_no_kernels_is_left_alone(capability, architectures, runs):
    assert has_kernels(capability, architectures) == runs


def test_two_processes_write_the_behaviors_and_the_report_of_one(few, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    ask = ["--tasks", str(FEW_TASKS), "--per-utterance", "1", "--batch-size", "8"]
    assert mtbi.main(["behaviors", str(few), "--out", str(one), *ask]) == 0
    assert mtbi.main(["train", str(one), *SMALL]) == 0
    assert mtbi.main(["bench", str(one), *A_SMALL_BENCH]) == 0
    both = tmp_path / "both.py"
    both.write_text(f"""
import shutil, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import mtbi
from support.processes import MAIN, wait
one, two = Path({str(one)!r}), Path({str(two)!r})
assert mtbi.main(["behaviors", {str(few)!r}, "--out", str(two), *{ask}]) == 0
if MAIN:
    shutil.move(two / "behaviors.jsonl", two / "of-two.jsonl")
    shutil.copy(one / "behaviors.jsonl", two)
    shutil.copytree(one / "mtbi", two / "mtbi")
wait()
assert mtbi.main(["bench", str(two), *{A_SMALL_BENCH}]) == 0
""")
    said = in_two_processes(both)

    asked = []
    for file in (one / "behaviors.jsonl", two / "of-two.jsonl"):
        rows = [row for _, row in read_jsonl(file)]
        asked.append(sorted((row["utterance"], row["prompt"], row["response"]) for row in rows))
    assert asked[0] == asked[1]
    assert said.count(f"behaviors.jsonl: {len(asked[0])} behaviors") == 1
    assert said.count("\nreport:") == 1 and not list(two.rglob("*.part-*"))

    reports = [read_json(run / "report.json")["recipes"] for run in (one, two)]
    for name, entry in reports[0].items():
        other = reports[1][name]
        for inside in (entry, other):  # sums of floats, which round by the number of threads
            inside.pop("seconds")
            inside.pop("bench_seconds")
            inside["gap"] = {"gap": inside.pop("behavior_gap")["score"]}
        for kind in ("attention", "gap"):
            ours, theirs = entry.pop(kind), other.pop(kind)
            for key in ours or ():
                assert theirs[key] == pytest.approx(ours[key], abs=1e-4)
    assert reports[0] == reports[1]


# ---- checkpoints: damaged, foreign, half ----


def without(*lost):
    """Leave out the tensors whose names hold one of these."""

    def change(tensors):
        return {k: v for k, v in tensors.items() if not any(name in k for name in lost)}

    return change


def no_numbers(tensors):
    return {
        k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in tensors.items()
    }


@pytest.mark.parametrize("lost", ["layers.1", "embed_tokens", "lm_head"])
def test_an_llm_whose_weights_are_not_whole_is_refused(tmp_path, lost):
    change_weights(save_llm(tmp_path, "qwen2"), without(lost))
    for bits in (4, 16):
        with pytest.raises(UserError, match=f"weights are not whole: .*{lost}"):
            load_llm(tmp_path, bits)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2-ctc", "wavlm", "parakeet"])
def test_an_encoder_whose_weights_are_not_whole_or_not_numbers_is_refused(tmp_path, kind):
    whole = load_file(save_encoder(tmp_path, kind) / "model.safetensors")
    change_weights(tmp_path, without("layers.1"))
    with pytest.raises(UserError, match="weights are not whole"):
        HuggingFaceEncoder(tmp_path)
    change_weights(tmp_path, lambda _: no_numbers(whole))
    with pytest.raises(UserError, match="NaN or infinite"):
        HuggingFaceEncoder(tmp_path)


def test_what_wav2vec2_needs_for_pre_training_only_may_be_missing(tmp_path):
    change_weights(save_encoder(tmp_path, "wav2vec2-ctc"), without("masked_spec_embed"))
    assert HuggingFaceEncoder(tmp_path).can_transcribe


def test_an_extractor_of_another_model_is_refused(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor().save_pretrained(save_encoder(tmp_path, "whisper"))
    with pytest.raises(UserError, match="do not fit together"):
        HuggingFaceEncoder(tmp_path)


def test_what_is_no_checkpoint_is_refused_in_words(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(UserError, match="speech encoder .*cannot be loaded"):
        HuggingFaceEncoder(tmp_path)
    with pytest.raises(UserError, match="LLM .*cannot be loaded"):
        load_llm(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    weights = save_llm(tmp_path, "qwen2") / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_llm(tmp_path, 16)


def test_code_in_a_checkpoint_is_never_run_even_if_the_user_says_yes(tmp_path, monkeypatch):
    config = json.loads((save_llm(tmp_path, "qwen2") / "config.json").read_text())
    evil = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    write_json(tmp_path / "config.json", {**config, "model_type": "evil", "auto_map": evil})
    it_ran = tmp_path / "it-ran"
    (tmp_path / "evil.py").write_text(f"open({str(it_ran)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr(builtins, "input", lambda *question: "y")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_llm(tmp_path, 16)
    assert not it_ran.exists()


def test_an_llm_that_looks_up_more_of_a_token_than_its_embedding_is_refused(tmp_path):
    """As Gemma 4's smaller ones do: embeddings in place of tokens would be another LLM."""
    more = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16}
    shape = {"global_head_dim": 16, "num_kv_shared_layers": 0, **more}
    save_llm(tmp_path, "gemma4", tokenizer_of("qwen2"), **shape)
    with pytest.raises(UserError, match="cannot be driven by embeddings alone"):
        load_llm(tmp_path, 16)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_weights_may_be_read_by_whom_any_new_file_may_be_read_by(tmp_path):
    (tmp_path / "any").write_text("")
    with whole_file(tmp_path / "weights.safetensors") as temporary:
        save_file({"a": torch.ones(1)}, temporary)
    rights = [path.stat().st_mode for path in sorted(tmp_path.iterdir())]
    assert rights[0] == rights[1]


def test_weights_have_a_fingerprint(tmp_path):
    save_llm(tmp_path / "one", "qwen2")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    one = fingerprint_of_weights(tmp_path / "one", "llm")
    assert fingerprint_of_weights(tmp_path / "other", "llm") == one
    change_weights(tmp_path / "other", lambda tensors: {k: v + 1e-3 for k, v in tensors.items()})
    assert fingerprint_of_weights(tmp_path / "other", "llm") != one
    assert fingerprint_of_weights("tiny", "llm") != fingerprint_of_weights("tiny", "encoder")


def test_a_small_tensor_trained_anew_between_large_ones_is_seen_by_its_beginning(tmp_path):
    """As a CTC head beside a large encoder, which fingerprint_of_weights may overlook."""
    large = torch.zeros(8 * 2**20)
    tensors = {"a": large, "b": torch.zeros(8), "c": large.clone(), "d": torch.tensor(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = fingerprint_of_beginnings(tmp_path, "encoder")
    assert fingerprint_of_beginnings(tmp_path, "encoder") == before
    save_file(tensors | {"b": torch.ones(8)}, tmp_path / "model.safetensors")
    assert fingerprint_of_beginnings(tmp_path, "encoder") != before


def test_weights_that_are_no_safetensors_file_are_named_in_one_line(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="model.safetensors: is no readable safetensors file"):
        fingerprint_of_beginnings(tmp_path, "llm")


def test_the_fingerprint_of_a_hub_model_is_its_revision(few, tmp_path, monkeypatch, capsys):
    """A model in the cache of the Hugging Face hub, as a download leaves it; offline."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = ROOT / "tiny" / "llm"
    repo = save_in_hub_cache(monkeypatch, tmp_path, source, "someone/tiny-llm", commit)
    of_the_hub = ["--llm", "someone/tiny-llm", "--tasks", str(ROOT / "tiny" / "tasks.toml")]
    assert ask_few(few, tmp_path / "run", *of_the_hub, "--max-new-tokens", 2) == 0
    config = read_json(tmp_path / "run" / "config.json")
    assert config["content"]["llm"] == commit
    assert config["options"]["llm"] == f"someone/tiny-llm@{commit}"

    # its owner changes it: the run goes on with what it began with, and a new one does not
    later = commit[::-1]
    shutil.copytree(ROOT / "tiny" / "llm", repo / "snapshots" / later)
    change_weights(
        repo / "snapshots" / later, lambda tensors: {k: 2 * v for k, v in tensors.items()}
    )
    (repo / "refs" / "main").write_text(later)
    capsys.readouterr()
    assert ask_few(few, tmp_path / "run", *of_the_hub, "--max-new-tokens", 2) == 0
    assert "has its behaviors already" in capsys.readouterr().out
    run = open_run(tmp_path / "run")
    run.check_llm()
    of_the_run = fingerprint_of_llm(*load_llm(*llm_of(run.options, "auto")))
    assert of_the_run == fingerprint_of_llm(*load_llm("tiny"))
    assert pinned("someone/tiny-llm", "llm") == f"someone/tiny-llm@{later}"
    assert fingerprint_of_llm(*load_llm("someone/tiny-llm")) != of_the_run


def test_a_training_goes_on_with_the_commit_of_the_encoder_that_it_was_begun_with(monkeypatch):
    monkeypatch.setattr("support.hub.fingerprint_of_weights", lambda name, kind: "0123")
    assert pinned_encoder("someone/ears") == "someone/ears@0123"
    assert pinned_encoder("someone/ears", "someone/ears@4567") == "someone/ears@4567"
    assert pinned_encoder("someone/ears", "someone/ears") == "someone/ears", "begun without one"
    assert pinned_encoder("someone/ears", "another/ears@4567") == "someone/ears@0123"
    assert pinned_encoder("someone/ears@main", "someone/ears@4567") == "someone/ears@0123"
    assert pinned_encoder("tiny") == "tiny"


# ---- chat templates and conversations ----


@pytest.mark.parametrize(
    "template",
    [
        "",
        "hello",
        "{{ 1 / 0 }}",
        "{% for m in messages %}{{ m['content'][:3] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
        "{% broken",
    ],
)
def test_a_template_that_cannot_say_what_is_asked_is_refused_with_the_models_name(
    tmp_path, template
):
    save_llm(tmp_path, "qwen2")
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=f"LLM {tmp_path}: .*(chat template)"):
        load_llm(tmp_path, 16)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}],
    ],
)
def test_a_conversation_that_is_none_is_explained(model, messages):
    with pytest.raises(UserError, match="no message like"):
        model.answer(messages)


# ---- trained folders: damaged, edited, begun anew ----


@pytest.fixture(scope="module")
def trained(few_behaviors, tmp_path_factory):
    """A run with a trained recipe that has an adapter."""
    new = begun_anew(few_behaviors, tmp_path_factory.mktemp("trained"))
    assert mtbi.main(["train", str(new), *SMALL, "--lora", "2"]) == 0
    return new


@pytest.fixture
def copy_of_trained(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_damaged_models_are_explained(copy_of_trained, encoder, few, capsys):
    folder, llm = copy_of_trained / "mtbi", load_llm("tiny", 4)
    adapter = folder / "adapter" / "adapter_model.safetensors"
    connector, about = folder / "connector.safetensors", folder / "model.json"
    whole = {path: path.read_bytes() for path in (adapter, connector, about)}

    def refused(reason):
        with pytest.raises(UserError, match=reason) as error:
            SpeechLLM.from_pretrained(folder, llm, encoder)
        assert "\n" not in str(error.value)
        for path, content in whole.items():
            path.write_bytes(content)

    def refused_as_it_is(reason):
        """What would be said of such weights if model.json named them."""
        now = {"weights_fingerprint": fingerprint_of_training(folder)}
        write_json(about, {**read_json(about), **now})
        refused(reason)

    for path in (adapter, connector):
        bits = bytearray(path.read_bytes())
        bits[-1] ^= 1
        path.write_bytes(bits)
        refused("its weights are damaged.*--force")
    audio = read_manifest(few / "manifest.jsonl")[0].audio
    adapter.write_bytes(b"")
    assert mtbi.main(["generate", str(copy_of_trained), str(audio), "Who did it?"]) == 2
    one_line(capsys, "its weights are damaged", "--force")
    adapter.write_bytes(whole[adapter])
    save_file(dict(list(load_file(adapter).items())[:3]), adapter)
    refused_as_it_is("its adapter is not whole.*--force")
    adapter.write_bytes(adapter.read_bytes()[:100])
    refused_as_it_is("is no readable safetensors file.*--force")
    save_file(no_numbers(load_file(connector)), connector)
    refused_as_it_is("NaN or infinite.*--force")
    save_file(dict(list(load_file(connector).items())[:3]), connector)
    refused_as_it_is("the connector cannot be loaded.*--force")
    for key, value in (("k", "6"), ("k", -1), ("hidden", "x"), ("lora", "x")):
        write_json(about, {**read_json(about), key: value})
        refused("model.json: is not what training writes there.*--force")
    write_json(about, {**read_json(about), "connector": []})
    refused("")


@pytest.mark.parametrize(
    "file, change",
    [
        ("config.json", {"options": 5}),
        ("config.json", {"options": {}}),
        ("mtbi/config.json", {"options": []}),
        ("mtbi/config.json", {"content": []}),
        ("mtbi/log.jsonl", None),
        ("report.json", {"recipes": {"mtbi": 5}, "meta": {}}),
        ("mtbi/model.json", {"k": None}),
    ],
)
def test_info_explains_files_that_are_not_its_own(copy_of_trained, capsys, file, change):
    path = copy_of_trained / file
    if change is None:
        path.write_text('{"step": "a", "loss": "b", "seconds": null}\n')
    else:
        before = read_json(path) if path.exists() else {}
        changed = {**before, **change}
        write_json(path, {name: value for name, value in changed.items() if value is not None})
    assert mtbi.main(["info", str(copy_of_trained)]) == 2
    one_line(capsys, "make another" if "config" in file else "--force")


def interrupted(*args, **options):
    raise KeyboardInterrupt


def test_a_training_begun_anew_forgets_the_old_one(copy_of_trained, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", interrupted)
    argv = ["train", str(copy_of_trained), "--steps", "50", *SMALL[2:], "--force"]
    assert mtbi.main(argv) == 130
    assert sorted(path.name for path in (copy_of_trained / "mtbi").iterdir()) == [
        ".mtbi-lock",
        "config.json",
    ]
    capsys.readouterr()
    assert mtbi.main(["info", str(copy_of_trained)]) == 0
    assert "steps 0 of 50" in capsys.readouterr().out


def test_the_same_recipe_with_an_adapter_resumes_bit_for_bit(trained, copy_of_trained, monkeypatch):
    saved, calls = train.save_state, []

    def dies(*args):
        saved(*args)
        calls.append(1)
        raise KeyboardInterrupt

    argv = ["train", str(copy_of_trained), *SMALL, "--lora", "2", "--save-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_state", dies)
        assert mtbi.main([*argv, "--force"]) == 130 and calls
    assert mtbi.main(argv) == 0
    assert fingerprint_of_training(copy_of_trained / "mtbi") == fingerprint_of_training(
        trained / "mtbi"
    )
    for name in ("connector.safetensors", "adapter/adapter_model.safetensors"):
        again = load_file(copy_of_trained / "mtbi" / name)
        for key, tensor in load_file(trained / "mtbi" / name).items():
            assert torch.equal(again[key], tensor), (name, key)
    (copy_of_trained / "mtbi" / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    assert fingerprint_of_training(copy_of_trained / "mtbi") != fingerprint_of_training(
        trained / "mtbi"
    )


@pytest.mark.parametrize(
    "device, width, threads", [("cpu", NARROW - 1, 1), ("cpu", NARROW, 2), ("cuda", NARROW, 1)]
)
def test_a_narrow_encoder_hears_with_one_thread_and_a_wide_one_on_a_cpu_with_all(
    device, width, threads, monkeypatch
):
    monkeypatch.setattr(support.console, "DEVICE", device)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(SimpleNamespace(width=width)):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- documents ----


@pytest.mark.parametrize("folder", ["", "docs", "tiny"])
def test_documents_hold_no_placeholders(folder):
    for path in (ROOT / folder).glob("*.md"):
        text = path.read_text(encoding="utf-8")
        for word in ("RUNTIME", "LOSSA", "LOSSB", "DEMOTIME", "TODO", "TBD", "XXX"):
            assert word not in text, path
