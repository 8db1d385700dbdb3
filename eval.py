"""The generalization benchmark: seen and unseen tasks x seen and unseen prompts, on speech that training never heard.

The reference is the text LLM's own answer to the true transcript, so any LLM and any transcribed speech can be benchmarked. A system is a model and a way to
put an utterance before it: as text, as speech, or as what a CTC model made of it. What is measured of it is a record, kept in RUN/bench/ and measured once.
"""

import random
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from answers import forget_parts, generate_all
from data import Speech, chat_parts, dialogue, normalize, transcript_tokens
from features import encode_all
from files import UserError, read_json, read_json_if_whole, timed, write_json
from model import SpeechLLM
from parallel import MAIN, wait

QUADRANTS = ["seen_task_seen_prompt", "seen_task_unseen_prompt", "unseen_task_seen_prompt", "unseen_task_unseen_prompt"]
DIALOGUES = ["speech_then_text_question", "text_then_speech", "two_speeches"]      # the multi-turn mixed-modal set
PARTS = ["", "-dialogues", "-retention"]      # what a system is asked: the cases, the dialogues, and, if it has an adapter, the cases in text
RESAMPLES = 1000             # bootstrap resamples of the utterances


def quadrant_names(between):
    """The quadrants for people: "seen task × seen prompt", …, with `between` between task and prompt."""
    return [q.replace("_task_", f" task{between}").replace("_prompt", " prompt") for q in QUADRANTS]


@dataclass(frozen=True)
class Case:
    """One question of the benchmark."""
    utterance: object
    task: object
    prompt: str
    quadrant: str            # one of QUADRANTS, or of DIALOGUES
    earlier: tuple = ()      # the turn before, if there is one: (prompt, utterance, is it spoken, answer)
    again: bool = False      # the question comes without an utterance: it is about the one of the turn before

    def parts(self, tokenizer, hear, response=None):
        """The conversation; hear(utterance) gives the parts that stand for what is spoken."""
        audio = [hear(self.utterance)] if not self.again else []
        if self.earlier:
            _, utterance, spoken, _ = self.earlier
            audio.insert(0, hear(utterance) if spoken else [transcript_tokens(tokenizer, utterance.text)])
        turns = [(self.earlier[0], self.earlier[3])] if self.earlier else []
        return chat_parts(tokenizer, dialogue(turns, self.prompt, self.again), audio, response)


def draw_cases(tasks, utterances, per_prompt, seed):
    """For every prompt of every task `per_prompt` held-out utterances the task applies to; the same ones for every system."""
    rng, cases = random.Random(f"bench-{seed}"), []
    for task in tasks.values():
        fitting = [u for u in utterances if task.applies(u.text)]
        for prompts, seen in ((task.prompts, "seen"), (task.unseen_prompts, "unseen")):
            quadrant = f"{'seen' if task.split == 'train' else 'unseen'}_task_{seen}_prompt"
            for prompt in prompts:
                cases += [Case(u, task, prompt, quadrant) for u in rng.sample(fitting, min(per_prompt, len(fitting)))]
    if not cases:
        raise UserError("no task of the task table applies to any held-out transcript")
    return cases


def draw_dialogues(cases, answers, n, seed):
    """n conversations of two turns of each kind in DIALOGUES, made of pairs of cases; the first turn is answered as the text LLM answered it."""
    rng, drawn, about = random.Random(f"dialogues-{seed}"), [], {}
    for i, case in enumerate(cases):
        about.setdefault(case.utterance.id, []).append(i)
    for kind in DIALOGUES:
        again = kind == "speech_then_text_question"
        fitting = [i for i, case in enumerate(cases) if (len(about[case.utterance.id]) if again else len(cases)) > 1]
        for i in rng.sample(fitting, min(n, len(fitting))):
            first = rng.choice([j for j in (about[cases[i].utterance.id] if again else range(len(cases))) if j != i])
            drawn.append(Case(cases[i].utterance, cases[i].task, cases[i].prompt, kind, (cases[first].prompt, cases[first].utterance,
                                                                                       kind != "text_then_speech", answers[first]), again))
    return drawn


