"""The page: what its buttons do, and a browser that presses them.

The browser is Debian's chromium, driven by playwright; without either, or without gradio, these
tests are skipped, which pytest says.
"""

import shutil
import threading
import time
import urllib.request
from collections import Counter

import numpy as np
import pytest
import soundfile
from conftest import ROOT
from programs import free_port, one_line, program

from app.systems import Systems, Turn
from app.voice import spoken
from mtbi import RECIPES, main
from support.files import UserError

gradio = pytest.importorskip("gradio", reason="no gradio: pip install -r requirements-page.txt")
from app.serve import IN_FLIGHT, MOST_TURNS, Page, prompts_of  # noqa: E402

CLIENTS = IN_FLIGHT + 8  # so some find the queue full
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def systems(trained_world):
    return Systems(trained_world / "run", list(RECIPES), 8)


@pytest.fixture
def page(systems):
    return Page(systems)


@pytest.fixture
def wav(trained_world):
    return str(trained_world / "data" / "audio" / "test-00000.wav")


def last(generator):
    *_, end = generator
    return end


# ---- what the buttons do ----


def test_every_system_answers_and_a_second_turn_knows_the_first(page, systems, wav):
    turns, *chats = last(page.ask([], "Who did it?", wav, "the farmer sold apples"))
    assert systems.names() == ["mtbi", "asr", "cascade", "text"]
    assert len(chats) == 4 and set(turns[0].answers) == set(systems.names())
    turns, *chats = last(page.ask(turns, "And what is the last word?", None, ""))
    assert len(turns) == 2 and all(len(chat) == 4 for chat in chats)
    first, both = (systems.parts("mtbi", turns[:n]) for n in (1, 2))
    assert len(both[-1].ids) > len(first[-1].ids)


def test_the_answer_of_the_page_is_the_models_own(page, systems, wav):
    turns, *_ = last(page.ask([], "Who did it?", wav, ""))
    expected = systems.recipes["mtbi"].answer("Who did it?", wav, max_new_tokens=8)
    assert turns[0].answers["mtbi"] == expected
    assert "type the transcript" in turns[0].notices["text"]


def test_sessions_never_mix(page, wav):
    """What one session asks changes nothing that another has."""
    mine, *_ = last(page.ask([], "Who did it?", wav, ""))
    before = list(mine)
    last(page.ask([], "Repeat this.", wav, ""))
    last(page.ask(mine, "And then?", None, ""))
    assert mine == before and len(mine) == 1


@pytest.mark.parametrize(
    "question, sound, reason",
    [
        ("", None, "ask something"),
        ("x" * 501, None, "500 characters at most"),
        ("Who?", "text", "a.wav"),
        ("Who?", "silence", "silent"),
        ("Who?", "long", "too long"),
    ],
)
def test_what_is_nothing_or_too_much_is_refused_with_a_message(
    page, question, sound, reason, tmp_path
):
    path = tmp_path / "a.wav" if sound else None
    if sound == "text":
        path.write_text("no sound")
    elif sound:
        seconds = 1 if sound == "silence" else 45
        noise = np.random.default_rng(0).normal(0, 0.1, 16000 * seconds)
        soundfile.write(path, 0 * noise if sound == "silence" else noise, 16000)
    with pytest.raises(gradio.Error, match=reason):
        last(page.ask([], question, path and str(path), ""))


def test_a_conversation_ends_after_so_many_turns(page):
    turns = [Turn("Who?")] * MOST_TURNS
    with pytest.raises(gradio.Error, match="begin a new one"):
        last(page.ask(turns, "Who?", None, ""))


def test_an_answer_that_takes_too_long_is_stopped_and_says_so(page, wav, monkeypatch):
    monkeypatch.setattr("app.systems.SECONDS", -1)
    turns, *chats = last(page.ask([], "Who did it?", wav, ""))
    for name, chat in zip(("mtbi", "asr", "cascade"), chats):
        assert "stopped after" in chat[1]["content"]
        assert "stopped" not in turns[0].answers[name], "no model said that"


