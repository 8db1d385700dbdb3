"""The benchmark: its questions, scores and probes, and the table of answers it writes."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from checkpoints import change_weights, save_encoder
from conftest import A_SMALL_BENCH, FEW_TASKS, ROOT
from hypothesis import given
from hypothesis import strategies as st
from programs import one_line

import eval as eval_module
import model
from data import Response, Run, Speech, Task, Text, Utterance, chat_parts, load_tasks, normalize
from data import read_manifest, response_tokens, transcript_tokens, user_turn
from eval import CELLS, DIALOGUES, SETS, BenchOptions, Case, Questions, System, all_metrics
from eval import directives_of, draw_cases, draw_dialogues, draw_repeats, earlier_about_the_same
from eval import hypothesis, row_of, score
from lab.mistakes import MISTAKES, Mistakes, kind_of_mistake
from lab.probes import attention_shares, behavior_gap, shares_of_parts
from lab.statistics import read_answers
from model import SpeechLLM
from mtbi import main
from support.files import read_json, read_jsonl, write_json, write_jsonl
from support.runs import lock_folder

PLOTS = ("cells.png", "tasks.png", "attention.png", "loss.png")
MADE = ("answers.csv", "report.json", "report.md", *PLOTS)


# ---- scores ----


def test_exact_match_by_hand():
    assert score("exact", "The farmer.", "the farmer") == 1
    assert score("exact", "red", "blue") == 0


def test_word_accuracy_by_hand():
    assert score("wer", "three red apples", "three blue apples") == pytest.approx(2 / 3)
    assert score("wer", "a", "b c d e") == 0
    assert score("wer", "", "") == 1


def test_the_cascade_reads_small_letters_where_a_recognizer_writes_capitals_alone(llm):
    reader = SpeechLLM(*llm)
    for heard, read in (("RED Apples", "RED Apples"), ("RED APPLES", "red apples")):
        transcriber = SimpleNamespace(transcribe=lambda frames, heard=heard: heard)
        expected = transcript_tokens(reader.tokenizer, read)
        assert hypothesis(transcriber, None, reader).ids == expected.ids


def test_chrf_by_hand():
    assert score("chrf", "tres manzanas", "tres manzanas") == 1
    assert 0 < score("chrf", "tres manzanas", "tres limones") < 1


@given(st.text(max_size=20), st.text(max_size=20))
def test_every_metric_is_a_number_whatever_was_answered(reference, answer):
    metrics = all_metrics(reference, answer)
    assert set(metrics) == {"exact", "wer", "chrf", "bleu"}
    assert metrics["wer"] >= 0
    assert all(0 <= metrics[name] <= 1 + 1e-9 for name in ("exact", "chrf", "bleu"))
    for metric in ("exact", "wer", "chrf"):
        assert 0 <= score(metric, reference, answer) <= 1 + 1e-9
    assert score("exact", reference, reference) == 1


WHO = Task("who", "train", "exact", ["Who?"], ["Who was it?"])
SAID = "the farmer sold three red apples"


def case_about(task, prompt="Who?", cell=CELLS[0]):
    return Case(Utterance(Path("x"), SAID, 1.0, id="x"), task, prompt, cell)


def test_an_instruction_is_ignored_where_the_answer_is_the_transcript():
    """Word for word: one with a word of its own may be the right sort of answer, and wrong."""

    def ignored(reference, answer):
        row = row_of("asr", "questions", case_about(WHO), reference, answer)
        return row["ignored_instruction"]

    assert ignored("the farmer", SAID.upper() + ".") == 1
    assert ignored("the farmer", "the farmer will sell three red apples") == 0
    assert ignored("the farmer", "the baker") == 0
    assert ignored(SAID, SAID) is None, "the transcript was the right answer"


def test_repeating_ignores_no_instruction_where_it_is_asked_for():
    repeat = Task("repeat", "train", "wer", ["Repeat."], ["Again."])
    row = row_of("asr", "questions", case_about(repeat, "Repeat."), SAID, SAID)
    assert row["ignored_instruction"] is None
    slip = SAID.replace("red", "green")  # the text LLM's own
    row = row_of("asr", "questions", case_about(repeat, "Repeat."), slip, SAID)
    assert row["ignored_instruction"] is None
    assert row_of("asr", "questions", case_about(WHO), "the farmer", SAID)["ignored_instruction"]
    assert row_of("asr", "text", case_about(WHO), "the farmer", SAID)["ignored_instruction"] is None


def test_whoever_copies_the_transcript_ignores_every_instruction_of_which_one_can_tell():
    question = Task("question", "unseen", "exact", ["As a question?"], ["Ask it."])
    asked = "who sold them"
    row = row_of("copy", "questions", case_about(question), asked, SAID)
    assert row["ignored_instruction"] == 1.0
    nearly = SAID.replace("three", "four")
    row = row_of("copy", "questions", case_about(question), nearly, SAID)
    assert row["ignored_instruction"] == 1.0
    row = row_of("copy", "questions", case_about(question), SAID, SAID)
    assert row["ignored_instruction"] is None


# ---- mistakes ----


@pytest.mark.parametrize(
    "answer, heard, mistake",
    [
        ("the baker", False, "misheard"),
        (SAID, True, "copied"),
        ("two", True, "obeyed"),
        ("apples", True, "another task"),
        ("the baker", True, "wrong word"),
        ("the farmer sold", True, "wrong word"),
        ("in spanish", True, "other"),
    ],
)
def test_how_a_wrong_answer_is_wrong(answer, heard, mistake):
    found = kind_of_mistake(
        case_about(WHO),
        "the farmer",
        answer,
        heard,
        reply="two",
        others=["red", "apples"],
        possible={"the baker", "the farmer"},
    )
    assert found == mistake


def test_a_copy_is_a_copy_where_the_right_answer_differs_by_a_word():
    """Not the answer to *repeat*, which is another task, too."""
    reference = SAID.replace("the farmer", "who")
    found = kind_of_mistake(case_about(WHO), reference, SAID, True, None, [SAID], set())
    assert found == "copied"


def test_wrong_answers_are_looked_into_and_right_ones_are_not(benched_world):
    rows = read_answers(benched_world / "run" / "answers.csv")
    assert set(rows["mistake"]) <= {"", *MISTAKES}
    assert (rows[rows["mistake"] != ""]["exact"] == 0).all()
    for system in ("mtbi", "asr"):  # trained for a moment, it is wrong about nearly all
        looked_into = rows[(rows["system"] == system) & (rows["mistake"] != "")]
        assert len(looked_into) == 3, "as many as --mistakes says"
    assert not rows[rows["system"].isin(["text", "copy"])]["mistake"].any()


def test_a_directive_is_obeyed_where_the_answer_is_what_the_speech_asks_for():
    questions = Questions.__new__(Questions)
    said = Utterance(Path("x"), "which is larger two or five", 1.0, id="x", kind="directive")
    case = Case(said, WHO, "Who?", "seen")
    assert directives_of([case, case]) == [said]
    questions.cases = {"questions": [case, case, case]}
    questions.references = {"questions": ["nobody", "nobody", "five"]}
    questions.replies = {"x": "five"}
    answers = {"questions": ["five", "nobody", "five"]}
    rows = questions.rows("asr", answers, {})
    assert [row["anchored"] for row in rows] == [1.0, 0.0, None], "the last may have been either"


# ---- questions ----


@pytest.fixture(scope="module")
def tested(utterances):
    return [u for u in utterances if u.split == "test"]


@pytest.fixture(scope="module")
def cases(tested):
    return draw_cases(load_tasks(ROOT / "tiny" / "tasks.toml"), tested, 1, 0)


def test_only_what_is_asked_about_is_heard(tested, monkeypatch):
    many = [replace(u, id=f"{u.id}-{i}") for u in tested for i in range(20)]
    bench = eval_module.Bench(BenchOptions("run", per_prompt=1), None, Path(), None, many, {}, {})
    cases, repeats = bench.draw(load_tasks(FEW_TASKS))
    monkeypatch.setattr(eval_module, "encode_all", lambda encoder, heard, *where: heard)
    heard = [u.id for u in bench.encode(SimpleNamespace(fingerprint="ears"))]
    assert set(heard) == {case.utterance.id for case in (*cases, *repeats)}
    assert len(heard) == len(set(heard)) < len(many)


def test_every_prompt_gets_its_questions_and_every_cell_is_filled(tested):
    tasks = load_tasks(ROOT / "tiny" / "tasks.toml")
    cases = draw_cases(tasks, tested, 2, 0)
    assert {c.cell for c in cases} == set(CELLS)
    prompts = set()
    for task in tasks.values():
        prompts |= {(task.name, prompt) for prompt in task.prompts + task.unseen_prompts}
    assert {(c.task.name, c.prompt) for c in cases} == prompts
    for c in cases:
        assert c.task.applies(c.utterance.text)
        new_prompt = c.task.split == "train" and c.prompt in c.task.unseen_prompts
        assert (c.task.split == "unseen") == (c.cell == "unseen_task")
        assert new_prompt == (c.cell == "unseen_prompt")


def test_other_utterances_are_to_be_repeated_in_the_wording_that_a_recipe_of_one_prompt_has(tested):
    repeat = Task("repeat", "train", "wer", ["Say it.", "Copy it.", "Do it again."], ["Again."])
    cases = draw_repeats({"repeat": repeat}, tested, 3, 0)
    assert {case.prompt for case in cases} == {"Copy it."}, "the first one by name, as in data.py"
    assert len({case.utterance.id for case in cases}) == 3
    assert len(draw_repeats({"repeat": repeat}, tested, 10**6, 0)) == len(tested)


def test_dialogues_are_of_all_kinds_and_about_held_out_speech(cases):
    drawn = draw_dialogues(cases, [f"answer {i}" for i in range(len(cases))], 5, 0)
    assert [d.cell for d in drawn] == np.repeat(DIALOGUES, 5).tolist()
    for d in drawn:
        prompt, utterance, spoken, answer = d.earlier
        case = cases[int(answer.split()[1])]
        # the first turn is a case, with the answer to it
        assert (case.prompt, case.utterance) == (prompt, utterance)
        assert d.again == (d.cell == "speech_then_text_question")
        assert spoken == (d.cell != "text_then_speech")
        assert not d.again or utterance is d.utterance
        assert not d.again or case.task is not d.task, "the answer stands there already"


def test_no_second_answer_can_be_read_in_the_first_turn_about_the_same_speech(tested):
    tasks = [Task(name, "train", "exact", [name], []) for name in ("without", "last", "repeat")]
    one = replace(tested[0], text="the red bus stops")
    cases = [Case(one, task, task.name, "seen") for task in tasks]
    answers = ["Stops, bus red.", "stops", "the red bus stops"]
    about = {one.id: [0, 1, 2]}
    found = [earlier_about_the_same(cases, answers, i, about) for i in range(3)]
    # the last word stands in both other answers, and whoever repeats tells everything
    assert found == [[1], [], [0, 1]]


@given(st.lists(st.sampled_from(["yes", "Yes!", "no", "maybe"]), min_size=1, max_size=12))
def test_an_utterance_of_its_own_has_other_words_than_the_turn_before(texts):
    task = Task("repeat", "train", "wer", ["Say it."], [])
    cases = []
    for i, text in enumerate(texts):
        utterance = Utterance(Path(f"u{i}.wav"), text, 1.0, id=f"u{i}")
        cases.append(Case(utterance, task, "Say it.", "seen"))
    drawn = draw_dialogues(cases, texts, 3, 0)
    for d in drawn:
        assert d.cell in ("text_then_speech", "two_speeches")
        assert normalize(d.earlier[1].text) != normalize(d.utterance.text)
    several = len({normalize(text) for text in texts}) > 1
    assert len(drawn) == (2 * min(3, len(texts)) if several else 0)


# ---- probes ----


class Hears(System):
    """A model that hears frames."""

    def __init__(self, model, frames):
        super().__init__("hears", "", model)
        self.frames = frames

    def parts(self, utterance):
        return [Speech(self.frames[utterance.id])]


@pytest.fixture
def reads(model):
    return System("text", "", model)


@pytest.fixture
def hears(model, frames):
    return Hears(model, frames)


def own_answers(system, cases):
    """The token ids of the system's own answers."""
    answers = system.model.generate([case.parts(system) for case in cases])
    return [response_tokens(system.model.tokenizer, answer) for answer in answers]


