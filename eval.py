"""The benchmark: seen prompts, unseen prompts, unseen tasks, on speech never trained on.

The reference is the text LLM's own answer to the true transcript, so that any LLM and any
transcribed speech can be benchmarked. A system is a model and a way to put an utterance before it:
as text, as speech, or as what a CTC model made of it. Every answer becomes a row of one table.
What is made of that table, the gain above all, is in lab/statistics.py; the behavior gap and the
attention are in lab/probes.py.

    python eval.py RUN
"""

import random
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import support  # noqa: F401  first: torch reads what it sets

from data import Run, Speech, Task, Text, Utterance, as_compared, chat_parts, dialogue, load_tasks
from data import normalize, open_run, read_manifest, transcript_tokens
from model import SpeechLLM, compute_precision, encode_all, fingerprint_of_encoder
from model import llm_of, load_encoder, shared_llm
from support.answers import answer_all, keep_record, kept_parts
from support.console import say_device, timed
from support.files import PROJECT, UserError, fingerprint, fingerprint_of_file
from support.files import read_json_if_whole, write_json
from support.frames import fingerprint_of_audio
from support.hub import absolute_if_local, fingerprint_of_beginnings, free_memory
from support.options import Count, RunFolder, Seed
from support.processes import first_process
from support.runs import begin, fingerprint_of_training, finish, lock_folder
from support.runs import recipes_to_bench, refuse_foreign
from support.states import load_weights, state_at

# what is new about a question: nothing, its prompt, or its task (of which no prompt was seen)
CELLS = ["seen", "unseen_prompt", "unseen_task"]
# conversations of two turns
DIALOGUES = ["speech_then_text_question", "text_then_speech", "two_speeches"]
# what a system is asked: the questions, to repeat more utterances, the dialogues, and the
# questions in text
SETS = ("questions", "repeats", "dialogues", "text")
# what is kept of an answer that was looked into; its scores are made anew from the answer
LOOKED_INTO = ("mistake", "behavior_gap", "attention_on_instruction", "attention_on_utterance")
# increased whenever something else is asked, or answers are scored otherwise: reports are then
# written anew
SCORING = 4


# ---- options ----


