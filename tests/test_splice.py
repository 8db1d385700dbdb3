"""The one function that turns parts into embeddings, mask and labels, and the interleaving before it."""

import random

import pytest
import torch
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import Response, Speech, Text, Utterance, ask, chat_parts, transcript_tokens
from model import IGNORE, end_of_turn
from examples import interleave, random_spans

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
flags_and_words = st.lists(st.tuples(st.booleans(), st.sampled_from("the farmer sold three red apples in market yesterday ünlikely don't".split())),
                           min_size=1, max_size=9)


def utterance_of(words, seconds_a_word=0.3):
    times = [[w, i * seconds_a_word, (i + 1) * seconds_a_word] for i, w in enumerate(words)]
    return Utterance("x.wav", " ".join(words), len(words) * seconds_a_word, words=times)


def conversation(model, heard, response="three red apples"):
    return chat_parts(model.tokenizer, ask("What things are there?"), [heard], model.response(response).ids)


@quick
@given(flags_and_words)
def test_interleaving_keeps_every_token_and_every_frame_once_and_in_order(model, rows):
    flags, words = [f for f, _ in rows], [w for _, w in rows]
    frames = torch.arange(10 * len(words)).float()[:, None].repeat(1, 4)
    utterance = utterance_of(words)
    parts = interleave(model.tokenizer, utterance, frames, flags)
    whole = model.tokenizer(utterance.text, add_special_tokens=False, return_offsets_mapping=True)
    kept = [i for p in parts if isinstance(p, Text) for i in p.ids]
    starts = [len(" ".join(words[:i])) for i in range(len(words) + 1)]
    expected = [token for token, (start, _) in zip(whole["input_ids"], whole["offset_mapping"])
                if flags[max(i for i in range(len(words)) if starts[i] <= start)]]
    assert kept == expected                                        # tokens of the whole transcript, never of a lone word
    heard = [p.frames[:, 0].tolist() for p in parts if isinstance(p, Speech)]
    assert [f for span in heard for f in span] == [10.0 * i + j for i in range(len(words)) if not flags[i] for j in range(10)]
    assert all(type(a) is not type(b) for a, b in zip(parts, parts[1:]))     # text and speech alternate


@quick
@given(st.lists(st.sampled_from("the farmer sold three red apples".split()), min_size=1, max_size=8))
def test_all_text_is_the_text_prompt_and_no_text_is_the_speech_prompt(model, words):
    utterance, frames = utterance_of(words), torch.randn(10 * len(words), model.encoder.width)
    for flag, plain in ((True, [transcript_tokens(model.tokenizer, utterance.text)]), (False, [Speech(frames)])):
        mixed = interleave(model.tokenizer, utterance, frames, [flag] * len(words))
        for a, b in zip(model.embed([conversation(model, mixed)]), model.embed([conversation(model, plain)])):
            assert torch.equal(a, b)
        assert model([conversation(model, mixed)]).item() == model([conversation(model, plain)]).item()


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "smollm2-135m-instruct"])
def test_interleaving_with_real_tokenizers(name):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(shared(f"tokenizers/{name}"))
    utterance = utterance_of("Dr. Smith's café sold 12,500 croissants — unbelievably!".split())
    n = len(utterance.words)
    whole = tokenizer(utterance.text, add_special_tokens=False)["input_ids"]
    for seed in range(20):
        flags = random_spans(random.Random(seed), n, 0.5, 2)
        one = interleave(tokenizer, utterance, torch.zeros(100, 2), flags)
        other = interleave(tokenizer, utterance, torch.zeros(100, 2), [not f for f in flags])
        pieces = [next(p.ids for p in (a, b) if isinstance(p, Text)) for a, b in zip(one, other)]
        assert [i for piece in pieces for i in piece] == whole


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "smollm2-135m-instruct"])
def test_parts_of_a_real_chat_are_the_tokens_of_the_whole_rendered_string(name):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(shared(f"tokenizers/{name}"))
    parts = chat_parts(tokenizer, ask("Translate this into German."), [[transcript_tokens(tokenizer, "three red apples")]])
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "Translate this into German.\nthree red apples"}], tokenize=True,
                                          add_generation_prompt=True, return_dict=False)
    assert [i for p in parts for i in p.ids] == whole
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"


def test_only_the_response_and_its_end_of_turn_carry_loss(model, frames, utterances):
    u = utterances[0]
    embeds, mask, labels = model.embed([conversation(model, [Speech(frames[u.id])], "red"), conversation(model, [transcript_tokens(model.tokenizer, u.text)])])
    wanted = [model.response("red").ids, model.response("three red apples").ids]
    assert [row[row != IGNORE].tolist() for row in labels] == wanted
    assert all(ids[-1] == model.eot and row[-len(ids):].tolist() == ids for ids, row in zip(wanted, labels))


