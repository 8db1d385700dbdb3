"""What the benchmark measures beside scores, and the comparison: its rule, its intervals, and what happens when a recipe fails."""

import json
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import compare
import eval as benchmark
from data import Speech, chat_parts, ask, transcript_tokens
from examples import load_tasks
from files import read_json
from jobs import Jobs
from mtbi import RECIPES, main, run_command


@pytest.fixture(scope="module")
def cases(utterances):
    return benchmark.draw_cases(load_tasks(ROOT / "tiny" / "tasks.toml"), [u for u in utterances if u.split == "test"], 1, 0)


def reader(model):
    return lambda u: [transcript_tokens(model.tokenizer, u.text)]


# ---- behavior gap and attention ----

def test_the_behavior_gap_is_zero_for_text_and_the_kl_loss_for_speech(model, cases, frames):
    few = cases[:6]
    references = model.generate([c.parts(model.tokenizer, reader(model)) for c in few])
    responses = [model.response(reference).ids for reference in references]
    assert benchmark.behavior_gap(model, model, reader(model), reader(model), few, responses) == pytest.approx([0] * 6, abs=1e-6)
    gaps = benchmark.behavior_gap(model, model, lambda u: [Speech(frames[u.id])], reader(model), few, responses, batch_size=4)
    for case, ids, gap in zip(few, responses, gaps):
        with torch.no_grad():
            kl = model([case.parts(model.tokenizer, lambda u: [Speech(frames[u.id])], ids)], [case.parts(model.tokenizer, reader(model), ids)])
        assert gap == pytest.approx(kl.item() / len(ids), rel=1e-3, abs=1e-5) and gap > 0


def test_attention_shares_are_shares_of_the_very_prompt_that_is_asked(model, cases, frames):
    few = cases[:4]
    references = model.generate([c.parts(model.tokenizer, reader(model)) for c in few])
    before = model.llm.config._attn_implementation
    for hear in (reader(model), lambda u: [Speech(frames[u.id])]):
        for row in benchmark.attention_shares(model, hear, few, [model.response(reference).ids for reference in references]):
            assert len(row["instruction"]) == len(row["utterance"]) == model.llm.config.num_hidden_layers
            assert all(0 < a and 0 < b and a + b < 1 for a, b in zip(row["instruction"], row["utterance"]))
    assert model.llm.config._attn_implementation == before, "the fast kernels are back"
    for case in few:                                               # the probe puts the prompt where audio goes, to know where it is
        slots = [{"role": "user", "content": [{"type": "audio", "audio": None}] * 2}]
        probed = chat_parts(model.tokenizer, slots, [[transcript_tokens(model.tokenizer, case.prompt)], reader(model)(case.utterance)])
        asked = chat_parts(model.tokenizer, ask(case.prompt), [reader(model)(case.utterance)])
        assert [i for p in probed for i in p.ids] == [i for p in asked for i in p.ids]


def test_dialogues_are_of_all_kinds_and_about_held_out_speech(cases):
    drawn = benchmark.draw_dialogues(cases, [f"answer {i}" for i in range(len(cases))], 5, 0)
    assert [d.quadrant for d in drawn] == [kind for kind in benchmark.DIALOGUES for _ in range(5)]
    for d in drawn:
        prompt, utterance, spoken, answer = d.earlier
        case = cases[int(answer.split()[1])]
        assert (case.prompt, case.utterance) == (prompt, utterance), "the first turn is a case, with the answer to it"
        assert d.again == (d.quadrant == "speech_then_text_question") and spoken == (d.quadrant != "text_then_speech")
        assert not d.again or utterance is d.utterance


def test_in_a_dialogue_the_spoken_utterances_alone_are_spoken(model, cases, frames):
    for d in benchmark.draw_dialogues(cases, ["red"] * len(cases), 3, 0):
        parts = d.parts(model.tokenizer, lambda u: [Speech(frames[u.id])])
        assert sum(isinstance(p, Speech) for p in parts) == {"speech_then_text_question": 1, "text_then_speech": 1, "two_speeches": 2}[d.quadrant]


# ---- intervals and verdicts ----

values = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=3, max_size=20)


@settings(max_examples=20, deadline=None)
@given(st.lists(values, min_size=1, max_size=3))
def test_the_interval_over_runs_holds_what_can_be_and_a_recipe_never_differs_from_itself(runs):
    groups = [[(str(u), v) for u, v in rows] for rows in runs]
    found = compare.over_runs(groups)
    assert found["ci95"][0] - 1e-9 <= found["score"] <= found["ci95"][1] + 1e-9 and found["n"] == len(runs)
    assert compare.over_runs([[(u, v - v) for u, v in rows] for rows in groups])["ci95"] == [0, 0]


def record(value, n=40):
    return {"values": {name: [[f"u{i}", value(i)] for i in range(n)] for names in compare.MEASURES.values() for name in names}}