@dataclass
class BenchOptions:
    run: RunFolder
    """a run folder with a trained recipe"""
    data: str | None = None
    """the data folder whose held-out speech is used; default: the one the run was made from"""
    recipes: str = ""
    """which of the trained recipes, separated by commas: the report then holds only these;
    default: all"""
    step: Count | None = None
    """measure the recipes as they were after so many steps, from a state that `train --keep-states`
    kept; the report goes to RUN/steps/STEP"""
    force: bool = False
    """ask again, whatever is there"""
    seed: Seed = 0
    """seed of every random choice"""

    # how much is asked
    per_prompt: Count = 8
    """questions for each prompt of each task; and twelve times as many utterances that are only to
    be repeated, for the word accuracy"""
    dialogues: Count = 60
    """conversations of two turns of each kind: speech then a text question, text then speech, two
    speeches"""
    probes: Count = 96
    """questions on which the behavior gap and the attention shares are measured"""
    mistakes: Count = 40
    """wrong answers of each system, at most, of which it is looked into how they are wrong"""
    max_new_tokens: Count = 64
    """longest answer, in tokens"""

    # of whom
    asr: str | None = None
    """CTC model for the cascade, or a folder that `recognizer` made; default: the speech encoder's
    own head, if it has one"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """what the LLM computes in; auto: bf16 on a GPU that has it, fp16 on an older one; on a CPU
    fp32, or bf16 if it has AVX512-BF16 and the LLM is no tiny one"""

    # what changes no answer
    batch_size: Count = 96
    """questions answered at once"""
    cache_features: Literal["disk", "ram", "off"] = "disk"
    """keep encoder frames on disk (memory-mapped), in ram, or off: encode at every use"""

    # support/runs.py reads it: what this command may write
    MAKES: ClassVar = (
        "data.json",
        "answers.csv",
        "report.md",
        "report.json",
        "cells.png",
        "tasks.png",
        "attention.png",
        "loss.png",
        "bench/*.json",
        "bench/*.part-[0-9]*.jsonl",
    )
    # plan_bench() makes the fingerprint of the answers of these
    CHANGE_ANSWERS: ClassVar = (
        "per_prompt",
        "dialogues",
        "probes",
        "mistakes",
        "seed",
        "max_new_tokens",
        "precision",
    )


# ---- the command: load, ask, score ----


@dataclass
class Bench:
    """A benchmark of the recipes of a run on the held-out speech of a data folder."""

    options: BenchOptions
    run: Run
    data: Path
    folder: Path  # where its report goes; what is measured is kept in folder/bench
    utterances: list  # the held-out ones
    trained_with: dict  # {recipe: the options it was trained with}
    settings: dict  # all that the report depends on
    asked_about: list = field(default_factory=list)  # the utterances that questions are about
    in_ram: dict = field(default_factory=dict)  # {encoder's fingerprint: frames}

    @contextmanager
    def at_work(self):
        """While this benchmark works in its folder, no other does, and nobody else's file is there.

        UserError otherwise.
        """
        config = "bench/config.json"
        with lock_folder(self.folder / "bench"):
            refuse_foreign(self.folder, "bench", self.options.MAKES, config)
            begin(self.folder, "bench", self.options, self.settings, config)
            yield
            finish(self.folder, "bench", self.options, self.settings, config)

    def draw(self, tasks):
        """(the questions, the utterances to be repeated), as Cases; nothing else will be heard."""
        options = self.options
        cases = draw_cases(tasks, self.utterances, options.per_prompt, options.seed)
        repeats = draw_repeats(tasks, self.utterances, 12 * options.per_prompt, options.seed)
        ids = {case.utterance.id for case in (*cases, *repeats)}
        self.asked_about = [u for u in self.utterances if u.id in ids]
        return cases, repeats

    def encode(self, encoder):
        """{utterance id: frames (T, D_encoder)} of the speech that is asked about."""
        keep, own = self.options.cache_features, encoder.fingerprint
        if own in self.in_ram:
            return self.in_ram[own]
        frames = encode_all(encoder, self.asked_about, self.data / "features", keep)
        if keep == "ram":
            self.in_ram[own] = frames
        return frames

    def encoder_of(self, recipe):
        """The speech encoder with which a recipe was trained."""
        options = self.trained_with[recipe]
        return load_encoder(options["encoder"], options["pad_whisper"])

    def fingerprint_of(self, weights="", transcriber=""):
        """Names what the answers of one system depend on."""
        same = {**self.settings, "trained": weights, "asr": transcriber}
        del same["scoring"]  # answers that are kept are scored anew
        return fingerprint(same)


@dataclass
class Measured:
    """What a benchmark found."""

    bench: Bench
    tasks: dict
    rows: list  # of the table of answers
    attention: dict  # {system: {"instruction": [by layer], "utterance": [by layer]}}
    seconds: dict  # {system: what measuring it took}
    llm_is_4_bit: bool


def plan_bench(options, table):
    """The Bench that is asked for; table: the names of all recipes, in order.

    Loads and writes nothing. UserError if there is nothing that could be asked.
    """
    run = open_run(options.run)
    precision = compute_precision(options.precision, run.options["llm"])
    options = replace(options, precision=precision)
    data, utterances = run.data, run.utterances
    if options.data and not run.is_own(options.data):
        data = Path(options.data)
        utterances = read_manifest(data / "manifest.jsonl")
    tested = never_trained_on(run, utterances)
    if not tested:
        raise UserError(
            f"{data / 'manifest.jsonl'}: has no row of split test whose words were not trained on; "
            "`prepare --test-only` makes a test set of other recordings"
        )
    run.check_llm()
    trained = recipes_to_bench(run.folder, options.recipes, table)
    weights = fingerprints_of_weights(run, trained, options.step)
    check_task_table(run)
    settings = {name: getattr(options, name) for name in options.CHANGE_ANSWERS}
    settings |= {
        "manifest": fingerprint_of_file(data / "manifest.jsonl"),
        "audio": fingerprint_of_audio(tested, data / "features"),
        "tasks": run.content["task_table"],
        "llm": run.content["llm"],
        **run.packing(),
        "asr": fingerprints_of_transcriber(options.asr, trained),
        "trained": weights,
        "scoring": SCORING,
    }
    folder = report_folder(run, data)
    if options.step:
        folder = folder / "steps" / str(options.step)
    return Bench(options, run, data, folder, tested, trained, settings)


def fingerprints_of_weights(run, trained, step):
    """{recipe: the fingerprint of what was trained}, at the end or after so many steps."""
    found = {}
    for name in trained:
        folder = run.folder / name
        if step:
            found[name] = fingerprint_of_file(state_at(folder, step))
        else:
            found[name] = fingerprint_of_training(folder)
    return found


def fingerprints_of_transcriber(asr, trained):
    """Of what transcribes for the cascade (see transcriber_of), without loading it."""
    if asr:
        name = absolute_if_local(asr)
        weights = fingerprint_of_encoder(name)
    else:
        name = next(iter(trained.values()))["encoder"]
        weights = ""  # the frames, and so the recipes, are of it
    # of large weights a CTC head may be all that was trained anew
    return [asr, weights, fingerprint_of_beginnings(name, "encoder")]


def check_task_table(run):
    """UserError if the run's task table is not the one that stage 1 asked."""
    path = PROJECT / run.options["tasks"]
    if fingerprint_of_file(path) != run.content["task_table"]:
        raise UserError(
            f"{path}: has changed since `behaviors`; run `behaviors` again with --force"
        )


