"""A recording from the microphone, where there is one."""

import tempfile
from pathlib import Path

from data import SAMPLE_RATE, write_audio
from support.files import UserError, first_line

LONGEST_RECORDING = 30  # seconds


def recorded(seconds):
    """The path of a sound file, in the system's temporary folder, of so many seconds of speech.

    UserError if sounddevice is not installed or finds no microphone, or if it is too long.
    """
    if not 0 < seconds <= LONGEST_RECORDING:
        raise UserError(f"a recording of {seconds:g} s: it may have up to {LONGEST_RECORDING} s")
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the system's PortAudio is missing
        raise UserError(
            f"no recording without sounddevice ({first_line(error)}): pip install sounddevice, and "
            "on Linux apt install libportaudio2"
        ) from None
    try:
        print(f"recording {seconds:g} s …", flush=True)
        samples = sounddevice.rec(round(seconds * SAMPLE_RATE), SAMPLE_RATE, channels=1)
        sounddevice.wait()
    except sounddevice.PortAudioError as error:
        raise UserError(f"the microphone cannot be used ({first_line(error)})") from None
    path = Path(tempfile.mkdtemp(prefix="mtbi-")) / "recording.wav"
    write_audio(path, samples[:, 0])
    return str(path)
