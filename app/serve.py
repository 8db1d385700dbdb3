"""A page in the browser: speak to the models of a run, side by side, and look inside them.

gradio (requirements-page.txt) is imported where it is used: it is optional, and takes seconds.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from app.inside import draw_heard, hear
from app.microphone import LONGEST_RECORDING as MOST_SECONDS
from app.systems import Systems, Turn
from app.voice import LONGEST, VOICES, spoken
from data import SAMPLE_RATE, load_audio, load_tasks
from lab.plots import pyplot
from support.console import is_out_of_memory, want_of_memory
from support.files import PROJECT, UserError
from support.options import Between, Count, RunFolder

MOST_TURNS = 8  # of a conversation
MOST_BYTES_SENT = "20mb"  # of a file
IN_FLIGHT = 20  # requests that wait; one is answered at a time
PROMPT_CHARACTERS = 500


@dataclass
class ServeOptions:
    run: RunFolder
    """a run folder with a trained recipe"""
    port: Annotated[int, Between(1, 65535)] = 7860
    """where the page is"""
    host: str = "127.0.0.1"
    """who may come: this machine alone, or 0.0.0.0 for everybody in the network"""
    max_new_tokens: Count = 64
    """longest answer, in tokens"""
    asr: str | None = None
    """CTC model for the cascade, or a folder that `recognizer` made; default: the speech encoder's
    own head, if it has one"""


class Page:
    """What the page's buttons do. A session's turns are its own: gradio hands them in and out."""

    def __init__(self, systems):
        self.systems = systems

    def say(self, text, voice, rate, pitch, noise):
        """(what the page plays, the transcript) of a typed sentence."""
        samples = self.tried(spoken, text, voice, round(rate), round(pitch), noise)
        return (SAMPLE_RATE, (32767 * samples.clip(-1, 1)).astype(np.int16)), text

    def ask(self, turns, question, path, transcript):
        """Yields (turns, a chat for each system) while one system after another answers."""
        turn = self.tried(self.new_turn, turns, question, path, transcript)
        for name in self.systems.names():
            for text, notice in self.systems.answer(name, [*turns, turn]):
                answers = {**turn.answers, name: text.strip()}
                notices = {**turn.notices, name: notice}
                turn = replace(turn, answers=answers, notices=notices)
                yield [turns, *self.chats([*turns, turn])]
        yield [[*turns, turn], *self.chats([*turns, turn])]

    def new_turn(self, turns, question, path, transcript):
        """The Turn that is asked; UserError if it is nothing or too much."""
        question = (question or "").strip()
        if len(turns) >= MOST_TURNS:
            raise UserError(f"a conversation has {MOST_TURNS} turns at most: begin a new one")
        if len(question) > PROMPT_CHARACTERS or len(transcript or "") > PROMPT_CHARACTERS:
            raise UserError(
                f"a prompt and a transcript have {PROMPT_CHARACTERS} characters at most"
            )
        if not question and not path:
            raise UserError("ask something, or say something")
        samples = None
        if path:
            try:
                samples = load_audio(path)
            except UserError as error:  # where the server keeps it is not told
                raise UserError(str(error).replace(str(path), Path(path).name)) from None
            if len(samples) > MOST_SECONDS * SAMPLE_RATE:
                raise UserError(f"the recording is longer than {MOST_SECONDS} s")
        return Turn(question, samples, (transcript or "").strip())

    def chats(self, turns):
        """The messages of each system's chat."""
        chats = []
        for name in self.systems.names():
            messages = []
            for turn in turns:
                heard = "(speech) " if turn.samples is not None else ""
                messages.append({"role": "user", "content": heard + turn.question})
                messages.append({"role": "assistant", "content": shown_answer(turn, name)})
            chats.append(messages)
        return chats

    def look_inside(self, turns, name):
        """A figure of what a recipe made of the last recording."""
        heard = [turn for turn in turns if turn.samples is not None]
        if not heard:
            self.tried(refuse, "say something first")
        return self.tried(self.draw, heard[-1], name)

    def draw(self, turn, name):
        """The figure of one turn."""
        model = self.systems.model(name)
        with self.systems.lock:
            return draw_heard(
                pyplot,
                model,
                hear(model, turn.samples),
                turn.question or " ",
                turn.answers.get(name, ""),
            )

    def tried(self, function, *args):
        """What a function returns; its UserError, or want of memory, is shown on the page."""
        try:
            return function(*args)
        except UserError as error:
            why = str(error)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = want_of_memory(error)
        import gradio

        raise gradio.Error(why, print_exception=False)


def shown_answer(turn, name):
    """What a system's chat shows of a turn: its answer, and in brackets what went wrong."""
    shown = turn.answers.get(name, "")
    notice = turn.notices.get(name)
    return f"{shown} ({notice})".strip() if notice else shown


def refuse(reason):
    raise UserError(reason)


