"""From sound files and transcripts to batches.

How a sample travels:

    manifest row -> Utterance -> (stage 1) Behavior -> parts [Text, Speech, Text, Response] -> batch

The chapters below follow it: audio, utterances, tasks and recipes, behaviors, parts, interleaving,
examples; and run folders, which are what stage 1 leaves for the training and the benchmark.
"""

import hashlib
import os
import random
import re
import tomllib
import unicodedata
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import support  # noqa: F401  first: torch reads what it sets
import numpy as np
import soundfile
import torch

from support.chat_template import AUDIO_MARK, BREAK, as_plain_text, end_of_turn, marks_of
from support.chat_template import render_chat, tokenize_answer, tokenize_in_context
from support.checks import check_task, is_turn
from support.console import progress_bar
from support.files import UserError, ceil_div, fingerprint, relative, whole_file
from support.files import read_json_if_whole, read_jsonl, read_lines
from support.hub import fingerprint_of_small_files, fingerprint_of_weights
from support.recordings import LONGEST, MAX_SECONDS, audio_name, checked_row, read_sound
from support.recordings import check_length, check_text_fits, check_words
from support.runs import read_config

SAMPLE_RATE = 16000  # Hz; everything is resampled to it
MIN_SECONDS = 0.1  # less gives some encoders not one frame
ZERO_WIDTH_SPACE = "\u200b"  # parts words where spaces do not
LOUDEST = 100  # largest sample of a float file; full scale is 1, so more than that is no sound


# ---- audio ----


def load_audio(path, duration=None, max_seconds=None):
    """float32 samples (n,), mono, at SAMPLE_RATE, of a WAV, FLAC, OGG or MP3 file of any rate.

    duration: seconds, as the manifest says; a file that holds clearly less was cut off, which is a
    UserError. max_seconds: the longest that is read; without it a little more than `duration`, or
    MAX_SECONDS. UserErrors name the file and what is wrong.
    """
    path = Path(path)
    samples, rate = read_sound(path, duration, max_seconds)  # (n,)
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: the audio holds NaN or infinite samples")
    peak = np.abs(samples).max()
    if peak < 1e-4:
        raise UserError(f"{path}: the audio is silent")
    if peak > LOUDEST:
        raise UserError(
            f"{path}: its samples go up to {peak:.0f}, where 1 is the loudest that is played; "
            "divide them (by 32768 if they were 16-bit numbers) and write it anew"
        )
    seconds = len(samples) / rate
    if seconds < MIN_SECONDS:
        raise UserError(
            f"{path}: the audio is too short ({seconds:.3f} s; at least {MIN_SECONDS} s are needed)"
        )
    return at_sample_rate(samples, rate)


def at_sample_rate(samples, rate):
    """Samples (n,) of `rate` Hz, resampled to SAMPLE_RATE.

    The memory it takes grows with both numbers of the ratio of the rates, so they are at most 1000:
    8000 Hz is 1:2, and 44101 Hz is taken as 328:119. That is never 0.1% off.
    """
    if rate == SAMPLE_RATE:
        return samples
    from torchaudio.functional import resample

    low, high = sorted((rate, SAMPLE_RATE))
    ratio = Fraction(low, high).limit_denominator(1000)
    old, new = ratio.numerator, ratio.denominator
    if rate > SAMPLE_RATE:
        old, new = new, old
    return resample(torch.from_numpy(samples), old, new).numpy()


def write_audio(path, samples):
    """Write samples (n,) at SAMPLE_RATE; what is beyond -1 and 1 is clipped."""
    with whole_file(path, lasting=False) as temporary:  # there are thousands of these
        soundfile.write(temporary, np.clip(samples, -1, 1), SAMPLE_RATE)


# ---- utterances ----


@dataclass
class Utterance:
    """One manifest row: a recording and what is said in it."""

    audio: Path
    text: str  # the transcript
    duration: float  # seconds
    speaker: str = ""
    split: str = ""  # "train" or "test"
    words: list = None  # word times [[word, start_s, end_s], ...], one per word of `text`, or None
    id: str = ""  # the audio path as the manifest writes it
    kind: str = ""  # what sort of utterance it is, if the corpus says so; reports are split by it

    def row(self, folder):
        """The manifest row of this utterance, for a manifest in `folder`."""
        row = {
            "audio_filepath": relative(self.audio, folder),
            "duration": round(self.duration, 4),
            "text": self.text,
            "speaker": self.speaker,
            "split": self.split,
        }
        if self.kind:
            row["kind"] = self.kind
        if self.words:
            row["words"] = [[word, round(s, 4), round(e, 4)] for word, s, e in self.words]
        return row