@pytest.mark.parametrize("ours, theirs, verdict", [(lambda i: 0.9, lambda i: 0.5, "holds"), (lambda i: 0.5, lambda i: 0.9, "does not hold"),
                                                   (lambda i: i % 2, lambda i: (i + 1) % 2, "undecided"), (lambda i: 0.5, lambda i: 0.5, "undecided")])
def test_the_verdict_follows_the_rule(ours, theirs, verdict):
    claim = compare.Claim("a claim", "a paper", "score, unseen tasks", compare.above("mtbi", "asr"))
    kept = {f"seed-{i}": {"mtbi": record(ours), "asr": record(theirs)} for i in range(3)}
    found = compare.decide(claim, kept)
    assert found["verdict"] == verdict and found["n"] == 3
    assert compare.decide(claim, {"seed-0": {"mtbi": record(ours)}})["verdict"] == "not measured"


def test_when_runs_differ_more_than_utterances_do_three_that_agree_by_chance_decide_nothing():
    """Under no true difference, with runs that scatter: at most about one in twenty may be decided, as the 95% promise."""
    rng, decided = np.random.default_rng(0), 0
    for _ in range(200):
        found = compare.over_runs([[(str(i), v) for i, v in enumerate(rng.normal(rng.normal(0, 0.1), 0.3, 60))] for _ in range(3)])
        decided += found["ci95"][0] > 0 or found["ci95"][1] < 0
    assert decided / 200 < 0.1


def test_a_margin_must_be_exceeded():
    claim = next(c for c in compare.CLAIMS if c.margin)
    for retention, verdict in ((0.998, "does not hold"), (0.9, "holds")):
        kept = {"seed-0": {"text": record(lambda i: 1.0), "vtb-no-text": record(lambda i, retention=retention: retention)}}
        assert compare.decide(claim, kept)["verdict"] == verdict


def test_a_difference_of_differences_is_paired():
    claim = next(c for c in compare.CLAIMS if len(c.terms) == 4)
    noisy = {name: record(lambda i, at=at: ((7 * i) % 11) / 11 + at) for name, at in (("mtbi@10", 0.5), ("mtbi-no-interleave@10", 0.2),
                                                                                     ("mtbi", 0.6), ("mtbi-no-interleave", 0.5))}
    found = compare.decide(claim, {"seed-0": noisy})
    assert found["score"] == pytest.approx(0.2) and found["ci95"] == pytest.approx([0.2, 0.2]), "what the recipes have in common cancels"


def test_every_claim_is_about_recipes_that_are_trained_and_values_that_are_measured():
    trained = set(RECIPES) | {f"{name}@{percent}" for name in compare.CURVE for percent in compare.CURVE[name]}
    for claim in compare.CLAIMS:
        assert {name for _, name in claim.terms} <= trained and claim.measure in compare.MEASURES and sum(sign for sign, _ in claim.terms) == 0


# ---- several commands at once ----

def test_a_job_that_fails_is_explained_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)          # what a command prints must come before why it failed
    jobs = Jobs(2, run_command, tiny=True)
    commands = [["recipes"], ["compare", "--out", str(tmp_path / "out"), "--speech", str(tmp_path / "nowhere"), "--jobs", "1"]]
    assert jobs.each("two commands", lambda argv: jobs.attempt(argv, tmp_path, argv[0]), commands) == [True, False]
    assert list(jobs.failures) == [f"{tmp_path.name}/compare"] and "nothing could be measured" in jobs.failures[f"{tmp_path.name}/compare"]
    assert "mtbi-no-interleave" in (tmp_path / "output-recipes-recipes.txt").read_text(encoding="utf-8")
    assert "trainings in each of 3 runs" in (tmp_path / "failed-compare-compare.txt").read_text(encoding="utf-8")
    assert "FAILED" in capsys.readouterr().out


def test_ctrl_c_ends_what_runs_and_begins_nothing_more():
    jobs, begun = Jobs(2, run_command, tiny=True), []

    def work(item):
        begun.append(item)
        if item == 1:
            raise KeyboardInterrupt
        time.sleep(0.2)

    with pytest.raises(KeyboardInterrupt):
        jobs.each("ten things", work, list(range(10)))
    assert len(begun) < 10 and not jobs.threads


# ---- the command ----

