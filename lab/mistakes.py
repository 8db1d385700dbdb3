"""What a wrong answer is instead of the right one: some of each system's are looked into."""

import random

from data import normalize
from eval import Case, exact_match, repeats_of, word_error_rate
from support.answers import answer_in_memory

# How an answer may be wrong; whoever misheard the utterance is not asked further.
MISTAKES = {
    "misheard": "does not repeat the utterance without error",
    "copied": "answered with the transcript, though another task was asked",
    "obeyed": "did what the speech says instead of what the prompt says",
    "another task": "gave the answer to another task about this utterance",
    "wrong word": "gave the right sort of answer, with another word in it",
    "other": "none of these",
}


class Mistakes:
    """Looks into the wrong answers of one system after the other.

    It asks whether the system repeats the utterances, and, once for all systems, what the text LLM
    answers to every other task about them.
    """

    def __init__(self, questions):
        self.questions = questions
        self.others = {}  # {utterance id: {task: the text LLM's answer}}
        self.possible = {}  # {task: every answer that is right for some utterance}
        for case, answer in zip(self.cases, self.references):
            self.possible.setdefault(case.task.name, set()).add(normalize(answer))

    @property
    def cases(self):
        return self.questions.cases["questions"]

    @property
    def references(self):
        return self.questions.references["questions"]

    def of(self, system, answers):
        """{index of a question: one of MISTAKES}, for some of those that were answered wrongly."""
        wrong = []
        for i, case in enumerate(self.cases):
            if case.task.name != "repeat" and not exact_match(self.references[i], answers[i]):
                wrong.append(i)
        options = self.questions.options
        rng = random.Random(f"mistakes-{options.seed}")
        wrong = sorted(rng.sample(wrong, min(options.mistakes, len(wrong))))

        utterances = list(
            {self.cases[i].utterance.id: self.cases[i].utterance for i in wrong}.values()
        )
        misheard = self.misheard(system, utterances)
        with system.model.without_adapter():  # which may be on the LLM that they share
            self.ask_other_tasks(utterances)
        found = {}
        for i in wrong:
            case = self.cases[i]
            others = dict(self.others[case.utterance.id])
            others.pop(case.task.name, None)
            found[i] = kind_of_mistake(
                case,
                self.references[i],
                answers[i],
                heard=case.utterance.id not in misheard,
                reply=self.questions.replies.get(case.utterance.id),
                others=others.values(),
                possible=self.possible[case.task.name],
            )
        return found

    def misheard(self, system, utterances):
        """The ids of those that a system does not repeat word for word."""
        repeats = repeats_of(self.questions.tasks["repeat"], utterances)
        wrong = set()
        for case, answer in zip(repeats, self.ask(system, repeats)):
            if not exact_match(case.utterance.text, answer):
                wrong.add(case.utterance.id)
        return wrong

    def ask_other_tasks(self, utterances):
        """Let the text LLM answer every task about these utterances, if it has not yet."""
        new = []
        for u in utterances:
            if u.id not in self.others:
                self.others[u.id] = {}
                for task in self.questions.tasks.values():
                    if task.applies(u.text):
                        new.append(Case(u, task, task.prompts[0], "seen"))
        top_line = self.questions.top_line
        for case, answer in zip(new, self.ask(top_line, new)):
            self.others[case.utterance.id][case.task.name] = answer

    def ask(self, system, cases):
        """The answers of a system to a few cases, which are not kept."""
        conversations = [case.parts(system) for case in cases]
        options = self.questions.options
        answers, _ = answer_in_memory(
            system.model, conversations, options.batch_size, options.max_new_tokens
        )
        return [answer for answer, _ in answers]


def kind_of_mistake(case, reference, answer, heard, reply, others, possible):
    """One of MISTAKES.

    heard: the same system repeats the utterance without error. reply: what the LLM answers if the
    utterance is the prompt. others: its answers to the other tasks about this utterance. possible:
    its answers to this task about all utterances.
    """
    if not heard:
        return "misheard"
    if exact_match(case.utterance.text, answer):
        return "copied"
    if reply is not None and exact_match(reply, answer):
        return "obeyed"
    if any(exact_match(other, answer) for other in others):
        return "another task"
    if normalize(answer) in possible or word_error_rate(reference, answer) <= 0.5:
        return "wrong word"
    return "other"