def test_in_a_dialogue_the_spoken_utterances_alone_are_spoken(cases, hears):
    spoken = {"speech_then_text_question": 1, "text_then_speech": 1, "two_speeches": 2}
    for d in draw_dialogues(cases, [f"answer {i}" for i in range(len(cases))], 3, 0):
        assert sum(isinstance(p, Speech) for p in d.parts(hears)) == spoken[d.cell]


def test_the_behavior_gap_of_text_is_zero(cases, reads):
    few = cases[:6]
    gaps = behavior_gap(reads, reads, few, own_answers(reads, few))
    assert gaps == pytest.approx([0] * 6, abs=1e-6)


def test_the_behavior_gap_of_speech_is_the_kl_loss(cases, reads, hears):
    few = cases[:6]
    responses = own_answers(reads, few)
    gaps = behavior_gap(hears, reads, few, responses)
    for case, ids, gap in zip(few, responses, gaps):
        with torch.no_grad():
            heard, read = ([case.parts(system, ids)] for system in (hears, reads))
            kl = hears.model(heard, read, "kl").item()
        assert gap == pytest.approx(kl / len(ids), rel=1e-3, abs=1e-5)
        assert gap > 0


def test_attention_shares_are_shares_of_every_layer(cases, reads, hears):
    few, model = cases[:4], reads.model
    before = model.llm.config._attn_implementation
    for system in (reads, hears):
        for shares in attention_shares(system, few, own_answers(reads, few)):
            on_instruction, on_utterance = shares["instruction"], shares["utterance"]
            assert len(on_instruction) == len(on_utterance) == model.llm.config.num_hidden_layers
            for a, b in zip(on_instruction, on_utterance):
                assert 0 < a < 1 and 0 < b < 1 and a + b < 1
    # what follows the first token of the answer does not count
    responses = own_answers(reads, few)
    first = attention_shares(hears, few, [ids[:1] for ids in responses])
    for one, other in zip(first, attention_shares(hears, few, responses)):
        assert one["instruction"] == pytest.approx(other["instruction"], abs=1e-5)
    assert model.llm.config._attn_implementation == before, "the fast kernels are back"