def test_compare_reports_a_failed_recipe_goes_on_with_the_others_and_does_nothing_twice(tmp_path, capsys):
    """k = 6 is no power of two, which the convolutions of blsp need."""
    out = tmp_path / "compare"
    argv = ["compare", "--out", str(out), "--recipes", "mtbi,blsp,vtb", "--seeds", "1", "--steps", "3", "--k", "6", "--train", "40", "--test", "16",
            "--per-prompt", "1", "--dialogues", "2", "--probes", "4", "--no-curve", "--jobs", "1", "--batch-size", "16", "--accumulate", "2", "--bits", "16",
            "--tasks", str(ROOT / "tiny" / "tasks.toml")]
    assert main(argv) == 0
    asked, trained = (read_json(out / "seed-0" / where / "config.json")["settings"] for where in (".", "mtbi"))
    assert (asked["bits"], asked["tasks"], trained["batch_size"], trained["accumulate"]) == (16, "tiny/tasks.toml", 16, 2), "every command is told"
    said = capsys.readouterr().out
    report = read_json(out / "report.json")
    assert "FAILED" in said and list(report["meta"]["failures"]) == ["seed-0/blsp"] and "power of two" in report["meta"]["failures"]["seed-0/blsp"]
    assert list(report["quadrants"]) == ["text", "cascade", "mtbi", "vtb"]
    verdicts = {(c["claim"], c["difference"]): c["verdict"] for c in report["claims"]}
    assert verdicts["MTBI generalizes to unseen tasks better than vtb", "mtbi − vtb"] in ("holds", "does not hold", "undecided")
    assert verdicts["MTBI generalizes to unseen tasks better than blsp", "mtbi − blsp"] == "not measured"
    text = (out / "report.md").read_text(encoding="utf-8")
    assert compare.RULE in text and "**Failed:**" in text and "power of two" in text
    assert "no recipe was trained on a part" in text and not (out / "curve.png").exists()
    for name in ("quadrants", "tasks", "ignored", "retention", "dialogues", "attention"):
        assert (out / f"{name}.png").stat().st_size > 1000 and json.loads((out / f"{name}.json").read_text(encoding="utf-8")) is not None
    pairs, metrics = report["differences"]["score, unseen tasks"], report["metrics"]
    assert [(a, b) for a, row in pairs.items() for b in row] == [(a, b) for i, a in enumerate(report["quadrants"]) for b in list(report["quadrants"])[i + 1:]]
    gap = report["measures"]["mtbi"]["score, unseen tasks"]["score"] - report["measures"]["vtb"]["score, unseen tasks"]["score"]
    assert pairs["mtbi"]["vtb"]["score"] == pytest.approx(gap)
    row = next(line for line in text.split("## Paired differences")[1].splitlines() if line.startswith("| `vtb` |"))
    assert float(row.split("|")[4].strip(" *")) == pytest.approx(-100 * gap, abs=0.051)
    assert "15 other claims are about recipes that were not asked for" in text and "this is another" in text.split("## The quality bar")[1]
    assert metrics["text"]["repeat"]["exact"] == 1 and set(metrics["vtb"]["translate"]) == {"exact", "wer", "chrf", "bleu"}
    trained = report["training"]
    assert trained["mtbi"]["audio_seconds"] > 0 and trained["vtb"]["trained_parameters"] > trained["mtbi"]["trained_parameters"]
    vtb = read_json(out / "seed-0" / "bench" / "vtb.json")["values"]["text retention"]
    assert len(vtb) == sum(len(read_json(out / "seed-0" / "bench" / "vtb.json")["values"][q]) for q in benchmark.QUADRANTS)

    kept = {f: f.stat().st_mtime_ns for f in (out / "seed-0").rglob("*.safetensors")} | {f: f.stat().st_mtime_ns for f in (out / "seed-0/bench").iterdir()}
    assert main(argv) == 0
    assert {f: f.stat().st_mtime_ns for f in kept} == kept, "what is there is not done again"
    assert len(read_json(out / "report.json")["meta"]["wall_seconds_by_sitting"]) == 2 and report["meta"]["k"] == 6, "how it was made is all there"

    before = (out / "report.json").read_bytes()
    (out / "seed-0" / "bench" / "mtbi.json").write_text("{")       # damaged: measured again
    assert main(argv) == 0 and "mtbi" in read_json(out / "report.json")["quadrants"]
    assert read_json(out / "report.json")["claims"] == json.loads(before)["claims"]
    capsys.readouterr()
    argv[argv.index("--steps") + 1] = "4"
    assert main(argv) == 2 and "steps was 3, now 4" in capsys.readouterr().err, "records of other settings are never put beside each other"


def test_leaving_each_speaker_out_needs_speakers(data, tmp_path, capsys):
    lines = (data / "manifest.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    rows = [{**json.loads(line), "speaker": "ann"} for line in lines]
    (data / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["compare", "--out", str(tmp_path), "--speech", str(data / "one.jsonl"), "--leave-one-speaker-out"]) == 2
    assert "needs two or more" in capsys.readouterr().err
    assert main(["compare", "--out", str(tmp_path), "--recipes", "text,cascade"]) == 2 and "names no recipe that is trained" in capsys.readouterr().err
    assert main(["compare", "--out", str(tmp_path), "--recipes", "mtbi,nothing"]) == 2 and "there is no recipe 'nothing'" in capsys.readouterr().err