def systems(run, encoders, transcriber, llm, reader, utterances, cache, keep, precision):
    """{name: function that loads it, giving (model, hear)}: the top line, the cascade if there is a transcriber for it, and each trained recipe.

    encoders: {recipe: function that gives its speech encoder}; llm: the (LLM, tokenizer) that the frozen recipes share; reader: the SpeechLLM of these alone.
    """
    def text():
        return reader, lambda u: [transcript_tokens(reader.tokenizer, u.text)]

    def cascade():
        frames = encode_all(transcriber, utterances, cache, keep)
        heard = {}

        def hear(u):
            if u.id not in heard:
                heard[u.id] = [transcript_tokens(reader.tokenizer, transcriber.transcribe(frames[u.id]) or "…")]
            return heard[u.id]
        return reader, hear

    def trained(name):
        own_llm = read_json(run / name / "model.json", "lora")["lora"] > 0
        model = SpeechLLM.from_pretrained(run / name, None if own_llm else llm, encoders[name](), precision)
        frames = encode_all(model.encoder, utterances, cache, keep)
        return model, lambda u: [Speech(frames[u.id])]

    if transcriber.head is None:
        print(f"cascade: left out, {transcriber.name} has no CTC head; --asr names a CTC model to transcribe with")
    return {"text": text, **({"cascade": cascade} if transcriber.head is not None else {}), **{name: partial(trained, name) for name in encoders}}


# ---- what is measured of a system ----

class Bench:
    """The questions, the top line's answers to them, and the record of each system."""

    def __init__(self, run, tasks, utterances, reader, keys, *, per_prompt, dialogues, probes, seed, batch_size, max_new_tokens):
        self.run, self.reader, self.keys, self.batch_size, self.max_new_tokens = run, reader, keys, batch_size, max_new_tokens
        self.cases = draw_cases(tasks, utterances, per_prompt, seed)
        self.references, self.ended = self.answers_of_text("", self.cases)
        self.dialogues = draw_dialogues(self.cases, self.references, dialogues, seed)
        self.dialogue_references, _ = self.answers_of_text("-dialogues", self.dialogues)
        self.probes = sorted(random.Random(f"probes-{seed}").sample(range(len(self.cases)), min(probes, len(self.cases))))

    def read(self, utterance):
        return [transcript_tokens(self.reader.tokenizer, utterance.text)]

    def answers_of_text(self, part, cases):
        """(the text LLM's answers to the transcripts, which of them ended by themselves): asked once, and kept."""
        path, key = self.run / "bench" / f"text{part}.answers.json", self.keys["text"]
        kept = read_record(path, key, "ended")
        if not kept:
            answers, ended = zip(*self.ask(self.reader, self.read, cases, "text", part)) if cases else ((), ())
            kept = {"key": key, "answers": list(answers), "ended": list(ended)}
            wait()
            if MAIN:
                write_json(path, kept)
            self.forget("text")
        return kept["answers"], kept["ended"]

    def ask(self, model, hear, cases, name, part=""):
        """The answers of the system `name` to the cases: [(text, did it end by itself)]; `part`: one of PARTS."""
        parts = [c.parts(model.tokenizer, hear) for c in cases]
        order = [(c.task.name, c.utterance.duration) for c in cases]
        return generate_all(model, parts, order, f"bench {name}{part}", self.batch_size, self.max_new_tokens, self.run / "bench" / f"{name}{part}",
                            self.keys[name])

    def forget(self, name):
        """Delete the answers that were kept one by one."""
        for part in PARTS:
            forget_parts(self.run / "bench" / f"{name}{part}")

    def record(self, name, load):
        """What there is to measure of a system: taken from RUN/bench/NAME.json if it was measured before."""
        path, start = self.run / "bench" / f"{name}.json", time.perf_counter()
        if record := read_record(path, self.keys[name], "values", "attention", "metrics", "seconds"):
            return record
        with timed(f"bench {name}"):
            model, hear = load()
            answers = self.references if name == "text" else texts(self.ask(model, hear, self.cases, name))
            spoken = self.dialogue_references if name == "text" else texts(self.ask(model, hear, self.dialogues, name, "-dialogues"))
            retained = texts(self.ask(model, self.read, self.cases, name, "-retention")) if model.lora else self.references   # a frozen LLM answers as ever
            probes, responses = [self.cases[i] for i in self.probes], [model.response(self.references[i], self.ended[i]).ids for i in self.probes]
            gap = behavior_gap(model, self.reader, hear, self.read, probes, responses)
            attention = attention_shares(model, hear, probes, responses)
        record = {"key": self.keys[name], "answers": answers, "dialogue_answers": spoken,
                  "values": self.values(answers, spoken, retained, gap, attention), "attention": by_layer(attention),
                  "metrics": self.metrics(answers), "repeat_wer": corpus_wer(self.cases, answers), "seconds": round(time.perf_counter() - start, 1)}
        wait()
        if MAIN:
            write_json(path, record)
        self.forget(name)
        return record

    def values(self, answers, spoken, retained, gap, attention):
        """{measure: [[utterance id, value], ...]}, one value per question: what intervals and paired differences are made of."""
        def scored(cases, references, answers):
            return [(c, score(c.task.metric, r, a)) for c, r, a in zip(cases, references, answers)]
        values, rows = {name: [] for name in [*QUADRANTS, *DIALOGUES]}, scored(self.cases, self.references, answers)
        for case, value in rows + scored(self.dialogues, self.dialogue_references, spoken):
            values[case.quadrant].append((case, value))
        for case, value in rows:
            values.setdefault(f"task {case.task.name}", []).append((case, value))
        values["ignored instruction"] = [(c, float(repeats_instead(c, r, a))) for c, r, a in zip(self.cases, self.references, answers)
                                         if c.task.name != "repeat"]
        values["text retention"] = scored(self.cases, self.references, retained)
        probes = [self.cases[i] for i in self.probes]
        values["behavior gap"] = list(zip(probes, gap))
        values["attention on instruction"] = list(zip(probes, [float(np.mean(rows["instruction"])) for rows in attention]))
        return {name: [[c.utterance.id, round(value, 6)] for c, value in rows] for name, rows in values.items()}

    def metrics(self, answers):
        """{task: {"exact", "wer", "chrf", "bleu"}}: every metric of every task, whichever its score is made of; over all its answers (sacrebleu, jiwer)."""
        import jiwer
        from sacrebleu import corpus_bleu, corpus_chrf
        table = {}
        for task in dict.fromkeys(c.task.name for c in self.cases):
            rows = [(normalize(r) or r, normalize(a) or a) for c, r, a in zip(self.cases, self.references, answers) if c.task.name == task]
            said, heard = [r for r, _ in rows], [a for _, a in rows]
            table[task] = {"exact": sum(r == a for r, a in rows) / len(rows), "wer": jiwer.wer(said, heard) if all(said) else None,
                           "chrf": corpus_chrf(heard, [said]).score / 100, "bleu": corpus_bleu(heard, [said]).score / 100}
        return table


