"""What is trained on: tasks, recipes, behaviors, and the batches made of them."""

import hashlib
import random
import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from data import Speech, Text, chat_parts, dialogue, tokenize_in_context, transcript_tokens
from files import UserError, read_jsonl
from parallel import WORLD

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

METRICS = ("exact", "wer", "chrf")
ALWAYS = ("repeat", "continue")      # asked about every transcript they apply to, because some recipes train on one of them alone


# ---- tasks, recipes, behaviors ----

@dataclass
class Task:
    """One table of tasks.toml: what can be asked of an utterance."""
    name: str
    split: str               # "train": stage 2 may train on it; "unseen": kept for the benchmark
    metric: str              # one of METRICS
    prompts: list
    unseen_prompts: list
    transcripts: str = ".*"  # the task applies to transcripts that match this pattern

    def applies(self, text):
        return re.fullmatch(self.transcripts, text) is not None


def load_tasks(path):
    """{name: Task} of a tasks.toml; UserError names the table that is wrong."""
    try:
        table, tasks = tomllib.loads(Path(path).read_text(encoding="utf-8")), {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a task table ({error})") from None
    for name, entry in table.items():
        try:
            task = tasks[name] = Task(name, **entry)
            re.compile(task.transcripts)
        except (TypeError, re.error) as error:
            raise UserError(f"{path}: task [{name}]: {str(error).replace('Task.__init__() ', '')}") from None
        if task.split not in ("train", "unseen") or task.metric not in METRICS:
            raise UserError(f"{path}: task [{name}]: split must be train or unseen, metric one of {', '.join(METRICS)}")
        if any(not isinstance(ps, list) or not ps or not all(isinstance(p, str) and p for p in ps) for ps in (task.prompts, task.unseen_prompts)):
            raise UserError(f"{path}: task [{name}]: prompts and unseen_prompts must be lists of texts")
        if set(task.prompts) & set(task.unseen_prompts):
            raise UserError(f"{path}: task [{name}]: no prompt may be in prompts and in unseen_prompts")
    if "repeat" not in tasks or tasks["repeat"].split != "train":
        raise UserError(f"{path}: there is no training task [repeat], which recipes and the ignored-instruction rate need")
    return tasks


@dataclass(frozen=True)
class Recipe:
    """One row of the recipe table: what makes one paper's system differ from another's."""
    about: str
    tasks: tuple = ("*",)        # which of the training tasks, as names or patterns
    connector: str = "stack-mlp" # "": nothing is trained
    tokens_per_second: float = 5.6    # speech tokens a second of speech; how many encoder frames that makes one, the encoder's frame rate tells
    lora: int = 0                # rank of a LoRA adapter on the LLM; 0: the LLM is frozen
    interleave: float = 0.0      # share of examples in which spans of words enter as text
    text_words: float = 0.4      # share of words that are text in such an example
    span: float = 2.0            # mean length of a text span, words
    repeat: tuple = (0.0, 0.0)   # share of the task "repeat": at the start, and from half-way on
    lr: float = 1.0              # peak learning rate, as a share of the usual one: the Transformer layers of a Q-Former want a smaller one
    loss: str = "ce"             # "ce": the LLM's answer; "kl": its whole next-token distribution
    text_only: float = 0.0       # share of examples without speech: the LLM reads the transcript, and any training task is asked (text-only SFT)
    mixed: float = 0.0           # share of examples that are mixed-modal turns: of a conversation in text some utterances, or spans of them, are spoken
    speech: float = 1.0          # share of the training utterances that is used

    def trains_on(self, task):
        return any(fnmatch(task, pattern) for pattern in self.tasks)


@dataclass
class Behavior:
    """The LLM's own answer to a prompt about a transcript: what stage 2 imitates."""
    utterance: str           # Utterance.id
    task: str
    prompt: str
    response: str
    ended: bool = True       # False: cut off at the longest length allowed, so its end is not imitated
    llm: str = ""            # fingerprint of the LLM that gave it
    earlier: list = field(default_factory=list)      # turns before the question: [[prompt, Utterance.id, answer], ...]
    again: bool = False      # the question is about the earlier utterance, and comes without one of its own

    def messages(self):
        return dialogue([(prompt, answer) for prompt, _, answer in self.earlier], self.prompt, self.again)

    def utterances(self):
        """The ids of the utterances it is about, in the order in which they are said."""
        return [turn[1] for turn in self.earlier] + [self.utterance] * (not self.again)


def read_behaviors(path):
    behaviors = []
    for number, row in read_jsonl(path):
        if isinstance(row, str) or not all(isinstance(row.get(key), str) for key in ("utterance", "task", "prompt", "response")):
            raise UserError(f"{path}:{number}: is no behavior; run `imitate` again with --force")
        earlier = row.get("earlier") or []
        if not isinstance(earlier, list) or not all(isinstance(turn, list) and [type(x) for x in turn] == [str] * 3 for turn in earlier):
            raise UserError(f"{path}:{number}: its earlier turns are no turns; run `imitate` again with --force")
        behaviors.append(Behavior(row["utterance"], row["task"], row["prompt"], row["response"], bool(row.get("ended", True)), str(row.get("llm", "")),
                                  earlier, bool(row.get("again"))))
    return behaviors


# ---- the questions of stage 1 ----

def draw_questions(tasks, utterances, per_utterance, seed):
    """Behaviors that lack their response: training tasks and training prompts only."""
    rng, questions = random.Random(f"imitate-{seed}"), []
    for u in utterances:
        fitting = [t for t in tasks.values() if t.split == "train" and t.applies(u.text)]
        others = [t for t in fitting if t.name not in ALWAYS]
        for task in [*(t for t in fitting if t.name in ALWAYS), *rng.sample(others, min(per_utterance, len(others)))]:
            questions.append(Behavior(u.id, task.name, rng.choice(task.prompts), ""))
    return questions


def draw_dialogues(tasks, utterances, behaviors, per_utterance, seed):
    """Questions of a second turn, likewise: half of them about the utterance of the first turn once more, half about a new one."""
    rng, questions, about = random.Random(f"dialogues-{seed}"), [], {}
    for b in behaviors:
        about.setdefault(b.utterance, []).append(b)
    for u in utterances * per_utterance:
        fitting = [t for t in tasks.values() if t.split == "train" and t.applies(u.text)]
        if not fitting:
            continue
        again, task = rng.random() < 0.5, rng.choice(fitting)
        first = rng.choice(about.get(u.id, behaviors) if again else behaviors)
        again = again and first.utterance == u.id
        questions.append(Behavior(u.id, task.name, rng.choice(task.prompts), "", earlier=[[first.prompt, first.utterance, first.response]], again=again))
    return questions


# ---- from behaviors to batches ----

@lru_cache(maxsize=2)
def epoch_order(lengths, batch_size, seed, epoch):
    """One epoch's batches of indices of similar length; what is left over when the batches are full differs from epoch to epoch.

    The very first batch of a training is the longest of its epoch: if the memory does not suffice, that shows in the first step.
    """
    rng = random.Random(f"epoch-{seed}-{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths) // batch_size * batch_size)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if epoch == 0 and longest not in order:
        order[0] = longest
    bucket = 8 * batch_size
    ordered = [i for b in range(0, len(order), bucket) for i in sorted(order[b:b + bucket], key=lengths.__getitem__)]
    batches = [ordered[b:b + batch_size] for b in range(0, len(ordered), batch_size)]
    rng.shuffle(batches)
    if epoch == 0:
        first = next(i for i, batch in enumerate(batches) if longest in batch)
        batches[0], batches[first] = batches[first], batches[0]
    return batches


def random_spans(rng, n, share, mean):
    """n flags, a share of them True in runs of `mean` words on average (a two-state Markov chain)."""
    if share >= 1:
        return [True] * n
    enter, flag, flags = share / (mean * (1 - share)), rng.random() < share, []
    for _ in range(n):
        flags.append(flag)
        flag = rng.random() >= 1 / mean if flag else rng.random() < enter
    return flags


def interleave(tokenizer, utterance, frames, as_text):
    """The utterance with the words flagged in `as_text` as text tokens and the others as speech: alternating Text and Speech parts.

    Text tokens are the whole transcript's tokens, assigned to words by character offsets; frames are cut midway between two words.
    All True gives exactly the transcript's tokens, all False exactly the utterance's frames.
    """
    ids, starts = tokenize_in_context(tokenizer, utterance.text)
    ends = [match.end() for match in re.finditer(r"\S+", utterance.text)]
    token_word = [sum(end <= start for end in ends[:-1]) for start in starts]   # a space belongs to the word it precedes
    rate = len(frames) / utterance.duration
    cuts = [0, *(round((a[2] + b[1]) / 2 * rate) for a, b in zip(utterance.words, utterance.words[1:])), len(frames)]
    parts, first = [], 0
    for last in range(1, len(as_text) + 1):
        if last == len(as_text) or as_text[last] != as_text[first]:
            if as_text[first]:
                parts.append(Text([i for i, word in zip(ids, token_word) if first <= word < last]))
            else:
                parts.append(Speech(frames[cuts[first]:cuts[last]]))
            first = last
    return parts


def fewer(utterances, share):
    """A share of the utterances, the same whatever the seed; a smaller share is a part of a larger one."""
    order = sorted(range(len(utterances)), key=lambda i: hashlib.sha256(utterances[i].id.encode()).digest())
    kept = set(order[:max(1, round(share * len(utterances)))])
    return [u for i, u in enumerate(utterances) if i in kept]


class Examples:
    """The training set of a run. A step is `accumulate` micro-batches of `batch_size` conversations; which ones is a pure function of (seed, step,
    micro-batch), so that there is no data position to save, and the step is the same on any number of processes."""

    def __init__(self, model, utterances, behaviors, frames, recipe, steps, batch_size, seed, accumulate=1):
        self.model, self.frames, self.recipe = model, frames, recipe
        self.steps, self.batch_size, self.accumulate, self.seed = steps, batch_size, accumulate, seed
        self.by_id = by_id = {u.id: u for u in fewer(utterances, recipe.speech)}
        self.behaviors = {}      # utterance id -> {"repeat": [..], "other": [..]}
        self.in_text, self.dialogues = [], []
        for b in behaviors:
            if b.earlier:
                self.dialogues += [b] if recipe.trains_on(b.task) and all(i in by_id for i in (b.utterance, *(turn[1] for turn in b.earlier))) else []
            elif b.utterance in by_id:
                self.in_text.append(b)
                if recipe.trains_on(b.task):
                    kinds = self.behaviors.setdefault(b.utterance, {"repeat": [], "other": []})
                    kinds["repeat" if b.task == "repeat" else "other"].append(b)
        if recipe.text_only and not recipe.lora:
            raise UserError("a recipe with text-only examples trains an adapter; with --lora 0 there is nothing in them to train")
        self.utterances = [by_id[i] for i in self.behaviors]
        self.lengths = tuple(u.duration for u in self.utterances)
        if len(self.utterances) < batch_size:
            raise UserError(f"{len(self.utterances)} utterances have behaviors for this recipe, fewer than one batch of {batch_size}: "
                            "prepare more speech, lower --batch-size, or see that the task table has the recipe's tasks")
        if recipe.interleave and not any(u.words for u in self.utterances):
            print("interleaving is off: no utterance of this data has word times")
        if recipe.mixed and not self.dialogues:
            print("mixed-modal turns are off: `imitate` asked no questions of two turns")

    def explain(self):
        """Print how much speech there is, what a step is, and how much is trained."""
        seconds, k, step, model = sum(self.lengths), self.model.connector.k, self.batch_size * self.accumulate, self.model
        rate, trainable = model.encoder.frame_rate, sum(p.numel() for p in model.trainable().values())
        print(f"speech: {len(self.utterances)} utterances, {seconds / 60:.1f} minutes; {rate:.1f} encoder frames/s / k = {rate / k:.1f} speech tokens/s")
        print(f"batch: {self.batch_size} x accumulation {self.accumulate} = {step} utterances a step" +
              (f", divided among {WORLD} processes" if WORLD > 1 else "") + f"; {self.steps} steps = {self.steps * step / len(self.utterances):.1f} epochs")
        print(f"trainable: {trainable / 1e6:.2f}M parameters in fp32 (connector {self.recipe.connector}{', LoRA' if model.lora else ''}); "
              f"the LLM ({'NF4' if getattr(model.llm, 'is_loaded_in_4bit', False) else 'not 4-bit'}) and the encoder are frozen")

    def repeat_share(self, step):
        start, end = self.recipe.repeat
        return start + (end - start) * min(1.0, step / max(1, self.steps / 2))

    def choose(self, rng, utterance, step):
        kinds = self.behaviors[utterance.id]
        want = "repeat" if rng.random() < self.repeat_share(step) else "other"
        return rng.choice(kinds[want] or kinds["repeat"] or kinds["other"])

    def hear(self, rng, utterance):
        """The parts that stand for the utterance: its speech, or speech and text interleaved."""
        frames, recipe = self.frames[utterance.id], self.recipe
        if not utterance.words or rng.random() >= recipe.interleave:
            return [Speech(frames)]
        as_text = random_spans(rng, len(utterance.words), recipe.text_words, recipe.span)
        if all(as_text):                                           # without speech there is nothing to learn
            as_text[rng.randrange(len(as_text))] = False
        return interleave(self.model.tokenizer, utterance, frames, as_text)

    def hear_in_text(self, rng, utterance):
        """All of the utterance as speech; or, with word times, half the time one span of its words as speech and the rest as text."""
        if not utterance.words or rng.random() < 0.5:
            return [Speech(self.frames[utterance.id])]
        start = rng.randrange(len(utterance.words))
        length = rng.randint(1, len(utterance.words) - start)
        return interleave(self.model.tokenizer, utterance, self.frames[utterance.id], [not start <= i < start + length for i in range(len(utterance.words))])

    def example(self, rng, utterance, step):
        """(behavior, parts that stand for each of its utterances): about the speech of `utterance`; a share of them text alone, or mixed-modal turns."""
        kind, mixed = rng.random() if self.recipe.text_only or self.recipe.mixed else 1.0, self.recipe.mixed if self.dialogues else 0.0
        if kind < self.recipe.text_only:
            behavior = rng.choice(self.in_text)
            return behavior, [self.read(self.by_id[behavior.utterance])]
        if kind < self.recipe.text_only + mixed:
            behavior = rng.choice(self.dialogues)
            said = behavior.utterances()
            spoken = {rng.randrange(len(said))} | {i for i in range(len(said)) if rng.random() < 0.5}
            return behavior, [self.hear_in_text(rng, self.by_id[u]) if i in spoken else self.read(self.by_id[u]) for i, u in enumerate(said)]
        return self.choose(rng, utterance, step), [self.hear(rng, utterance)]

    def read(self, utterance):
        return [transcript_tokens(self.model.tokenizer, utterance.text)]

    def batch(self, step, micro=0):
        """(batch, teacher batch or None) of micro-batch `micro` of step `step`: the same conversations with speech and with the transcript."""
        rng, tokenizer, heard, read = random.Random(f"batch-{self.seed}-{step}-{micro}"), self.model.tokenizer, [], []
        epoch, at = divmod(step * self.accumulate + micro, len(self.utterances) // self.batch_size)
        for utterance in (self.utterances[i] for i in epoch_order(self.lengths, self.batch_size, self.seed, epoch)[at]):
            behavior, utterance_parts = self.example(rng, utterance, step)
            response = self.model.response(behavior.response, behavior.ended).ids
            heard.append(chat_parts(tokenizer, behavior.messages(), utterance_parts, response))
            if self.recipe.loss == "kl":
                read.append(chat_parts(tokenizer, behavior.messages(), [self.read(self.by_id[i]) for i in behavior.utterances()], response))
        return heard, read or None
