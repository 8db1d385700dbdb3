"""From files to parts: audio, manifests, and the pieces a conversation is made of.

How a sample travels:  manifest row -> Utterance -> (stage 1) Behavior -> parts [Text, Speech, Text, Response] -> SpeechLLM
"""

import hashlib
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm
from transformers import AddedToken

from files import UserError, name_of, read_jsonl, relative, whole_file

SAMPLE_RATE = 16000          # Hz; everything is resampled to it
MIN_SECONDS = 0.1            # less gives some encoders not one frame


# ---- audio and manifests ----

def load_audio(path, duration=None):
    """float32 mono samples at SAMPLE_RATE of a WAV, FLAC, OGG or MP3 file of any rate.

    `duration` (seconds) is what the manifest says; a file that holds less is truncated. UserError names the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such audio file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the audio file is empty")
    with open(path, "rb") as file:
        head = file.read(8)
    promised = int.from_bytes(head[4:8], "little") + 8 if head[:4] == b"RIFF" else 0
    try:
        expected = soundfile.info(path).frames
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)      # (n, channels)
    except (soundfile.LibsndfileError, RuntimeError, OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from None
    if len(samples) == 0:
        raise UserError(f"{path}: the audio file holds no samples")
    seconds = len(samples) / rate
    if len(samples) < expected or size < promised < 2**32 - 1024 or (duration and seconds < 0.95 * duration - 0.05):
        raise UserError(f"{path}: the audio file is truncated, it holds {seconds:.2f} s" + (f" of {duration:.2f} s" if duration else ""))
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: the audio holds NaN or infinite samples")
    samples = torch.from_numpy(samples.mean(axis=1))
    if samples.abs().max() < 1e-4:
        raise UserError(f"{path}: the audio is silent")
    if seconds < MIN_SECONDS:
        raise UserError(f"{path}: the audio is too short ({seconds:.3f} s; at least {MIN_SECONDS} s are needed)")
    if rate != SAMPLE_RATE:
        from torchaudio.functional import resample
        samples = resample(samples, rate, SAMPLE_RATE)
    return samples.numpy()


@dataclass
class Utterance:
    """One manifest row. `words` is [[word, start_s, end_s], ...], one per word of `text`, or None."""
    audio: Path
    text: str
    duration: float
    speaker: str = ""
    split: str = ""
    words: list = None
    id: str = ""             # the audio path as the manifest writes it

    def row(self, folder):
        """The manifest row of this utterance, for a manifest in `folder`."""
        row = {"audio_filepath": relative(self.audio, folder), "duration": round(self.duration, 4), "text": self.text,
               "speaker": self.speaker, "split": self.split}
        return {**row, "words": [[w, round(s, 4), round(e, 4)] for w, s, e in self.words]} if self.words else row


KEYS = {                     # our names of a row's keys, and what NeMo, BLSP, Self-Powered LSM and Common Voice call them
    "audio_filepath": ("audio_filepath", "audio", "path"), "text": ("text", "sentence", "transcript"),
    "speaker": ("speaker", "speaker_id", "client_id"), "duration": ("duration",), "split": ("split",), "words": ("words",), "offset": ("offset",)}


def parse_row(row, folder):
    """The Utterance of a manifest row; UserError says what is wrong with it. Its duration is 0 if the row does not say."""
    if isinstance(row, str):
        raise UserError(row)
    row = {key: next((row[name] for name in names if row.get(name) is not None), None) for key, names in KEYS.items()}
    for key in ("audio_filepath", "text"):
        if not isinstance(row[key], str):
            raise UserError(f"lacks the key {key!r}" if row[key] is None else f"{key!r} is {row[key]!r}, which is not a text")
    text, duration = " ".join(row["text"].split()), row["duration"]
    if not text:
        raise UserError("the transcript is empty")
    if duration is not None and (isinstance(duration, bool) or not isinstance(duration, (int, float))):
        raise UserError(f"'duration' is {duration!r}, which is not a number")
    if duration is not None and not 0 < duration < 1e6:
        raise UserError(f"the duration is {duration} s")
    if row["offset"]:
        raise UserError(f"has the offset {row['offset']}: parts of longer recordings are not read; cut them into files of their own")
    if row["split"] not in (None, "", "train", "test"):
        raise UserError(f"'split' is {row['split']!r}; it must be train or test")
    words = None if row["words"] is None else check_words(row["words"], text, duration or math.inf)
    speaker = "" if row["speaker"] is None else str(row["speaker"])
    return Utterance(Path(folder) / row["audio_filepath"], text, float(duration or 0), speaker, row["split"] or "", words, row["audio_filepath"])


def check_words(words, text, duration):
    """[[word, start_s, end_s], ...] as numbers; UserError if they cannot be the times of the transcript's words."""
    try:
        times = [[str(word), float(start), float(end)] for word, start, end in words]
    except (TypeError, ValueError, OverflowError):
        raise UserError("'words' must be [[word, start_s, end_s], …]") from None
    if len(times) != len(text.split()):
        raise UserError(f"has times for {len(times)} words, but its transcript has {len(text.split())}")
    last = 0.0
    for word, start, end in times:
        if not last - 1e-3 <= start <= end:          # NaN fails this too
            raise UserError(f"the word times run backwards at {word!r} ({start} to {end} s)")
        if end > duration + 0.05:
            raise UserError(f"the word {word!r} ends at {end} s, past the end of the audio ({duration} s)")
        last = end
    return times


