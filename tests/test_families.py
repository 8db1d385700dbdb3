"""Every family of LLMs and speech encoders goes through the same code: small random weights, real architectures, their ways with chat templates."""

import numpy as np
import pytest
import soundfile
import torch
from checkpoints import FAMILIES, SPECIAL, save_encoder, save_llm
from conftest import shared

from connectors import Connector
from corpora import word_times
from data import Response, Speech, Text, ask, chat_parts, render, transcript_tokens
from model import SpeechEncoder, SpeechLLM, embedding_rms, load_llm

PROMPT, TRANSCRIPT = "Translate this into German.", "the farmer sold three red apples"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def heard_model(folder, encoder):
    spec = {"llm": str(folder), "bits": 4, "encoder": "tiny", "pad_whisper": False, "connector": "stack-mlp", "k": 6, "hidden": 32, "lora": 0}
    return SpeechLLM.build(spec, load_llm(folder, 4), encoder).train(False)


def ids(parts):
    return [i for p in parts for i in p.ids]


def test_the_prompt_of_training_is_the_prompt_of_generation_and_what_the_template_writes(heard_model, family):
    tokenizer, heard = heard_model.tokenizer, [transcript_tokens(heard_model.tokenizer, TRANSCRIPT)]
    response = heard_model.response("drei rote Äpfel").ids
    training, generation = chat_parts(tokenizer, ask(PROMPT), [heard], response), chat_parts(tokenizer, ask(PROMPT), [heard])
    assert training[:-1] == generation and training[-1] == Response(response)
    said = render(tokenizer, [{"role": "user", "content": f"{PROMPT}\n{TRANSCRIPT}"}])
    assert ids(generation) == tokenizer(said, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if family in ("llama", "gemma3"):
        assert ids(generation)[0] == bos and ids(generation).count(bos) == 1 and tokenizer("a")["input_ids"][0] == bos
    assert tokenizer.decode(response[:-1]) == "drei rote Äpfel" and tokenizer.convert_ids_to_tokens(response[-1]) == SPECIAL[family][1]
    assert said.endswith("<think>\n\n</think>\n\n") == (family == "qwen3")


def test_speech_stands_exactly_where_the_transcript_would(heard_model):
    tokenizer, frames = heard_model.tokenizer, torch.zeros(12, heard_model.encoder.width)
    for content in ([("text", PROMPT), ("audio", 0)], [("audio", 0), ("text", PROMPT)], [("text", PROMPT), ("audio", 0), ("text", TRANSCRIPT), ("audio", 1)]):
        messages = [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in content]}]
        n = sum(kind == "audio" for kind, _ in content)
        spoken = chat_parts(tokenizer, messages, [[Speech(frames)]] * n)
        read = chat_parts(tokenizer, messages, [[transcript_tokens(tokenizer, TRANSCRIPT)]] * n)
        assert sum(isinstance(p, Speech) for p in spoken) == n
        assert [p for p in read if p != transcript_tokens(tokenizer, TRANSCRIPT)] == [p for p in spoken if isinstance(p, Text)]


def test_a_system_turn_is_written_once_or_put_before_the_question_where_it_is_refused(heard_model, family):
    system = {"role": "system", "content": "Answer in a few words."}
    said = heard_model.tokenizer.decode(ids(chat_parts(heard_model.tokenizer, [system, *ask(PROMPT)], [[]])))
    assert said.count("Answer in a few words.") == 1 and "helpful assistant" not in said
    if family == "gemma3":
        assert "<start_of_turn>user\nAnswer in a few words.\n\n" + PROMPT in said
    without = heard_model.tokenizer.decode(ids(chat_parts(heard_model.tokenizer, ask(PROMPT), [[]])))
    assert ("helpful assistant" in without) == (family in ("qwen2", "smollm"))


def test_the_prompt_is_the_same_every_day(heard_model, monkeypatch):
    parts = chat_parts(heard_model.tokenizer, ask(PROMPT), [[]])
    import transformers.utils.chat_template_utils as utils

    class Tomorrow(utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)
    monkeypatch.setattr(utils, "datetime", Tomorrow)
    assert chat_parts(heard_model.tokenizer, ask(PROMPT), [[]]) == parts


def test_it_trains_the_connector_alone_and_answers(heard_model, frames, utterances):
    rows = [chat_parts(heard_model.tokenizer, ask(PROMPT), [[Speech(frames[u.id])]], heard_model.response(u.text).ids) for u in utterances[:3]]
    loss = heard_model(rows)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in heard_model.connector.parameters())
    assert all(p.grad is None for p in heard_model.llm.parameters())
    assert loss.item() == pytest.approx(sum(heard_model([row]).item() for row in rows), rel=1e-4)
    open_rows = [row[:-1] for row in rows]
    answers = heard_model.generate(open_rows, 12)
    assert answers == [heard_model.generate([row], 12)[0] for row in open_rows] == heard_model.generate(open_rows, 12)


def test_generation_is_greedy_whatever_the_checkpoint_recommends(heard_model):
    row = chat_parts(heard_model.tokenizer, ask(PROMPT), [[transcript_tokens(heard_model.tokenizer, TRANSCRIPT)]])
    embeds, mask, _ = heard_model.embed([row])
    chosen = []
    for _ in range(8):
        best = heard_model.llm(inputs_embeds=embeds).logits[0, -1].argmax()
        if best.item() in heard_model.ends:
            break
        chosen.append(best.item())
        embeds = torch.cat([embeds, heard_model.llm.get_input_embeddings()(best[None, None])], dim=1)
    answer = heard_model.tokenizer.decode(chosen, skip_special_tokens=True).strip().rstrip("\ufffd").strip()
    assert heard_model.generate([row], 8) == [answer]


