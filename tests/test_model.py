"""The model: encoders, connectors, the frozen LLM, what is spliced, lost, generated and saved."""

import sys
from types import SimpleNamespace

import bitsandbytes
import jiwer
import numpy as np
import pytest
import soundfile
import torch
import transformers
from checkpoints import FAMILIES, SPECIAL, TEMPLATES, save_encoder, save_llm, tokenizer_of
from checkpoints import too_little_memory_at_first
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import model as models
from data import FULL, Recipe, Response, Speech, Text, Utterance, chat_parts, interleave, load_audio
from data import read_manifest, response_tokens, transcript_tokens, user_turn
from lab.memory import LiveBytes
from lab.model_shapes import find_config
from model import CONNECTORS, ENCODERS, IGNORE, LOSSES, Connector, ConnectorBody, SpeechLLM
from model import HuggingFaceEncoder, embedding_rms, encode_all, fingerprint_of_encoder
from model import load_encoder, load_llm, loss_in_slices, shared_encoder
from support.chat_template import render_chat
from support.files import UserError, read_json, write_json
from support.hub import fingerprint_of_llm, modules_with_weights
from support.runs import read_spec
from train import TrainOptions, connector_size

PROMPT, TRANSCRIPT = "Translate this into German.", "the farmer sold three red apples"
ONE_SECOND = 16000  # samples
SMALL = {"connector": "stack-mlp", "k": 6, "hidden": 32, "lora": 0}


def noise(seconds):
    rng = np.random.default_rng(0)
    return rng.standard_normal(round(seconds * ONE_SECOND), dtype=np.float32) * 0.1


def conversation(model, audio, response=None, prompt=PROMPT):
    """The parts of a question about parts that are heard or read; open without a response."""
    if response is not None:
        response = response_tokens(model.tokenizer, response)
    return chat_parts(model.tokenizer, user_turn(prompt), [audio], response)


def heard(model, frames, utterances, prompt=PROMPT):
    """Conversations about speech, whose answer is what was said."""
    return [conversation(model, [Speech(frames[u.id])], u.text, prompt) for u in utterances]


def read(model, texts, prompt=PROMPT):
    """The same about transcripts."""
    return [conversation(model, [transcript_tokens(model.tokenizer, t)], t, prompt) for t in texts]


def rms(x):
    return x.detach().float().pow(2).mean().sqrt().item()


# ---- speech encoders ----

FRAME_RATES = {
    "whisper": 50,
    "wav2vec2": 50,
    "hubert": 50,
    "wavlm": 50,
    "wav2vec2-ctc": 50,
    "hubert-ctc": 50,
    "wavlm-ctc": 50,
    "parakeet": 12.5,
    "parakeet-encoder": 12.5,
}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("whisper"), "whisper")


@pytest.mark.parametrize("kind", FRAME_RATES)
def test_encoders_of_every_family_tell_their_width_and_frame_rate(kind, tmp_path):
    encoder = HuggingFaceEncoder(save_encoder(tmp_path, kind))
    assert encoder.frame_rate == pytest.approx(FRAME_RATES[kind], rel=0.01)
    frames = encoder(noise(3))
    assert frames.shape == (pytest.approx(3 * FRAME_RATES[kind], abs=1), encoder.width)
    assert encoder.width == 32 and torch.isfinite(frames.float()).all()
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
    assert encoder.can_transcribe == (kind.endswith("-ctc") or kind == "parakeet")
    if encoder.can_transcribe:
        assert isinstance(encoder.transcribe(frames), str)