def test_what_a_system_could_not_answer_is_no_part_of_its_conversation(page, systems, wav):
    turns, *chats = last(page.ask([], "Who did it?", wav, ""))  # without a transcript
    assert "type the transcript" in chats[-1][1]["content"] and not turns[0].answers["text"]
    *_, after = last(page.ask(turns, "What is the last word?", None, ""))
    assert "ask again with a transcript" in after[-1]["content"], "it knows of no speech"
    turns, *chats = last(page.ask(turns, "What is the last word?", wav, "the farmer sold apples"))
    assert turns[1].answers["text"] and not turns[1].notices["text"]
    alone = systems.parts("text", [turns[1]])
    assert systems.parts("text", turns) == alone
    assert len(systems.parts("mtbi", turns)) > len(systems.parts("mtbi", [turns[1]]))


def test_where_the_server_keeps_a_bad_upload_is_not_told(page, tmp_path):
    path = tmp_path / "bad.wav"
    path.write_bytes(b"RIFF no sound at all")
    with pytest.raises(gradio.Error, match="bad.wav") as error:
        last(page.ask([], "Who?", str(path), ""))
    assert str(tmp_path) not in str(error.value)


def test_the_cascade_can_have_another_recognizer_or_is_said_to_be_left_out(
    trained_world, tmp_path, monkeypatch, capsys
):
    table = ["mtbi"]
    own = Systems(trained_world / "run", table, 8)
    assert own.transcriber is own.recipes["mtbi"].encoder and "cascade" in own.names()
    shutil.copytree(ROOT / "tiny" / "encoder", tmp_path / "another")
    other = Systems(trained_world / "run", table, 8, asr=str(tmp_path / "another"))
    assert other.transcriber is not own.transcriber and "cascade" in other.names()

    capsys.readouterr()
    monkeypatch.setattr("model.HuggingFaceEncoder.can_transcribe", False)
    assert "cascade" not in Systems(trained_world / "run", table, 8).names()
    assert "cascade: left out" in capsys.readouterr().out


def test_a_sentence_is_spoken_in_the_voice_that_was_chosen():
    sounds = [
        spoken("three five nine"),
        spoken("three five nine", "en+f3"),
        spoken("three five nine", rate=220),
        spoken("three five nine", noise=0.5),
    ]
    lengths = [len(sound) for sound in sounds]
    assert lengths[2] < 0.9 * lengths[0]
    assert lengths[3] == pytest.approx(lengths[0], rel=0.01)  # by what was spoken before
    shortest = min(lengths)
    assert not np.allclose(sounds[0][:shortest], sounds[3][:shortest], atol=0.01)
    for text, voice in (("", "en+f3"), ("x" * 201, "en+f3"), ("three", "nobody"), ("…", "en+f3")):
        with pytest.raises(UserError):
            spoken(text, voice)


@pytest.mark.parametrize("text", ["I have 42 apples", "hello - world", "7:30", "3.5 + 4", "a/b"])
def test_what_is_spoken_need_not_be_words(text):
    assert len(spoken(text)) > 4000


def test_the_menu_marks_what_the_training_never_saw(systems):
    shown = {prompt: label for label, prompt in prompts_of(systems)}
    assert "(seen)" in shown["Who did it?"]
    assert {label.rpartition("(")[2] for label in shown.values()} == {
        "seen)",
        "unseen prompt)",
        "unseen task)",
    }


def test_the_inside_of_the_last_recording_is_drawn(page, wav):
    with pytest.raises(gradio.Error, match="say something first"):
        page.look_inside([], "mtbi")
    turns, *_ = last(page.ask([], "Who did it?", wav, ""))
    assert page.look_inside(turns, "mtbi").axes


def test_without_gradio_the_page_says_what_to_install(trained_world, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["serve", str(trained_world / "run")]) == 2
    one_line(capsys, "pip install -r requirements-page.txt")


# ---- in a browser ----


@pytest.fixture(scope="session")
def url(trained_world):
    """The page of a process of its own."""
    port = free_port()
    words = ["mtbi.py", "serve", trained_world / "run", "--port", port, "--max-new-tokens", "8"]
    nobody = f"http://127.0.0.1:{free_port()}"  # a proxy, as many networks want; it is not asked
    process = program(words, dict.fromkeys(("HTTP_PROXY", "http_proxy"), nobody), wait=False)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5)
            break
        except OSError:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.25)
    yield url
    process.kill()
    process.communicate()