def test_speech_tokens_start_at_the_norm_the_llms_layers_see(heard_model):
    text = heard_model.llm.get_input_embeddings()(torch.arange(50)).pow(2).mean().sqrt().item()
    speech = heard_model.connector([torch.randn(60, heard_model.encoder.width)])[0].pow(2).mean().sqrt().item()
    assert speech == pytest.approx(embedding_rms(heard_model.llm).item(), rel=1e-3) and speech == pytest.approx(text, rel=0.1)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_4_8_and_16_bits(tmp_path_factory, bits, encoder, frames, utterances):
    folder = save_llm(tmp_path_factory.mktemp("bits"), "qwen2")
    llm, tokenizer = load_llm(folder, bits)
    assert bool(getattr(llm, "is_loaded_in_4bit", False)) == (bits == 4) and bool(getattr(llm, "is_loaded_in_8bit", False)) == (bits == 8)
    if bits == 4:
        config = llm.config.quantization_config
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    model = SpeechLLM.build({"connector": "stack-mlp", "k": 6, "hidden": 32, "lora": 0}, (llm, tokenizer), encoder)
    u = utterances[0]
    loss = model([chat_parts(tokenizer, ask(PROMPT), [[Speech(frames[u.id])]], model.response(u.text).ids)])
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.abs().sum() > 0 for p in model.connector.parameters())
    assert model.generate([chat_parts(tokenizer, ask(PROMPT), [[Speech(frames[u.id])]])], 4)


def test_pickled_weights_are_refused(tmp_path):
    from files import UserError
    folder = save_llm(tmp_path, "qwen2")
    weights = folder / "model.safetensors"
    from safetensors.torch import load_file
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_llm(folder, 16)


# ---- speech encoders ----

ENCODERS = {"whisper": 50, "wav2vec2": 50, "hubert": 50, "wavlm": 50, "wav2vec2-ctc": 50, "hubert-ctc": 50, "wavlm-ctc": 50, "parakeet": 12.5,
            "parakeet-encoder": 12.5}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_of_every_family_tell_their_width_and_frame_rate(kind, tmp_path):
    encoder = SpeechEncoder(save_encoder(tmp_path, kind))
    assert encoder.frame_rate == pytest.approx(ENCODERS[kind], rel=0.01) and encoder.width == 32
    audio = np.random.default_rng(0).standard_normal(16000 * 3, dtype=np.float32) * 0.1
    frames = encoder(audio)
    assert len(frames) == pytest.approx(3 * ENCODERS[kind], abs=1) and torch.isfinite(frames.float()).all()
    assert not any(p.requires_grad for p in encoder.parameters()) and not any("decoder" in name for name, _ in encoder.named_parameters())
    assert (encoder.head is not None) == (kind.endswith("-ctc") or kind == "parakeet")
    if encoder.head is not None:
        assert isinstance(encoder.transcribe(frames), str)
        text = "The farmer sold 12 red apples — naïvely, №5!"
        words, score = word_times(encoder, encoder(np.tile(audio, 4)), text, 12.0)
        assert [w for w, _, _ in words] == text.split() and 0 <= score <= 1
        assert all(0 <= s <= e <= 12 for _, s, e in words) and all(a[2] <= b[1] + 1e-6 for a, b in zip(words, words[1:]))


@pytest.mark.parametrize("kind", ["wavlm", "wav2vec2", "parakeet"])
def test_frames_are_those_of_the_model_itself(kind, tmp_path):
    from transformers import AutoFeatureExtractor, AutoModel
    encoder = SpeechEncoder(save_encoder(tmp_path, kind))
    audio = np.random.default_rng(0).standard_normal(25600, dtype=np.float32) * 0.1
    inputs = AutoFeatureExtractor.from_pretrained(tmp_path)(audio, sampling_rate=16000, return_tensors="pt")
    model = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        out = getattr(model, "encoder", model)(**inputs) if kind == "parakeet" else model(**inputs)
    reference, frames = out.last_hidden_state[0], encoder(audio).float()
    assert len(frames) == (out.attention_mask.sum() if kind == "parakeet" else len(reference)), "what the extractor padded is cut off"
    torch.testing.assert_close(frames, reference[:len(frames)], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["stack-mlp", "conv", "qformer"])
def test_every_connector_gives_one_token_for_k_frames_wherever_the_span_stands(kind):
    torch.manual_seed(0)
    connector = Connector(kind, 24, 40, 4, 32, 0.7).eval()
    spans = [torch.randn(n, 24) for n in (40, 3, 40, 41)]
    together = connector(spans)
    assert [len(t) for t in together] == [10, 1, 10, 11]
    for span, tokens in zip(spans, together):
        torch.testing.assert_close(connector([span])[0], tokens, rtol=1e-4, atol=1e-5)
        assert tokens.pow(2).mean().sqrt().item() == pytest.approx(0.7, rel=1e-3)
    sum(t.sum() for t in connector.train()(spans)).backward()
    assert all(p.grad is not None for p in connector.parameters())


def test_the_real_tokenizers_on_small_random_models(tmp_path, encoder):
    from transformers import AutoTokenizer
    for name, family in (("qwen2.5-instruct", "qwen2"), ("smollm2-135m-instruct", "smollm")):
        tokenizer = AutoTokenizer.from_pretrained(shared(f"tokenizers/{name}"))
        model = SpeechLLM.build({"connector": "qformer", "k": 6, "hidden": 32, "lora": 0}, load_llm(save_llm(tmp_path / name, family, tokenizer), 4), encoder)
        soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
        assert isinstance(model.answer(PROMPT, tmp_path / "a.wav", 4), str) and model.tokenizer.convert_ids_to_tokens(model.eot) == "<|im_end|>"