def test_masks_go_by_position_never_by_token_id(model):
    """A transcript and an answer full of pad and end-of-turn ids are text like any other."""
    odd = [model.tokenizer.pad_token_id, model.eot, model.tokenizer.pad_token_id]
    embeds, mask, labels = model.embed([[Text(odd), Response(odd)], [Text(odd * 3), Response(odd)]])
    assert mask.sum(1).tolist() == [6, 12] and (labels != IGNORE).sum(1).tolist() == [3, 3]


def test_the_prompt_of_training_is_the_prompt_of_generation(model, frames, utterances):
    heard = [Speech(frames[utterances[0].id])]
    training = chat_parts(model.tokenizer, ask("Who did it?"), [heard], model.response("the farmer").ids)
    generation = chat_parts(model.tokenizer, ask("Who did it?"), [heard])
    assert training[:-1] == generation and isinstance(training[-1], Response)
    a, b = model.embed([training])[0][0], model.embed([generation])[0][0]
    assert torch.equal(a[:len(b)], b)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 120), min_size=1, max_size=4), st.randoms())
def test_padding_changes_nothing_for_any_mix_of_lengths(model, lengths, rng):
    """Embeddings, mask and labels of a conversation do not depend on what it is batched with."""
    torch.manual_seed(rng.randrange(10**6))
    rows = [conversation(model, [Speech(torch.randn(n, model.encoder.width))], " ".join(["red"] * rng.randint(1, 9))) for n in lengths]
    embeds, mask, labels = model.embed(rows)
    for row, e, m, y in zip(rows, embeds, mask, labels):
        (one,), (ones,), (alone,) = model.embed([row])
        n = len(one)
        assert m.tolist() == [0] * (len(m) - n) + [1] * n == [0] * (len(m) - n) + ones.tolist()
        torch.testing.assert_close(e[-n:], one)
        assert y[-n:].tolist() == alone.tolist() and not e[:-n].any() and (y[:-n] == IGNORE).all()


def test_a_batch_agrees_with_each_conversation_alone(model, frames, utterances):
    rows = [conversation(model, [Speech(frames[u.id])], u.text) for u in utterances[:5]]
    assert model(rows).item() == pytest.approx(sum(model([row]).item() for row in rows), rel=1e-5)
    open_rows = [row[:-1] for row in rows]
    assert model.generate(open_rows) == [model.generate([row])[0] for row in open_rows]


def test_left_and_right_padding_agree(model, frames, utterances):
    rows = [conversation(model, [Speech(frames[u.id])], u.text) for u in utterances[:4]]
    embeds, mask, _ = model.embed(rows)
    left = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    pads = (mask == 0).sum(1).tolist()
    assert len(set(pads)) > 1
    rolled = torch.stack([row.roll(-n, 0) for row, n in zip(embeds, pads)])
    flipped = torch.stack([row.roll(-n, 0) for row, n in zip(mask, pads)])
    right = model.llm(inputs_embeds=rolled, attention_mask=flipped).logits
    for a, b, n in zip(left, right, pads):
        torch.testing.assert_close(a[n:], b[:len(b) - n], rtol=1e-4, atol=1e-4)


def test_many_turns_and_any_order_of_text_and_audio(model, frames, utterances):
    a, b = ([Speech(frames[u.id])] for u in utterances[:2])
    messages = [{"role": "system", "content": "Answer in a few words."},
                {"role": "user", "content": [{"type": "audio", "audio": "a"}, {"type": "text", "text": "Who did it?"}]},
                {"role": "assistant", "content": "the farmer"},
                {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "audio", "audio": "b"}]}]
    parts = chat_parts(model.tokenizer, messages, [a, b])
    assert [type(p) for p in parts] == [Text, Speech, Text, Speech, Text]
    assert model.tokenizer.decode(parts[2].ids) == "\nWho did it?<|im_end|>\n<|im_start|>assistant\nthe farmer<|im_end|>\n<|im_start|>user\nAnd here?\n"


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(1, 5), st.integers(1, 40))
def test_random_spans_have_one_flag_a_word(seed, share, mean, n):
    flags = random_spans(random.Random(seed), n, share, mean)
    assert len(flags) == n and (share > 0 or not any(flags)) and (share < 1 or all(flags))


def test_random_spans_have_the_share_and_the_length_they_are_asked_for():
    flags = random_spans(random.Random(0), 100_000, 0.4, 2.0)
    runs = sum(b and not a for a, b in zip([False] + flags, flags))
    assert sum(flags) / len(flags) == pytest.approx(0.4, abs=0.02) and sum(flags) / runs == pytest.approx(2.0, abs=0.05)