def prompts_of(systems):
    """(what the menu shows, the prompt) of every prompt of the run's task table."""
    choices = []
    for task in load_tasks(PROJECT / systems.run.options["tasks"]).values():
        for prompt in task.prompts:
            seen = "unseen task" if task.split == "unseen" else "seen"
            choices.append((f"{task.name}: {prompt}  ({seen})", prompt))
        for prompt in task.unseen_prompts:
            seen = "unseen task" if task.split == "unseen" else "unseen prompt"
            choices.append((f"{task.name}: {prompt}  ({seen})", prompt))
    return choices


def blocks_of_page(gradio, page):
    """The page as gradio's Blocks."""
    names = page.systems.names()
    with gradio.Blocks(title="MTBI", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        turns = gradio.State([])
        cascade = "`cascade` reads what a recognizer heard, " if "cascade" in names else ""
        gradio.Markdown(
            "# Speak to your own model\nSay something, choose what is asked about it, and compare "
            f"who obeys. {cascade}`text` reads the transcript you type. "
            "To go on about what was said before, take the recording away and ask again."
        )
        audio, transcript = lay_out_speech(gradio, page)
        menu = gradio.Dropdown(prompts_of(page.systems), label="tasks of this run", value=None)
        question = gradio.Textbox(
            label="what is asked", max_length=PROMPT_CHARACTERS, elem_id="question"
        )
        with gradio.Row():
            ask = gradio.Button("ask", variant="primary", elem_id="ask")
            anew = gradio.Button("new conversation", elem_id="anew")
        chats = []
        with gradio.Row():
            for name in names:
                chat = gradio.Chatbot(
                    label=name, elem_id=f"chat-{name}", height=320, buttons=["copy"]
                )
                chats.append(chat)
        lay_out_inside(gradio, page, turns)

        menu.change(lambda prompt: prompt, [menu], [question])
        ask.click(page.ask, [turns, question, audio, transcript], [turns, *chats])
        anew.click(
            lambda: [[], None, "", *[[] for _ in names]], None, [turns, audio, transcript, *chats]
        )
    return blocks


def lay_out_speech(gradio, page):
    """The microphone and the sentence that is spoken for you; (the recording, its transcript)."""
    with gradio.Row():
        with gradio.Column():
            audio = gradio.Audio(
                sources=["microphone", "upload"],
                type="filepath",
                label=f"your speech, up to {MOST_SECONDS} s",
                buttons=[],
                elem_id="speech",
            )
            transcript = gradio.Textbox(label="its transcript, for `text`", elem_id="transcript")
        with gradio.Column():
            sentence = gradio.Textbox(
                label="or a sentence that is spoken for you",
                placeholder="the farmer sold three red apples in the market yesterday",
                max_length=LONGEST,
                elem_id="sentence",
            )
            with gradio.Row():
                voice = gradio.Dropdown(VOICES, value=VOICES[0], label="voice")
                rate = gradio.Slider(100, 220, 160, label="words a minute")
                pitch = gradio.Slider(0, 99, 50, label="pitch")
                noise = gradio.Slider(0, 1, 0, label="noise")
            speak = gradio.Button("speak it", elem_id="speak")
    # a transcript is of one recording
    own = [audio.upload, audio.start_recording, audio.clear]
    gradio.on(own, lambda: "", None, [transcript], queue=False)
    speak.click(page.say, [sentence, voice, rate, pitch, noise], [audio, transcript])
    return audio, transcript


def lay_out_inside(gradio, page, turns):
    """What a recipe made of the last recording, when it is asked for."""
    recipes = list(page.systems.recipes)
    with gradio.Accordion("look inside", open=False):
        which = gradio.Radio(recipes, value=recipes[0], label="recipe")
        look = gradio.Button("look at the last recording", elem_id="look")
        picture = gradio.Plot(elem_id="inside")
    look.click(page.look_inside, [turns, which], [picture])


def serve_page(options, recipes):
    """Open the page and stay until Ctrl-C; recipes: the names of the table."""
    # nothing of what happens here is told to anybody: read when gradio is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("no_proxy", "NO_PROXY"):  # nor is a proxy asked whether the page is there
        own = [os.environ.get(name, ""), "localhost", "127.0.0.1", options.host]
        os.environ[name] = ",".join(filter(None, own))
    try:
        import gradio
    except ImportError:
        raise UserError("the page needs gradio: pip install -r requirements-page.txt") from None

    page = Page(Systems(options.run, recipes, options.max_new_tokens, options.asr))
    blocks = blocks_of_page(gradio, page)
    blocks.queue(default_concurrency_limit=1, max_size=IN_FLIGHT, api_open=False)
    print(f"http://{options.host}:{options.port} shows {', '.join(page.systems.names())}")
    print("Ctrl-C closes it.", flush=True)
    try:
        blocks.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            quiet=True,
            show_error=False,
            footer_links=[],
            max_file_size=MOST_BYTES_SENT,
            enable_monitoring=False,
            ssr_mode=False,
            state_session_capacity=100,
            theme=gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        where = f"--host {options.host} --port {options.port}"
        raise UserError(f"{where}: {error}; name another --port, or another --host") from None
