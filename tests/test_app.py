"""What a trained model is used with: asking, talking, giving away, looking for what is missing."""

import io
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from programs import begun_anew, one_line, program

import app.chat
import app.doctor
import app.microphone
from app.drawing import DrawingOptions, draw_interleaved
from app.generate import GenerateOptions, answer_questions
from app.inside import attention_on_speech, hear, nearest_words
from app.inspecting import InspectOptions, figure_of_example
from data import load_audio, open_run
from model import SpeechLLM
from mtbi import RECIPES, main
from support.files import UserError, read_json, write_json


@pytest.fixture
def wav(trained_world):
    return trained_world / "data" / "audio" / "test-00000.wav"


@pytest.fixture
def run(trained_world):
    return trained_world / "run"


def typed(monkeypatch, *lines):
    """The lines that `input` gives, then the end of the file."""
    left = list(lines)

    def read(_):
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


# ---- generate ----


def test_each_of_several_clips_is_answered_and_what_it_took_is_said(run, wav, capsys):
    words = ["generate", str(run), str(wav), str(wav), "Who did it?", "--max-new-tokens", "4"]
    assert main([*words, "--verbose"]) == 0
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert first == second and first.startswith(f"{wav}: ")
    assert "first token after" in said.err and "speech tokens heard" in said.err
    most = float(said.err.rpartition("at most ")[2].split(" GB")[0])
    assert 0.1 < most < 100


def test_what_streams_is_the_answer(run, wav, capsys):
    assert main(["generate", str(run), str(wav), "Who did it?"]) == 0
    streamed = capsys.readouterr().out.strip()
    model = SpeechLLM.from_pretrained(run / "mtbi")
    assert streamed == model.answer("Who did it?", str(wav))


def test_a_conversation_comes_from_a_file_whose_paths_are_its_own(run, wav, tmp_path, capsys):
    (tmp_path / "clip.wav").write_bytes(wav.read_bytes())
    content = [{"type": "text", "text": "Who did it?"}, {"type": "audio", "audio": "clip.wav"}]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"role": "user", "content": content}]))
    assert main(["generate", str(run), "--messages", str(path)]) == 0
    from_file = capsys.readouterr().out
    assert main(["generate", str(run), str(wav), "Who did it?"]) == 0
    assert capsys.readouterr().out == from_file


