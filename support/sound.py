"""Sound files as they are on disk: read whole, or refused with what is wrong."""

import soundfile

from support.files import UserError


def read_sound(path, duration):
    """(float32 samples (n, channels), rate in Hz) of a whole sound file."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such audio file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the audio file is empty")
    try:
        expected = soundfile.info(path).frames
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (n, channels)
    except (soundfile.LibsndfileError, RuntimeError, OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from None
    if len(samples) == 0:
        raise UserError(f"{path}: the audio file holds no samples")

    # Three signs of a file that ends too early: samples, bytes, and what the manifest says.
    seconds = len(samples) / rate
    truncated = len(samples) < expected
    truncated = truncated or size < bytes_promised(path) < 2**32 - 1024
    truncated = truncated or bool(duration and seconds < 0.95 * duration - 0.05)
    if truncated:
        of = f" of {duration:.2f} s" if duration else ""
        raise UserError(f"{path}: the audio file is truncated, it holds {seconds:.2f} s{of}")
    return samples, rate


def bytes_promised(path):
    """How long a WAV file's header says that it is; 0 for any other file."""
    with open(path, "rb") as file:
        head = file.read(8)
    return int.from_bytes(head[4:8], "little") + 8 if head[:4] == b"RIFF" else 0