def texts(answers):
    return [text for text, _ in answers]


def read_record(path, key, *more):
    """The record at `path` if it is whole and was measured under this key, or None."""
    record = read_json_if_whole(path, "key", "answers", *more)
    return record if record and record["key"] == key else None


# ---- probes: what the LLM does inside ----

@torch.no_grad()
def behavior_gap(model, reader, hear, read, cases, responses, batch_size=32):
    """KL(LLM reading text || model hearing speech) over the LLM's own answer (`responses`: token ids), nats per token: one number per case."""
    gaps = []
    for at in range(0, len(cases), batch_size):
        rows = list(zip(cases[at:at + batch_size], responses[at:at + batch_size]))
        heard = model.logits([c.parts(model.tokenizer, hear, ids) for c, ids in rows])[0].log_softmax(-1)           # (R, V)
        text = reader.logits([c.parts(model.tokenizer, read, ids) for c, ids in rows])[0].log_softmax(-1)           # (R, V)
        kl = (text.exp() * (text - heard)).sum(-1)                                                                  # (R)
        gaps += [part.mean().item() for part in kl.split([len(ids) for _, ids in rows])]
    return gaps


@contextmanager
def attention_weights(llm):
    """Let the LLM give its attention weights, which the fast kernels never hold."""
    before = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.set_attn_implementation(before)


