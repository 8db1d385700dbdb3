"""Speech encoders: the tiny one, a random Whisper, and the real whisper-tiny.en where it is there."""

import jiwer
import numpy as np
import pytest
import torch
from conftest import shared

from corpora import word_times
from data import load_audio, read_manifest
from files import UserError
from model import SpeechEncoder


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    WhisperForConditionalGeneration(WhisperConfig(d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                                                  encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                                                  decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


def test_whisper_runs_on_the_audios_own_length_and_the_flag_brings_the_padding_back(whisper):
    audio = np.random.default_rng(0).standard_normal(16000 * 2, dtype=np.float32) * 0.1
    own, padded = SpeechEncoder(whisper), SpeechEncoder(whisper, pad_whisper=True)
    assert own(audio).shape == padded(audio).shape == (100, 32) and own.key != padded.key
    assert not torch.equal(own(audio), padded(audio))
    assert not any("decoder" in name for name, _ in own.named_parameters())


def test_on_30_seconds_our_whisper_pass_is_transformers_own(whisper):
    from transformers import WhisperModel
    audio = np.random.default_rng(0).standard_normal(16000 * 30, dtype=np.float32) * 0.1
    encoder = SpeechEncoder(whisper)
    mel = encoder.extractor(audio, sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        reference = WhisperModel.from_pretrained(whisper).encoder(mel).last_hidden_state[0]
    torch.testing.assert_close(encoder(audio).float(), reference, rtol=1e-2, atol=1e-2)


def test_whisper_hears_long_audio_in_pieces_of_at_most_30_seconds(whisper):
    audio = np.random.default_rng(0).standard_normal(16000 * 32, dtype=np.float32) * 0.1
    encoder = SpeechEncoder(whisper)
    frames = encoder(audio, "long.wav")
    assert len(frames) == 1600 and torch.equal(frames[:800], encoder(audio[:16 * 16000]))


def test_the_real_whisper_encoder_hears_real_speech():
    encoder = SpeechEncoder(shared("models/whisper-tiny.en"))
    rows = read_manifest(shared("data/ljspeech") / "manifest.jsonl")
    frames = encoder(load_audio(rows[1].audio), rows[1].audio)
    assert frames.shape == (pytest.approx(rows[1].duration * 50, abs=1), 384) and torch.isfinite(frames.float()).all()


def test_the_tiny_encoder_gives_33_frames_a_second_and_transcribes_unseen_voices(encoder, utterances, frames):
    tested = [u for u in utterances if u.split == "test"]
    assert sum(len(frames[u.id]) for u in utterances) / sum(u.duration for u in utterances) == pytest.approx(100 / 3, rel=0.02)
    error = jiwer.wer([u.text for u in tested], [encoder.transcribe(frames[u.id]) for u in tested])
    assert error <= 0.12, f"{error:.1%} WER on {len(tested)} utterances in unseen voices; the model card says far less"


def test_what_is_no_checkpoint_is_refused_in_words(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(UserError, match="speech encoder .*cannot be loaded"):
        SpeechEncoder(tmp_path)


def test_word_alignment_is_close_to_espeaks_own_times_on_unseen_voices(encoder, utterances, frames):
    tested = [u for u in utterances if u.split == "test"]
    errors = [abs(ours[1] - theirs[1]) for u in tested for ours, theirs in zip(word_times(encoder, frames[u.id], u.text, u.duration)[0][1:], u.words[1:])]
    print(f"mean boundary error: {1000 * np.mean(errors):.0f} ms over {len(errors)} boundaries")
    assert np.mean(errors) <= 0.04


def test_alignment_keeps_words_it_cannot_spell(encoder, utterances, frames):
    u = utterances[0]
    text = u.text + " 12 —"
    words, _ = word_times(encoder, frames[u.id], text, u.duration)
    assert [w for w, _, _ in words] == text.split()
    assert all(0 <= s <= e <= u.duration for _, s, e in words) and all(a[2] <= b[1] + 1e-6 for a, b in zip(words, words[1:]))


def test_a_transcript_too_long_for_its_audio_cannot_be_aligned(encoder, utterances, frames):
    with pytest.raises(UserError, match="does not fit the audio"):
        word_times(encoder, frames[utterances[0].id], "seven " * 200, utterances[0].duration)