@pytest.mark.parametrize("kind", ["wavlm", "wav2vec2", "parakeet"])
def test_frames_are_those_of_the_model_itself(kind, tmp_path):
    from transformers import AutoFeatureExtractor, AutoModel

    encoder = HuggingFaceEncoder(save_encoder(tmp_path, kind))
    extractor, whole = AutoFeatureExtractor.from_pretrained, AutoModel.from_pretrained(tmp_path)
    inputs = extractor(tmp_path)(noise(1.6), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        out = whole.encoder(**inputs) if kind == "parakeet" else whole(**inputs)
    reference, frames = out.last_hidden_state[0], encoder(noise(1.6)).float()
    n = out.attention_mask.sum() if kind == "parakeet" else len(reference)
    assert len(frames) == n, "what the extractor padded is cut off"
    torch.testing.assert_close(frames, reference[:n], rtol=2e-3, atol=2e-3)


def test_whisper_runs_on_the_audios_own_length_and_the_flag_brings_the_padding_back(whisper):
    own, padded = HuggingFaceEncoder(whisper), HuggingFaceEncoder(whisper, pad_whisper=True)
    assert own(noise(2)).shape == padded(noise(2)).shape == (100, 32)
    assert not torch.equal(own(noise(2)), padded(noise(2)))
    assert own.fingerprint != padded.fingerprint
    assert load_encoder(whisper) is load_encoder(whisper, False)
    assert load_encoder(whisper, True).pad_whisper


def test_on_30_seconds_our_whisper_pass_is_transformers_own(whisper):
    from transformers import WhisperModel

    encoder = HuggingFaceEncoder(whisper)
    mel = encoder.extractor(noise(30), sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        reference = WhisperModel.from_pretrained(whisper).encoder(mel).last_hidden_state[0]
    torch.testing.assert_close(encoder(noise(30)).float(), reference, rtol=1e-2, atol=1e-2)


def test_whisper_hears_long_audio_in_pieces_of_at_most_30_seconds(whisper):
    encoder = HuggingFaceEncoder(whisper)
    frames = encoder(noise(32), "long.wav")
    assert len(frames) == 1600
    assert torch.equal(frames[:800], encoder(noise(32)[: 16 * ONE_SECOND]))


def test_the_real_whisper_encoder_hears_real_speech():
    encoder = HuggingFaceEncoder(shared("models/whisper-tiny.en"))
    u = read_manifest(shared("data/ljspeech") / "manifest.jsonl")[1]
    frames = encoder(load_audio(u.audio), u.audio)
    assert frames.shape == (pytest.approx(u.duration * 50, abs=1), 384)
    assert torch.isfinite(frames.float()).all()


def test_the_tiny_encoder_gives_33_frames_a_second_and_transcribes_unseen_voices(
    encoder, utterances, frames
):
    seconds = sum(u.duration for u in utterances)
    assert sum(len(frames[u.id]) for u in utterances) / seconds == pytest.approx(100 / 3, rel=0.02)
    tested = [u for u in utterances if u.split == "test"]
    transcribed = [encoder.transcribe(frames[u.id]) for u in tested]
    error = jiwer.wer([u.text for u in tested], transcribed)
    assert error <= 0.12, f"{error:.1%} WER on {len(tested)} utterances in unseen voices"


class Loudness:
    """An encoder that is no Hugging Face checkpoint: 40 frames a second, of 8 loudnesses each."""

    name, width, frame_rate, fingerprint = "loudness", 8, 40.0, "loudness-1"
    can_transcribe = False
    loaded = []

    def __init__(self):
        self.asked = []  # the devices it was moved to, and the files it heard
        self.loaded.append(self)

    def __call__(self, samples, name="the audio"):
        self.asked.append(name)
        whole = len(samples) // 400 * 400
        pieces = torch.from_numpy(samples[:whole]).reshape(-1, 8, 50)
        return pieces.pow(2).mean(-1).add(1e-6).log().half()  # (T, 8)

    def to(self, device):
        self.asked.append(device)


def test_an_encoder_outside_hugging_face_works_end_to_end(
    llm, utterances, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(ENCODERS, "loudness", Loudness)
    shared_encoder.cache_clear()
    assert fingerprint_of_encoder("loudness") == "loudness-1"
    encoder = load_encoder("loudness")
    frames = encode_all(encoder, utterances[:4], tmp_path / "features")
    assert [p.name for p in (tmp_path / "features").glob("*/")] == ["loudness-1"]
    assert "40.0 frames/s x 8 values" in capsys.readouterr().out
    files = [u.audio for u in utterances[:4]]
    assert [word for word in encoder.asked if not isinstance(word, str)] == files
    for u in utterances[:4]:
        assert frames[u.id].shape == (pytest.approx(40 * u.duration, abs=1), 8)

    spec = {"llm": "tiny", "bits": 4, "encoder": "loudness", "pad_whisper": False, **SMALL}
    model = SpeechLLM.build(spec, llm)
    assert model.encoder is encoder and Loudness.loaded == [encoder], "loaded once"
    model(heard(model, frames, utterances[:4])).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.trainable().values())
    model.save(tmp_path, spec)
    again = SpeechLLM.from_pretrained(tmp_path, llm)
    assert again.answer(PROMPT, files[0], 4) == model.train(False).answer(PROMPT, files[0], 4)

    monkeypatch.setattr(Loudness, "fingerprint", "loudness-2")
    with pytest.raises(UserError, match="another speech encoder than the one .* at loudness"):
        SpeechLLM.from_pretrained(tmp_path, llm)
    shared_encoder.cache_clear()


# ---- connectors ----


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_connector_gives_one_token_for_k_frames_wherever_the_span_stands(kind):
    torch.manual_seed(0)
    connector = Connector(kind, 24, 40, k=4, hidden=32, embedding_rms=0.02).eval()
    spans = [torch.randn(n, 24) for n in (40, 3, 40, 41, 0, 1, 4)]
    together = connector(spans)
    assert [len(tokens) for tokens in together] == [10, 1, 10, 11, 0, 1, 1]
    for span, tokens in zip(spans, together):
        torch.testing.assert_close(connector([span])[0], tokens, rtol=1e-4, atol=1e-5)
        size = tokens.detach().pow(2).mean(1).sqrt()
        assert size == pytest.approx([0.02] * len(tokens), rel=1e-3), "the norm of the embeddings"
    assert connector([torch.zeros(0, 24)])[0].shape == (0, 40), "all of them without frames"
    sum(tokens.sum() for tokens in connector.train()(spans)).backward()
    assert all(p.grad is not None for p in connector.parameters())


@pytest.mark.parametrize("kind, groups", [("stack-mlp", 1), ("qformer", 1), ("conv", 3)])
def test_windows_that_stand_apart_go_through_the_connector_at_once(kind, groups):
    connector = Connector(kind, 24, 40, k=4, hidden=32)
    shapes = []
    connector.body.register_forward_pre_hook(lambda body, args: shapes.append(args[0].shape))
    connector([torch.randn(n, 24) for n in (40, 3, 40, 41, 0, 1, 4)])
    assert len(shapes) == groups, "spans of 10, 1 and 11 tokens"
    assert sum(rows * frames for rows, frames, _ in shapes) == (10 + 1 + 10 + 11 + 1 + 1) * 4


@pytest.mark.parametrize("kind", CONNECTORS)
def test_a_conversation_whose_speech_has_no_frames_can_be_trained_on(kind):
    """As where the one word that is left as speech has no length in the corpus."""
    connector = Connector(kind, 24, 40, k=4, hidden=32)
    (nothing,) = connector([torch.randn(0, 24)])
    assert nothing.shape == (0, 40)
    nothing.sum().backward()


class EveryKth(ConnectorBody):
    """A connector as docs/extend.md adds one: every k-th frame, projected."""

    k_is_a_power_of_two = True
    widening, multiple_of, widest = 1, 5, 50

    def __init__(self, width_in, width_out, k, hidden):
        super().__init__()
        self.k, self.project = k, torch.nn.Linear(width_in, width_out)

    def forward(self, x):
        return self.project(x[:, :: self.k])  # (B, N, D)


def test_each_connector_has_its_own_defaults_for_k_and_the_hidden_width():
    k = {kind: body.frames_per_token(100 / 3, 5.6) for kind, body in CONNECTORS.items()}
    assert k == {"stack-mlp": 6, "conv": 8, "qformer": 6}, "of conv a power of two"
    assert all(body.frames_per_token(3.0, 5.6) == 1 for body in CONNECTORS.values())
    for width, expected in (
        (100, (400, 400, 128)),
        (192, (768, 768, 192)),
        (4096, (2048, 2048, 1024)),
    ):
        found = [body.hidden_width(width)[0] for body in CONNECTORS.values()]
        assert found == list(expected), f"for an LLM of width {width}"
    assert EveryKth.hidden_width(192) == (
        50,
        "1 x the LLM's width of 192, as a multiple of 5, at most 50",
    )


def test_a_connector_of_ones_own_is_an_entry_of_the_table(encoder, llm, monkeypatch, capsys):
    monkeypatch.setitem(CONNECTORS, "every-kth", EveryKth)
    recipe = Recipe("", connector="every-kth")
    size = connector_size(TrainOptions("run"), recipe, 192, encoder)
    assert size == {"k": 4, "hidden": 50}, "by its own defaults"
    assert connector_size(TrainOptions("run", k=3, hidden=9), recipe, 192, encoder) == {
        "k": 3,
        "hidden": 9,
    }
    assert "hidden: 50, 1 x the LLM's width of 192, as a multiple of 5" in capsys.readouterr().out
    model = SpeechLLM.build({"connector": "every-kth", "lora": 0, **size}, llm, encoder)
    assert len(model.connector([torch.randn(17, encoder.width)])[0]) == 5
    with pytest.raises(UserError, match="no connector 'nosuch'; there are stack-mlp, .*every-kth"):
        Connector("nosuch", 8, 8, 1, 8)


# ---- the frozen LLM: families, bits, precisions ----


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def of_family(family, encoder, tmp_path_factory):
    """A speech LLM on a small random-weight LLM of the family, in NF4."""
    llm = load_llm(save_llm(tmp_path_factory.mktemp(family), family), 4)
    return SpeechLLM.build(SMALL, llm, encoder).train(False)


def ids(parts):
    found = []
    for part in parts:
        found += part.ids
    return found


def test_the_prompt_of_training_is_that_of_generation_and_what_the_template_writes(
    of_family, family
):
    tokenizer = of_family.tokenizer
    audio = [transcript_tokens(tokenizer, TRANSCRIPT)]
    training = conversation(of_family, audio, "drei rote Äpfel")
    generation = conversation(of_family, audio)
    assert training[:-1] == generation and isinstance(training[-1], Response)
    said = render_chat(tokenizer, [{"role": "user", "content": f"{PROMPT}\n{TRANSCRIPT}"}])
    assert ids(generation) == tokenizer(said, add_special_tokens=False)["input_ids"]
    assert said.endswith("<think>\n\n</think>\n\n") == (family == "qwen3")
    *answer, end = training[-1].ids
    assert tokenizer.decode(answer) == "drei rote Äpfel"
    assert tokenizer.convert_ids_to_tokens(end) == SPECIAL[family][1]
    if family in ("llama", "gemma3"):
        bos = tokenizer.bos_token_id
        assert tokenizer("a")["input_ids"][0] == bos, "the tokenizer would write a second one"
        assert ids(generation)[0] == bos and ids(generation).count(bos) == 1


def entry(kind, value):
    return {"type": kind, kind: value}


@pytest.mark.parametrize(
    "content",
    [
        [entry("text", PROMPT), entry("audio", "a")],
        [entry("audio", "a"), entry("text", PROMPT)],
        [entry("text", PROMPT), entry("audio", "a"), entry("text", "and"), entry("audio", "b")],
    ],
)
def test_speech_stands_exactly_where_the_transcript_would(of_family, content):
    tokenizer, n = of_family.tokenizer, sum(c["type"] == "audio" for c in content)
    messages = [{"role": "user", "content": content}]
    speech = Speech(torch.zeros(12, of_family.encoder.width))
    transcript = transcript_tokens(tokenizer, TRANSCRIPT)
    spoken = chat_parts(tokenizer, messages, [[speech]] * n)
    as_text = chat_parts(tokenizer, messages, [[transcript]] * n)
    assert sum(isinstance(p, Speech) for p in spoken) == n
    assert [p for p in as_text if p != transcript] == [p for p in spoken if isinstance(p, Text)]


def test_a_system_turn_is_written_once_or_put_before_the_question_where_it_is_refused(
    of_family, family
):
    tokenizer = of_family.tokenizer
    system = {"role": "system", "content": "Answer in a few words."}
    said = tokenizer.decode(ids(chat_parts(tokenizer, [system, *user_turn(PROMPT)], [[]])))
    assert said.count("Answer in a few words.") == 1 and "helpful assistant" not in said
    if family == "gemma3":
        assert "<start_of_turn>user\nAnswer in a few words.\n\n" + PROMPT in said
    without = tokenizer.decode(ids(conversation(of_family, [])))
    assert ("helpful assistant" in without) == (family in ("qwen2", "smollm"))


def test_a_system_turn_that_a_template_silently_drops_is_put_before_the_question():
    tokenizer = tokenizer_of("phi3")
    loop = "{% for m in messages %}"
    dropping = loop.replace("%}", "if m['role'] != 'system' %}")
    tokenizer.chat_template = TEMPLATES["phi3"].replace(loop, dropping)
    system = {"role": "system", "content": "Be brief."}
    parts = chat_parts(tokenizer, [system, *user_turn("Who did it?")], [[]])
    assert tokenizer.decode(parts[0].ids).count("Be brief.\n\nWho did it?") == 1


def test_the_prompt_is_the_same_every_day(of_family, monkeypatch):
    import transformers.utils.chat_template_utils as utils

    class Tomorrow(utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    parts = conversation(of_family, [])
    monkeypatch.setattr(utils, "datetime", Tomorrow)
    assert conversation(of_family, []) == parts


def test_it_trains_the_connector_alone_and_answers(of_family, frames, utterances):
    rows = heard(of_family, frames, utterances[:3])
    loss = of_family(rows)
    loss.backward()
    assert torch.isfinite(loss)
    for p in of_family.connector.parameters():
        assert torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0
    assert all(p.grad is None for p in of_family.llm.parameters())
    with torch.no_grad():
        assert loss.item() == pytest.approx(sum(of_family([row]).item() for row in rows), rel=1e-4)
    questions = [row[:-1] for row in rows]
    alone = [of_family.generate([row], 12)[0] for row in questions]
    assert of_family.generate(questions, 12) == alone == of_family.generate(questions, 12)


def test_generation_is_greedy_whatever_the_checkpoint_recommends(of_family):
    row = conversation(of_family, [transcript_tokens(of_family.tokenizer, TRANSCRIPT)])
    embeds, mask, _ = of_family.embed([row])
    chosen, table = [], of_family.llm.get_input_embeddings()
    for _ in range(8):
        best = of_family.llm(inputs_embeds=embeds).logits[0, -1].argmax()
        if best.item() in of_family.ends:
            break
        chosen.append(best.item())
        embeds = torch.cat([embeds, table(best[None, None])], dim=1)
    answer = of_family.tokenizer.decode(chosen, skip_special_tokens=True)
    assert of_family.generate([row], 8) == [answer.strip().rstrip("\ufffd").strip()]


def test_speech_tokens_start_at_the_norm_the_llms_layers_see(of_family):
    text = of_family.llm.get_input_embeddings()(torch.arange(50))
    speech = of_family.connector([torch.randn(60, of_family.encoder.width)])[0]
    assert rms(speech) == pytest.approx(embedding_rms(of_family.llm).item(), rel=1e-3)
    assert rms(speech) == pytest.approx(rms(text), rel=0.1)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_4_8_and_16_bits(bits, encoder, frames, utterances, tmp_path):
    llm, tokenizer = load_llm(save_llm(tmp_path, "qwen2"), bits)
    assert getattr(llm, "is_loaded_in_4bit", False) == (bits == 4)
    assert getattr(llm, "is_loaded_in_8bit", False) == (bits == 8)
    if bits == 4:
        config = llm.config.quantization_config
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    model = SpeechLLM.build(SMALL, (llm, tokenizer), encoder)
    rows = heard(model, frames, utterances[:1])
    loss = model(rows)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad.abs().sum() > 0 for p in model.connector.parameters())
    assert model.generate([rows[0][:-1]], 4)


def test_a_projection_in_nf4_makes_another_llm_and_stays_near(frames, utterances, encoder):
    whole, tokenizer = load_llm("tiny", 4)
    packed, _ = load_llm("tiny", 4, "auto", 4)
    states = torch.randn(50, whole.config.hidden_size)
    expected, found = (llm.get_output_embeddings()(states) for llm in (whole, packed))
    assert (found - expected).norm() < 0.15 * expected.norm()
    prints = [SpeechLLM(llm, tokenizer).fingerprint for llm in (whole, packed)]
    assert prints[0] != prints[1]


def test_an_adapter_leaves_the_projection_alone_also_in_slices():
    llm, tokenizer = load_llm("tiny", 4, "auto", 4, "host")
    adapted = SpeechLLM(llm, tokenizer, lora=2)
    names = list(adapted.trainable())
    assert names and not any("slices" in name or "lm_head" in name for name in names)


def test_embeddings_that_are_the_projection_too_stay_where_it_is(tmp_path):
    with pytest.raises(UserError, match="--embeddings host goes with --head-bits 4"):
        load_llm(save_llm(tmp_path, "qwen2", tie_word_embeddings=True), 4, "auto", 16, "host")


def test_an_encoder_without_memory_on_the_gpu_hears_on_the_cpu(monkeypatch, capsys):
    ears = models.HuggingFaceEncoder("tiny")
    samples, expected = noise(1), ears(noise(1))
    monkeypatch.setattr(ears, "hear", too_little_memory_at_first(ears.hear))
    assert torch.equal(ears(samples), expected)
    assert "CUBLAS_STATUS_ALLOC_FAILED" in capsys.readouterr().err


def test_rows_that_bitsandbytes_unpacks_wrongly_on_a_cpu_are_refused(tmp_path):
    odd = save_llm(tmp_path, "qwen2", intermediate_size=96)
    with pytest.raises(UserError, match="down_proj has rows of 96 weights, no multiple of 64"):
        load_llm(odd, 4)
    assert load_llm(odd, 16)


@pytest.mark.xfail(
    strict=True, reason="bitsandbytes 0.50.2: once it passes, check_row_widths may go"
)
def test_bitsandbytes_unpacks_rows_of_any_width_on_a_cpu():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    unpacked = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert (unpacked - weight).norm() < 0.12 * weight.norm()


def test_an_encoder_has_one_name_in_the_precisions_of_a_gpu_and_of_a_cpu(tmp_path):
    """A Whisper encoder is fp16 on the one and fp32 on the other."""
    ears = HuggingFaceEncoder(save_encoder(tmp_path, "whisper"))
    name = ears.fingerprint
    del ears.fingerprint  # a fingerprint is taken once
    ears.model.half()
    assert ears.fingerprint == name
    del ears.fingerprint
    with torch.no_grad():
        ears.model.layers[0].fc1.weight += 1
    assert ears.fingerprint != name


def test_an_llm_has_one_name_in_bf16_fp16_and_fp32(tmp_path):
    """Though a small number of a checkpoint in bf16 loses digits in fp16."""
    folder = save_llm(tmp_path, "qwen2")
    whole = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key, w in whole.items():
        noise = 0.02 * torch.randn(w.shape, generator=generator)
        noise.view(-1)[0] = 1.2345e-6
        whole[key] = noise.to(torch.bfloat16)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    names = {}
    for precision in ("bf16", "fp16", "fp32"):
        names[precision] = fingerprint_of_llm(*load_llm(str(folder), 16, precision))
    assert len(set(names.values())) == 1, names


def test_an_llm_stored_in_fp32_has_one_name_in_bf16_and_fp32(tmp_path):
    folder = save_llm(tmp_path, "qwen2")
    whole = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key, w in whole.items():
        whole[key] = torch.randn(w.shape, generator=generator)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    names = [fingerprint_of_llm(*load_llm(str(folder), 16, p)) for p in ("bf16", "fp32")]
    assert names[0] == names[1]


def test_a_control_token_that_no_conversation_has_may_be_unknown_to_the_llm(tmp_path):
    """As that for pictures is to Gemma 3's models for text."""
    folder = save_llm(tmp_path, "gemma3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    known = len(load_file(folder / "model.safetensors")["model.embed_tokens.weight"])
    fill = [f"<unused{i}>" for i in range(known - len(tokenizer))]
    pictures = "<image_soft_token>"
    tokenizer.add_special_tokens({"additional_special_tokens": [*fill, pictures]})
    assert tokenizer.convert_tokens_to_ids(pictures) == known
    tokenizer.save_pretrained(folder)
    load_llm(str(folder), 16)
    tokenizer.chat_template = pictures + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="but its weights only"):
        load_llm(str(folder), 16)


def test_a_word_that_the_llm_does_not_know_is_refused(tmp_path):
    folder = save_llm(tmp_path, "gemma3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(16)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="but its weights only"):
        load_llm(str(folder), 16)


def test_where_bitsandbytes_does_not_work_the_llm_runs_unquantized_and_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    llm, _ = load_llm("tiny", 4)
    assert not getattr(llm, "is_loaded_in_4bit", False)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and "runs unquantized" in said[0]


def test_the_compute_type_is_bf16_fp16_or_fp32(monkeypatch):
    assert models.compute_precision() == "fp32" or torch.cuda.is_available()
    monkeypatch.setattr(models, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for major, expected in ((7, "fp16"), (8, "bf16"), (9, "bf16")):
        card = SimpleNamespace(major=major, minor=5)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert models.compute_precision() == expected
    assert models.compute_precision("fp16") == "fp16", "or what is asked for"


def test_on_a_cpu_with_bf16_an_llm_that_is_not_tiny_computes_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "DEVICE", "cpu")
    wide = save_llm(tmp_path / "wide", "qwen2", hidden_size=512)
    narrow = save_llm(tmp_path / "narrow", "qwen2", hidden_size=256)
    for has_it in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        expected = "bf16" if has_it else "fp32"
        assert models.compute_precision("auto", wide) == expected
        assert models.compute_precision("auto", find_config("qwen2.5-0.5b", "llm")) == expected
        assert models.compute_precision("auto", str(narrow)) == "fp32"
        assert models.compute_precision("auto", "tiny") == "fp32"
        assert models.compute_precision("fp32", str(wide)) == "fp32", "or what is asked for"
    llm, _ = load_llm(str(wide), 16)
    assert llm.dtype == torch.bfloat16 and load_llm("tiny", 16)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "name, family", [("qwen2.5-instruct", "qwen2"), ("smollm2-135m-instruct", "smollm")]
)
def test_the_real_tokenizers_on_small_random_models(name, family, encoder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared(f"tokenizers/{name}"))
    llm = load_llm(save_llm(tmp_path / name, family, tokenizer), 4)
    model = SpeechLLM.build({**SMALL, "connector": "qformer"}, llm, encoder)
    soundfile.write(tmp_path / "a.wav", noise(1), ONE_SECOND)
    assert isinstance(model.answer(PROMPT, tmp_path / "a.wav", 4), str)
    assert isinstance(model.answer("Who are you?", max_new_tokens=4), str)
    assert model.tokenizer.convert_ids_to_tokens(model.eot) == "<|im_end|>"


def test_a_recording_beside_a_whole_conversation_is_refused(llm):
    with pytest.raises(UserError, match="a.wav: name it in the conversation"):
        SpeechLLM(*llm).answer([{"role": "user", "content": "hi"}], "a.wav")


def test_an_answer_ends_where_the_context_of_the_llm_ends(llm, monkeypatch):
    model = SpeechLLM(*llm)
    context = llm[0].config.max_position_embeddings
    monkeypatch.setattr(model, "ends", [-1])  # nothing else ends it
    question = chat_parts(model.tokenizer, user_turn("Repeat this."), [[]])
    left = context - sum(len(part.ids) for part in question)
    real, lengths = llm[0].generate, []

    def generate(**options):
        options["min_new_tokens"] = options["max_new_tokens"]
        answers = real(**options)
        lengths.append(answers.shape[1])
        return answers

    monkeypatch.setattr(llm[0], "generate", generate)
    model.generate([question], max_new_tokens=10 * context)
    assert lengths == [left]


def test_a_conversation_longer_than_the_context_of_the_llm_is_refused(llm):
    model = SpeechLLM(*llm)
    long = chat_parts(model.tokenizer, user_turn("Repeat this. " * 300), [[]])
    with pytest.raises(UserError, match="longer than this LLM's context of 512"):
        model.generate([long])
    answered = chat_parts(model.tokenizer, user_turn("Repeat this."), [[]], [5] * 600)
    with pytest.raises(UserError, match="longer than this LLM's context of 512"):
        model([answered])


def test_an_answer_cut_off_in_the_middle_of_a_character_loses_that_half(llm, monkeypatch):
    from transformers import AutoTokenizer

    model = SpeechLLM(*llm)
    model.tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers/qwen2.5-instruct"))
    ok, *hedgehog = model.tokenizer("ok 🦔")["input_ids"]
    ended = [ok, model.eot, *[0 for _ in hedgehog]][: len(hedgehog)]
    answers = torch.tensor([[ok, *hedgehog[:-1]], ended])
    monkeypatch.setattr(model, "embed", lambda batch: (torch.zeros(2, 1, 1), None, None))
    monkeypatch.setattr(model.llm, "generate", lambda **options: answers)
    assert model.generate_rows([[], []]) == [("ok", False), ("ok", True)]


# ---- the splice: parts become embeddings, mask and labels ----

quick = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def utterance_of(words):
    """Said in 0.3 s a word."""
    times = [[word, 0.3 * i, 0.3 * (i + 1)] for i, word in enumerate(words)]
    return Utterance("x.wav", " ".join(words), 0.3 * len(words), words=times)


@quick
@given(st.lists(st.sampled_from(TRANSCRIPT.split()), min_size=1, max_size=8))
def test_all_text_is_the_text_prompt_and_no_text_is_the_speech_prompt(model, words):
    utterance, frames = utterance_of(words), torch.randn(10 * len(words), model.encoder.width)
    transcript = transcript_tokens(model.tokenizer, utterance.text)
    for flag, part in ((True, transcript), (False, Speech(frames))):
        mixed = interleave(model.tokenizer, utterance, frames, [flag for _ in words])
        one, other = (conversation(model, audio, "red") for audio in (mixed, [part]))
        for a, b in zip(model.embed([one]), model.embed([other])):
            assert torch.equal(a, b)
        assert model([one]).item() == model([other]).item()


@settings(quick, max_examples=8)
@given(st.lists(st.integers(0, 120), min_size=1, max_size=4), st.randoms())
def test_padding_changes_nothing_for_any_mix_of_lengths(model, lengths, rng):
    """Embeddings, mask and labels of a conversation do not depend on what it is batched with."""
    torch.manual_seed(rng.randrange(10**6))
    rows = []
    for n in lengths:
        speech = Speech(torch.randn(n, model.encoder.width))
        rows.append(conversation(model, [speech], " ".join(["red"] * rng.randint(1, 9))))
    embeds, mask, labels = model.embed(rows)
    for row, e, m, y in zip(rows, embeds, mask, labels):
        (one,), (ones,), (alone,) = model.embed([row])
        n = len(one)
        assert m.tolist() == [0] * (len(m) - n) + [1] * n and ones.tolist() == [1] * n
        torch.testing.assert_close(e[-n:], one)
        assert y[-n:].tolist() == alone.tolist()
        assert not e[:-n].any() and (y[:-n] == IGNORE).all()


def test_parts_take_their_places_in_order(model):
    """The example of embed's docstring, with k = 6."""
    frames = torch.randn(60, model.encoder.width)
    parts = [Text(list(range(9))), Speech(frames), Text([3, 1, 4, 1]), Response([5, 9, 2])]
    (embeds,), (mask,), (labels,) = model.embed([parts])
    table, (tokens,) = model.llm.get_input_embeddings(), model.connector([frames])
    text = table(torch.tensor([*range(9), 3, 1, 4, 1, 5, 9, 2]))
    assert torch.equal(embeds, torch.cat([text[:9], tokens, text[9:]])) and len(embeds) == 26
    assert mask.tolist() == [1] * 26 and labels.tolist() == [IGNORE] * 23 + [5, 9, 2]


def test_only_the_response_and_its_end_of_turn_carry_loss(model, frames, utterances):
    u = utterances[0]
    transcript = transcript_tokens(model.tokenizer, u.text)
    rows = [
        conversation(model, [Speech(frames[u.id])], "red"),
        conversation(model, [transcript], "three red apples"),
    ]
    _, _, labels = model.embed(rows)
    for row, parts, answer in zip(labels, rows, ("red", "three red apples")):
        wanted = response_tokens(model.tokenizer, answer)
        assert (
            row[row != IGNORE].tolist() == wanted == parts[-1].ids == row[-len(wanted) :].tolist()
        )
        assert wanted[-1] == model.eot


def test_masks_go_by_position_never_by_token_id(model):
    """A transcript and an answer full of pad and end-of-turn ids are text like any other."""
    odd = [model.tokenizer.pad_token_id, model.eot, model.tokenizer.pad_token_id]
    _, mask, labels = model.embed([[Text(odd), Response(odd)], [Text(odd * 3), Response(odd)]])
    assert mask.sum(1).tolist() == [6, 12] and (labels != IGNORE).sum(1).tolist() == [3, 3]


def test_the_embeddings_of_training_begin_with_those_of_generation(model, frames, utterances):
    (training,) = heard(model, frames, utterances[:1])
    (whole,), (question,) = (model.embed([parts])[0] for parts in (training, training[:-1]))
    assert torch.equal(whole[: len(question)], question) and len(whole) > len(question)


def test_a_batch_agrees_with_each_conversation_alone(model, frames, utterances):
    rows = heard(model, frames, utterances[:5])
    with torch.no_grad():
        assert model(rows).item() == pytest.approx(sum(model([r]).item() for r in rows), rel=1e-5)
    questions = [row[:-1] for row in rows]
    assert model.generate(questions) == [model.generate([row])[0] for row in questions]


def test_left_and_right_padding_agree(model, frames, utterances):
    embeds, mask, _ = model.embed(heard(model, frames, utterances[:4]))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pads = (mask == 0).sum(1).tolist()
    assert len(set(pads)) > 1
    rolled = torch.stack([row.roll(-n, 0) for row, n in zip(embeds, pads)])
    flipped = torch.stack([row.roll(-n, 0) for row, n in zip(mask, pads)])
    with torch.no_grad():
        left = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
        right = model.llm(inputs_embeds=rolled, attention_mask=flipped).logits
    for a, b, n in zip(left, right, pads):
        torch.testing.assert_close(a[n:], b[: len(b) - n], rtol=1e-4, atol=1e-4)


# ---- losses ----


def test_losses_are_a_table(model, frames, utterances, monkeypatch):
    assert {name: loss.has_teacher for name, loss in LOSSES.items()} == {"ce": False, "kl": True}

    class WrongTokens:
        has_teacher = True

        def __call__(self, logits, answers, teacher):
            return (logits + teacher).sum()

    monkeypatch.setitem(LOSSES, "wrong-tokens", WrongTokens())
    rows = heard(model, frames, utterances[:2])
    with torch.no_grad():
        logits, _ = model.logits(rows)
        assert model(rows, rows, "wrong-tokens").item() == pytest.approx(2 * logits.sum().item())


def test_cross_entropy_is_summed_over_response_tokens(model, frames, utterances):
    rows = heard(model, frames, utterances[:3])
    with torch.no_grad():
        logits, answers = model.logits(rows)
        each = -logits.log_softmax(-1)[range(len(answers)), answers]
        assert (
            model(rows).item() == model(rows, None, "ce").item() == pytest.approx(each.sum().item())
        )
    assert len(each) == sum(len(row[-1].ids) for row in rows)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_in_slices_has_the_gradient_of_one_in_one_piece(name, monkeypatch):
    """To the bit, in the precision of the LLM; and less memory is alive at once."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 50, 700).bfloat16()
    logits.requires_grad_()
    answers = torch.randint(700, (50,))
    monkeypatch.setattr(models, "AT_ONCE", 700 * 7 + 1)

    def in_one_piece(loss, logits, answers, teacher):
        return loss(logits.float(), answers, teacher.float())

    found = []
    for way in (in_one_piece, loss_in_slices):
        logits.grad = None
        with LiveBytes([logits, answers, teacher]) as live:
            loss = way(LOSSES[name], logits, answers, teacher)
            (loss / 8).backward()
        found.append((loss.item(), logits.grad, live.peak))
    (whole, gradient, most), (sum_of_slices, same, least) = found
    assert sum_of_slices == pytest.approx(whole, rel=1e-5)
    assert torch.equal(gradient, same) and gradient.abs().sum() > 0
    assert least < 0.6 * most


def test_kl_is_zero_when_the_model_hears_what_the_teacher_reads(model, utterances):
    rows = read(model, [u.text for u in utterances[:3]])
    assert abs(model(rows, rows, "kl").item()) < 1e-3


def test_kl_gradients_reach_the_connector_after_a_teacher_pass(model, utterances, frames):
    """Not so if load_llm let bitsandbytes repack CPU weights in calls without gradients.

    The kernel they are repacked for has no backward.
    """
    rows = heard(model, frames, utterances[:1])
    model.generate([rows[0][:-1]])
    model(rows, read(model, [utterances[0].text]), "kl").backward()
    for p in model.trainable().values():
        assert p.grad is not None and p.grad.abs().sum() > 0


def test_with_an_adapter_kl_still_imitates_the_frozen_llm(model, encoder, utterances):
    """A teacher that had the adapter, too, would drift with what is trained."""
    tuned = SpeechLLM.build({**SMALL, "lora": 4}, load_llm("tiny", 4), encoder).train()
    rows = read(model, [u.text for u in utterances[:3]])
    assert abs(tuned(rows, rows, "kl").item()) < 1e-3, "an adapter begins as nothing"
    adapter = [p for name, p in tuned.trainable().items() if "lora_B" in name]
    with torch.no_grad():
        for p in adapter:
            p.normal_(0, 0.5)
        target = model.logits(rows)[0].log_softmax(-1)
        found = tuned.logits(rows)[0].log_softmax(-1)
    expected = torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True).item()
    loss = tuned(rows, rows, "kl")
    assert loss.item() == pytest.approx(expected, rel=1e-4) and expected > 0.1
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter)


def test_an_adapter_on_a_shared_llm_is_taken_off_without_a_trace(model, spec, utterances):
    rows = read(model, [u.text for u in utterances[:3]])
    modules = [name for name, _ in model.llm.named_modules()]
    with torch.no_grad():
        alone = model.logits(rows)[0]
        tuned = SpeechLLM.build({**spec, "lora": 4}, (model.llm, model.tokenizer), model.encoder)
        for name, p in tuned.trainable().items():
            if "lora_B" in name:
                p.normal_(0, 0.5)
        assert not torch.allclose(model.logits(rows)[0], alone), "it is on the LLM of both"
        with tuned.without_adapter():
            assert torch.equal(model.logits(rows)[0], alone)
        tuned.take_off_adapter()
        assert torch.equal(model.logits(rows)[0], alone)
    assert [name for name, _ in model.llm.named_modules()] == modules
    assert not hasattr(model.llm, "peft_config"), "another one may follow"


def test_a_whole_llm_trains_as_a_copy_and_leaves_the_first_one_as_it_was(
    encoder, utterances, frames, tmp_path
):
    spec = {**SMALL, "llm": "tiny", "bits": 16, "encoder": "tiny", "pad_whisper": False}
    spec["lora"] = FULL
    shared = load_llm("tiny", 16)
    alone = SpeechLLM(*shared)
    modules = [name for name, _ in shared[0].named_modules()]
    weights = {name: w.clone() for name, w in shared[0].state_dict().items()}
    rows = read(alone, [u.text for u in utterances[:3]])
    with torch.no_grad():
        before = alone.logits(rows)[0]

    tuned = SpeechLLM.build(spec, shared, encoder)
    trained = sum(p.numel() for n, p in tuned.trainable().items() if n.startswith("llm."))
    assert trained == sum(w.numel() for w in weights.values())
    assert abs(tuned(rows, rows, "kl").item()) < 1e-3, "it begins as what it is a copy of"
    spoken = heard(tuned, frames, utterances[:3])
    optimizer = torch.optim.SGD(tuned.trainable().values(), lr=1e-2)
    for _ in range(2):
        tuned(spoken).backward()
        assert all(p.grad is not None for p in tuned.trainable().values())
        optimizer.step()
    with torch.no_grad():
        after = tuned.logits(rows)[0]
        with tuned.without_adapter():
            assert torch.equal(tuned.logits(rows)[0], before)
    assert not torch.allclose(after, before)

    tuned.save(tmp_path, spec)
    again = SpeechLLM.from_pretrained(tmp_path, None, encoder)
    with torch.no_grad():
        assert torch.equal(again.logits(rows)[0], after)
    rounded = SpeechLLM.from_pretrained(tmp_path, None, encoder, "bf16").trainable()
    for name, p in tuned.trainable().items():
        assert torch.equal(rounded[name].float(), p.to(rounded[name].dtype).float())
    tuned.take_off_adapter()
    assert [name for name, _ in shared[0].named_modules()] == modules
    left = shared[0].state_dict()
    assert all(torch.equal(left[name], w) for name, w in weights.items())


def test_tied_embeddings_stay_tied_in_a_whole_llm_that_trains(encoder, tmp_path):
    checkpoint = str(save_llm(tmp_path / "llm", "qwen2", tie_word_embeddings=True))
    spec = {**SMALL, "llm": checkpoint, "bits": 16, "encoder": "tiny", "pad_whisper": False}
    spec["lora"] = FULL
    tuned = SpeechLLM.build(spec, None, encoder)
    table = tuned.llm.get_input_embeddings().weight
    assert any(p is table for p in tuned.trainable().values())
    with torch.no_grad():
        for p in tuned.trainable().values():
            p.add_(0.01)
    tuned.save(tmp_path / "run", spec)
    again = SpeechLLM.from_pretrained(tmp_path / "run", None, encoder)
    assert torch.equal(again.llm.get_input_embeddings().weight, table)
    assert again.llm.get_output_embeddings().weight is again.llm.get_input_embeddings().weight


def test_a_weight_of_a_module_with_others_inside_is_copied_once():
    inside = torch.nn.Linear(2, 2)
    around = torch.nn.Module()
    around.sinks, around.q_proj = torch.nn.Parameter(torch.zeros(2)), inside
    llm = torch.nn.ModuleDict({"attention": around, "norm": torch.nn.LayerNorm(2)})
    assert modules_with_weights(llm) == ["attention", "norm"]


@pytest.mark.parametrize("bits, head_bits", [(4, 16), (16, 4)])
def test_an_llm_that_is_packed_is_not_trained_as_a_whole(bits, head_bits):
    llm, tokenizer = load_llm("tiny", bits, "auto", head_bits)
    with pytest.raises(UserError, match="packed cannot be trained as a whole"):
        SpeechLLM(llm, tokenizer, lora=FULL)


def test_an_adapter_that_cannot_be_loaded_does_not_stay_on_a_shared_llm(
    llm, spec, encoder, tmp_path
):
    spec = {**spec, "lora": 4}
    tuned = SpeechLLM.build(spec, load_llm("tiny", 4), encoder)
    tuned.save(tmp_path, spec)
    modules = [name for name, _ in llm[0].named_modules()]
    with torch.no_grad():
        next(iter(tuned.connector.parameters())).fill_(torch.nan)
    tuned.save(tmp_path, spec)
    with pytest.raises(UserError, match="it holds NaN or infinite weights"):
        SpeechLLM.from_pretrained(tmp_path, llm, encoder)
    assert [name for name, _ in llm[0].named_modules()] == modules


def test_an_llm_whose_numbers_overflow_is_refused_before_it_answers_nonsense(encoder, spec):
    llm, tokenizer = load_llm("tiny", 16, "fp16")
    model = SpeechLLM.build(spec, (llm, tokenizer), encoder)
    question = read(model, ["Who?"])[0][:-1]
    model.check_finite(question)
    llm.model.norm.weight.mul_(1e5)  # more than fp16 can hold
    with pytest.raises(UserError, match="overflow in torch.float16 .* say --precision fp32"):
        model.check_finite(question)


# ---- building and saving ----


def test_the_same_seed_gives_the_same_start_whether_or_not_the_models_are_loaded_already(
    spec, llm, encoder
):
    one, other = SpeechLLM.build(spec, llm, encoder, seed=3), SpeechLLM.build(spec, seed=3)
    for name, p in one.connector.state_dict().items():
        assert torch.equal(p, other.connector.state_dict()[name])
    assert one.fingerprint == other.fingerprint
    assert one.encoder.fingerprint == other.encoder.fingerprint


def test_a_saved_model_answers_as_before_and_another_llm_is_refused(
    model, spec, llm, encoder, utterances, frames, tmp_path
):
    with torch.no_grad():
        for p in model.connector.parameters():  # no longer what any seed begins with
            p += 0.1 * torch.randn_like(p)
    model.save(tmp_path, spec)
    again = SpeechLLM.from_pretrained(tmp_path, llm, encoder)
    questions = [row[:-1] for row in heard(model, frames, utterances[:3])]
    assert torch.equal(model.embed(questions)[0], again.embed(questions)[0])
    assert model.generate(questions) == again.generate(questions)
    saved = read_json(tmp_path / "model.json")
    write_json(tmp_path / "model.json", {**saved, "llm_fingerprint": "0"})
    with pytest.raises(UserError, match="another LLM"):
        SpeechLLM.from_pretrained(tmp_path, llm, encoder)


@pytest.mark.parametrize("name", ["trained_parameters", "lora", "k", "pad_whisper", "encoder"])
def test_a_model_json_in_which_a_value_is_none_of_its_kind_is_refused(model, spec, tmp_path, name):
    model.save(tmp_path, spec)
    saved = read_json(tmp_path / "model.json")
    write_json(tmp_path / "model.json", {**saved, name: []})
    with pytest.raises(UserError, match="is not what training writes there"):
        read_spec(tmp_path)


def test_a_lora_adapter_trains_and_loads_while_the_quantized_weights_stay(
    spec, encoder, utterances, frames, tmp_path
):
    from peft import PeftModel

    spec = {**spec, "lora": 4}
    model = SpeechLLM.build(spec, load_llm("tiny", 4), encoder)
    assert model.llm.is_loaded_in_4bit
    rows = heard(model, frames, utterances[:4])
    optimizer = torch.optim.SGD(model.trainable().values(), lr=1e-2)
    before = {n: t.clone() for n, t in model.llm.state_dict().items() if "lora" not in n}
    for _ in range(2):
        model(rows).backward()
        optimizer.step()
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in model.trainable().items())
    assert all(torch.equal(t, model.llm.state_dict()[name]) for name, t in before.items())

    model.save(tmp_path, spec)
    again = SpeechLLM.from_pretrained(tmp_path, None, encoder)
    torch.testing.assert_close(model.train(False)(rows), again(rows))

    # PEFT itself loads the adapter, on the plain LLM
    adapted = PeftModel.from_pretrained(load_llm("tiny", 4)[0], tmp_path / "adapter")
    embeds, mask, _ = model.embed(rows)
    with torch.no_grad(), again.without_adapter():
        plain, alone = (
            m(inputs_embeds=embeds, attention_mask=mask).logits for m in (again.llm, adapted)
        )
        ours = model.llm(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(alone, ours)
    assert not torch.allclose(plain, ours), "without it the LLM is the frozen one"
    model.save(tmp_path, spec)  # a second save replaces the first
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["adapter", "connector.safetensors", "model.json"]