@torch.no_grad()
def attention_shares(model, hear, cases, responses):
    """[{"instruction": [by layer], "utterance": [by layer]}] per case: the share of attention, averaged over heads and over the positions that predict the
    answer, that falls on the instruction and on what stands for the utterance; the rest falls on the chat template and on the answer itself."""
    shares, llm = [], model.llm.get_base_model() if model.lora else model.llm
    with attention_weights(llm):
        for case, response in zip(cases, responses):
            instruction, heard = transcript_tokens(model.tokenizer, case.prompt), hear(case.utterance)
            slots = [{"role": "user", "content": [{"type": "audio", "audio": None}] * 2}]      # the instruction in a slot too: so its part can be told
            parts = chat_parts(model.tokenizer, slots, [[instruction], heard], response)
            kinds = ["instruction" if p is instruction else "utterance" if any(p is h for h in heard) else "" for p in parts]
            lengths = [-(-len(p.frames) // model.connector.k) if isinstance(p, Speech) else len(p.ids) for p in parts]
            embeds, mask, _ = model.embed([parts])
            layers = model.llm(inputs_embeds=embeds, attention_mask=mask, output_attentions=True, use_cache=False).attentions       # each (1, heads, L, L)
            means = torch.stack([a[0, :, -len(response) - 1:-1].float().mean((0, 1)) for a in layers if a is not None])             # (layers, L)
            pieces = means.split(lengths, dim=1)
            shares.append({kind: sum(p.sum(1) for p, k in zip(pieces, kinds) if k == kind).tolist() for kind in ("instruction", "utterance")})
    return shares


def by_layer(shares):
    """{"instruction": [mean by layer], "utterance": [mean by layer]} over the cases."""
    return {kind: np.mean([rows[kind] for rows in shares], axis=0).tolist() for kind in ("instruction", "utterance")} if shares else None


# ---- metrics ----

def word_error_rate(reference, answer):
    import jiwer
    reference, answer = normalize(reference), normalize(answer)
    return jiwer.wer(reference, answer) if reference else float(bool(answer))


def score(metric, reference, answer):
    """0..1: "exact" match, "wer" as 1 - word error rate (jiwer), or "chrf" (sacrebleu, Popović 2015)."""
    if metric == "exact":
        return float((normalize(reference) or reference) == (normalize(answer) or answer))
    if metric == "wer":
        return max(0.0, 1.0 - word_error_rate(reference, answer))
    from sacrebleu import sentence_chrf
    return sentence_chrf(answer, [reference]).score / 100 if reference else float(not answer)


def repeats_instead(case, reference, answer):
    """The model ignored the instruction: asked for another task, it answered with the transcript, give or take a quarter of its words."""
    return case.task.name != "repeat" and word_error_rate(case.utterance.text, answer) <= 0.25 < word_error_rate(case.utterance.text, reference)


def corpus_wer(cases, answers):
    """Word error rate of the task "repeat" against the true transcripts, over all its words; None if it was not asked."""
    import jiwer
    rows = [(normalize(c.utterance.text), normalize(a)) for c, a in zip(cases, answers) if c.task.name == "repeat" and normalize(c.utterance.text)]
    return jiwer.wer([r for r, _ in rows], [a for _, a in rows]) if rows else None


def cell(scores, utterances, seed=0):
    """{"score", "share_of_text", "n", "ci95"}: mean score, its share of the top line's, and a 95% bootstrap interval over utterances.

    The text LLM is its own reference, so the top line's score is 1 and the share is the score.
    """
    if not scores:
        return {"score": None, "share_of_text": None, "n": 0, "ci95": [None, None]}
    means = bootstrap(scores, utterances, np.random.default_rng(seed))
    return {"score": float(np.mean(scores)), "share_of_text": float(np.mean(scores)), "n": len(scores),
            "ci95": [float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))]}


def bootstrap(values, utterances, rng):
    """RESAMPLES means, each over as many utterances drawn with replacement: answers about one utterance are no independent observations."""
    values, ids = np.asarray(values), np.unique(utterances, return_inverse=True)[1]
    sums, counts = np.bincount(ids, values), np.bincount(ids)
    picks = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
    return sums[picks].sum(1) / counts[picks].sum(1)


def summary(record, seconds=0.0):
    """A system's entry of report.json; `seconds`: of its training, added to those of the benchmark."""
    def over(name):
        rows = record["values"][name]
        return cell([value for _, value in rows], [i for i, _ in rows])

    ignored = over("ignored instruction")
    return {"quadrants": {q: over(q) for q in QUADRANTS}, "dialogues": {d: over(d) for d in DIALOGUES},
            "tasks": {name.removeprefix("task "): over(name) for name in record["values"] if name.startswith("task ")},
            "metrics": record["metrics"], "repeat_wer": record["repeat_wer"], "ignored_instruction_rate": ignored["score"],
            "ignored_instruction_ci95": ignored["ci95"], "behavior_gap": over("behavior gap"), "text_retention": over("text retention"),
            "attention": record["attention"], "seconds": round(record["seconds"] + seconds, 1)}
