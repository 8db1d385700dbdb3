"""Encoder frames, made once: the encoder is frozen, so what it makes of a recording is kept.

Kept on disk, frames are half precision in safetensors files that are memory-mapped: a data set
larger than the memory is trained on as well, and the encoder leaves the GPU. They are named by the
content of the recording and by the encoder (DATA/features/ENCODER/), so that a file moved or copied
is known, and a changed one is encoded anew.
"""

import hashlib
import os
import shutil
import zlib
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.ahead import READERS, ahead
from support.console import progress_bar, threads_for, timed
from support.files import HALF_WRITTEN, UserError, WriteError, fingerprint
from support.files import nearest_existing, read_json_if_whole, whole_file, write_json
from support.processes import DEVICE, WORLD, anyone, first_process, my_share, wait
from support.runs import lock_folder

SHARD = 256 * 2**20  # bytes of frames in one file, about


class KeptFrames:
    """{utterance id: frames (T, D_encoder)} of frames that are on disk or in memory."""

    def __init__(self, utterances, places, width):
        self.audio = {u.id: u.audio for u in utterances}
        self.places, self.width = places, width
        self.looked_at = set()  # a checksum is looked at once

    def __getitem__(self, utterance_id):
        place, name = self.places[utterance_id]
        if isinstance(place, dict):
            return place[name]
        frames = place.get_tensor(name)  # of a mapped file: read when it is used
        if name not in self.looked_at:
            fits = frames.ndim == 2 and len(frames) and frames.shape[1] == self.width
            if not fits or place.metadata().get(name) != checksum_of_frames(frames):
                raise UserError(
                    f"{self.audio[utterance_id]}: its kept frames are damaged "
                    f"({tuple(frames.shape)}, expected T x {self.width}); delete DATA/features and "
                    "run again"
                )
            self.looked_at.add(name)
        return frames

    def __len__(self):
        return len(self.audio)


class FramesAtEveryUse:
    """{utterance id: frames (T, D_encoder)}, encoded when they are asked for."""

    def __init__(self, encoder, load, utterances):
        self.encoder, self.load = encoder, load
        self.by_id = {u.id: u for u in utterances}

    def __getitem__(self, utterance_id):
        utterance = self.by_id[utterance_id]
        return self.encoder(self.load(utterance), utterance.audio)

    def __len__(self):
        return len(self.by_id)


def keep_frames(encoder, load, utterances, folder, keep="disk"):
    """The frames of all utterances, by utterance id; load(utterance): its samples.

    keep: on "disk" (in `folder`, memory-mapped), in "ram", or "off": encode at every use.
    Interrupted, it goes on from the last whole file. Several processes encode a share each.
    UserError if the disk has no room.
    """
    if keep == "off":
        encoder.to(DEVICE)
        print("features: not kept; the encoder hears them at every use")
        return FramesAtEveryUse(encoder, load, utterances)
    folder = Path(folder) / encoder.fingerprint
    names = content_names(utterances, folder.parent)
    made, todo = kept_and_missing(utterances, names, folder)
    if anyone(todo):  # whoever looked last may find more than another process did
        tell_size(encoder, todo, folder, keep)
        encoder.to(DEVICE)
        lock = lock_folder(folder.parent, "encodes speech") if keep == "disk" else nullcontext()
        with lock, timed(f"encode {len(todo)} utterances"), threads_for(encoder):
            if keep == "ram":
                frames = {names[u.id]: row for u, row in hear_all(encoder, load, todo)}
                for name in frames:
                    made[name] = frames  # in memory the dict stands where else a file would
            else:
                sweep(folder)  # and wait for it
                # another command may just have made them
                made, todo = kept_and_missing(utterances, names, folder)
                write_shards(encoder, load, my_share(todo), names, folder)
                wait()
                made = kept_shards(folder)
    if DEVICE != "cpu":
        encoder.to("cpu")  # its memory on the GPU is for the training
    if keep == "ram":
        made = read_all(made, set(names.values()))
    places = {u.id: (made[names[u.id]], names[u.id]) for u in utterances}
    return KeptFrames(utterances, places, encoder.width)


@first_process
def sweep(folder):
    """Take away what a process left half-written that was killed; within the lock on `folder`."""
    for path in folder.glob(f"{HALF_WRITTEN}*.safetensors"):
        path.unlink()


def kept_and_missing(utterances, names, folder):
    """(what is on disk, the utterances that are not); all processes see the same."""
    made = kept_shards(folder)
    missing = {names[u.id]: u for u in utterances if names[u.id] not in made}
    wait()  # before the first one writes
    return made, list(missing.values())


def read_all(made, names):
    """What was on disk already is read into memory."""
    in_memory = {}
    for name in names:
        place = made[name]
        if not isinstance(place, dict):
            place = {name: place.get_tensor(name).clone()}
        in_memory[name] = place
    return in_memory


def hear_all(encoder, load, utterances):
    """Yields (utterance, its frames (T, D_encoder)) of all, in any order.

    On a GPU sound is read by threads meanwhile, and clips of equal length are heard together,
    unless the encoder is one's own and has no `seconds_at_once`, or had to leave the GPU.
    """
    bar = progress_bar(desc="encode speech", total=len(utterances), unit="utt")
    threads = 0 if DEVICE == "cpu" else READERS
    together = threads and getattr(encoder, "seconds_at_once", 0)
    say_how_many(encoder, together)
    hear = hear_groups if together else hear_each
    with bar:
        for u, frames in hear(encoder, load, utterances, threads):
            yield u, frames
            bar.update()