def test_attention_is_summed_over_the_positions_of_each_part():
    """By hand: every position has a digit of its own, k frames are one speech token."""
    spoken = [Speech(torch.zeros(3, 4))]  # with k = 2 two speech tokens
    parts = [Text([7, 7]), Text([8], is_instruction=True), *spoken, Text([9]), Response([1, 2])]
    attention = torch.tensor([[1.0, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7]])  # (1 layer, L)
    model = SimpleNamespace(connector=SimpleNamespace(k=2))
    found = shares_of_parts(attention, parts, spoken, model)
    assert found == {"instruction": [100.0], "utterance": [11000.0]}
    read = [parts[3]]  # its transcript stands for the utterance
    assert shares_of_parts(attention, parts, read, model)["utterance"] == [1e5]


def test_the_probe_reads_the_very_prompt_that_is_asked_and_knows_where_it_is(cases, reads):
    tokenizer = reads.model.tokenizer
    for case in cases[:4]:
        audio = [reads.parts(case.utterance)]
        asked = chat_parts(tokenizer, user_turn(case.prompt), audio)
        probed = chat_parts(tokenizer, user_turn(case.prompt), audio, instruction=case.prompt)
        assert all_ids(probed) == all_ids(asked)
        [marked] = [p for p in probed if getattr(p, "is_instruction", False)]
        assert tokenizer.decode(marked.ids).strip() == case.prompt