def parse_row(row, folder):
    """The Utterance of a manifest row; UserError says what is wrong with it.

    Its duration is 0 if the row does not say.
    """
    row = checked_row(row)
    audio = Path(folder) / row.pop("audio_filepath")
    return Utterance(audio, **row)


def read_manifest(path, rows=None, check_audio=False, skipped=None, max_seconds=None):
    """The utterances of a JSONL manifest, or of the rows of another corpus at `path`.

    rows: [(line number or name, row)]. A bad row is a UserError naming file and line; or, if
    `skipped` is a list, it goes there. check_audio: read every file, and measure its duration.
    max_seconds: how long a recording may be; None: as long as its folder allows.
    """
    path = Path(path)
    utterances = []
    lines = {}  # {path of a sound file: the row that has it}
    folder = path if path.is_dir() else path.parent
    rows = list(read_jsonl(path)) if rows is None else rows
    max_seconds = max_seconds or seconds_allowed(folder)
    bar = progress_bar(rows, desc="check audio", unit="utt") if check_audio else rows
    for number, row in bar:
        try:
            utterance = parse_row(row, folder)
            audio = os.path.abspath(utterance.audio)
            if audio in lines:
                raise UserError(f"has the same audio file as line {lines[audio]}")
            settle_duration(utterance, check_audio, max_seconds)
            lines[audio] = number
            utterances.append(utterance)
        except (UserError, OSError) as error:
            if skipped is None:
                raise UserError(f"{path}:{number}: {error}") from None
            name = audio_name(row)
            reason = str(error).removeprefix(f"{folder / name}: ")
            skipped.append({"line": number, "audio_filepath": name, "reason": reason})
    if not utterances:
        why = ""
        if skipped:
            why = f"; the first bad row is line {skipped[0]['line']}: {skipped[0]['reason']}"
        raise UserError(f"{path}: holds no usable utterance{why}")
    return utterances


def seconds_allowed(folder):
    """How long a recording of a data folder may be: what `prepare --max-seconds` said there."""
    options = (read_json_if_whole(folder / "config.json") or {}).get("options")
    said = options.get("max_seconds") if isinstance(options, dict) else None
    is_number = isinstance(said, (int, float)) and 0 < said <= LONGEST
    return said if is_number else MAX_SECONDS


def settle_duration(utterance, check_audio, max_seconds):
    """Measure an utterance's duration, or see that its row gave one; neither may be too long."""
    if utterance.duration:
        check_length(utterance.duration, None, max_seconds)
    if check_audio:
        samples = load_audio(utterance.audio, utterance.duration, max_seconds)
        utterance.duration = len(samples) / SAMPLE_RATE
        if utterance.words:
            check_words(utterance.words, utterance.text, utterance.duration)
    elif not utterance.duration:
        raise UserError("lacks the key 'duration'; `prepare` measures it")
    check_text_fits(utterance.text, utterance.duration)


def fingerprint_of_utterances(utterances):
    """Names what stage 1 depends on: audio, transcripts and split; word times may come later."""
    return fingerprint([(u.id, u.text, u.split) for u in utterances])


def is_mark(letter):
    """Is it an accent or a vowel sign, which stands with the letter before it?"""
    return unicodedata.category(letter).startswith("M")


def normalize(text):
    """The words in small letters: accents and vowel signs stay, punctuation goes (but for "_")."""
    kept = ""
    for letter in unicodedata.normalize("NFC", text.lower()):
        if unicodedata.category(letter) == "Cf" and letter != ZERO_WIDTH_SPACE:
            continue  # like a joiner of letters: it is within a word
        is_of_a_word = letter.isalnum() or letter == "_"
        if is_mark(letter) and kept and kept[-1] != " ":
            is_of_a_word = True  # it belongs to the letter before it
        kept += letter if is_of_a_word else " "
    return " ".join(kept.split())


def as_compared(text):
    """What is the same for two texts that differ in case or punctuation alone.

    Texts of signs alone, which have no words, are compared sign by sign.
    """
    return normalize(text) or text.strip()


