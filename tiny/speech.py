"""The voices of the tiny world: espeak-ng, which the PyPI package `espeakng-loader` carries.

espeak-ng reports each word as an event with its position in the audio, so word times are exact, not
estimated.
"""

import atexit
import ctypes
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

ACCENTS = ["en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc"]
# fmt: off
TRAIN_VARIANTS = [
    "m1", "m2", "m3", "m5", "m6", "m7", "f1", "f2", "f4", "Andy", "Alex", "Annie", "linda", "steph",
    "ed", "john", "michel", "pedro", "iven", "klatt2", "max", "norbert", "paul", "rob", "adam",
    "anika", "belinda", "boris", "caleb", "Denis", "Gene", "grandma", "Hugo", "klatt", "Lee",
    "marcelo", "Michael", "miguel", "quincy", "Reed", "sandro", "shelby", "travis", "victor",
]
# fmt: on
# Kept for the benchmark: neither the encoder's pre-training nor stage 2 ever hears these.
TEST_VARIANTS = ["m4", "f3", "f5", "m8", "david", "Alicia", "steph2", "zac"]

SAMPLE_RATE = 16000  # what render() returns, Hz
# Constants and types of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS, _EVENT_WORD, _UTF8, _DO_NOT_EXIT = 2, 1, 1, 0x8000
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_SYNTH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class _Event(ctypes.Structure):  # espeak_EVENT of speak_lib.h
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


def variants(split):
    """The voice variants of "train" or "test"."""
    return TEST_VARIANTS if split == "test" else TRAIN_VARIANTS


def random_voice(rng, split):
    """A speaker of the split: {"voice", "rate" (words/minute), "pitch", "range" (0..100), "size"}.

    size scales pitch and formants, from large people (0.75) to children (1.45). espeak-ng has few
    such voices, and an encoder that never heard one does not understand them; the held-out voices
    are left as espeak-ng made them.
    """
    size = 1.0 if split == "test" else 2 ** rng.uniform(-0.4, 0.54)
    return {
        "voice": f"{rng.choice(ACCENTS)}+{rng.choice(variants(split))}",
        "rate": rng.randint(135, 185),
        "pitch": rng.randint(30, 70),
        "range": rng.randint(35, 65),
        "size": size,
    }


@lru_cache(maxsize=1)
def _library():
    """espeak-ng, initialised once per process.

    Returns (library, sample rate in Hz, what the callback writes to, the callback).
    """
    import espeakng_loader

    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path()
    if len(data) > 120:  # espeak-ng has room for a path of 160 characters, file names included
        # a copy for each process: of one for all, one would read what another is writing
        folder = tempfile.mkdtemp(prefix="espeak-ng-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        data = str(shutil.copytree(data, Path(folder) / "espeak-ng-data"))
    rate = espeak.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data.encode(), _DO_NOT_EXIT)
    if rate <= 0:
        raise RuntimeError("espeak-ng could not be started; is the package espeakng-loader whole?")
    heard = {"audio": [], "starts": []}

    def callback(samples, n, events):
        if samples and n:
            heard["audio"].append(np.ctypeslib.as_array(samples, (n,)).copy())
        event = ctypes.cast(events, ctypes.POINTER(_Event))
        i = 0
        while event[i].type != 0:  # the list ends with type 0
            if event[i].type == _EVENT_WORD:
                heard["starts"].append(event[i].sample)
            i += 1
        return 0

    keep_alive = _SYNTH_CALLBACK(callback)
    espeak.espeak_SetSynthCallback(keep_alive)
    return espeak, rate, heard, keep_alive


def speak(text, voice):
    """`text` spoken by `voice` (see random_voice), word by word.

    Returns (samples float32 in -1..1, their rate in Hz, [[word, start_s, end_s], ...]). ValueError
    where espeak-ng makes other words of it than stand there, as of "42".
    """
    audio, rate, starts, end = synthesized(text, voice)
    words = text.split()
    if len(starts) != len(words):
        raise ValueError(f"espeak-ng spoke {len(starts)} words for {text!r}")
    ends = starts[1:] + [end]
    times = [[w, s / rate, e / rate] for w, s, e in zip(words, starts, ends)]
    return audio, rate, times


def synthesized(text, voice):
    """`text` spoken by `voice`, whatever words espeak-ng makes of it.

    Returns (samples float32 in -1..1, their rate in Hz, the sample at which each word begins, the
    sample at which the last one ends). ValueError if there is no such voice, or nothing to hear.
    """
    espeak, rate, heard, _ = _library()
    if espeak.espeak_SetVoiceByName(voice["voice"].encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice['voice']!r}")
    espeak.espeak_SetParameter(_RATE, voice["rate"], 0)
    espeak.espeak_SetParameter(_PITCH, voice["pitch"], 0)
    espeak.espeak_SetParameter(_RANGE, voice["range"], 0)
    heard["audio"], heard["starts"] = [], []
    # Hoarse and breathy voices have noise in them: the same one every time.
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
    # espeak-ng speaks some pairs ("in the") as one word with one event; a zero-width space between
    # words keeps them two.
    data = "\u200b ".join(text.split()).encode()
    espeak.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
    audio = np.concatenate([np.zeros(0), *heard["audio"]]).astype(np.float32) / 32768

    # espeak-ng ends a clause with silence: the last word ends 20 ms after the last loud sample.
    loud = np.flatnonzero(np.abs(audio) > 0.01)
    if not len(loud):
        raise ValueError(f"espeak-ng finds nothing to say in {text!r}")
    end = min(len(audio), int(loud[-1]) + rate // 50)
    return audio[: end + rate // 20], rate, heard["starts"], end


def render(text, rng, split, echo=0.5):
    """`text` in a random voice of the split, at 16 kHz, with silence around it and light noise.

    The noise is 20 to 45 dB below the speech. echo: share of the training utterances with an echo
    of 20 to 80 ms, as of a room; held-out voices are left as espeak-ng made them.

    Returns (samples float32 at SAMPLE_RATE, [[word, start_s, end_s], ...], the voice).
    """
    import torch
    from torchaudio.functional import resample

    voice = random_voice(rng, split)
    audio, rate, words = speak(text, {**voice, "rate": round(voice["rate"] / voice["size"])})
    # Played faster: higher, and as fast as before since it was spoken slower.
    played = 250 * round(rate * voice["size"] / 250)
    audio = resample(torch.from_numpy(audio), played, SAMPLE_RATE).numpy()
    if echo and split == "train" and rng.random() < echo:
        delay = int(rng.uniform(0.02, 0.08) * SAMPLE_RATE)
        gain = rng.uniform(0.1, 0.6)
        audio[delay:] += gain * audio[:-delay].copy()

    before = rng.uniform(0.05, 0.2)  # seconds of silence
    after = rng.uniform(0.05, 0.2)
    audio = np.pad(audio, (int(before * SAMPLE_RATE), int(after * SAMPLE_RATE)))
    audio = as_recorded(rng, audio, loudest=(0.3, 0.9), below=(20, 45))

    times = []
    for word, start, end in words:
        times.append([word, start * rate / played + before, end * rate / played + before])
    return audio, times, voice


def as_recorded(rng, audio, loudest, below):
    """`audio` louder or softer, and with white noise.

    loudest: the range of its loudest sample; below: how far the noise is below the speech, dB.
    """
    audio = audio * (rng.uniform(*loudest) / max(1e-3, float(np.abs(audio).max())))
    level = float(np.sqrt(np.mean(audio**2))) * 10 ** (-rng.uniform(*below) / 20)
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(audio), dtype=np.float32)
    return audio + level * noise