def all_ids(parts):
    return [i for part in parts for i in part.ids]


# ---- the table of answers ----


@pytest.fixture
def own(benched_world, tmp_path):
    """A folder with data and a benchmarked run, which may be changed."""
    return shutil.copytree(benched_world, tmp_path / "world")


@pytest.fixture(scope="module")
def report(benched_world):
    return read_json(benched_world / "run" / "report.json")


@pytest.fixture(scope="module")
def answers(benched_world):
    return pandas.read_csv(benched_world / "run" / "answers.csv")


SYSTEMS = ["text", "copy", "cascade", "mtbi", "asr"]


def test_everything_is_written(benched_world, report):
    for name in MADE:
        assert (benched_world / "run" / name).stat().st_size > 100, name
    assert set(report) == {"recipes", "samples", "meta"}
    assert list(report["recipes"]) == SYSTEMS
    assert report["meta"]["llm_is_4_bit"]


def test_a_report_that_is_gone_is_written_again(own):
    (own / "run" / "report.md").unlink()
    assert main(["bench", str(own / "run"), *A_SMALL_BENCH]) == 0
    assert (own / "run" / "report.md").exists()


def test_answers_csv_is_a_row_for_every_answer_of_every_system(answers, report):
    assert answers["system"].unique().tolist() == SYSTEMS
    questions = 24  # one for each prompt of tests/few_tasks.toml
    repeats = min(12, report["meta"]["n_utterances"])
    sizes = answers.groupby(["system", "set"]).size()
    for system in SYSTEMS:
        asked = {"questions": questions, "repeats": repeats, "dialogues": 6}
        assert sizes[system].to_dict() == asked | ({} if system == "copy" else {"text": 24})
    assert set(answers["set"]) == set(SETS)
    assert report["meta"]["n_cases"] == questions
    # every system was asked the very same
    asked = ["set", "cell", "task", "prompt", "utterance", "transcript", "reference"]
    spoken = answers[answers["set"] != "text"]
    tables = [rows[asked].reset_index(drop=True) for _, rows in spoken.groupby("system")]
    for table in tables[1:]:
        pandas.testing.assert_frame_equal(table, tables[0])


def test_a_row_says_who_was_asked_what_and_how_the_answer_scores(answers):
    tasks = load_tasks(FEW_TASKS)
    for row in answers.fillna({"answer": "", "reference": ""}).itertuples():
        task = tasks[row.task]
        if row.set != "dialogues":
            assert (row.cell == "unseen_task") == (task.split != "train")
            seen = task.split == "train" and row.prompt in task.prompts
            assert (row.cell == "seen") == seen
        assert row.score == pytest.approx(score(task.metric, row.reference, row.answer), abs=1e-6)
        copied = score(task.metric, row.reference, row.transcript)
        assert row.copy == pytest.approx(copied, abs=1e-6)
        for name, value in all_metrics(row.reference, row.answer).items():
            assert getattr(row, name) == pytest.approx(value, abs=1e-6)


def test_the_bottom_line_answers_everything_with_the_transcript(answers, report):
    bottom = answers[answers["system"] == "copy"]
    assert (bottom["answer"] == bottom["transcript"]).all()
    assert (bottom["score"] == bottom["copy"]).all()
    gains = [cell["gain"] for cell in report["recipes"]["copy"]["cells"].values()]
    assert gains == pytest.approx([0, 0, 0])
    gains = [cell["gain"] for cell in report["recipes"]["text"]["cells"].values()]
    assert gains == pytest.approx([1, 1, 1])


def test_the_top_line_is_its_own_reference(answers):
    top = answers[answers["system"] == "text"]
    assert (top["score"] == 1).all()
    assert (top["behavior_gap"].dropna().abs() < 1e-6).all()


