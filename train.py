"""What is trained and how: tasks, recipes, behaviors, examples, and stage 2, in which the connector learns to get from the frozen LLM the answers
to speech that it gave to the transcript. One loop for every recipe."""

import math
import random
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import Speech, Text, UserError, ask, chat_parts, read_jsonl, tokenize_in_context, transcript_tokens, whole_file, write_jsonl

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

METRICS = ("exact", "wer", "chrf")


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
    tasks: str = "train"         # "train": all training tasks of the task table; or the name of one task
    connector: str = "stack-mlp"
    tokens_per_second: float = 5.6    # speech tokens a second of speech; how many encoder frames that makes one, the encoder's frame rate tells
    lora: int = 0                # rank of a LoRA adapter on the LLM; 0: the LLM is frozen
    interleave: float = 0.0      # share of examples in which spans of words enter as text
    text_words: float = 0.4      # share of words that are text in such an example
    span: float = 2.0            # mean length of a text span, words
    repeat: tuple = (0.0, 0.0)   # share of the task "repeat": at the start, and from half-way on
    loss: str = "ce"             # "ce": the LLM's answer; "kl": its whole next-token distribution


@dataclass
class Behavior:
    """The LLM's own answer to a prompt about a transcript: what stage 2 imitates."""
    utterance: str           # Utterance.id
    task: str
    prompt: str
    response: str
    ended: bool = True       # False: cut off at the longest length allowed, so its end is not imitated


def read_behaviors(path):
    behaviors = []
    for number, row in read_jsonl(path):
        if isinstance(row, str) or not all(isinstance(row.get(key), str) for key in ("utterance", "task", "prompt", "response")):
            raise UserError(f"{path}:{number}: is no behavior; run `imitate` again with --force")
        behaviors.append(Behavior(row["utterance"], row["task"], row["prompt"], row["response"], bool(row.get("ended", True))))
    return behaviors


# ---- from behaviors to batches ----

