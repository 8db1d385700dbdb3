"""Looks into a system: how its wrong answers are wrong, and what the LLM does inside.

That is how far it is from the LLM that reads the transcript, and what it attends to.
"""

import random
from contextlib import contextmanager

import numpy as np
import torch

from data import chat_parts, positions_of, response_tokens, user_turn
from lab.mistakes import Mistakes
from model import LOSSES


class LooksInto:
    """What a benchmark finds out about a system beside its answers.

    How some of its wrong answers are wrong, and, on some questions, what it does inside.
    """

    def __init__(self, questions):
        self.questions, self.mistakes = questions, Mistakes(questions)
        rng = random.Random(f"probes-{questions.options.seed}")
        n = len(questions.cases["questions"])
        self.probes = sorted(rng.sample(range(n), min(questions.options.probes, n)))

    def of(self, system, answers):
        """({index of a question: {column of the table: value}}, attention by layer).

        answers: the system's to the questions.
        """
        columns = {}
        for i, mistake in self.mistakes.of(system, answers).items():
            columns[i] = {"mistake": mistake}
        gaps, attention = self.probe(system)
        for i, gap, shares in zip(self.probes, gaps, attention):
            probed = columns.setdefault(i, {})
            probed["behavior_gap"] = round(gap, 6)
            for kind, by_layer in shares.items():
                probed[f"attention_on_{kind}"] = round(float(np.mean(by_layer)), 6)
        return columns, mean_by_layer(attention)

    def probe(self, system):
        """(behavior gaps, attention shares) over the text LLM's own answers to the probes."""
        questions = self.questions
        cases, responses = [], []
        for i in self.probes:
            answer = questions.references["questions"][i]
            cases.append(questions.cases["questions"][i])
            responses.append(response_tokens(system.model.tokenizer, answer, questions.ended[i]))
        gaps = behavior_gap(system, questions.top_line, cases, responses)
        return gaps, attention_shares(system, cases, responses)


@torch.no_grad()
def behavior_gap(system, top_line, cases, responses):
    """KL(LLM reading text || model hearing speech) over the LLM's own answer, nats per token.

    responses: the token ids of these answers. One number per case, and one case at a time: the
    whole vocabulary at every token of many answers would need more memory than answering did.
    """
    gaps = []
    for case, ids in zip(cases, responses):
        hears, _ = system.model.logits([case.parts(system, ids)])  # (R, V)
        with system.model.without_adapter():  # which may be on the LLM that they share
            reads, _ = top_line.model.logits([case.parts(top_line, ids)])  # (R, V)
        kl = LOSSES["kl"](hears.float(), ids, reads.float())  # summed over the R tokens
        gaps.append((kl / len(hears)).item())
    return gaps


@contextmanager
def attention_weights(model):
    """Let a SpeechLLM give its attention weights, which the fast kernels never hold."""
    llm = model.llm.get_base_model() if model.lora else model.llm
    before = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.set_attn_implementation(before)


@torch.no_grad()
def attention_shares(system, cases, responses):
    """[{"instruction": [by layer], "utterance": [by layer]}], one per case.

    The share of attention that falls on the instruction and on what stands for the utterance where
    the first token of the answer is predicted, which is where it is decided what to do; averaged
    over heads. The rest falls on the chat template.
    """
    model = system.model
    shares = []
    with attention_weights(model):
        for case, response in zip(cases, responses):
            spoken = system.parts(case.utterance)
            parts = chat_parts(
                model.tokenizer, user_turn(case.prompt), [spoken], response, instruction=case.prompt
            )
            # the position that predicts the first token
            attention = attention_from(model, parts, -len(response) - 1)  # (layers, L)
            shares.append(shares_of_parts(attention, parts, spoken, model))
    return shares


def attention_from(model, parts, position):
    """Attention (layers, L) from one position of a conversation on all, averaged over heads.

    Within attention_weights.
    """
    embeds, mask, _ = model.embed([parts])
    out = model.llm(
        inputs_embeds=embeds,
        attention_mask=mask,
        output_attentions=True,
        use_cache=False,
        logits_to_keep=1,  # they are not looked at
    )
    layers = []
    for attention in out.attentions:
        if attention is not None:  # (1, heads, L, L)
            layers.append(attention[0, :, position].float().mean(0))  # (heads, L) -> (L,)
    return torch.stack(layers)  # (layers, L)


def shares_of_parts(attention, parts, spoken, model):
    """attention (layers, L) summed over the positions of the instruction and of the utterance."""
    instruction = torch.zeros(len(attention))  # (layers,)
    utterance = torch.zeros(len(attention))
    at = 0  # positions so far
    for part in parts:
        n = positions_of(part, model.connector.k if model.connector else None)
        falls_on_part = attention[:, at : at + n].sum(1).cpu()  # (layers,)
        if any(part is p for p in spoken):
            utterance = utterance + falls_on_part
        elif getattr(part, "is_instruction", False):
            instruction = instruction + falls_on_part
        at += n
    return {"instruction": instruction.tolist(), "utterance": utterance.tolist()}


def mean_by_layer(shares):
    """{"instruction": [mean by layer], "utterance": [mean by layer]} over the cases, or None."""
    if not shares:
        return None
    means = {}
    for kind in ("instruction", "utterance"):
        means[kind] = np.mean([by_layer[kind] for by_layer in shares], axis=0).tolist()
    return means
