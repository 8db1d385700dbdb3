"""Several turns with a trained model in the terminal: typed, spoken, from files, recorded."""

import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from app.generate import answer_streaming, chosen_recipe
from app.microphone import recorded
from app.voice import VOICES, spoken
from data import load_audio, write_audio
from model import SpeechLLM
from support.console import is_out_of_memory, want_of_memory
from support.files import UserError, WriteError, unused, write_text
from support.options import Count, RunFolder, Seed

HELP = """What you type is a question. Before it, or without it:
  /audio FILE       a sound file, heard with the next question
  /say TEXT         the text, spoken by one of espeak-ng's voices, likewise
  /record SECONDS   from the microphone, likewise
  /reset            forget everything
  /save FILE        the conversation so far, as JSON; with a question more in it, it is what
                    `generate --messages` takes
  /help             this
  /quit             leave (or Ctrl-D); Ctrl-C stops an answer or a recording"""


@dataclass
class ChatOptions:
    run: RunFolder
    """a run folder with a trained recipe, or the folder of one, RUN/RECIPE"""
    recipe: str | None = None
    """which of its recipes; default: the first of the table that is there"""
    system: str = ""
    """a system turn before everything; default: none"""
    max_new_tokens: Count = 64
    """longest answer, in tokens"""
    seed: Seed = 0
    """seed of the voices of /say"""


class Chat:
    """A conversation, and what was heard for its next question."""

    def __init__(self, model, options):
        self.model, self.options = model, options
        self.rng = random.Random(options.seed)
        self.reset("")

    def reset(self, _):
        """Forget everything but the system turn."""
        self.messages = []
        if self.options.system:
            self.messages.append({"role": "system", "content": self.options.system})
        self.heard = []  # paths of what the next question comes with

    def audio(self, name):
        name = os.path.expanduser(name)
        load_audio(name)  # it is refused now, not with the question
        self.heard.append(name)
        print(f"heard with the next question: {name}")

    def say(self, text):
        voice = self.rng.choice(VOICES)
        samples = spoken(text, voice)
        path = Path(tempfile.mkdtemp(prefix="mtbi-")) / "said.wav"
        write_audio(path, samples)
        self.audio(str(path))
        print(f"spoken by {voice}")

    def record(self, seconds):
        try:
            length = float(seconds or 5)
        except ValueError:
            raise UserError(f"/record SECONDS: {seconds!r} is no number") from None
        self.audio(recorded(length))

    def save(self, name):
        if not name:
            raise UserError("/save FILE: names no file")
        path = unused(name)
        write_text(path, json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n")
        print(f"{path}: {len(self.messages)} messages")

    def help(self, _):
        print(HELP)

    def ask(self, text):
        """Put a question with what was heard, and answer it; taken back if that is interrupted."""
        content = [{"type": "text", "text": text}] if text else []
        content += [{"type": "audio", "audio": str(Path(path).resolve())} for path in self.heard]
        if not self.heard:
            content = text
        question = {"role": "user", "content": content}
        try:
            stream = answer_streaming(
                self.model, [*self.messages, question], self.options.max_new_tokens
            )
        except KeyboardInterrupt:
            print("\nstopped; the question is taken back")
            return
        self.messages += [question, {"role": "assistant", "content": stream.text.strip()}]
        self.heard = []

    COMMANDS = {
        "/audio": audio,
        "/say": say,
        "/record": record,
        "/reset": reset,
        "/save": save,
        "/help": help,
    }

    def take(self, line):
        """Do what a line says; False if it says to leave."""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word in self.COMMANDS:
            self.COMMANDS[word](self, unquoted(rest.strip()))
        elif word.startswith("/"):
            raise UserError(f"there is no command {word}; /help lists them")
        elif line or self.heard:
            self.ask(line)
        return True


def unquoted(text):
    """A file name as it was dragged into the terminal: without the quotes around it."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def talk(options, recipes):
    """Read lines until there are no more; recipes: the names of the table."""
    folder = chosen_recipe(options.run, options.recipe, recipes)
    chat = Chat(SpeechLLM.from_pretrained(folder), options)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a letter in another encoding ends no conversation
    print(f"{folder}. /help says what can be done.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")
            continue
        try:
            if not chat.take(line):
                return
        except (UserError, WriteError, OSError) as error:  # of one line; the conversation goes on
            print(f"chat: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # of a recording, say
            print("\nstopped")
        except RuntimeError as error:  # of memory there may be too little; /reset makes it shorter
            if not is_out_of_memory(error):
                raise
            print(f"chat: {want_of_memory(error)}", file=sys.stderr)