@lru_cache(maxsize=2)
def epoch_order(lengths, batch_size, seed, epoch):
    """One epoch's batches of indices of similar length; what is left over when the batches are full differs from epoch to epoch."""
    rng = random.Random(f"epoch-{seed}-{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths) // batch_size * batch_size)
    bucket = 8 * batch_size
    ordered = [i for b in range(0, len(order), bucket) for i in sorted(order[b:b + bucket], key=lengths.__getitem__)]
    batches = [ordered[b:b + batch_size] for b in range(0, len(ordered), batch_size)]
    rng.shuffle(batches)
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


class Examples:
    """The training set of a run: batches of parts as a pure function of (seed, step), so that there is no data position to save."""

    def __init__(self, model, utterances, behaviors, frames, recipe, steps, batch_size, seed):
        self.model, self.frames, self.recipe = model, frames, recipe
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        by_id = {u.id: u for u in utterances}
        self.behaviors = {}      # utterance id -> {"repeat": [..], "other": [..]}
        for b in behaviors:
            if b.utterance in by_id and recipe.tasks in ("train", b.task):
                kinds = self.behaviors.setdefault(b.utterance, {"repeat": [], "other": []})
                kinds["repeat" if b.task == "repeat" else "other"].append(b)
        self.utterances = [by_id[i] for i in self.behaviors]
        self.lengths = tuple(u.duration for u in self.utterances)
        if len(self.utterances) < batch_size:
            raise UserError(f"{len(self.utterances)} utterances have behaviors for this recipe, fewer than one batch of {batch_size}: "
                            "prepare more speech, lower --batch-size, or see that the task table has the recipe's tasks")
        if recipe.interleave and not any(u.words for u in self.utterances):
            print("interleaving is off: no utterance of this data has word times")

    def explain(self, accumulate):
        """Print every derived number once, with its reason."""
        seconds, k, step, model = sum(self.lengths), self.model.connector.k, self.batch_size * accumulate, self.model
        rate, trainable = sum(len(self.frames[u.id]) for u in self.utterances) / seconds, sum(p.numel() for p in model.trainable().values())
        print(f"speech: {len(self.utterances)} utterances, {seconds / 60:.1f} minutes; {rate:.1f} encoder frames/s / k = {rate / k:.1f} speech tokens/s")
        print(f"batch: {self.batch_size} x accumulation {accumulate} = {step} utterances a step; {self.steps} steps = "
              f"{self.steps * step / len(self.utterances):.1f} epochs")
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

    def batch(self, step, micro, accumulate):
        """(batch, teacher batch or None) of micro-batch `micro` of step `step`: the same conversations with speech and with the transcript."""
        rng, tokenizer, heard, read = random.Random(f"batch-{self.seed}-{step}-{micro}"), self.model.tokenizer, [], []
        epoch, at = divmod(step * accumulate + micro, len(self.utterances) // self.batch_size)
        for utterance in (self.utterances[i] for i in epoch_order(self.lengths, self.batch_size, self.seed, epoch)[at]):
            behavior = self.choose(rng, utterance, step)
            response = self.model.response(behavior.response, behavior.ended).ids
            heard.append(chat_parts(tokenizer, ask(behavior.prompt), [self.hear(rng, utterance)], response))
            if self.recipe.loss == "kl":
                read.append(chat_parts(tokenizer, ask(behavior.prompt), [[transcript_tokens(tokenizer, utterance.text)]], response))
        return heard, read or None


# ---- the loop ----

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then a cosine to zero."""
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))))


def accumulate_gradients(model, micro_batches):
    """Backward over the micro-batches of one step; the loss is the mean over all response tokens of the step, however they are divided."""
    total = sum(len(parts[-1].ids) for batch, _ in micro_batches for parts in batch)
    loss = 0.0
    for batch, teacher in micro_batches:
        summed = model(batch, teacher)
        (summed / total).backward()
        loss += summed.item() / total
    return loss, total


def train(model, examples, folder, *, lr, accumulate=1, warmup=50, clip=1.0, save_every=100):
    """Train what is trainable of `model` on `examples` for examples.steps steps; resumes from folder/state.safetensors.

    Writes folder/log.jsonl. Killed or interrupted, it loses at most `save_every` steps and ends with the very same weights.
    UserError if the loss stops being finite.
    """
    folder, parameters = Path(folder), model.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    state = folder / "state.safetensors"
    first = load_state(state, parameters, optimizer) if state.exists() else 0
    log = [row for row in read_log(folder / "log.jsonl") if row["step"] < first] if first else []
    bar = tqdm(range(first, examples.steps), desc=f"train {folder.name}", initial=first, total=examples.steps, unit="step")
    model.train()
    step, start, smooth = first, time.perf_counter() - (log[-1]["seconds"] if log else 0), None
    try:
        for step in bar:
            torch.manual_seed(examples.seed * 1_000_003 + step)    # dropout too is a function of (seed, step)
            rate = optimizer.param_groups[0]["lr"] = learning_rate(step, examples.steps, lr, warmup)
            loss, tokens = accumulate_gradients(model, [examples.batch(step, i, accumulate) for i in range(accumulate)])
            if not math.isfinite(loss):
                raise UserError(f"{folder}: the loss is {loss} at step {step}; " + ("lower --lr and train again" if step else
                                "no step was taken yet, so the weights of the LLM or of the encoder must be damaged"))
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            log.append({"step": step, "loss": loss, "lr": rate, "grad_norm": norm.item(), "tokens": tokens,
                        "seconds": round(time.perf_counter() - start, 2)})
            if (step + 1) % save_every == 0 or step + 1 == examples.steps:
                write_jsonl(folder / "log.jsonl", log)             # the log first: what it is ahead of the state is dropped on resuming
                save_state(state, parameters, optimizer, step + 1)
    except KeyboardInterrupt:
        print(f"\ninterrupted in step {step}; the same command goes on from the last saved step ({state})")
        raise
    return model.train(False)


def read_log(path):
    """The rows of a training log."""
    rows = [row for _, row in read_jsonl(path)]
    if not rows or not all(isinstance(row, dict) and all(isinstance(row.get(key), (int, float)) for key in ("step", "loss", "seconds")) for row in rows):
        raise UserError(f"{path}: is no whole training log; train again with --force")
    return rows


def save_state(path, parameters, optimizer, step):
    """One safetensors file: trainable weights, both Adam moments, and the number of steps done."""
    tensors = {f"weight.{name}": p.detach().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"{key}.{name}": value.contiguous() for key, value in optimizer.state[p].items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step)})


def load_state(path, parameters, optimizer):
    """Put a saved state back; returns the number of steps done."""
    try:
        with safe_open(path, "pt") as file:
            for name, p in parameters.items():
                p.data.copy_(file.get_tensor(f"weight.{name}"))
                optimizer.state[p] = {key: file.get_tensor(f"{key}.{name}").clone().to(p.device if key != "step" else "cpu")
                                      for key in ("step", "exp_avg", "exp_avg_sq")}
            step = int(file.metadata()["step"])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: is no state of this training ({error}); --force starts again") from None
    print(f"resuming at step {step}")
    return step