@pytest.fixture
def browser_page(wav):
    """A tab of a headless chromium whose microphone plays a file; it fails on what it asks of
    anybody else than this machine."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    if not CHROMIUM:
        pytest.skip("no chromium: apt install chromium")
    asked = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={wav}",
            ],
        )
        tab = browser.new_page()
        tab.set_default_timeout(60_000)
        tab.on("request", lambda request: asked.append(request.url))
        yield tab
        browser.close()
    here = ("http://127.0.0.1", "data:", "blob:")
    assert [address for address in asked if not address.startswith(here)] == []


def fill(tab, name, text):
    tab.fill(f"#{name} textarea, #{name} input", text)


def upload(tab, path):
    tab.click("#speech button[aria-label='Upload file']")
    tab.set_input_files("#speech input[type=file]", str(path))
    tab.wait_for_timeout(1500)


def answered(tab, name, n):
    """Wait until a chat has so many messages of which the last is not empty."""
    tab.wait_for_function(
        "([name, n]) => {const all = document.querySelectorAll(`#chat-${name} .message`);"
        "return all.length >= n && all[n - 1].innerText.trim().length > 0}",
        arg=[name, n],
    )


def test_a_spoken_sentence_is_answered_twice_in_a_browser(url, browser_page):
    tab = browser_page
    tab.goto(url)
    fill(tab, "sentence", "three five nine")
    tab.click("#speak")
    tab.wait_for_selector("#speech audio, #speech .waveform-container", state="attached")
    tab.wait_for_function(
        "document.querySelector('#transcript textarea, #transcript input').value.length > 0"
    )
    fill(tab, "question", "Repeat this.")
    tab.click("#ask")
    answered(tab, "text", 2)
    fill(tab, "question", "What is the last word?")
    tab.click("#ask")
    answered(tab, "text", 4)
    answered(tab, "mtbi", 4)


def test_an_upload_is_heard_and_a_bad_one_refused_in_a_browser(url, browser_page, wav, tmp_path):
    tab = browser_page
    tab.goto(url)
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF no sound at all")
    upload(tab, bad)
    fill(tab, "question", "Who did it?")
    tab.click("#ask")
    tab.wait_for_selector("text=bad.wav", state="attached")

    tab.goto(url)
    fill(tab, "transcript", "of another recording")
    upload(tab, wav)
    tab.wait_for_function(
        "document.querySelector('#transcript textarea, #transcript input').value === ''"
    )
    fill(tab, "question", "Who did it?")
    tab.click("#ask")
    answered(tab, "mtbi", 2)


def test_a_microphone_is_heard_in_a_browser(url, browser_page):
    tab = browser_page
    tab.goto(url)
    tab.click("#speech .record-button")
    tab.wait_for_timeout(2500)
    tab.click("#speech .stop-button")
    tab.wait_for_timeout(2000)
    fill(tab, "question", "Who did it?")
    tab.click("#ask")
    answered(tab, "mtbi", 2)


def test_more_clients_than_may_wait_are_answered_or_told_so_for_a_minute(url, wav):
    """Every client gets an answer or a message, again and again; none gets another one's."""
    client_of = pytest.importorskip("gradio_client")
    outcomes, lock = [], threading.Lock()
    until = time.monotonic() + 60

    def visit(i):
        n = 0
        while n == 0 or time.monotonic() < until:
            if n % MOST_TURNS == 0:  # a conversation is full: the next one
                client, before = client_of.Client(url, verbose=False), []
            n += 1
            try:
                found = client.predict(f"Say {i} {n}.", None, "", api_name="/ask")
                before.append(f"Say {i} {n}.")
                said = [str(m["content"]) for m in found[0] if m["role"] == "user"]
                its_own = all(mine in text for mine, text in zip(before, said, strict=True))
                outcome = "answered" if its_own else "mixed"
            except Exception as error:  # a full queue is said by an exception of gradio's client
                outcome = "full" if "full" in str(error).lower() else str(error)
                time.sleep(1)
            with lock:
                outcomes.append(outcome)

    clients = [threading.Thread(target=visit, args=(i,)) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(timeout=180)
    assert not any(client.is_alive() for client in clients)
    counts = Counter(outcomes)
    print(f"{CLIENTS} clients in a minute: {dict(counts)}")
    assert set(counts) == {"answered", "full"} and counts["answered"] >= 20
    assert urllib.request.urlopen(url, timeout=10).status == 200