def read_manifest(path, rows=None, check_audio=False, skipped=None):
    """The utterances of a JSONL manifest, or of the rows [(line number or name, row)] of another corpus at `path`.

    A bad row is a UserError naming file and line; or, if `skipped` is a list, it goes there. check_audio: read every file, and measure its duration.
    """
    path, utterances, lines = Path(path), [], {}
    folder, rows = path if path.is_dir() else path.parent, list(read_jsonl(path)) if rows is None else rows
    for number, row in tqdm(rows, desc="check audio", unit="utt", disable=not check_audio):
        try:
            utterance = parse_row(row, folder)
            if (first := lines.setdefault(os.path.abspath(utterance.audio), number)) != number:
                raise UserError(f"has the same audio file as line {first}")
            if check_audio:
                utterance.duration = len(load_audio(utterance.audio, utterance.duration)) / SAMPLE_RATE
                if utterance.words:
                    check_words(utterance.words, utterance.text, utterance.duration)
            elif not utterance.duration:
                raise UserError("lacks the key 'duration'; `prepare` measures it")
            utterances.append(utterance)
        except (UserError, OSError) as error:
            if skipped is None:
                raise UserError(f"{path}:{number}: {error}") from None
            audio = "" if isinstance(row, str) else next((str(row[name]) for name in KEYS["audio_filepath"] if name in row), "")
            skipped.append({"line": number, "audio_filepath": audio, "reason": str(error).removeprefix(f"{folder / audio}: ")})
    if not utterances:
        raise UserError(f"{path}: holds no usable utterance" + (f"; the first bad row is line {skipped[0]['line']}: {skipped[0]['reason']}" if skipped else ""))
    return utterances


def utterances_id(utterances):
    """Names what stage 1 depends on: audio, transcripts and split; word times may be added later."""
    return name_of([(u.id, u.text, u.split) for u in utterances])


