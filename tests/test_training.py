"""The training loop: what it may change, what it must not, and that stopping it changes nothing."""

import copy
import random

import pytest
import torch

from data import Speech, Text, ask, chat_parts, read_manifest, transcript_tokens
from files import UserError, read_json, read_jsonl, write_json
from connectors import CONNECTORS, Connector
from model import SpeechLLM, load_llm
from mtbi import HERE, RECIPES, main
from examples import Examples, epoch_order, load_tasks, read_behaviors
from train import accumulate_gradients, count_tokens, learning_rate, train


@pytest.fixture
def examples(model, utterances, run, frames):
    return Examples(model, [u for u in utterances if u.split == "train"], read_behaviors(run / "behaviors.jsonl"), frames, RECIPES["mtbi"], 6, 8, 0)


def weights(model):
    return {name: p.detach().clone() for name, p in model.trainable().items()}


def test_accumulating_micro_batches_equals_one_big_batch(model, utterances, frames):
    rows = [chat_parts(model.tokenizer, ask("Repeat this."), [[Speech(frames[u.id])]], model.response(u.text).ids) for u in utterances[:8]]
    gradients = []
    for micro in ([rows], [rows[:1], rows[1:3], rows[3:]]):
        model.zero_grad()
        loss = accumulate_gradients(model, [(0, batch, None) for batch in micro], count_tokens([(0, rows, None)]))
        gradients.append((loss, {name: p.grad.clone() for name, p in model.trainable().items()}))
    (loss, one), (accumulated_loss, accumulated) = gradients
    assert accumulated_loss == pytest.approx(loss, rel=1e-5)
    for name in one:
        torch.testing.assert_close(one[name], accumulated[name], rtol=1e-3, atol=1e-6)


def test_the_llm_and_the_encoder_never_change_by_a_bit(model, examples, tmp_path):
    frozen = {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("connector.") and isinstance(t, torch.Tensor)}
    before = weights(model)
    train(model, examples, tmp_path, lr=1e-3)
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in frozen.items())
    assert all(not torch.equal(before[name], p) for name, p in model.trainable().items())
    model.train()
    assert not model.llm.training and not model.encoder.training and not any(m.training for m in model.llm.modules())


