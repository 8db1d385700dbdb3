"""The speech of the tiny world: its sentences, spoken by espeak-ng."""

import random

from data import Utterance, write_audio
from support.console import progress_bar
from support.files import UserError
from tiny import speech, world


def render_tiny(out, n_train, n_test, seed):
    """Utterances of the tiny world with exact word times, their audio in OUT/audio.

    The test utterances are held-out sentences in held-out voices. UserError if espeak-ng fails.
    """
    rng, utterances = random.Random(f"prepare-{seed}"), []
    for split, n in (("train", n_train), ("test", n_test)):
        stream = world.draws(f"prepare-{seed}", held_out=split == "test")
        for i in progress_bar(range(n), desc=f"render {split}", unit="utt"):
            said = next(stream)
            try:
                samples, words, voice = speech.render(said.words, rng, split)
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(f"espeak-ng: {error}") from None
            path = out / "audio" / f"{split}-{i:05d}.wav"
            write_audio(path, samples)
            seconds = len(samples) / speech.SAMPLE_RATE
            u = Utterance(path, said.words, seconds, voice["voice"], split, words)
            u.kind = world.kind_of(said)
            utterances.append(u)
    return utterances