def test_the_numbers_of_report_json_are_group_bys_of_the_table(answers, report):
    questions = answers[answers["set"] == "questions"]
    by_task = questions.groupby(["system", "task"])["score"].mean()
    in_two_turns = answers[answers["set"] == "dialogues"].groupby(["system", "cell"])["score"]
    ignored = questions.groupby("system")["ignored_instruction"].mean()
    gap = questions.groupby("system")["behavior_gap"].mean()
    retention = answers[answers["set"] == "text"].groupby("system")["score"].mean()
    for system, entry in report["recipes"].items():
        assert list(entry["cells"]) == CELLS
        for cell, found in entry["cells"].items():
            rows = questions[(questions["system"] == system) & (questions["cell"] == cell)]
            assert found["score"] == pytest.approx(rows["score"].mean())
            assert found["exact"] == pytest.approx(rows["exact"].mean())
            assert found["n"] == len(rows)
            ways = rows[rows["copy"] < 1]
            mean, copied = ways["score"].mean(), ways["copy"].mean()
            assert found["gain"] == pytest.approx((mean - copied) / (1 - copied))
            assert found["ci95"][0] <= found["gain"] <= found["ci95"][1] <= 1 + 1e-9
        looked_into = questions[questions["system"] == system]["mistake"].notna().sum()
        assert sum(entry["mistakes"].values()) == looked_into
        for task, found in entry["tasks"].items():
            assert found["score"] == pytest.approx(by_task[system, task])
            assert found["n"] == 4
        for kind, found in entry["dialogues"].items():
            assert found["score"] == pytest.approx(in_two_turns.mean()[system, kind])
        assert entry["ignored_instruction_rate"] == pytest.approx(ignored[system])
        if system == "copy":  # it is no model to look into, and reads nothing
            assert entry["behavior_gap"]["score"] is entry["text_retention"]["score"] is None
            continue
        assert entry["behavior_gap"]["score"] == pytest.approx(gap[system])
        assert entry["text_retention"]["score"] == pytest.approx(retention[system])


def test_probes_are_few_and_the_attention_by_layer_has_their_mean(answers, report):
    for system, entry in report["recipes"].items():
        if system == "copy":
            assert not entry["attention"]
            continue
        rows = answers[answers["system"] == system]
        assert rows["behavior_gap"].notna().sum() == report["meta"]["n_probes"] == 4
        for kind, by_layer in entry["attention"].items():
            mean = rows[f"attention_on_{kind}"].mean()
            assert np.mean(by_layer) == pytest.approx(mean, abs=1e-5)


def test_text_skills_are_measured_of_an_adapter_and_a_frozen_llm_keeps_them(answers):
    rows = answers[answers["set"] == "text"].set_index("system")
    for system in ("text", "cascade", "mtbi"):
        assert (rows.loc[system, "score"] == 1).all(), "nothing changed it"


def test_an_llm_with_an_adapter_is_asked_the_questions_in_text_anew():
    questions = Questions.__new__(Questions)
    questions.top_line = System("text", "", SimpleNamespace(lora=0))
    questions.references = {"questions": ["spoken"], "dialogues": [], "text": ["as ever"]}
    asked = []

    def ask(system, which, presenter=None):
        asked.append((system.name, which, type(presenter)))
        return [("changed", True)]

    questions.ask = ask
    frozen, adapted = (Hears(SimpleNamespace(lora=rank), {}) for rank in (0, 8))
    assert questions.answers_of(frozen, "text") == ["as ever"]
    assert asked == []
    assert questions.answers_of(adapted, "text") == ["changed"]
    assert asked == [("hears", "text", System)], "the utterances come as transcripts"


def test_the_text_llm_is_asked_about_mistakes_without_the_adapter_of_the_mistaken(monkeypatch):
    """It is on the LLM that they share."""
    asked, without = [], []

    @contextmanager
    def without_adapter():
        without.append(1)
        yield
        without.pop()

    class Asked:
        options = SimpleNamespace(seed=0, mistakes=9)
        tasks = {"repeat": Task("repeat", "train", "wer", ["Repeat."], []), "who": WHO}
        cases = {"questions": [case_about(WHO)]}
        references = {"questions": ["the farmer"]}
        replies = {}
        top_line = System("text", "", None)

    def ask(self, system, cases):
        asked.append((system.name, bool(without)))
        return [SAID for _ in cases]

    monkeypatch.setattr(Mistakes, "ask", ask)

    tuned = System("vtb", "", SimpleNamespace(without_adapter=without_adapter))
    Mistakes(Asked()).of(tuned, ["the baker"])
    assert asked == [("vtb", False), ("text", True)]