def normalize(text):
    """The words alone: small letters, no punctuation."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def held_out(text):
    """One transcript in eight, by a hash of its words: the same texts are held out whoever asks (the tiny LLM's pre-training too)."""
    return hashlib.sha256((normalize(text) or text).encode()).digest()[0] < 32


def write_audio(path, samples):
    with whole_file(path) as temporary:
        soundfile.write(temporary, np.clip(samples, -1, 1), SAMPLE_RATE)


# ---- parts: what a conversation is made of before it becomes embeddings ----

@dataclass
class Text:
    ids: list                # token ids of text that is read

@dataclass
class Speech:
    frames: torch.Tensor     # (T, D_encoder) encoder frames

@dataclass
class Response:
    ids: list                # token ids to be answered, with the end-of-turn token: the only part that carries loss


AUDIO_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"     # stands where audio goes while a conversation is rendered and tokenized


@lru_cache(maxsize=8)
def audio_mark_id(tokenizer):
    """AUDIO_MARK as one token of its own: text beside it is tokenized as in the middle of a conversation, and the cut is exact."""
    tokenizer.add_tokens(AddedToken(AUDIO_MARK, normalized=False, special=True))
    return tokenizer.convert_tokens_to_ids(AUDIO_MARK)


def tokenize_in_context(tokenizer, text):
    """(token ids, the character each begins at) of a text in the middle of a conversation; at the start of a string some tokenizers add a space."""
    audio_mark_id(tokenizer)
    encoded = tokenizer(AUDIO_MARK + text.replace(AUDIO_MARK, " "), add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"][1:], [start - 1 for start, _ in encoded["offset_mapping"][1:]]


def transcript_tokens(tokenizer, text):
    return Text(tokenize_in_context(tokenizer, text)[0])


A_DAY = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}{{ '' }}"      # before a chat template that asks for today's date (Llama 3)


def render(tokenizer, messages, add_generation_prompt=True):
    """The conversation as the chat template writes it: thinking off, the same date every day, and a system turn that it refuses before the question."""
    try:
        template = tokenizer.get_chat_template()
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False,
                                                 chat_template=A_DAY + template if "strftime_now" in template else template)
        why = "it leaves out what is said" if any(m["content"].strip() not in rendered for m in messages if m["role"] != "assistant") else None
    except Exception as error:                                     # a template is a program, and may raise anything
        why = f"{type(error).__name__}: {error}"
    if why and len(messages) > 1 and messages[0]["role"] == "system":
        asked = {**messages[1], "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        return render(tokenizer, [asked, *messages[2:]], add_generation_prompt)
    if why:
        raise UserError(f"the chat template refuses this conversation ({why})")
    return rendered


def chat_parts(tokenizer, messages, audio, response=None):
    """Parts of a conversation in the Hugging Face message format; training, generation and the benchmark all come through here.

    audio: one list of parts per audio entry, in order (speech, its transcript as text, or the two interleaved).
    response: token ids of the answer, or None to leave the conversation open for generation.
    """
    def flat(content):
        if isinstance(content, str):
            return content.encode(errors="replace").decode().replace(AUDIO_MARK, " ")
        return "\n".join(flat(c["text"]) if c["type"] == "text" else AUDIO_MARK for c in content)

    mark, parts, audio = audio_mark_id(tokenizer), [Text([])], list(audio)
    rendered = render(tokenizer, [{"role": m["role"], "content": flat(m["content"])} for m in messages])
    if rendered.count(AUDIO_MARK) != len(audio):
        raise UserError(f"the conversation names {rendered.count(AUDIO_MARK)} audio entries, but {len(audio)} were given")
    for token in tokenizer(rendered, add_special_tokens=False)["input_ids"]:
        if token == mark:
            parts += [*audio.pop(0), Text([])]
        else:
            parts[-1].ids.append(token)
    return [p for p in parts if not isinstance(p, Text) or p.ids] + ([Response(response)] if response is not None else [])


def check_messages(messages):
    """UserError unless it is a conversation in the Hugging Face message format."""
    def is_part(c):
        return isinstance(c, dict) and c.get("type") in ("text", "audio") and isinstance(c.get(c["type"]), (str, Path))
    for m in messages if isinstance(messages, list) and messages else [None]:
        content = m.get("content") if isinstance(m, dict) and isinstance(m.get("role"), str) else None
        if not isinstance(content, str) and not (isinstance(content, list) and all(map(is_part, content))):
            raise UserError(f'{m!r} is no message like {{"role": "user", "content": TEXT}}, where instead of a text may stand a list of '
                            '{"type": "text", "text": TEXT} and {"type": "audio", "audio": PATH}')


def ask(prompt, audio=None):
    """The one-turn conversation of the benchmark and of stages 1 and 2: a prompt, then an utterance."""
    return [{"role": "user", "content": [{"type": "text", "text": prompt}, {"type": "audio", "audio": audio}]}]


def dialogue(earlier, prompt, again=False):
    """A conversation of several turns: earlier ones, [(prompt about an utterance, answer)], and a question; `again`: about the earlier utterance, so that
    it comes without one of its own."""
    turns = [message for said, answer in earlier for message in (*ask(said), {"role": "assistant", "content": answer})]
    return turns + ([{"role": "user", "content": prompt}] if again else ask(prompt))