def hear_each(encoder, load, utterances, threads):
    """Yields (utterance, its frames), heard one after the other."""
    with ahead(load, utterances, threads) as loaded:
        for u, samples in zip(utterances, loaded):
            yield u, encoder(samples, u.audio)


def hear_groups(encoder, load, utterances, threads):
    """Yields (utterance, its frames), clips of equal length heard together.

    The longest come first: if the memory does not suffice, that shows at once.
    """

    def clip_of(u):
        return u, encoder.clip(load(u), u.audio)

    by_length = sorted(utterances, key=lambda u: -u.duration)
    with ahead(clip_of, by_length, threads) as clips:
        for group in equally_long(clips, encoder):
            heard = encoder.hear_together([clip for _, clip in group])
            yield from zip([u for u, _ in group], heard)


def equally_long(clips, encoder):
    """Lists of neighbours (utterance, clip) that the encoder can hear together.

    Their features have the same shape, so that nothing is padded, and they are together no longer
    than encoder.seconds_at_once, if there is more than one.
    """
    group = []
    for u, clip in clips:
        seconds = (len(group) + 1) * u.duration
        if group and (clip.shape != group[0][1].shape or seconds > encoder.seconds_at_once):
            yield group
            group = []
        group.append((u, clip))
    if group:
        yield group


def say_how_many(encoder, together):
    """Print how many clips are heard at once, and why."""
    if together:
        seconds = f"up to {encoder.seconds_at_once:g} s of sound"
        print(f"at once: clips of equal length, {seconds}, because with one clip a GPU idles")
    elif DEVICE == "cpu":
        print("at once: 1 clip, because one keeps a CPU busy")
    else:
        print(f"at once: 1 clip, because the encoder {encoder.name} hears no more there")


def write_shards(encoder, load, utterances, names, folder):
    """Encode, and write a safetensors file whenever enough frames have come together."""
    frames, size = {}, 0
    for i, (u, row) in enumerate(hear_all(encoder, load, utterances), 1):
        frames[names[u.id]] = row
        size += row.numel() * row.element_size()
        if size >= SHARD or i == len(utterances):
            shard = hashlib.sha256("".join(frames).encode()).hexdigest()[:12]
            with whole_file(folder / f"{shard}.safetensors") as temporary:
                checksums = {name: checksum_of_frames(t) for name, t in frames.items()}
                whole = {name: t.contiguous() for name, t in frames.items()}
                save_file(whole, temporary, metadata=checksums)
            frames, size = {}, 0


def checksum_of_frames(frames):
    """CRC-32, which takes a few ms for half a minute of speech."""
    return f"{zlib.crc32(frames.contiguous().numpy().tobytes()):08x}"


def kept_shards(folder):
    """{content name: the open file that has its frames} of what is on disk."""
    made = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith(HALF_WRITTEN):  # its process was killed
            shard = open_shard(path, path.stat().st_mtime_ns)
            made |= dict.fromkeys(shard.keys(), shard)
    return made


@lru_cache(maxsize=4096)
def open_shard(path, _written):
    try:
        return safe_open(path, "pt").__enter__()
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: is no readable safetensors file ({error}); delete it and run again"
        ) from None


def fingerprint_of_audio(utterances, folder):
    """Names the content of all recordings, so that one that changed is noticed."""
    names = content_names(utterances, Path(folder))
    return fingerprint([names[u.id] for u in utterances])


def content_names(utterances, folder):
    """{utterance id: name of the content of its recording}.

    A file of the same size and date as last time is not read again.
    """
    path = folder / "contents.json"
    known = read_json_if_whole(path)
    ours = known is not None or not path.exists()
    known = known or {}
    names, found = {}, {}
    for u in utterances:
        if not u.audio.is_file():
            names[u.id] = f"missing {u.id}"  # which load_audio explains
            continue
        stamp = [u.audio.stat().st_size, u.audio.stat().st_mtime_ns]
        before = known.get(u.id)
        whole = isinstance(before, list) and len(before) == 3 and isinstance(before[2], str)
        if whole and before[:2] == stamp:
            names[u.id] = before[2]
        else:
            with open(u.audio, "rb") as content:  # in pieces: it may be larger than the memory
                names[u.id] = hashlib.file_digest(content, "sha256").hexdigest()[:24]
        found[u.id] = [*stamp, names[u.id]]
    if ours and any(known.get(i) != row for i, row in found.items()):
        try:
            write_json(path, known | found)
        except WriteError:
            pass  # it only saves time
    return names


def tell_size(encoder, utterances, folder, keep):
    """Say how much room the frames will take; UserError if the disk has not so much."""
    seconds = sum(u.duration for u in utterances)
    size = seconds * encoder.frame_rate * encoder.width * 2
    where = f"in {os.path.normpath(folder)}, memory-mapped"
    if keep == "ram":
        where = "of memory" + (f" in each of {WORLD} processes" if WORLD > 1 else "")
    print(
        f"features: {seconds / 3600:.3g} hours x {encoder.frame_rate:.1f} frames/s x "
        f"{encoder.width} values x 2 bytes = {size / 1e9:.3g} GB {where}"
    )
    if keep == "ram":
        return
    advice = "say --cache-features ram or off (train and bench have that option)"
    there = nearest_existing(folder)
    if not os.access(there, os.W_OK):
        raise UserError(f"{folder}: cannot be written; make it writable, or {advice}")
    free = shutil.disk_usage(there).free
    if free < 1.05 * size:
        raise UserError(
            f"{folder}: the features take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
            f"there; make room, or {advice}"
        )