def never_trained_on(run, utterances):
    """Those for testing whose words no training utterance of the run has."""
    trained_on = {as_compared(u.text) for u in run.utterances if u.split == "train"}
    return [u for u in utterances if u.split == "test" and as_compared(u.text) not in trained_on]


def report_folder(run, data):
    """Where the report goes: the run folder for its own data, a place of its own for any other."""
    if run.is_own(data):
        return run.folder
    whole = str(data.resolve())
    folder = run.folder / "on" / data.resolve().name
    for path in [folder / "data.json", *sorted(folder.glob("steps/*/data.json"))]:
        known = read_json_if_whole(path, "data")
        is_other = known is not None and known["data"] != whole
        if is_other or (not known and path.exists()):  # of the same name, or damaged
            return folder.with_name(f"{folder.name}-{fingerprint(whole)}")
    return folder


def measure_all(bench, look_into):
    """Ask every system everything that it was not asked before, and score the answers.

    look_into: what finds out more about a system than its answers tell (lab.probes.LooksInto), made
    of the Questions; its `of(system, answers)` is ({index of a question: {column: value}},
    attention by layer).
    """
    options, run = bench.options, bench.run
    say_device()
    tasks = load_tasks(PROJECT / run.options["tasks"])
    cases, repeats = bench.draw(tasks)
    first = next(iter(bench.trained_with))
    transcriber = transcriber_of(options.asr, bench.encoder_of(first))
    if options.cache_features == "disk":
        # before the LLM, which may leave an encoder no room on a GPU
        used = [(o["encoder"], o["pad_whisper"]) for o in bench.trained_with.values()]
        for name, pad_whisper in dict.fromkeys(used):  # most recipes share one
            bench.encode(load_encoder(name, pad_whisper))
        if transcriber:
            bench.encode(transcriber)
    llm = shared_llm(*llm_of(run.options, options.precision))
    systems = systems_of(bench, llm, transcriber)
    if not run.is_own(bench.data):
        write_json(bench.folder / "data.json", {"data": str(bench.data.resolve())})
    if options.force:
        forget_records(bench.folder / "bench", systems)
    questions = Questions(bench, tasks, cases, repeats, systems["text"])
    looks = look_into(questions)
    records = {name: questions.record(system, looks) for name, system in systems.items()}
    rows = []
    for record in records.values():
        rows += record["rows"]
    return Measured(
        bench,
        tasks,
        rows,
        attention={name: record["attention"] for name, record in records.items()},
        seconds={name: record["seconds"] for name, record in records.items()},
        llm_is_4_bit=bool(getattr(llm[0], "is_loaded_in_4bit", False)),
    )


