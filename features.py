"""Encoder frames, made once: the encoder is frozen, so what it makes of a recording is kept, and the encoder leaves the GPU.

Kept on disk, frames are half precision in safetensors files that are memory-mapped: a data set larger than the memory is trained on as well. They are named
by the content of the recording and by the encoder (DATA/features/ENCODER/), so a file moved or copied is known, and a changed one is encoded anew.
"""

import hashlib
import os
import shutil
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import load_audio
from files import UserError, alone, name_of, one_thread, read_json_if_whole, timed, whole_file, write_json
from parallel import DEVICE, MAIN, WORLD, mine, wait

KEEP = ("disk", "ram", "off")
SHARD = 256 * 2**20          # bytes of frames in one file, about


class Kept:
    """{utterance id: frames (T, D_encoder)} of frames that are on disk, in memory, or made when they are asked for (`encoder` is given)."""

    def __init__(self, utterances, places, encoder=None, width=0):
        self.by_id, self.places, self.encoder, self.width = {u.id: u for u in utterances}, places, encoder, width

    def __getitem__(self, utterance_id):
        if self.encoder:
            u = self.by_id[utterance_id]
            return self.encoder(load_audio(u.audio, u.duration), u.audio)
        place, name = self.places[utterance_id]
        frames = place[name] if isinstance(place, dict) else place.get_tensor(name)    # of a mapped file: read when it is used
        if frames.ndim != 2 or not len(frames) or frames.shape[1] != self.width:
            raise UserError(f"{self.by_id[utterance_id].audio}: its kept frames are damaged ({tuple(frames.shape)}, expected T x {self.width}); "
                            "delete DATA/features and run again")
        return frames

    def __len__(self):
        return len(self.by_id)


def encode_all(encoder, utterances, folder, keep="disk"):
    """The frames of all utterances, by utterance id. keep: on "disk" (in `folder`, memory-mapped), in "ram", or "off": encode at every use.

    Interrupted, it goes on from the last whole file. Several processes encode a share each. UserError if the disk has no room.
    """
    if keep == "off":
        print(f"features: not kept; the encoder stays on {DEVICE} and hears every utterance at every use")
        return Kept(utterances, {}, encoder.to(DEVICE))
    folder, names = Path(folder) / encoder.key, content_names(utterances, Path(folder))

    def look():
        """(what is on disk, the utterances that are not); all processes see the same before the first one writes."""
        made = kept_shards(folder)
        todo = list({names[u.id]: u for u in utterances if names[u.id] not in made}.values())
        wait()
        return made, todo

    made, todo = look()
    if todo:
        tell_size(encoder, todo, folder, keep)
        encoder.to(DEVICE)
        with alone(folder.parent, "encodes speech") if keep == "disk" else nullcontext(), timed(f"encode {len(todo)} utterances"), one_thread():
            if keep == "ram":
                frames = encode(encoder, todo, names)
                made |= dict.fromkeys(frames, frames)
            else:
                wait()
                made, todo = look()                                # another command may just have made them
                write_shards(encoder, mine(todo), names, folder)
                wait()
                made = kept_shards(folder)
    if DEVICE != "cpu":
        encoder.to("cpu")                                          # its memory on the GPU is for the training
    if keep == "ram":                                              # what was on disk already is read now
        made = {name: made[name] if isinstance(made[name], dict) else {name: made[name].get_tensor(name).clone()} for name in set(names.values())}
    return Kept(utterances, {u.id: (made[names[u.id]], names[u.id]) for u in utterances}, width=encoder.width)


def audio_id(utterances, folder):
    """Names the content of all recordings, so that one that changed is noticed."""
    names = content_names(utterances, Path(folder))
    return name_of([names[u.id] for u in utterances])


def encode(encoder, utterances, names):
    bar = tqdm(utterances, desc="encode speech", unit="utt", disable=not MAIN)
    return {names[u.id]: encoder(load_audio(u.audio, u.duration), u.audio) for u in bar}


def write_shards(encoder, utterances, names, folder):
    """Encode, and write a safetensors file whenever enough frames have come together."""
    frames, size = {}, 0
    for i, u in enumerate(tqdm(utterances, desc="encode speech", unit="utt", disable=not MAIN), 1):
        frames[names[u.id]] = row = encoder(load_audio(u.audio, u.duration), u.audio)
        size += row.numel() * row.element_size()
        if size >= SHARD or i == len(utterances):
            shard = hashlib.sha256("".join(frames).encode()).hexdigest()[:12]
            with whole_file(folder / f"{shard}.safetensors") as temporary:
                save_file({name: t.contiguous() for name, t in frames.items()}, temporary)
            frames, size = {}, 0


def kept_shards(folder):
    """{content name: the open file that has its frames} of what is on disk."""
    made = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("."):                          # a file that was being written when its process was killed
            shard = open_shard(path, path.stat().st_mtime_ns)
            made |= dict.fromkeys(shard.keys(), shard)
    return made


@lru_cache(maxsize=4096)
def open_shard(path, _written):
    try:
        return safe_open(path, "pt").__enter__()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is no readable safetensors file ({error}); delete it and run again") from None


def content_names(utterances, folder):
    """{utterance id: name of the content of its recording}; a file of the same size and date as last time is not read again."""
    path = folder / "contents.json"
    known = read_json_if_whole(path) or {}
    names, found = {}, {}
    for u in utterances:
        stamp = [u.audio.stat().st_size, u.audio.stat().st_mtime_ns] if u.audio.is_file() else None
        before = known.get(u.id)
        if stamp is None:
            names[u.id] = f"missing {u.id}"                        # which load_audio explains
            continue
        same = isinstance(before, list) and len(before) == 3 and before[:2] == stamp and isinstance(before[2], str)
        names[u.id] = before[2] if same else hashlib.sha256(u.audio.read_bytes()).hexdigest()[:24]
        found[u.id] = [*stamp, names[u.id]]
    if MAIN and any(known.get(i) != row for i, row in found.items()):
        try:
            write_json(path, known | found)
        except OSError:
            pass                                                   # it only saves time
    return names


def tell_size(encoder, utterances, folder, keep):
    """Say how much room the frames will take; UserError if the disk has not so much."""
    seconds = sum(u.duration for u in utterances)
    size = seconds * encoder.frame_rate * encoder.width * 2
    print(f"features: {seconds / 3600:.3g} hours x {encoder.frame_rate:.1f} frames/s x {encoder.width} values x 2 bytes = {size / 1e9:.3g} GB " +
          (f"in {os.path.normpath(folder)}, memory-mapped" if keep == "disk" else "of memory" + (f" in each of {WORLD} processes" if WORLD > 1 else "")))
    if keep == "disk":
        if not os.access(next(p for p in [folder, *folder.absolute().parents] if p.exists()), os.W_OK):
            raise UserError(f"{folder}: cannot be written; say --cache-features ram, or off to encode at every use")
        there = next(p for p in [folder, *folder.absolute().parents] if p.exists())
        if (free := shutil.disk_usage(there).free) < 1.05 * size:
            raise UserError(f"{folder}: the features take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; make room, or say "
                            "--cache-features ram, or off to encode at every use")
