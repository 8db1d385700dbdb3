"""The training loop: what it may change, what it must not, and that stopping it changes nothing."""

import copy
import random

import pytest
import torch

from data import Speech, UserError, ask, chat_parts, epoch_batches, load_tasks, read_behaviors, read_manifest, transcript_tokens
from model import CONNECTORS, Connector, SpeechLLM, load_llm
from mtbi import HERE, RECIPES, main
from train import Examples, accumulate_gradients, learning_rate, train


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
        loss, _ = accumulate_gradients(model, [(batch, None) for batch in micro])
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
    from data import read_jsonl
    losses = [row["loss"] for _, row in read_jsonl(tmp_path / "log.jsonl")]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_killed_and_resumed_gives_the_weights_of_a_run_never_killed(spec, llm, encoder, examples, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return SpeechLLM.build(spec, llm, encoder)

    def go(model, folder, die_at=None):
        mine = copy.copy(examples)
        mine.model = model
        if die_at is not None:
            batch = mine.batch
            mine.batch = lambda step, *more: (_ for _ in ()).throw(RuntimeError("killed")) if step == die_at else batch(step, *more)
        return train(model, mine, folder, lr=1e-3, save_every=2)

    whole, again, cut = fresh(), fresh(), fresh()
    go(whole, tmp_path / "whole")
    go(again, tmp_path / "again")
    with pytest.raises(RuntimeError, match="killed"):
        go(cut, tmp_path / "cut", die_at=5)
    resumed = fresh()
    go(resumed, tmp_path / "cut")
    for name, p in whole.trainable().items():
        assert torch.equal(p, again.trainable()[name]), "same seed, same machine, same weights"
        assert torch.equal(p, resumed.trainable()[name]), "killed at step 5, resumed from step 4"


def test_a_loss_that_is_not_finite_stops_the_training_in_words(model, examples, tmp_path):
    model.connector.scale.data[:] = float("nan")
    with pytest.raises(UserError, match="loss is nan at step 0"):
        train(model, examples, tmp_path, lr=1e-3)


def test_kl_loss_is_zero_when_the_model_hears_what_the_teacher_reads(model, utterances):
    rows = [chat_parts(model.tokenizer, ask("Repeat this."), [[transcript_tokens(model.tokenizer, u.text)]], model.response(u.text).ids)
            for u in utterances[:3]]
    assert abs(model(rows, rows)[0].item()) < 1e-3


def test_kl_gradients_reach_the_connector_after_a_teacher_pass(model, utterances, frames):
    """bitsandbytes repacks CPU weights in calls without gradients, into a kernel without a backward; load_llm turns that off."""
    u = utterances[0]
    heard, read = ([chat_parts(model.tokenizer, ask("Repeat this."), [audio], model.response(u.text).ids)]
                   for audio in ([Speech(frames[u.id])], [transcript_tokens(model.tokenizer, u.text)]))
    model.generate([heard[0][:-1]])
    model(heard, read)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trainable().values())


@pytest.mark.parametrize("kind", CONNECTORS)
def test_connectors_give_the_tokens_they_promise_at_the_norm_of_the_embeddings(kind):
    connector = Connector(kind, 24, 32, k=4, hidden=16, embedding_rms=0.02)
    spans = [torch.randn(n, 24) for n in (1, 4, 5, 37, 0, 37)]
    tokens = connector(spans)
    assert [len(t) for t in tokens] == [1, 1, 2, 10, 0, 10]
    assert tokens[3].detach().pow(2).mean(1).sqrt() == pytest.approx([0.02] * 10, rel=1e-3)
    torch.testing.assert_close(tokens[3], connector([spans[3]])[0])          # alone or in a batch


def test_a_saved_model_answers_as_before_and_another_llm_is_refused(model, spec, llm, encoder, utterances, frames, tmp_path):
    from data import read_json, write_json
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
    rows = [chat_parts(model.tokenizer, ask("Repeat this."), [[Speech(frames[u.id])]], model.response(u.text).ids) for u in utterances[:4]]
    optimizer = torch.optim.SGD(model.trainable().values(), lr=1.0)
    before = {n: t.clone() for n, t in model.llm.state_dict().items() if "lora" not in n}
    for _ in range(2):
        accumulate_gradients(model, [(rows, None)])
        optimizer.step()
    assert any("lora_B" in n and p.abs().sum() > 0 for n, p in model.trainable().items())
    assert all(torch.equal(t, model.llm.state_dict()[n]) for n, t in before.items())
    model.save(tmp_path, spec)
    again = SpeechLLM.from_pretrained(tmp_path, None, encoder)
    torch.testing.assert_close(model(rows)[0], again(rows)[0])


def test_an_epoch_visits_every_utterance_once_in_batches_of_similar_length():
    lengths = [((i * 37) % 100) / 10 for i in range(96)]
    batches = [epoch_batches(lengths, 8, seed=1, step=s) for s in range(12)]
    assert sorted(i for b in batches for i in b) == list(range(96))
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / 12
    assert spread < 3 and epoch_batches(lengths, 8, 1, 12) != batches[0] and epoch_batches(lengths, 8, 1, 3) == batches[3]


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[-1] < 0.01 and rates[:10] == sorted(rates[:10])


def test_examples_interleave_as_often_as_the_recipe_says_and_start_with_repeat(examples):
    from data import Text
    batch, teacher = examples.batch(0, 0, 1)
    assert teacher is None and len(batch) == 8
    first = [examples.choose(random.Random(i), examples.utterances[0], 0).task for i in range(50)]
    last = [examples.choose(random.Random(i), examples.utterances[0], 6).task for i in range(50)]
    assert set(first) == {"repeat"} and 0 < last.count("repeat") < 30
    mixed = [sum(isinstance(p, (Text, Speech)) for p in examples.batch(s, 0, 1)[0][i]) > 3 for s in range(6) for i in range(8)]
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