@pytest.mark.parametrize(
    "words, refusal",
    [
        ([], "say what to ask"),
        (["Who did it?"], "name the sound files, then what to ask"),
        (["missing.wav", "Who did it?"], "missing.wav"),
        (["a.wav", "Who?", "--messages", "talk.json"], "name no AUDIO or PROMPT"),
        (["a.wav", "Who?", "--record", "3"], "takes the place of the sound files"),
        (["--messages", "missing.json"], "missing.json: there is no such"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(run, words, refusal, capsys):
    assert main(["generate", str(run), *words]) == 2
    one_line(capsys, refusal)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[1]", '[{"role": "user"}]', "[" * 9999])
def test_a_file_that_is_no_conversation_is_refused(run, text, tmp_path, capsys):
    path = tmp_path / "talk.json"
    path.write_text(text)
    assert main(["generate", str(run), "--messages", str(path)]) == 2
    one_line(capsys)


def test_without_a_microphone_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sounddevice", None)
    with pytest.raises(UserError, match="pip install sounddevice"):
        app.microphone.recorded(1.0)


@pytest.mark.parametrize("seconds", [0, 30.5, 1e6])
def test_a_recording_has_an_end(seconds):
    with pytest.raises(UserError, match="it may have up to 30 s"):
        app.microphone.recorded(seconds)


# ---- chat ----


def test_a_chat_mixes_speech_and_text_and_is_saved_and_replayed(
    run, wav, tmp_path, monkeypatch, capsys
):
    saved = tmp_path / "talk.json"
    typed(
        monkeypatch,
        "/help",
        f"/audio '{wav}'",
        "Who did it?",
        "/say 42 apples - at 7:30",  # other words than stand there
        "Repeat this.",
        "And what is the last word?",
        f"/save {saved}",
    )
    assert main(["chat", str(run), "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "/record SECONDS" in said and "spoken by" in said and "6 messages" in said
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3
    assert isinstance(messages[0]["content"], list) and isinstance(messages[4]["content"], str)
    messages.append({"role": "user", "content": "Go on."})
    saved.write_text(json.dumps(messages))
    assert main(["generate", str(run), "--messages", str(saved), "--max-new-tokens", "4"]) == 0


def test_a_bad_line_of_a_chat_is_said_and_the_chat_goes_on(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.json").write_text("mine")
    typed(
        monkeypatch,
        "/nosuch",
        "/audio missing.wav",
        "/say",
        "/record soon",
        "/record 99",
        f"/save {tmp_path / 'mine.json'}",
        f"/save {tmp_path / 'missing' / '..' / 'mine.json'}",
        f"/save {tmp_path / 'mine.json' / 'below.json'}",
        "/say …",
        "/save " + 300 * "x",
        "/say 'it's fine'",
        KeyboardInterrupt,
        "/reset",
        "",
        "/quit",
        "never read",
    )
    assert main(["chat", str(run)]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("chat: ")]
    assert len(lines) == 10 and "spoken by" in said.out and "Traceback" not in said.err
    assert (tmp_path / "mine.json").read_text() == "mine"
    assert not (tmp_path / "missing").exists()


def test_a_letter_in_another_encoding_ends_no_chat(run, monkeypatch, capsys):
    typed_in_latin_1 = io.TextIOWrapper(io.BytesIO(b"/caf\xe9\n/quit\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed_in_latin_1)
    assert main(["chat", str(run)]) == 0
    assert "there is no command /caf" in capsys.readouterr().err


def test_ctrl_c_while_it_records_ends_the_recording_and_not_the_chat(run, monkeypatch, capsys):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(app.chat, "recorded", stopped)
    typed(monkeypatch, "/record 5", "/help")
    assert main(["chat", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.index("stopped") < said.index("/record SECONDS")


def test_an_answer_that_is_stopped_is_taken_back(run, wav, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    model = SpeechLLM.from_pretrained(run / "mtbi")
    chat = app.chat.Chat(model, app.chat.ChatOptions(str(run)))
    chat.take(f"/audio {wav}")
    monkeypatch.setattr(app.chat, "answer_streaming", stopped)
    assert chat.take("Who did it?")
    assert chat.messages == [] and chat.heard == [str(wav)]


# ---- inspect ----


def test_a_recording_is_drawn_from_its_sound_to_the_attention(run, wav, tmp_path, capsys):
    out = tmp_path / "inside.png"
    assert main(["inspect", str(run), str(wav), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    assert main(["inspect", str(run), str(wav), "--out", str(out)]) == 2
    one_line(capsys, "is there already")


def test_a_conversation_of_the_training_is_drawn(run, tmp_path, capsys):
    out = tmp_path / "example.png"
    assert main(["inspect", str(run / "mtbi"), "--example", "3", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    out = tmp_path / "none.png"
    assert main(["inspect", str(run), "--example", "99999999", "--out", str(out)]) == 2
    one_line(capsys, "counted from 0 to")
    assert main(["inspect", str(run), "--out", str(out)]) == 2
    one_line(capsys, "name one sound file, or --example N")
    assert not out.exists()


def test_conversations_are_counted_over_all_micro_batches(run, tmp_path, monkeypatch, capsys):
    asked, drawn = [], []

    def batch(step, micro):
        asked.append((step, micro))
        return [SimpleNamespace(parts=[]) for _ in range(4)]

    examples = SimpleNamespace(batch_size=4, accumulate=3, steps=2, batch=batch)
    monkeypatch.setattr("app.inspecting.examples_of", lambda *_: (None, examples))
    monkeypatch.setattr("app.inspecting.draw_example", lambda *words: drawn.append(words[-1]))
    options = InspectOptions(str(run), example=23, recipe="mtbi")
    figure_of_example(options, run / "mtbi")
    assert asked == [(1, 2)] and drawn[0].endswith("conversation 11 of step 1")
    with pytest.raises(UserError, match="counted from 0 to 23"):
        figure_of_example(replace(options, example=24), run / "mtbi")


def test_a_training_on_other_behaviors_is_not_shown_as_if_on_these(run, tmp_path, capsys):
    mine = begun_anew(run, tmp_path / "trained")
    shutil.copytree(run / "mtbi", mine / "mtbi")
    lines = (mine / "behaviors.jsonl").read_text(encoding="utf-8").splitlines()
    (mine / "behaviors.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    words = ["inspect", str(mine), "--example", "0", "--out", str(tmp_path / "x.png")]
    assert main(words) == 2
    one_line(capsys, "is not what", "was trained on")


def test_the_picture_of_the_readme_is_drawn_of_a_run(run, tmp_path):
    sentences = [u for u in open_run(run).utterances if (u.split, u.kind) == ("test", "sentence")]
    words = sentences[0].text.split()
    for last in (2, 3):
        out = tmp_path / f"{last}.svg"
        draw_interleaved(DrawingOptions(str(run / "mtbi"), str(out), last=last))
        svg = out.read_text()
        assert f"<!-- {' '.join(words[1:last])} -->" in svg and "trained: the only" in svg
        assert f"<!-- “{' '.join(words[last:])}” -->" in svg
    with pytest.raises(UserError, match="must end in .png"):
        draw_interleaved(DrawingOptions(str(run), str(tmp_path / "no.txt")))
    with pytest.raises(UserError, match="comes after"):
        draw_interleaved(DrawingOptions(str(run), str(tmp_path / "no.svg"), first=3, last=2))
    with pytest.raises(UserError, match="has no such utterance"):
        draw_interleaved(DrawingOptions(str(run), str(tmp_path / "no.svg"), utterance="nobody"))


def test_what_is_said_of_the_inside_adds_up(run, wav):
    model = SpeechLLM.from_pretrained(run / "mtbi")
    heard = hear(model, load_audio(wav), wav)
    n = len(heard.tokens)
    assert n == -(-len(heard.frames) // model.connector.k)
    assert len(heard.borders) == n + 1 and heard.borders == sorted(heard.borders)
    assert len(heard.nearest) == n
    on_speech, on_prompt = attention_on_speech(model, heard, "Who did it?")
    assert on_speech.shape == (len(on_prompt), n)
    total = on_speech.sum(1) + on_prompt
    assert (total > 0).all() and (total <= 1 + 1e-5).all()


def test_the_word_nearest_to_an_embedding_is_its_own(llm):
    model = SpeechLLM(*llm)
    some = [300, 400, 500]
    table = model.llm.get_input_embeddings().weight
    found = nearest_words(model, table[some])
    assert [row[0][0] for row in found] == [model.tokenizer.decode([i]).strip() for i in some]


# ---- export ----


@pytest.mark.parametrize("recipe", ["mtbi", "asr"])
def test_an_exported_folder_loads_and_has_a_card_with_the_scores(
    benched_world, recipe, tmp_path, capsys
):
    run, out = benched_world / "run", tmp_path / "published"
    assert main(["export", str(run / recipe), "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "base_model" not in card, "the hub knows no model that is called tiny"
    assert card.startswith("---\nlibrary_name") and "seen" in card and "utterances" in card
    assert str(run) not in card and "Not measured" not in card
    wav = benched_world / "data" / "audio" / "test-00000.wav"
    answers = []
    for folder in (out, run / recipe):
        answers.append(SpeechLLM.from_pretrained(folder).answer("Who did it?", str(wav)))
    assert answers[0] == answers[1]

    capsys.readouterr()
    assert main(["export", str(run), "--out", str(out)]) == 2
    one_line(capsys, "is there already")


def test_what_is_local_is_exported_under_its_public_name(run, tmp_path, capsys):
    mine = begun_anew(run, tmp_path / "trained")
    shutil.copytree(run / "mtbi", mine / "mtbi")
    spec = read_json(mine / "mtbi" / "model.json")
    spec["encoder"] = str(tmp_path / "whisper-tiny.en")
    write_json(mine / "mtbi" / "model.json", spec)

    assert main(["export", str(mine), "--out", str(tmp_path / "local")]) == 0
    said = capsys.readouterr().out
    assert "nobody else can load it" in said and "--encoder-name" in said and "--license" in said
    assert str(tmp_path) not in (tmp_path / "local" / "README.md").read_text()
    named = ["--encoder-name", "openai/whisper-tiny.en", "--license", "mit", "--speech", "My own"]
    assert main(["export", str(mine), "--out", str(tmp_path / "public"), *named]) == 0
    assert "nobody else" not in capsys.readouterr().out
    card = (tmp_path / "public" / "README.md").read_text()
    head = card.split("---")[1]
    assert "base_model:\n- openai/whisper-tiny.en\n" in head and "license: mit" in head
    assert "made from: My own" in card and str(tmp_path) not in card
    assert read_json(tmp_path / "public" / "model.json")["encoder"] == "openai/whisper-tiny.en"


def test_a_licence_is_a_name_and_no_more(run, tmp_path, capsys):
    words = ["--out", str(tmp_path / "public"), "--license", "mit\nbase_model: another"]
    assert main(["export", str(run), *words]) == 2
    assert "give a name like mit or cc-by-4.0" in capsys.readouterr().err
    assert not (tmp_path / "public").exists()


def test_an_export_without_a_benchmark_says_so(run, tmp_path):
    out = tmp_path / "published"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "Not measured" in (out / "README.md").read_text()
    assert read_json(out / "model.json")["llm"] == "tiny"


def test_scores_of_an_earlier_training_are_not_published_and_not_told_as_new(
    benched_world, tmp_path, capsys
):
    world = shutil.copytree(benched_world, tmp_path / "world")
    run, short = str(world / "run"), ["--steps", "1", "--batch-size", "8", "--hidden", "32"]
    assert main(["train", run, "--recipe", "mtbi", *short, "--force"]) == 0
    assert main(["export", run, "--recipe", "mtbi", "--out", str(tmp_path / "new")]) == 0
    assert "no benchmark was run since it was trained" in (tmp_path / "new/README.md").read_text()
    capsys.readouterr()
    assert main(["info", run]) == 0
    assert capsys.readouterr().out.count("measured before it was trained again") == 1


def test_a_recipe_on_a_part_of_the_speech_is_asked_like_any_other(run, wav, tmp_path, capsys):
    mine = begun_anew(run, tmp_path / "trained")
    shutil.copytree(run / "mtbi", mine / "mtbi@10")
    config = read_json(mine / "mtbi@10" / "config.json")
    config["options"]["recipe"] = "mtbi@10"
    write_json(mine / "mtbi@10" / "config.json", config)
    words = ["Who did it?", "--max-new-tokens", "2"]
    assert main(["generate", str(mine), str(wav), *words]) == 0
    assert main(["generate", str(mine), str(wav), *words, "--recipe", "mtbi@10"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_a_hub_name_that_cannot_be_fetched_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be fetched from the hub"):
        SpeechLLM.from_pretrained("nobody/nothing-of-this-name")


# ---- doctor ----


def test_the_doctor_finds_this_machine_ready(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "MISSING" not in said and "mtbi.py demo" in said
    for what in ("Python", "packages", "GPU", "bitsandbytes", "espeak-ng", "memory", "disk"):
        assert f" {what} " in said


def test_the_doctor_names_what_is_missing_and_the_command_that_mends_it(capsys, monkeypatch):
    def broken(*_):
        raise OSError("libespeak-ng.so: no such file")

    monkeypatch.setattr("tiny.speech.speak", broken)
    monkeypatch.setattr(app.doctor, "MEMORY", 1e18)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.count("MISSING") == 2 and "libespeak-ng.so" in said
    assert "mend: pip install -r requirements.txt" in said
    assert "Not ready: espeak-ng, memory." in said


def test_the_doctor_looks_at_the_data_too(trained_world, tmp_path, capsys):
    assert main(["doctor", "--data", str(trained_world / "data")]) == 0
    assert " utterances, " in capsys.readouterr().out
    assert main(["doctor", "--data", str(tmp_path)]) == 0
    assert f"mend: python mtbi.py prepare … --out {tmp_path}" in capsys.readouterr().out


def test_without_torch_a_line_says_what_to_install():
    ended = program(["-ES", "mtbi.py", "doctor"])  # -S: without what pip installed
    assert ended.returncode == 2
    assert ended.said == "mtbi: torch is not installed: pip install -r requirements.txt\n"


def test_generate_answers_nothing_before_everything_asked_was_understood(run, wav):
    options = GenerateOptions(str(run), (str(wav), "Who?"), recipe="nosuch")
    with pytest.raises(UserError, match="holds no trained recipe 'nosuch'"):
        answer_questions(options, list(RECIPES))
