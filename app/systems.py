"""What answers side by side on the page: each trained recipe, the cascade, the LLM that reads."""

import queue
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from app.generate import Stream
from data import Speech, chat_parts, open_run, transcript_tokens
from eval import hypothesis, transcriber_of
from model import SpeechLLM, llm_of, load_encoder, shared_llm
from support.console import is_out_of_memory, want_of_memory
from support.files import UserError
from support.runs import read_spec, trained_recipes

SECONDS = 20  # the longest that one system may answer


@dataclass(frozen=True)
class Turn:
    """A question, what was heard with it, and what each system answered, if it could."""

    question: str
    samples: np.ndarray | None = None  # float32, SAMPLE_RATE
    transcript: str = ""
    answers: dict = field(default_factory=dict)  # system -> its answer
    notices: dict = field(default_factory=dict)  # system -> why there is none, or no whole one
    frames: dict = field(default_factory=dict)  # fingerprint of an encoder -> what it heard


def hear_once(encoder, turn):
    """The frames of a turn's speech: systems that share an encoder hear it once."""
    if encoder.fingerprint not in turn.frames:
        turn.frames[encoder.fingerprint] = encoder(turn.samples)
    return turn.frames[encoder.fingerprint]


class Systems:
    """The models of a run, which share one LLM and, if they can, one encoder; one answers at a
    time."""

    def __init__(self, run_folder, table, max_new_tokens, asr=None):
        self.run = open_run(run_folder)
        self.max_new_tokens = max_new_tokens
        self.lock = threading.Lock()
        self.recipes = {}
        llm = shared_llm(*llm_of(self.run.options, "auto"))
        self.reader = SpeechLLM(*llm)
        for name in trained_recipes(self.run.folder, table):
            folder = self.run.folder / name
            spec = read_spec(folder)
            encoder = load_encoder(spec["encoder"], spec["pad_whisper"])
            shared = None if spec["lora"] else llm  # an LLM with an adapter is nobody else's
            self.recipes[name] = SpeechLLM.from_pretrained(folder, shared, encoder)
        if not self.recipes:
            raise UserError(f"{run_folder}: holds no trained recipe: run `train` first")
        first = next(iter(self.recipes.values()))
        self.transcriber = transcriber_of(asr, first.encoder)

    def names(self):
        """The systems, in the order of the page."""
        names = list(self.recipes)
        if self.transcriber:
            names.append("cascade")
        return [*names, "text"]

    def model(self, name):
        return self.recipes.get(name, self.reader)

    def heard_as(self, name, turn):
        """What stands for a turn's speech in a system's conversation; UserError if nothing can."""
        if name == "text":
            if not turn.transcript:
                raise UserError("type the transcript, and the LLM reads it")
            return [transcript_tokens(self.reader.tokenizer, turn.transcript)]
        if name == "cascade":
            frames = hear_once(self.transcriber, turn)
            return [hypothesis(self.transcriber, frames, self.reader)]
        return [Speech(hear_once(self.model(name).encoder, turn))]

    def parts(self, name, turns):
        """The conversation of a system; the last turn is still to be answered."""
        messages, audio = [], []
        for turn in turns:
            if turn is not turns[-1] and not turn.answers.get(name):
                continue  # what it could not answer is no part of its conversation
            content = [{"type": "text", "text": turn.question}] if turn.question else []
            if turn.samples is not None:
                content.append({"type": "audio", "audio": None})
                audio.append(self.heard_as(name, turn))
            messages.append({"role": "user", "content": content})
            if turn is not turns[-1]:
                messages.append({"role": "assistant", "content": turn.answers[name]})
        if not audio and any(turn.samples is not None for turn in turns):
            raise UserError("it has read nothing of what was said: ask again with a transcript")
        return chat_parts(self.model(name).tokenizer, messages, audio)

    def answer(self, name, turns):
        """Yields (a system's answer to the last turn as it grows, what went wrong or "")."""
        said = queue.Queue()
        worker = threading.Thread(target=self.work, args=(name, turns, said), daemon=True)
        worker.start()
        text = ""
        while (more := said.get()) is not None:
            piece, notice = more
            text += piece
            yield text, notice
        worker.join()

    def work(self, name, turns, said):
        """Put (a piece of the answer, what went wrong) into the queue `said`, again and again; then
        None."""
        try:
            with self.lock:
                parts = self.parts(name, turns)
                stream = Stream(
                    self.model(name).tokenizer,
                    lambda text, **_: said.put((text, "")),
                    until=time.perf_counter() + SECONDS,
                )
                self.model(name).generate_rows([parts], self.max_new_tokens, stream)
        except TimeoutError:
            said.put(("", f"stopped after {SECONDS} s"))
        except UserError as error:
            said.put(("", str(error)))
        except Exception as error:
            if not is_out_of_memory(error):
                said.put(("", "something went wrong, and where the page was started it says what"))
                raise
            said.put(("", want_of_memory(error)))
        finally:
            said.put(None)
