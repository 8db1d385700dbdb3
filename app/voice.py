"""A typed sentence in one of espeak-ng's voices, for those without a microphone."""

import numpy as np
import torch
from torchaudio.functional import resample

from data import SAMPLE_RATE
from support.files import UserError
from tiny.speech import ACCENTS, TEST_VARIANTS, synthesized

VOICES = [f"{accent}+{variant}" for accent in ACCENTS for variant in TEST_VARIANTS]
LONGEST = 200  # characters


def spoken(text, voice=VOICES[0], rate=160, pitch=50, noise=0.0, seed=0):
    """float32 samples at SAMPLE_RATE of a text in a voice that no training heard.

    rate: words a minute; pitch: 0 to 99; noise: its level as a share of the speech's. UserError if
    the text cannot be spoken.
    """
    text = " ".join(text.split())
    if not text:
        raise UserError("there is nothing to say: type a sentence")
    if len(text) > LONGEST:
        raise UserError(f"a sentence of {len(text)} characters: up to {LONGEST} are spoken")
    if voice not in VOICES:
        raise UserError(f"there is no voice {voice!r}")
    try:
        audio, own_rate, _, _ = synthesized(
            text, {"voice": voice, "rate": rate, "pitch": pitch, "range": 50}
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    audio = resample(torch.from_numpy(audio), own_rate, SAMPLE_RATE).numpy()
    audio = np.pad(audio, SAMPLE_RATE // 10)
    audio *= 0.6 / max(1e-3, float(np.abs(audio).max()))
    level = noise * float(np.sqrt(np.mean(audio**2)))
    hiss = np.random.default_rng(seed).standard_normal(len(audio), dtype=np.float32)
    return audio + level * hiss