# ---- systems ----


class System:
    """A model, and a way to put an utterance before it: here, as its true transcript."""

    def __init__(self, name, fingerprint, model):
        self.name, self.fingerprint, self.model = name, fingerprint, model

    @contextmanager
    def ready(self):
        """Within it, it can answer; after it, what that took is let go."""
        yield

    def parts(self, utterance):
        """What stands for an utterance in a conversation."""
        return [transcript_tokens(self.model.tokenizer, utterance.text)]


class Copy(System):
    """The bottom line: whatever is asked, it answers with the transcript."""

    def __init__(self, bench):
        super().__init__("copy", bench.fingerprint_of(weights="copy"), model=None)


class Cascade(System):
    """A CTC model transcribes, and the LLM reads that."""

    def __init__(self, bench, reader, transcriber):
        own = bench.fingerprint_of(transcriber=transcriber.ctc_fingerprint)
        super().__init__("cascade", own, reader)
        self.bench, self.transcriber = bench, transcriber
        self.hypotheses = {}

    @contextmanager
    def ready(self):
        self.frames = self.bench.encode(self.transcriber)
        yield
        self.frames = None  # every utterance is transcribed by now

    def parts(self, utterance):
        if utterance.id not in self.hypotheses:
            frames = self.frames[utterance.id]
            self.hypotheses[utterance.id] = [hypothesis(self.transcriber, frames, self.model)]
        return self.hypotheses[utterance.id]