def test_training_lowers_the_loss(model, utterances, run, frames, tmp_path):
    examples = Examples(model, [u for u in utterances if u.split == "train"], read_behaviors(run / "behaviors.jsonl"), frames, RECIPES["asr"], 40, 8, 0)
    train(model, examples, tmp_path, lr=2e-3, warmup=5)
    losses = [row["loss"] for _, row in read_jsonl(tmp_path / "log.jsonl")]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_killed_and_resumed_gives_the_weights_of_a_run_never_killed(spec, llm, encoder, examples, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return SpeechLLM.build(spec, llm, encoder)

    def go(model, folder, die_at=None):
        mine = copy.copy(examples)
        mine.model, mine.batch_size, mine.accumulate = model, 4, 2
        if die_at is not None:
            batch = mine.batch
            mine.batch = lambda step, micro: (_ for _ in ()).throw(RuntimeError("killed")) if step == die_at else batch(step, micro)
        return train(model, mine, folder, lr=1e-3, save_every=2)

    def log(folder):
        return [{k: v for k, v in row.items() if k != "seconds"} for _, row in read_jsonl(folder / "log.jsonl")]

    whole, again = fresh(), fresh()
    go(whole, tmp_path / "whole")
    go(again, tmp_path / "again")
    for die_at in (1, 2, 5):
        folder, resumed = tmp_path / f"cut{die_at}", fresh()
        with pytest.raises(RuntimeError, match="killed"):
            go(fresh(), folder, die_at)
        go(resumed, folder)
        for name, p in whole.trainable().items():
            assert torch.equal(p, again.trainable()[name]), "same seed, same machine, same weights"
            assert torch.equal(p, resumed.trainable()[name]), f"killed in step {die_at}, resumed"
        assert log(folder) == log(tmp_path / "whole") and len(log(folder)) == 6


def test_killed_while_a_state_is_written_resumes_from_the_one_before(model, examples, tmp_path, monkeypatch):
    import train as module
    whole = train(model, examples, tmp_path / "whole", lr=1e-3, save_every=2).trainable()
    whole = {name: p.clone() for name, p in whole.items()}

    def fresh():
        torch.manual_seed(0)
        return SpeechLLM(model.llm, model.tokenizer, model.encoder, Connector("stack-mlp", model.encoder.width, 192, 6, 64,
                         model.llm.get_input_embeddings().weight.float().pow(2).mean().sqrt()))

    def half_written(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise RuntimeError("killed")

    cut = copy.copy(examples)
    cut.model = fresh()
    calls = []
    real = module.save_file
    monkeypatch.setattr(module, "save_file", lambda *a, **k: (calls.append(1), half_written(*a, **k) if len(calls) == 2 else real(*a, **k)))
    with pytest.raises(RuntimeError, match="killed"):
        train(cut.model, cut, tmp_path / "cut", lr=1e-3, save_every=2)
    resumed = copy.copy(examples)
    resumed.model = fresh()
    for name, p in train(resumed.model, resumed, tmp_path / "cut", lr=1e-3, save_every=2).trainable().items():
        assert torch.equal(p, whole[name])
    assert not list((tmp_path / "cut").glob(".*"))


def test_the_same_seed_gives_the_same_start_whether_or_not_the_models_are_loaded_already(spec, llm, encoder):
    one, other = SpeechLLM.build(spec, llm, encoder, seed=3), SpeechLLM.build(spec, seed=3)
    assert all(torch.equal(p, other.connector.state_dict()[name]) for name, p in one.connector.state_dict().items())
    assert one.fingerprint == other.fingerprint and one.encoder.key == other.encoder.key


def test_a_micro_batch_always_has_speech_to_learn_from(model, examples):
    from dataclasses import replace
    examples.recipe = replace(examples.recipe, interleave=1.0, text_words=1.0)
    for step in range(3):
        batch, _ = examples.batch(step)
        assert all(any(isinstance(p, Speech) for p in parts) for parts in batch)
    accumulate_gradients(model, [(0, [parts], None) for parts in batch], 100)


def test_where_bitsandbytes_does_not_work_the_llm_runs_unquantized_and_says_so(monkeypatch, capsys):
    import sys
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    llm, _ = load_llm("tiny", 4)
    assert not getattr(llm, "is_loaded_in_4bit", False)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and "runs unquantized" in said[0]


def test_kl_loss_is_zero_when_the_model_hears_what_the_teacher_reads(model, utterances):
    rows = [chat_parts(model.tokenizer, ask("Repeat this."), [[transcript_tokens(model.tokenizer, u.text)]], model.response(u.text).ids)
            for u in utterances[:3]]
    assert abs(model(rows, rows).item()) < 1e-3


def test_kl_gradients_reach_the_connector_after_a_teacher_pass(model, utterances, frames):
    """bitsandbytes repacks CPU weights in calls without gradients, into a kernel without a backward; load_llm turns that off."""
    u = utterances[0]
    heard, read = ([chat_parts(model.tokenizer, ask("Repeat this."), [audio], model.response(u.text).ids)]
                   for audio in ([Speech(frames[u.id])], [transcript_tokens(model.tokenizer, u.text)]))
    model.generate([heard[0][:-1]])
    model(heard, read).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trainable().values())


def test_with_an_adapter_kl_still_imitates_the_frozen_llm(spec, model, encoder, utterances):
    """A teacher that had the adapter too would drift with what is trained, and never correct it where the LLM reads."""
    tuned = SpeechLLM.build({**spec, "lora": 4}, load_llm("tiny", 4), encoder).train()
    rows = [chat_parts(model.tokenizer, ask("Repeat this."), [[transcript_tokens(model.tokenizer, u.text)]], model.response(u.text).ids)
            for u in utterances[:3]]
    assert abs(tuned(rows, rows).item()) < 1e-3, "an adapter begins as nothing"
    adapter = [p for name, p in tuned.trainable().items() if "lora_B" in name]
    with torch.no_grad():
        for p in adapter:
            p.normal_(0, 0.5)
        target, heard = model.logits(rows)[0].log_softmax(-1), tuned.logits(rows)[0].log_softmax(-1)
    loss = tuned(rows, rows)
    assert loss.item() == pytest.approx(torch.nn.functional.kl_div(heard, target, reduction="sum", log_target=True).item(), rel=1e-4) and loss.item() > 0.1
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_connectors_give_the_tokens_they_promise_at_the_norm_of_the_embeddings(kind):
    connector = Connector(kind, 24, 32, k=4, hidden=16, embedding_rms=0.02).eval()
    spans = [torch.randn(n, 24) for n in (1, 4, 5, 37, 0, 37)]
    tokens = connector(spans)
    assert [len(t) for t in tokens] == [1, 1, 2, 10, 0, 10]
    assert tokens[3].detach().pow(2).mean(1).sqrt() == pytest.approx([0.02] * 10, rel=1e-3)
    torch.testing.assert_close(tokens[3], connector([spans[3]])[0])          # alone or in a batch


def test_a_saved_model_answers_as_before_and_another_llm_is_refused(model, spec, llm, encoder, utterances, frames, tmp_path):
    model.save(tmp_path, spec)
    again = SpeechLLM.from_pretrained(tmp_path, llm, encoder)
    rows = [chat_parts(model.tokenizer, ask("Repeat this."), [[Speech(frames[u.id])]]) for u in utterances[:3]]
    assert torch.equal(model.embed(rows)[0], again.embed(rows)[0]) and model.generate(rows) == again.generate(rows)
    write_json(tmp_path / "model.json", {**read_json(tmp_path / "model.json"), "llm_fingerprint": "0"})
    with pytest.raises(UserError, match="another LLM"):
        SpeechLLM.from_pretrained(tmp_path, llm, encoder)


def test_a_lora_adapter_trains_and_loads_while_the_quantized_weights_stay(spec, encoder, utterances, frames, tmp_path):
    spec = {**spec, "lora": 4}
    model = SpeechLLM.build(spec, load_llm("tiny", 4), encoder)
    assert model.llm.is_loaded_in_4bit
    rows = [chat_parts(model.tokenizer, ask("Repeat this."), [[Speech(frames[u.id])]], model.response(u.text).ids) for u in utterances[:4]]
    optimizer = torch.optim.SGD(model.trainable().values(), lr=1.0)
    before = {n: t.clone() for n, t in model.llm.state_dict().items() if "lora" not in n}
    for _ in range(2):
        accumulate_gradients(model, [(0, rows, None)], count_tokens([(0, rows, None)]))
        optimizer.step()
    assert any("lora_B" in n and p.abs().sum() > 0 for n, p in model.trainable().items())
    assert all(torch.equal(t, model.llm.state_dict()[n]) for n, t in before.items())
    model.save(tmp_path, spec)
    again = SpeechLLM.from_pretrained(tmp_path, None, encoder)
    torch.testing.assert_close(model.train(False)(rows), again(rows))

    from peft import PeftModel                                    # and PEFT itself loads the adapter, on the plain LLM
    llm, _ = load_llm("tiny", 4)
    embeds, mask, _ = model.embed(rows)
    adapted = PeftModel.from_pretrained(llm, tmp_path / "adapter")
    torch.testing.assert_close(adapted(inputs_embeds=embeds, attention_mask=mask).logits, model.llm(inputs_embeds=embeds, attention_mask=mask).logits)
    model.save(tmp_path, spec)                                    # a second save replaces the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "connector.safetensors", "model.json"]


def test_an_epoch_visits_no_utterance_twice_in_batches_of_similar_length():
    lengths = tuple(((i * 37) % 100) / 10 for i in range(100))
    batches = epoch_order(lengths, 8, 1, 0)
    assert len(batches) == 12 and len({i for b in batches for i in b}) == 96
    assert max(lengths[i] for i in batches[0]) == max(lengths[i] for b in batches for i in b), "what needs most memory comes first"
    assert sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / 12 < 3
    assert all(max(lengths) in [lengths[i] for i in epoch_order(lengths, 8, seed, 0)[0]] for seed in range(50)), "the longest of all comes first"
    assert epoch_order(lengths, 8, 1, 1) != batches and epoch_order(lengths, 8, 2, 0) != batches
    assert {i for epoch in range(20) for b in epoch_order(lengths, 8, 1, epoch) for i in b} == set(range(100))


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[-1] < 0.01 and rates[:10] == sorted(rates[:10])


def test_examples_interleave_as_often_as_the_recipe_says_and_start_with_repeat(examples):
    batch, teacher = examples.batch(0)
    assert teacher is None and len(batch) == 8
    first = [examples.choose(random.Random(i), examples.utterances[0], 0).task for i in range(50)]
    last = [examples.choose(random.Random(i), examples.utterances[0], 6).task for i in range(50)]
    assert set(first) == {"repeat"} and 0 < last.count("repeat") < 30
    mixed = [sum(isinstance(p, (Text, Speech)) for p in examples.batch(s)[0][i]) > 3 for s in range(6) for i in range(8)]
    assert 0.1 < sum(mixed) / len(mixed) < 0.7


def test_nothing_of_the_benchmark_is_in_the_training_data(data, run):
    tasks = load_tasks(HERE / "tiny" / "tasks.toml")
    rows = read_manifest(data / "manifest.jsonl")
    trained = {u.id: u for u in rows if u.split == "train"}
    tested = [u for u in rows if u.split == "test"]
    assert not {u.text for u in trained.values()} & {u.text for u in tested}
    assert not {u.speaker.split("+")[1] for u in trained.values()} & {u.speaker.split("+")[1] for u in tested}
    for b in read_behaviors(run / "behaviors.jsonl"):
        assert b.utterance in trained and tasks[b.task].split == "train" and b.prompt in tasks[b.task].prompts


def test_a_finished_training_is_not_redone_and_other_settings_are_refused(run, capsys):
    argv = ["train", str(run), "--recipe", "asr", "--steps", "3", "--batch-size", "8", "--hidden", "32"]
    assert main(argv) == 0
    stamp = (run / "asr" / "connector.safetensors").stat().st_mtime_ns
    assert main(argv) == 0 and "is trained already" in capsys.readouterr().out
    assert (run / "asr" / "connector.safetensors").stat().st_mtime_ns == stamp
    assert main([*argv[:5], "4", *argv[6:]]) == 2
    assert "steps was 3, now 4" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0 and (run / "asr" / "connector.safetensors").stat().st_mtime_ns != stamp


def test_data_or_behaviors_that_changed_under_a_run_are_noticed(tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    small = ["--steps", "2", "--batch-size", "8", "--hidden", "16"]
    assert main(["prepare", "tiny", "--out", str(data), "--train", "10", "--test", "4"]) == 0
    assert main(["imitate", str(data), "--out", str(run), "--per-utterance", "1"]) == 0
    assert main(["train", str(run), "--recipe", "asr", *small]) == 0
    assert main(["imitate", str(data), "--out", str(run), "--per-utterance", "2", "--force"]) == 0
    assert main(["bench", str(run)]) == 2 and "was trained on other behaviors" in capsys.readouterr().err
    assert main(["prepare", "tiny", "--out", str(data), "--train", "12", "--test", "4", "--force"]) == 0
    assert main(["train", str(run), "--recipe", "mtbi", *small]) == 2 and "has changed since" in capsys.readouterr().err
    assert main(["train", str(data)]) == 2 and "no run folder made by" in capsys.readouterr().err