def test_a_recipe_with_an_adapter_shares_the_llm_which_comes_after_the_speech(
    trained_world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(trained_world, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "data" / "features")
    loaded = []

    def counted(*options):
        loaded.append(options)
        return load_llm(*options)

    load_llm = model.load_llm
    monkeypatch.setattr(model, "load_llm", counted)
    model.shared_llm.cache_clear()
    assert main(["bench", str(tmp_path / "run"), *A_SMALL_BENCH]) == 0
    assert len(loaded) == 1, "another one, for the adapter, might not fit the GPU"
    said = capsys.readouterr().out
    assert 0 < said.index("\nencode ") < said.index("\nload the LLM"), "which may leave no room"


def test_kept_answers_are_scored_by_the_code_of_today_and_stale_ones_asked_anew(
    benched_world, tmp_path, monkeypatch, capsys
):
    shutil.copytree(benched_world, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    before = read_answers(run / "answers.csv")
    monkeypatch.setattr(eval_module, "SCORING", 99)
    monkeypatch.setattr(eval_module, "score", lambda *_: 0.25)
    again = ["bench", str(run), *A_SMALL_BENCH]
    capsys.readouterr()
    assert main(again) == 0
    assert "bench mtbi" not in capsys.readouterr().out, "nobody is asked"
    after = read_answers(run / "answers.csv")
    assert set(after["score"]) == {0.25}
    same = [name for name in before.columns if name not in ("score", "copy", "audio")]
    pandas.testing.assert_frame_equal(before[same], after[same])

    # and once other dialogues are drawn
    draw = eval_module.draw_dialogues
    monkeypatch.setattr(eval_module, "draw_dialogues", lambda *asked: draw(*asked)[::-1])
    (run / "report.json").unlink()
    assert main(again) == 0
    assert "bench mtbi" in capsys.readouterr().out
    dialogues = read_answers(run / "answers.csv").query("set == 'dialogues'")
    expected = before.query("set == 'dialogues'")
    key = ["system", "cell", "task", "prompt", "utterance"]
    answers = dialogues.set_index(key)["answer"].sort_index()
    assert answers.tolist() == expected.set_index(key)["answer"].sort_index().tolist()


def test_the_words_none_and_nan_are_answers_and_no_holes_in_the_table(benched_world, tmp_path):
    path = tmp_path / "answers.csv"
    table = read_answers(benched_world / "run" / "answers.csv")
    table.loc[:3, "answer"] = ["nan", "None", "007", ""]
    table.to_csv(path, index=False)
    again = read_answers(path)
    assert again["answer"][:4].tolist() == ["nan", "None", "007", ""]
    pandas.testing.assert_frame_equal(again, table, check_dtype=False, check_exact=True)


def test_report_json_is_strict_json(benched_world):
    text = (benched_world / "run" / "report.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=refuse_constant)


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


# ---- what is asked again, and what is not ----


def stamps(folder):
    """{file: when it was written}."""
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def bench(folder, *words):
    return main(["bench", str(folder), *A_SMALL_BENCH, *map(str, words)])


def test_an_interrupted_benchmark_goes_on_with_what_was_answered(own, monkeypatch, capsys):
    assert bench(own / "run", "--force", "--batch-size", 8) == 0
    before = (own / "run" / "answers.csv").read_bytes()
    real, calls = SpeechLLM.generate_rows, []

    def third_is_stopped(self, *more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *more)

    monkeypatch.setattr(SpeechLLM, "generate_rows", third_is_stopped)
    assert bench(own / "run", "--force", "--batch-size", 8) == 130
    capsys.readouterr()
    assert bench(own / "run", "--batch-size", 8) == 0
    assert "16 of 24 answers are there already" in capsys.readouterr().out
    assert (own / "run" / "answers.csv").read_bytes() == before


def test_a_recipe_under_another_name_is_not_measured_as_that(own, capsys):
    shutil.copytree(own / "run" / "asr", own / "run" / "mtbi-kl")
    shutil.copytree(own / "run" / "asr", own / "run" / "mtbi@old")
    assert bench(own / "run") == 2
    one_line(capsys, "mtbi-kl: holds the recipe asr under another name")


def test_a_recipe_that_was_trained_again_meanwhile_is_not_measured(own, monkeypatch, capsys):
    plan = eval_module.plan_bench

    def and_train(*args):
        found = plan(*args)
        again = ["train", str(own / "run"), "--recipe", "asr", "--force", "--hidden", "16"]
        assert main([*again, "--steps", "1", "--batch-size", "8"]) == 0
        return found

    monkeypatch.setattr("mtbi.plan_bench", and_train)
    assert bench(own / "run", "--force") == 2
    one_line(capsys, "asr: was trained again while this benchmark is at work")


def test_what_is_kept_of_a_system_is_not_taken_for_that_of_one_with_a_longer_name(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("support.answers.wait", lambda: pytest.fail("the other processes do not"))
    kept = [f"{system}-questions.part-0.jsonl" for system in ("mtbi", "mtbi-1")]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / "text-replies.part-0.jsonl").touch()
    eval_module.forget_records(tmp_path, ["mtbi", "text"])
    assert [path.name for path in tmp_path.iterdir()] == kept[1:]


def test_of_two_benchmarks_at_once_the_second_is_refused(own, capsys):
    with lock_folder(own / "run" / "bench"):
        assert bench(own / "run", "--force") == 2
    one_line(capsys, "another process is at work in this folder")


def test_a_table_of_tasks_or_of_answers_that_changed_is_noticed(own, tmp_path, monkeypatch, capsys):
    with open(own / "run" / "answers.csv", "a") as file:
        file.write("\n")
    assert bench(own / "run") == 0
    assert "is not the table that was written there" in capsys.readouterr().out
    (tmp_path / "tests").mkdir()
    changed = FEW_TASKS.read_text(encoding="utf-8") + "\n# one line more\n"
    (tmp_path / "tests" / "few_tasks.toml").write_text(changed, encoding="utf-8")
    monkeypatch.setattr("eval.PROJECT", tmp_path)
    assert bench(own / "run") == 2
    one_line(capsys, "few_tasks.toml: has changed since `behaviors`")


def test_what_is_measured_is_not_measured_again(own, capsys):
    before = stamps(own)
    assert bench(own / "run") == 0
    assert "is written already" in capsys.readouterr().out
    assert stamps(own) == before


def test_a_benchmark_is_done_again_where_speech_changed(own, capsys):
    wavs = sorted((own / "data" / "audio").glob("test-*.wav"))
    shutil.copy(wavs[0], wavs[1])
    assert bench(own / "run") == 0
    said = capsys.readouterr().out
    assert "is written already" not in said
    assert "bench text:" in said and "bench asr:" in said


def test_a_benchmark_is_done_again_in_another_precision(own, capsys):
    assert bench(own / "run", "--precision", "bf16") == 0
    said = capsys.readouterr().out
    assert "is written already" not in said
    assert "bench text:" in said and "bench asr:" in said


def test_a_damaged_record_is_measured_again_and_the_others_are_kept(own, capsys):
    report = read_json(own / "run" / "report.json")
    kept = own / "run" / "bench"
    before = stamps(kept)
    (kept / "mtbi.json").write_text("{")
    assert bench(own / "run") == 0
    said = capsys.readouterr().out
    assert "bench mtbi:" in said and "bench asr:" not in said
    assert "mtbi.json: is no readable JSON" in said and "it is measured anew" in said
    changed = {f.name for f, at in stamps(kept).items() if before.get(f) != at}
    assert changed == {"mtbi.json", "config.json"}
    again = read_json(own / "run" / "report.json")
    for name in SYSTEMS:
        assert again["recipes"][name]["cells"] == report["recipes"][name]["cells"]


def test_a_report_in_which_something_is_missing_is_written_anew(own):
    report = read_json(own / "run" / "report.json")
    broken = read_json(own / "run" / "report.json")
    broken["recipes"]["text"] = {}
    write_json(own / "run" / "report.json", broken)
    assert bench(own / "run") == 0
    assert read_json(own / "run" / "report.json")["recipes"].keys() == report["recipes"].keys()
    assert read_json(own / "run" / "report.json")["recipes"]["text"]


def test_the_recipes_that_are_named_are_all_that_the_report_holds(own):
    assert bench(own / "run", "--recipes", "asr") == 0
    assert list(read_json(own / "run" / "report.json")["recipes"]) == [
        "text",
        "copy",
        "cascade",
        "asr",
    ]


def test_a_recipe_is_measured_as_it_was_after_so_many_steps(own, capsys):
    train = ["train", str(own / "run"), "--recipe", "asr", "--force", "--hidden", "16"]
    sizes = ["--steps", "4", "--batch-size", "8", "--save-every", "2", "--keep-states"]
    assert main([*train, *sizes]) == 0
    answers = []
    for words in (["--step", "2"], ["--step", "4"], []):
        assert bench(own / "run", "--recipes", "asr", *words) == 0
        folder = own / "run" / "steps" / words[1] if words else own / "run"
        table = read_answers(folder / "answers.csv")
        answers.append(table[table["system"] == "asr"].reset_index(drop=True))
    early, last, trained = answers
    pandas.testing.assert_frame_equal(last, trained)
    assert (early["answer"] != last["answer"]).any()
    capsys.readouterr()
    assert bench(own / "run", "--recipes", "asr", "--step", "3") == 2
    one_line(capsys, "no state after 3 steps was kept (2, 4 are there)", "--keep-states")


def test_another_transcriber_changes_the_cascade_alone(own, tmp_path, capsys):
    asr = save_encoder(tmp_path, "wav2vec2-ctc")
    assert bench(own / "run", "--asr", asr) == 0
    said = capsys.readouterr().out
    assert "bench cascade:" in said
    assert "bench text:" not in said and "bench mtbi:" not in said
    report = read_json(own / "run" / "report.json")
    assert list(report["recipes"]) == SYSTEMS
    assert report["meta"]["settings"]["asr"][0] == str(asr)

    change_weights(asr, lambda tensors: tensors | {"lm_head.bias": tensors["lm_head.bias"] + 1})
    model.shared_encoder.cache_clear()
    assert bench(own / "run", "--asr", asr) == 0
    said = capsys.readouterr().out
    assert "bench cascade:" in said, "its head was trained anew"
    assert "bench text:" not in said and "bench mtbi:" not in said


def test_a_transcriber_without_a_ctc_head_is_none(own, tmp_path, capsys):
    assert bench(own / "run", "--asr", save_encoder(tmp_path, "wav2vec2")) == 0
    assert "cascade: left out" in capsys.readouterr().out
    assert list(read_json(own / "run" / "report.json")["recipes"]) == [
        "text",
        "copy",
        "mtbi",
        "asr",
    ]


def test_a_run_folder_can_be_moved_with_its_data(own, tmp_path, capsys):
    shutil.move(own, tmp_path / "elsewhere")
    assert bench(tmp_path / "elsewhere" / "run") == 0
    assert "is written already" in capsys.readouterr().out
    assert bench(tmp_path / "elsewhere" / "run", "--recipes", "mtbi", "--force") == 0


# ---- other data ----


@pytest.fixture
def elsewhere(own):
    """A data folder that has held-out speech alone."""
    folder = own / "heard-elsewhere"
    shutil.copytree(own / "data" / "audio", folder / "audio")
    lines = (own / "data" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    tested = [line for line in lines if json.loads(line)["split"] == "test"]
    (folder / "manifest.jsonl").write_text("\n".join(tested[:8]) + "\n", encoding="utf-8")
    return folder


def test_other_data_may_have_no_training_speech_and_gets_a_report_of_its_own(own, elsewhere):
    run = own / "run"
    before = {name: (run / name).read_bytes() for name in MADE}
    assert bench(run, "--data", elsewhere) == 0
    there = run / "on" / "heard-elsewhere"
    for name in MADE:
        assert (there / name).stat().st_size > 100, name
        assert (run / name).read_bytes() == before[name], "the run's own report stays"
    report = read_json(there / "report.json")
    assert list(report["recipes"]) == SYSTEMS
    assert report["meta"]["n_utterances"] <= 8
    said = read_answers(there / "answers.csv")["audio"]
    assert all(Path(audio).resolve().is_relative_to(elsewhere.resolve()) for audio in said)


def test_two_data_folders_of_one_name_get_two_reports(own, elsewhere, tmp_path):
    run, other = own / "run", tmp_path / "another" / "heard-elsewhere"
    shutil.copytree(elsewhere, other)
    assert bench(run, "--data", elsewhere, "--recipes", "mtbi") == 0
    first = (run / "on" / "heard-elsewhere" / "report.md").read_bytes()
    assert bench(run, "--data", other, "--recipes", "mtbi") == 0
    assert (run / "on" / "heard-elsewhere" / "report.md").read_bytes() == first
    folders = sorted(path.parent.name for path in run.glob("on/*/report.md"))
    assert len(folders) == 2 and folders[1].startswith("heard-elsewhere-")
    (run / "on" / "heard-elsewhere" / "data.json").write_text("{")
    assert bench(run, "--data", other, "--recipes", "mtbi") == 0
    assert (run / "on" / "heard-elsewhere" / "report.md").read_bytes() == first


def test_two_data_folders_of_one_name_are_told_apart_by_a_saved_state_alone(tmp_path):
    run = Run(tmp_path / "run", {}, {}, tmp_path / "data", [])
    first, second = tmp_path / "a" / "test", tmp_path / "b" / "test"
    folder = eval_module.report_folder(run, first)
    write_json(folder / "steps" / "100" / "data.json", {"data": str(first.resolve())})
    assert eval_module.report_folder(run, first) == folder
    assert eval_module.report_folder(run, second) != folder


def test_naming_the_runs_own_data_is_the_same_as_naming_none(own, capsys):
    assert bench(own / "run", "--data", own / "data") == 0
    assert "is written already" in capsys.readouterr().out
    assert not (own / "run" / "on").exists()


def test_what_was_trained_on_is_never_asked_about(own):
    """Wherever it is heard again: here all of the run's own speech, as a test set."""
    manifest, again = own / "data" / "manifest.jsonl", own / "again"
    assert main(["prepare", str(manifest), "--test-only", "--out", str(again)]) == 0
    heard = [u.text for u in read_manifest(manifest) if u.split == "train"]
    assert all(u.split == "test" for u in read_manifest(again / "manifest.jsonl"))
    rows = [row for _, row in read_jsonl(again / "manifest.jsonl")]
    for row in rows:  # the same words
        row["text"] = row["text"].capitalize() + "."
    write_jsonl(again / "manifest.jsonl", rows)
    assert bench(own / "run", "--data", again, "--recipes", "mtbi") == 0
    table = read_answers(own / "run" / "on" / "again" / "answers.csv")
    assert len(table) and not {normalize(text) for text in table["transcript"]} & set(heard)