def hypothesis(transcriber, frames, reader):
    """What a recognizer makes of frames (T, D_encoder), as the LLM of a SpeechLLM reads it."""
    text = transcriber.transcribe(frames) or "…"
    if text == text.upper():  # as wav2vec 2.0's vocabulary has it, and no corpus after `prepare`
        text = text.lower()
    heard = transcript_tokens(reader.tokenizer, text)
    # a head that writes at every frame must leave room for the rest of the conversation
    return Text(heard.ids[: reader.context // 4])


class Trained(System):
    """A trained recipe: the LLM hears speech tokens."""

    def __init__(self, bench, recipe, llm):
        own = bench.fingerprint_of(weights=bench.settings["trained"][recipe])
        super().__init__(recipe, own, model=None)  # which is there within ready() alone
        self.bench, self.llm = bench, llm

    @contextmanager
    def ready(self):
        folder = self.bench.run.folder / self.name
        encoder = self.bench.encoder_of(self.name)
        self.model = SpeechLLM.from_pretrained(folder, self.llm, encoder)
        try:
            if self.bench.options.step:
                state = state_at(folder, self.bench.options.step)
                load_weights(state, self.model.trainable())
            elif fingerprint_of_training(folder) != self.bench.settings["trained"][self.name]:
                raise UserError(f"{folder}: was trained again while this benchmark is at work")
            self.frames = self.bench.encode(encoder)
            yield
        finally:
            self.model.take_off_adapter()  # from the LLM, which the systems share
            self.model = self.frames = None
            free_memory()

    def parts(self, utterance):
        return [Speech(self.frames[utterance.id])]


def systems_of(bench, llm, transcriber):
    """{name: System}: top and bottom line, the cascade if something transcribes, the recipes.

    llm: the (LLM, tokenizer) that all share; a recipe's adapter is on it within ready() alone.
    """
    reader = SpeechLLM(*llm)
    systems = {"text": System("text", bench.fingerprint_of(), reader), "copy": Copy(bench)}
    if transcriber:
        systems["cascade"] = Cascade(bench, reader, transcriber)
    for recipe in bench.trained_with:
        systems[recipe] = Trained(bench, recipe, llm)
    return systems


def transcriber_of(asr, encoder):
    """What transcribes for the cascade: the CTC model that `asr` names, or a recipe's encoder.

    None, and a line that says so, if it has no CTC head.
    """
    transcriber = load_encoder(absolute_if_local(asr)) if asr else encoder
    if transcriber.can_transcribe:
        return transcriber
    print(
        f"cascade: left out, {transcriber.name} has no CTC head; --asr names a CTC model, or a "
        "folder that `recognizer` made"
    )
    return None


# ---- questions ----


class Turn(NamedTuple):
    """The first of two turns."""

    prompt: str
    utterance: Utterance
    is_spoken: bool
    answer: str


@dataclass(frozen=True)
class Case:
    """One question of the benchmark."""

    utterance: Utterance
    task: Task
    prompt: str
    cell: str  # one of CELLS, or of DIALOGUES
    earlier: Turn | None = None  # the turn before
    again: bool = False  # it comes without an utterance: it is about the one of the turn before

    def names(self):
        """What names it, whatever folder the utterances are in."""
        earlier = ()
        if self.earlier:
            earlier = tuple(self.earlier._replace(utterance=self.earlier.utterance.id))
        return (self.utterance.id, self.task.name, self.prompt, self.cell, earlier, self.again)

    def parts(self, system, response=None):
        """The conversation, as the system hears or reads it."""
        tokenizer = system.model.tokenizer
        audio, turns = [], []
        if self.earlier:
            prompt, utterance, is_spoken, answer = self.earlier
            read = [transcript_tokens(tokenizer, utterance.text)]
            audio.append(system.parts(utterance) if is_spoken else read)
            turns.append((prompt, answer))
        if not self.again:
            audio.append(system.parts(self.utterance))
        return chat_parts(tokenizer, dialogue(turns, self.prompt, self.again), audio, response)


def draw_cases(tasks, utterances, per_prompt, seed):
    """For every prompt of every task `per_prompt` utterances; the same ones for every system."""
    rng = random.Random(f"bench-{seed}")
    cases = []
    for task in tasks.values():
        fitting = [u for u in utterances if task.applies(u.text)]
        for prompt in (*task.prompts, *task.unseen_prompts):
            cell = cell_of(task, prompt)
            for u in rng.sample(fitting, min(per_prompt, len(fitting))):
                cases.append(Case(u, task, prompt, cell))
    if not cases:
        raise UserError("no task of the task table applies to any held-out transcript")
    return cases


def cell_of(task, prompt):
    """One of CELLS: what stage 2 may have seen of such a question."""
    if task.split != "train":
        return "unseen_task"
    return "seen" if prompt in task.prompts else "unseen_prompt"


def draw_repeats(tasks, utterances, n, seed):
    """n utterances that are to be repeated word for word."""
    fitting = [u for u in utterances if tasks["repeat"].applies(u.text)]
    rng = random.Random(f"repeats-{seed}")
    return repeats_of(tasks["repeat"], rng.sample(fitting, min(n, len(fitting))))


def repeats_of(task, utterances):
    """To repeat these utterances, in one wording: the one that a recipe of one prompt trains on."""
    wording = min(task.prompts)  # as Examples chooses, if stage 1 asked this one at all
    return [Case(u, task, wording, "seen") for u in utterances]


def draw_dialogues(cases, answers, n, seed):
    """n conversations of two turns of each kind in DIALOGUES, made of pairs of cases.

    answers: the text LLM's to the cases; the first turn is answered with them. Where the second
    brings an utterance of its own, its words are others; the task may, by chance, be the same.
    """
    rng = random.Random(f"dialogues-{seed}")
    about = {}  # utterance id -> which cases are about it
    for i, case in enumerate(cases):
        about.setdefault(case.utterance.id, []).append(i)
    drawn = []
    for kind in DIALOGUES:
        fitting = []
        for i in range(len(cases)):
            if has_first_turn(cases, answers, i, kind, about):
                fitting.append(i)
        for i in rng.sample(fitting, min(n, len(fitting))):
            first = draw_first_turn(rng, cases, answers, i, kind, about)
            earlier, case = cases[first], cases[i]
            is_spoken = kind != "text_then_speech"
            again = kind == "speech_then_text_question"
            turn = Turn(earlier.prompt, earlier.utterance, is_spoken, answers[first])
            drawn.append(Case(case.utterance, case.task, case.prompt, kind, turn, again))
    return drawn


def has_first_turn(cases, answers, i, kind, about):
    """Can any case come before case i, in a conversation of this kind?"""
    if kind == "speech_then_text_question":
        return bool(earlier_about_the_same(cases, answers, i, about))
    return not all(says_the_same(other, cases[i]) for other in cases)


def draw_first_turn(rng, cases, answers, i, kind, about):
    """Which case comes before case i, in a conversation of this kind."""
    if kind == "speech_then_text_question":
        return rng.choice(earlier_about_the_same(cases, answers, i, about))
    first = rng.choice([j for j in range(len(cases)) if j != i])
    while says_the_same(cases[first], cases[i]):  # the next that brings other words
        first = (first + 1) % len(cases)
    return first


def earlier_about_the_same(cases, answers, i, about):
    """Cases about the utterance of case i whose answers tell neither its answer nor all words."""
    case = cases[i]
    fitting = []
    for j in about[case.utterance.id]:
        if cases[j].task is case.task:
            continue
        told = words_of(answers[j])
        if not (words_of(answers[i]) <= told or words_of(case.utterance.text) <= told):
            fitting.append(j)
    return fitting


def says_the_same(a, b):
    """Do two cases bring the same words, be it in one recording or in two?"""
    return as_compared(a.utterance.text) == as_compared(b.utterance.text)


@lru_cache(maxsize=2**16)  # an answer is compared with all that are about its utterance
def words_of(text):
    """How often each word is in a text."""
    return Counter(as_compared(text).split())


class Questions:
    """The questions, the top line's answers to them, and the record of each system."""

    def __init__(self, bench, tasks, cases, repeats, top_line):
        self.options = bench.options
        self.folder = bench.folder / "bench"
        self.tasks, self.top_line = tasks, top_line
        # by SETS, and "replies": bare directives, which only the text LLM is asked
        self.cases = {"questions": cases, "repeats": repeats, "text": cases}

        # the text LLM's own answers are the references
        answers, self.ended = self.answers_of_text("questions")
        self.references = {"questions": answers, "text": answers}
        # and the first turns of the dialogues
        drawn = draw_dialogues(cases, answers, self.options.dialogues, self.options.seed)
        self.cases["dialogues"] = drawn
        for which in ("repeats", "dialogues"):
            self.references[which], _ = self.answers_of_text(which)
        self.replies = self.answers_to_directives()

    def answers_to_directives(self):
        """{utterance id of a directive: what the text LLM answers when it is the prompt}."""
        directives = directives_of(self.cases["questions"])
        self.cases["replies"] = [bare_directive(u) for u in directives]
        replies, _ = self.answers_of_text("replies")
        return dict(zip([u.id for u in directives], replies))

    def answers_of_text(self, which):
        """(the text LLM's answers to the transcripts, which of them ended by themselves).

        which: a key of `cases`. They are asked for once, and kept.
        """
        path = self.folder / f"text-{which}.answers.json"
        asked = self.fingerprint_of(self.top_line, which)
        kept = read_record(path, asked, "answers", "ended")
        if not kept:
            found = self.ask(self.top_line, which) if self.cases[which] else []
            kept = {
                "fingerprint": asked,
                "answers": [answer for answer, _ in found],
                "ended": [ended for _, ended in found],
            }
            keep_record(path, kept, [self.folder / f"text-{which}"])
        return kept["answers"], kept["ended"]

    def fingerprint_of(self, system, *sets):
        """Names who is asked what: kept answers to anything else do not count."""
        asked = []
        for which in sets:
            asked += [case.names() for case in self.cases[which]]
        return fingerprint([system.fingerprint, asked])

    def ask(self, system, which, presenter=None):
        """[(answer, did it end by itself)] of a system to the cases of one key of `cases`.

        presenter: the System that puts the utterances before it, if it is not the system itself.
        """
        cases = self.cases[which]
        return answer_all(
            system.model,
            lambda i: cases[i].parts(presenter or system),
            sort_keys=[(case.task.name, case.utterance.duration) for case in cases],
            desc=f"bench {system.name}" + ("" if which == "questions" else f", {which}"),
            batch_size=self.options.batch_size,
            max_new_tokens=self.options.max_new_tokens,
            kept=self.folder / f"{system.name}-{which}",
            asked=self.fingerprint_of(system, which),
        )

    def record(self, system, looks):
        """What there is to measure of a system: rows of the table, and attention by layer.

        Taken from bench/NAME.json if it was measured before.
        """
        path = self.folder / f"{system.name}.json"
        start = time.perf_counter()
        asked = self.fingerprint_of(system, *SETS)
        record = read_record(path, asked, "rows", "attention", "seconds")
        if record:
            return {**record, "rows": self.scored_anew(system.name, record["rows"])}
        with timed(f"bench {system.name}"), system.ready():
            # copy is no model: without speech its answers would be the same again
            sets = [which for which in SETS if system.model or which != "text"]
            answers = {which: self.answers_of(system, which) for which in sets}
            found, attention = {}, None
            if system.model:
                found, attention = looks.of(system, answers["questions"])
        record = {
            "fingerprint": asked,
            "rows": self.rows(system.name, answers, found),
            "attention": attention,
            "seconds": round(time.perf_counter() - start, 1),
        }
        keep_record(path, record, [self.folder / f"{system.name}-{which}" for which in SETS])
        return record

    def answers_of(self, system, which):
        """The texts of a system's answers; what cannot differ from the references is not asked."""
        if system is self.top_line:
            return self.references[which]
        if not system.model:  # copy
            return [case.utterance.text for case in self.cases[which]]
        presenter = system
        if which == "text":
            if not system.model.lora:  # a frozen LLM answers to text as ever
                return self.references[which]
            presenter = System(system.name, system.fingerprint, system.model)  # of transcripts
        return [answer for answer, _ in self.ask(system, which, presenter)]

    def scored_anew(self, name, rows):
        """Rows that were kept, their scores as today's code makes them of the same answers."""
        answers = {which: [] for which in SETS}
        for row in rows:
            answers[row["set"]].append(row["answer"])
        scored = self.rows(name, answers, {})
        for row, kept in zip(scored, rows):
            for column in LOOKED_INTO:
                row[column] = kept[column]
        return scored

    def rows(self, name, answers, found):
        """One row of the table for each answer.

        found: {index of a question: {column: value}}, what was found by looking into it.
        """
        rows = {which: [] for which in SETS}
        for which in answers:
            for case, reference, answer in zip(
                self.cases[which], self.references[which], answers[which]
            ):
                rows[which].append(row_of(name, which, case, reference, answer))
        for i, columns in found.items():
            rows["questions"][i].update(columns)
        for row in rows["questions"]:
            obeyed = self.replies.get(row["utterance"])
            if obeyed is not None and not exact_match(obeyed, row["reference"]):
                row["anchored"] = exact_match(obeyed, row["answer"])
        in_order = []
        for which in SETS:
            in_order += rows[which]
        return in_order


def read_record(path, fingerprint, *keys):
    """What is kept at `path` if it is whole and was measured under this fingerprint, or None."""
    record = read_json_if_whole(path, "fingerprint", *keys, instead="it is measured anew")
    return record if record and record["fingerprint"] == fingerprint else None


@first_process
def forget_records(folder, systems):
    """Delete what is kept of these systems, so that they are asked and measured anew."""
    for system in systems:
        (folder / f"{system}.json").unlink(missing_ok=True)
        for which in (*SETS, "replies"):
            for path in kept_parts(folder / f"{system}-{which}"):
                path.unlink()
    for path in folder.glob("text-*.answers.json"):
        path.unlink()


# ---- scores ----


def row_of(name, which, case, reference, answer):
    """A row of the table of answers: who was asked what, and how the answer scores."""
    metrics = all_metrics(reference, answer)
    ignored = None
    if which == "questions" and differs_from_transcript(case, reference):
        ignored = exact_match(case.utterance.text, answer)
    return {
        "system": name,
        "set": which,
        "cell": case.cell,
        "kind": case.utterance.kind,
        "task": case.task.name,
        "prompt": case.prompt,
        "utterance": case.utterance.id,
        "speaker": case.utterance.speaker,
        "audio": str(case.utterance.audio),
        "transcript": case.utterance.text,
        "reference": reference,
        "answer": answer,
        "score": round(score(case.task.metric, reference, answer), 6),
        "copy": round(score(case.task.metric, reference, case.utterance.text), 6),  # copy's score
        # against the reference, like the score; *repeat*'s WER in reports is by the transcript
        **{metric: round(value, 6) for metric, value in metrics.items()},
        "ignored_instruction": ignored,  # did it answer with the transcript instead?
        "anchored": None,  # on a directive: did it do what the speech says?
        "mistake": "",  # of a wrong answer that was looked into: how it is wrong
        "behavior_gap": None,
        "attention_on_instruction": None,
        "attention_on_utterance": None,
    }


def exact_match(reference, answer):
    """1.0 if they differ in case and punctuation at most, else 0.0."""
    return float(as_compared(reference) == as_compared(answer))


@lru_cache(maxsize=2**16)  # a transcript is compared with many answers, and with the right one
def word_error_rate(reference, answer):
    """From 0, and above 1 where words were added: jiwer's, over normalized words."""
    import jiwer

    reference, answer = normalize(reference), normalize(answer)
    return jiwer.wer(reference, answer) if reference else float(bool(answer))


def chrf(reference, answer):
    """From 0 to 1, by sacrebleu; chrF of Popović 2015."""
    from sacrebleu import sentence_chrf

    return sentence_chrf(answer, [reference]).score / 100 if reference else float(not answer)


def bleu(reference, answer):
    """From 0 to 1, by sacrebleu, of one sentence."""
    from sacrebleu import sentence_bleu

    return sentence_bleu(answer, [reference]).score / 100 if reference else float(not answer)


def score(metric, reference, answer):
    """From 0 to 1, by the metric of a task; for "wer" it is the word accuracy."""
    found = all_metrics(reference, answer)
    return max(0.0, 1.0 - found["wer"]) if metric == "wer" else found[metric]


@lru_cache(maxsize=2**16)  # many answers are the same
def all_metrics(reference, answer):
    """Every metric of one answer, whichever its score is made of."""
    return {
        "exact": exact_match(reference, answer),
        "wer": word_error_rate(reference, answer),
        "chrf": chrf(reference, answer),
        "bleu": bleu(reference, answer),
    }


def differs_from_transcript(case, reference):
    """Is the right answer another text than the transcript? If not, repeating it is no mistake."""
    return case.task.name != "repeat" and not exact_match(case.utterance.text, reference)


# ---- directives: what the speech says to do ----

REPLY = Task("reply", "train", "exact", prompts=[], unseen_prompts=[])  # to a bare directive


def directives_of(cases):
    """The utterances of kind "directive", each once: questions and commands complete in themselves.

    A corpus names the kind of its utterances, or there are none.
    """
    found = {}
    for case in cases:
        if case.utterance.kind == "directive":
            found[case.utterance.id] = case.utterance
    return list(found.values())


def bare_directive(utterance):
    """The Case in which the directive is the prompt, and nothing goes with it.

    again: here, too, it says that no utterance of its own comes with the prompt.
    """
    return Case(utterance, REPLY, utterance.text, "seen", again=True)


if __name__ == "__main__":  # the same as `python mtbi.py bench`
    from mtbi import main

    sys.exit(main(["bench", *sys.argv[1:]]))