def held_out(text):
    """Is it one of the transcripts for testing, one in eight by a hash of its words?

    The tiny LLM's pre-training holds out the same ones (tiny/world.py).
    """
    return hashlib.sha256(as_compared(text).encode()).digest()[0] < 32


# ---- tasks and recipes ----


@dataclass
class Task:
    """One table of tasks.toml: what can be asked of an utterance."""

    name: str
    split: str  # "train": stage 2 may train on it; "unseen": kept for the benchmark
    metric: str  # "exact", "wer" or "chrf", of which eval.py's score() makes a number
    prompts: list
    unseen_prompts: list
    transcripts: str = ".*"  # the task applies to transcripts that match this pattern

    def applies(self, text):
        return re.fullmatch(self.transcripts, text) is not None


def load_tasks(path):
    """{name: Task} of a tasks.toml; UserError names the table that is wrong."""
    try:
        table = tomllib.loads("\n".join(read_lines(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a task table ({error})") from None
    tasks = {}
    for name, entry in table.items():
        try:
            tasks[name] = Task(name, **entry)
            re.compile(tasks[name].transcripts)
            check_task(tasks[name])
        except (TypeError, re.error, UserError) as error:
            why = str(error).replace("Task.__init__() ", "")
            raise UserError(f"{path}: task [{name}]: {why}") from None
    check_prompts(path, tasks.values())
    if "repeat" not in tasks or tasks["repeat"].split != "train":
        raise UserError(
            f"{path}: there is no training task [repeat], which recipes and the benchmark's "
            "word accuracy need"
        )
    return tasks


def check_prompts(path, tasks):
    """UserError if a prompt that training sees is to be an unseen one, or one of an unseen task."""
    seen = {}  # {prompt: the task that trains on it}
    for task in tasks:
        if task.split == "train":
            seen |= {as_compared(prompt): task.name for prompt in task.prompts}
    for task in tasks:
        unseen = (
            task.unseen_prompts if task.split == "train" else task.prompts + task.unseen_prompts
        )
        for prompt in unseen:
            trains_on_it = seen.get(as_compared(prompt))
            if trains_on_it:
                raise UserError(
                    f"{path}: task [{task.name}]: {prompt!r} is to be unseen, and task "
                    f"[{trains_on_it}] trains on it"
                )


FULL = "full"  # in place of the rank of an adapter: all of the LLM is trained


@dataclass(frozen=True)
class Recipe:
    """One row of the recipe table: what makes one paper's system differ from another's.

    `Examples`, below, is where most of it takes effect.
    """

    about: str
    # which of the training tasks, as names or patterns
    tasks: tuple = ("*",)
    # a key of model.CONNECTORS; "": nothing is trained
    connector: str = "stack-mlp"
    # speech tokens per second; with the encoder's frame rate it says how many frames make one
    tokens_per_second: float = 6.6
    # rank of a LoRA adapter on the LLM; 0: the LLM is frozen; or FULL
    lora: int | str = 0
    # share of examples in which spans of words enter as text
    interleave: float = 0.0
    # share of the words that are text in such an example
    text_words: float = 0.4
    # mean length of a text span in it, words
    span: float = 2.0
    # share of the task "repeat": at the start, and from half-way on
    repeat: tuple = (0.0, 0.0)
    # a key of model.LOSSES
    loss: str = "ce"
    # share of examples without speech: the LLM reads the transcript, and any training task is asked
    text_only: float = 0.0
    # share of mixed-modal turns: of a conversation in text some utterances, or spans, are spoken
    mixed: float = 0.0
    # which share of the training utterances is used
    speech: float = 1.0
    # the kinds of utterances that are used, where the corpus names kinds; none: all
    kinds: tuple = ()
    # how many prompts of a task are used: in alphabetical order the first of those that stage 1
    # asked; 0: all
    prompts: int = 0
    # are the answers of "repeat" the true transcripts, and not what the LLM says?
    true_transcripts: bool = False

    def changed(self):
        """{field: value} of all that differs from the defaults, but for `about`."""
        changed = {}
        for knob in fields(self):
            value = getattr(self, knob.name)
            if knob.name != "about" and value != knob.default:
                changed[knob.name] = value
        return changed

    def check(self):
        """UserError if some of its examples would train nothing."""
        if self.text_only and not self.lora:
            raise UserError(
                "a recipe with text-only examples trains an adapter; with --lora 0 there is "
                "nothing in them to train"
            )

    def trains_on(self, task):
        return any(fnmatchcase(task, pattern) for pattern in self.tasks)

    def repeat_share(self, done):
        """Share of the task "repeat" when so much of the training is done (0 to 1)."""
        start, end = self.repeat
        return start + (end - start) * min(1.0, 2 * done)


# ---- behaviors: what stage 1 asks, and what it was answered ----


@dataclass
class Behavior:
    """The LLM's own answer to a prompt about a transcript: what stage 2 imitates."""

    utterance: str  # Utterance.id
    task: str
    prompt: str
    response: str
    ended: bool = True  # False: cut off at the longest length allowed, so its end is not imitated
    llm: str = ""  # fingerprint of the LLM that gave it
    earlier: list = field(default_factory=list)  # turns before: [[prompt, Utterance.id, answer]]
    again: bool = False  # the question is about the earlier utterance, and comes without its own

    def messages(self):
        turns = [(prompt, answer) for prompt, _, answer in self.earlier]
        return dialogue(turns, self.prompt, self.again)

    def utterances(self):
        """The ids of the utterances it is about, in the order in which they are said."""
        said = [utterance for _, utterance, _ in self.earlier]
        if not self.again:
            said.append(self.utterance)
        return said


def read_behaviors(path):
    """The behaviors that stage 1 wrote; UserError names the line that is none."""
    texts = ("utterance", "task", "prompt", "response")
    behaviors = []
    for number, row in read_jsonl(path, ours=True):
        if isinstance(row, str) or not all(isinstance(row.get(key), str) for key in texts):
            raise UserError(f"{path}:{number}: is no behavior; run `behaviors` again with --force")
        ended, again = row.get("ended", True), row.get("again", False)
        if not isinstance(ended, bool) or not isinstance(again, bool):
            raise UserError(f'{path}:{number}: "ended" and "again" must be true or false')
        earlier = row.get("earlier") or []
        if not isinstance(earlier, list) or not all(is_turn(turn) for turn in earlier):
            raise UserError(
                f"{path}:{number}: its earlier turns are no turns; run `behaviors` again with "
                "--force"
            )
        behaviors.append(
            Behavior(
                *(row[key] for key in texts),
                ended=ended,
                llm=str(row.get("llm", "")),
                earlier=earlier,
                again=again,
            )
        )
    return behaviors


# ---- parts: what a conversation is made of before it becomes embeddings ----


@dataclass
class Text:
    ids: list  # token ids of text that is read
    is_instruction: bool = False  # the prompt's own tokens, where chat_parts is told to mark them


@dataclass
class Speech:
    frames: torch.Tensor  # (T, D_encoder) encoder frames


@dataclass
class Response:
    # token ids of the answer and, unless it was cut off, the end-of-turn token: the only part that
    # carries loss
    ids: list


def positions_of(part, k):
    """How many positions a part takes in the LLM, with k frames per speech token."""
    return ceil_div(len(part.frames), k) if isinstance(part, Speech) else len(part.ids)


def transcript_tokens(tokenizer, text):
    """The Text of a transcript that is read in place of the speech."""
    return Text(tokenize_in_context(tokenizer, text)[0])


def response_tokens(tokenizer, text, ended=True):
    """The token ids to imitate: the answer and, unless it was cut off, the end of its turn."""
    ids = tokenize_answer(tokenizer, text)
    return ids + [end_of_turn(tokenizer)] if ended else ids


def chat_parts(tokenizer, messages, audio, response=None, instruction=None):
    """Parts of a conversation in the Hugging Face message format.

    The one way into the LLM: training, generation and the benchmark all come through here.

    audio: one list of parts per audio entry, in order (speech, its transcript as text, or the two
    interleaved). response: token ids of the answer, or None to leave the conversation open for
    generation. instruction: a text in it whose tokens are to be a Text of their own, marked.
    """
    turns = []
    for message in messages:
        content = flatten(tokenizer, message["content"])
        turns.append({"role": message["role"], "content": content})
    rendered = render_chat(tokenizer, turns)
    if rendered.count(AUDIO_MARK) != len(audio):
        raise UserError(
            f"the conversation names {rendered.count(AUDIO_MARK)} audio entries, but {len(audio)} "
            "were given"
        )
    begin, end = 0, 0
    if instruction:
        begin, end = place_of(as_plain_text(tokenizer, instruction.strip()), rendered)

    parts = split_at_marks(tokenizer, rendered, audio, begin, end)
    if response is not None:
        parts.append(Response(response))
    return parts


def split_at_marks(tokenizer, rendered, audio, begin, end):
    """The parts of a rendered conversation; each AUDIO_MARK makes room for the next of `audio`.

    The tokens of the characters from begin to end, the instruction's, are in a Text of their own.
    """
    marks = marks_of(tokenizer)
    audio = iter(audio)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    parts = [Text([])]
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        if token == marks[BREAK]:  # it kept a user's words from being read as a control token
            continue
        if token == marks[AUDIO_MARK]:
            parts += [*next(audio), Text([])]
            continue
        inside = start < end and stop > begin  # if only in part, as one that begins with a space
        if inside != parts[-1].is_instruction:
            parts.append(Text([], is_instruction=inside))
        parts[-1].ids.append(token)
    return [p for p in parts if not isinstance(p, Text) or p.ids]


def place_of(instruction, rendered):
    """(begin, end) of an instruction: the last place before the speech that has its words."""
    begin = rendered.rfind(instruction, 0, rendered.rfind(AUDIO_MARK))
    return (begin, begin + len(instruction)) if begin >= 0 else (0, 0)


def flatten(tokenizer, content):
    """What a message says as one text, with AUDIO_MARK where audio goes."""
    if isinstance(content, str):
        return as_plain_text(tokenizer, content)
    pieces = []
    for entry in content:
        is_text = entry["type"] == "text"
        pieces.append(as_plain_text(tokenizer, entry["text"]) if is_text else AUDIO_MARK)
    return "\n".join(pieces)


def user_turn(prompt, audio=None):
    """The one-turn conversation of the benchmark and of both stages: a prompt, then speech."""
    content = [{"type": "text", "text": prompt}, {"type": "audio", "audio": audio}]
    return [{"role": "user", "content": content}]


def dialogue(earlier, prompt, again=False):
    """A conversation of several turns: [(prompt about an utterance, answer)], then a question.

    again: it is about the earlier utterance, so that it comes without one of its own.
    """
    turns = []
    for said, answer in earlier:
        turns += [*user_turn(said), {"role": "assistant", "content": answer}]
    if again:
        return [*turns, {"role": "user", "content": prompt}]
    return [*turns, *user_turn(prompt)]


# ---- interleaving ----


def random_spans(rng, n, share, mean):
    """n flags, a share of them True in runs of `mean` words on average.

    That speech and text are interleaved is MTBI's (arXiv 2505.18644); how spans are drawn is ours.
    A two-state Markov chain: a run of True ends with probability 1 / mean. Between two runs is a
    word at least, so that a large share makes them longer.
    """
    if share >= 1:
        return [True for _ in range(n)]
    mean = max(1.0, mean, share / (1 - share))
    enter = share / (mean * (1 - share))
    flag = rng.random() < share
    flags = []
    for _ in range(n):
        flags.append(flag)
        flag = rng.random() >= 1 / mean if flag else rng.random() < enter
    return flags


def interleave(tokenizer, utterance, frames, as_text):
    """The words flagged in `as_text` as text tokens, the others as speech: alternating parts.

    Text tokens are the whole transcript's tokens, assigned to words by character offsets; frames
    (T, D_encoder) are cut midway between two words. All True gives exactly the transcript's
    tokens, all False exactly the utterance's frames.
    """
    ids, word_of = tokens_and_words(tokenizer, utterance.text)
    cuts = frame_cuts(utterance, len(frames))
    parts = []
    begin = 0
    for is_text, flags in groupby(as_text):
        end = begin + len(list(flags))  # the words from `begin` up to `end` are of one kind
        if is_text:
            parts.append(Text([i for i, word in zip(ids, word_of) if begin <= word < end]))
        else:
            parts.append(Speech(frames[cuts[begin] : cuts[end]]))  # (T_span, D_encoder)
        begin = end
    return parts


def tokens_and_words(tokenizer, text):
    """(token ids of the whole text, for each the number of the word it belongs to)."""
    ids, starts = tokenize_in_context(tokenizer, text)
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    word_of = []
    for start in starts:
        # how many words (but the last) have ended: a space belongs to the word that it precedes
        word_of.append(sum(end <= start for end in ends[:-1]))
    return ids, word_of


def frame_cuts(utterance, n_frames):
    """The n + 1 borders of n words, in frames: 0, midway between each two of them, and the end."""
    rate = n_frames / utterance.duration  # frames a second
    cuts = [0]
    for (_, _, end), (_, start, _) in zip(utterance.words, utterance.words[1:]):
        cuts.append(round((end + start) / 2 * rate))
    return [*cuts, n_frames]


# ---- examples: from behaviors to batches ----

BUCKET = 24  # batches drawn together and sorted by length: 95% or more of their positions are used


@dataclass
class Example:
    """One conversation that ends in a Response."""

    parts: list  # what the LLM hears and reads, and the Response
    teacher: list | None  # the same with every transcript as text, for a loss that has a teacher

    def positions(self, k):
        """How many positions it takes in the LLM, with k frames per speech token."""
        return sum(positions_of(part, k) for part in self.parts)


def subset_of(utterances, share):
    """A share of the utterances, whatever the seed; a smaller one is a part of a larger."""
    by_hash = sorted(utterances, key=lambda u: hashlib.sha256(u.id.encode()).digest())
    kept = {u.id for u in by_hash[: max(1, round(share * len(utterances)))]}
    return [u for u in utterances if u.id in kept]


@dataclass
class Examples:
    """The training set of a run.

    A step is `accumulate` micro-batches of `batch_size` conversations; which ones is a pure
    function of the settings below, the step and the micro-batch, so that there is no data position
    to save, and the step is the same on any number of processes, but for its dropout.
    """

    tokenizer: object
    utterances: list  # those of the training split
    behaviors: list
    frames: object  # {utterance id: frames (T, D_encoder)}
    recipe: Recipe
    _: KW_ONLY
    k: int  # frames per speech token: what is of similar length shares a batch
    steps: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    with_teacher: bool = False  # does the loss have a teacher, which reads the transcripts?

    def __post_init__(self):
        # of the utterances those that the recipe may use
        self.by_id = {u.id: u for u in subset_of(self.of_its_kinds(), self.recipe.speech)}
        self.behaviors_about = {}  # {utterance id: {"repeat": [Behavior], "other": [Behavior]}}
        self.in_text = []  # behaviors of one turn, for examples without speech
        self.dialogues = []  # behaviors of two turns, for mixed-modal ones
        self.sort_behaviors()
        self.trained_on = [self.by_id[i] for i in self.behaviors_about]
        self.check()
        # steps in a row ask for batches of one bucket, or of two neighbours
        self.bucket = lru_cache(maxsize=2)(self.draw_bucket)

    def of_its_kinds(self):
        """The utterances that the recipe is for."""
        if not self.recipe.kinds or not any(u.kind for u in self.utterances):
            return self.utterances
        return [u for u in self.utterances if u.kind in self.recipe.kinds]

    def sort_behaviors(self):
        """Put each behavior where examples are drawn from: about, in_text, dialogues."""
        for b in self.as_the_recipe_has_them():
            if any(i not in self.by_id for i in b.utterances()):
                continue
            is_trained_on = self.recipe.trains_on(b.task)
            if b.earlier:
                if is_trained_on:
                    self.dialogues.append(b)
                continue
            self.in_text.append(b)  # whatever its task
            if is_trained_on:
                sorts = self.behaviors_about.setdefault(b.utterance, {"repeat": [], "other": []})
                sorts["repeat" if b.task == "repeat" else "other"].append(b)

    def as_the_recipe_has_them(self):
        """The behaviors, with fewer prompts and true transcripts where the recipe wants that.

        A behavior whose prompt is not used keeps its answer, and gets a prompt that is: right for
        tasks like *repeat*, where every wording has the same answer.
        """
        asked = {}  # {task: its prompts}
        for b in self.behaviors:
            asked.setdefault(b.task, set()).add(b.prompt)
        asked = {task: sorted(prompts) for task, prompts in asked.items()}
        for b in self.behaviors:
            if self.recipe.prompts:
                prompts = asked[b.task]
                at = prompts.index(b.prompt) % self.recipe.prompts
                b = replace(b, prompt=prompts[at])
            if self.recipe.true_transcripts and b.task == "repeat" and b.utterance in self.by_id:
                b = replace(b, response=self.by_id[b.utterance].text, ended=True)
            yield b

    def check(self):
        """UserError if this recipe cannot be trained on these behaviors; says what is left out."""
        recipe = self.recipe
        if len(self.trained_on) < self.batch_size:
            raise UserError(
                f"{len(self.trained_on)} utterances have behaviors for this recipe, fewer than one "
                f"batch of {self.batch_size}: prepare more speech, lower --batch-size, or see that "
                "the task table has the recipe's tasks"
            )
        if recipe.interleave and not any(len(u.words or []) > 1 for u in self.trained_on):
            print("interleaving is off: no utterance of this data has the times of two words")
        if recipe.mixed and not self.dialogues:
            print("mixed-modal turns are off: `behaviors` asked no questions of two turns")

    @property
    def per_epoch(self):
        """Batches per epoch."""
        return len(self.trained_on) // self.batch_size

    def batch(self, step, micro=0):
        """The examples of micro-batch `micro` of step `step`."""
        number = step * self.accumulate + micro  # counted from the start of the training
        epoch, of_epoch = divmod(number, self.per_epoch)
        bucket, of_bucket = divmod(of_epoch, BUCKET)
        return self.bucket(epoch, bucket)[of_bucket]

    def draw_bucket(self, epoch, number):
        """Up to BUCKET batches of an epoch: examples of similar length share one, in random order.

        The first batch of a training is the longest of its bucket, and the longest utterance is
        in that bucket, most often in that batch: if the memory does not suffice, the first step
        most likely shows it.
        """
        first = number * BUCKET * self.batch_size
        chosen = self.epoch_order(epoch)[first : first + BUCKET * self.batch_size]
        batches_before = epoch * self.per_epoch + number * BUCKET
        done = batches_before / (self.steps * self.accumulate)
        rng = random.Random(f"bucket-{self.seed}-{epoch}-{number}")
        examples = []
        for utterance in chosen:
            examples.append(self.conversation(*self.draw(rng, utterance, done)))

        examples.sort(key=lambda example: example.positions(self.k))
        batches = []
        for at in range(0, len(examples), self.batch_size):
            batches.append(examples[at : at + self.batch_size])
        longest = batches.pop()
        rng.shuffle(batches)
        is_very_first = epoch == 0 and number == 0
        place = 0 if is_very_first else rng.randint(0, len(batches))
        batches.insert(place, longest)
        return batches

    def epoch_order(self, epoch):
        """The utterances in the random order of an epoch; the first begins with the longest of all.

        What is left over when the batches are full differs from epoch to epoch.
        """
        rng = random.Random(f"epoch-{self.seed}-{epoch}")
        order = rng.sample(self.trained_on, self.per_epoch * self.batch_size)
        if epoch == 0:
            longest = max(self.trained_on, key=lambda u: u.duration)
            others = [u for u in order if u is not longest]
            order = [longest, *others][: len(order)]
        return order

    def conversation(self, behavior, audio):
        """The Example of a behavior; audio: the parts that stand for each of its utterances."""
        response = response_tokens(self.tokenizer, behavior.response, behavior.ended)
        messages = behavior.messages()
        teacher = None
        if self.with_teacher:
            transcripts = [self.read(self.by_id[i]) for i in behavior.utterances()]
            teacher = chat_parts(self.tokenizer, messages, transcripts, response)
        return Example(chat_parts(self.tokenizer, messages, audio, response), teacher)

    # -- which behavior, and how its utterances are put before the LLM --

    def draw(self, rng, utterance, done):
        """(behavior, parts that stand for each of its utterances) of one example.

        utterance: whose turn it is in the epoch; an example that is text-only or mixed has others.
        done: how much of the training is done, from 0 to 1.
        """
        recipe = self.recipe
        if recipe.text_only or recipe.mixed:  # so others draw the same numbers as without this
            chance = rng.random()
            if chance < recipe.text_only:
                return self.draw_text_only(rng)
            if self.dialogues and chance < recipe.text_only + recipe.mixed:
                return self.draw_mixed_turns(rng)
        return self.draw_about(rng, utterance, done), [self.listen(rng, utterance)]

    def draw_about(self, rng, utterance, done):
        """A behavior about the utterance; how often it is "repeat", the recipe says."""
        behaviors = self.behaviors_about[utterance.id]
        want = "repeat" if rng.random() < self.recipe.repeat_share(done) else "other"
        if not behaviors[want]:
            want = "other" if want == "repeat" else "repeat"
        return rng.choice(behaviors[want])

    def draw_text_only(self, rng):
        """Any training task about a transcript that is read."""
        behavior = rng.choice(self.in_text)
        return behavior, [self.read(self.by_id[behavior.utterance])]

    def draw_mixed_turns(self, rng):
        """Of a conversation of two turns at least one utterance is spoken."""
        behavior = rng.choice(self.dialogues)
        said = [self.by_id[i] for i in behavior.utterances()]
        spoken = {rng.randrange(len(said))}
        for i in range(len(said)):
            if rng.random() < 0.5:
                spoken.add(i)
        audio = []
        for i, utterance in enumerate(said):
            parts = self.listen_to_a_span(rng, utterance) if i in spoken else self.read(utterance)
            audio.append(parts)
        return behavior, audio

    def read(self, utterance):
        """Its transcript."""
        return [transcript_tokens(self.tokenizer, utterance.text)]

    def listen(self, rng, utterance):
        """Its speech, or speech and text interleaved."""
        frames = self.frames[utterance.id]
        recipe = self.recipe
        if not utterance.words or rng.random() >= recipe.interleave:
            return [Speech(frames)]
        as_text = random_spans(rng, len(utterance.words), recipe.text_words, recipe.span)
        if all(as_text):  # without speech there is nothing to learn
            as_text[rng.randrange(len(as_text))] = False
        return interleave(self.tokenizer, utterance, frames, as_text)

    def listen_to_a_span(self, rng, utterance):
        """All of it as speech; or, half the time, one span of its words, and the rest as text."""
        frames = self.frames[utterance.id]
        if not utterance.words or rng.random() < 0.5:
            return [Speech(frames)]
        n = len(utterance.words)
        start = rng.randrange(n)
        end = start + rng.randint(1, n - start)
        as_text = [not start <= i < end for i in range(n)]
        return interleave(self.tokenizer, utterance, frames, as_text)


# ---- run folders: what stage 1 leaves for the training and the benchmark ----


@dataclass
class Run:
    """A run folder made by `behaviors`."""

    folder: Path
    options: dict  # of the command that made it
    content: dict  # fingerprints of what it was made from
    data: Path  # the data folder
    utterances: list

    def check_llm(self):
        """UserError if its LLM is not the one any more that gave the behaviors."""
        llm = self.options["llm"]
        small_files = fingerprint_of_small_files(llm, "llm")
        is_same = fingerprint_of_weights(llm, "llm") == self.content["llm"]
        if not is_same or self.content.get("llm_files", small_files) != small_files:
            raise UserError(
                f"{llm}: is not the LLM any more that gave the behaviors of {self.folder}; run "
                "`behaviors` again with --force"
            )

    def is_own(self, data):
        """Is it the data folder that the run was made from?"""
        return Path(data).resolve() == self.data.resolve()

    def packing(self):
        """{name: value}: how the LLM's weights are packed, which is part of what the LLM is."""
        packing = {"bits": self.options["bits"]}
        if self.options["head_bits"] != 16:
            packing["head_bits"] = self.options["head_bits"]
        return packing


# how an LLM may be loaded
LLM_OPTIONS = {"bits": (4, 8, 16), "head_bits": (4, 16), "embeddings": ("gpu", "host")}


def open_run(folder):
    """The Run in a folder; UserError if its behaviors are not complete or its data has changed."""
    folder = Path(folder)
    types = {"data": str, "llm": str, "bits": int, "tasks": str, "seed": int}
    options, content, done = read_config(folder, "behaviors", **types)
    if not done:
        raise UserError(
            f"{folder}: its behaviors are not complete; run `behaviors … --out {folder}` first"
        )
    options = {"head_bits": 16, "embeddings": "gpu", **options}  # older runs do not say
    for name, possible in LLM_OPTIONS.items():
        if options[name] not in possible:
            raise UserError(
                f"{folder / 'config.json'}: {name} is {options[name]}, which is none of {possible}"
            )
    data = folder / options["data"]
    utterances = read_manifest(data / "manifest.jsonl")
    if fingerprint_of_utterances(utterances) != content["utterances"]:
        raise UserError(
            f"{data / 'manifest.jsonl'}: has changed since `behaviors` wrote {folder}; run "
            "`behaviors` again with --force"
        )
    return Run(folder, options, content, data, utterances)
