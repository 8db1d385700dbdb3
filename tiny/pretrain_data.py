"""What the tiny world's two models are trained on: conversations and rendered speech.

The LLM reads the conversations, the encoder hears the speech. Both are drawn from a seed; the
benchmark's sentences (world.is_held_out) and voices (speech.TEST_VARIANTS) are in neither.
"""

import random
import re

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from . import speech, world

HESITATIONS = ["uh", "um", "er"]
IGNORED = -100  # the label that carries no loss
HESITANT = 0.3  # of conversations hesitate: the more, the less it matters what was imitated
BLENDED = 0.5  # of these read like speech, and not like text
OBEYED = 0.55  # of directives are the prompt itself; the others are what a prompt is about


# ---- conversations ----


def applies(task, utterance):
    """Whether the task of tasks.toml is for such a transcript."""
    return re.fullmatch(task.get("transcripts", ".*"), utterance.words) is not None


def hesitate(rng, words):
    """`words` with up to 3 hesitations before, between and after them.

    Speech takes a varying number of tokens a word; an LLM that has only read clean text copies by
    position and cannot follow it.
    """
    most = rng.randint(1, 3)
    spoken = []
    for word in words.split():
        spoken += rng.choices(HESITATIONS, k=rng.randint(0, most))
        spoken.append(word)
    spoken += rng.choices(HESITATIONS, k=rng.randint(0, most))
    return " ".join(spoken)


def conversation(rng, tasks, stream, hesitant=HESITANT, weights=None):
    """One training conversation about an utterance of the stream, and maybe about a second.

    A question and its answer, or follow-ups, too. A directive may be the prompt itself, with
    nothing to go with it. hesitant: the share of conversations with hesitations. weights:
    {task: how often it is asked about, the others 1}.

    Returns messages, [{"role", "content"}, ...], of which the last is an answer.
    """
    hesitates = rng.random() < hesitant
    messages = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(world.SYSTEM_TURNS)})

    for turn in range(rng.choice([1, 1, 2, 2])):
        # Only a new utterance comes with its transcript; what follows is about it still.
        is_new = turn == 0 or rng.random() < 0.5
        if is_new:
            utterance = next(stream)
        transcript = hesitate(rng, utterance.words) if hesitates else utterance.words
        if is_new and isinstance(utterance, world.Directive) and rng.random() < OBEYED:
            question, answer = transcript, utterance.reply
        else:
            name, prompt = ask_about(rng, tasks, utterance, weights or {})
            question, answer = prompt, world.ANSWERS[name](utterance)
        if is_new and question != transcript:
            transcript_first = rng.random() < 0.15
            parts = [transcript, question] if transcript_first else [question, transcript]
            question = "\n".join(parts)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def ask_about(rng, tasks, utterance, weights):
    """(task, prompt): one that is for such an utterance."""
    names = [name for name, task in tasks.items() if applies(task, utterance)]
    name = rng.choices(names, [weights.get(name, 1) for name in names])[0]
    return name, rng.choice(tasks[name]["prompts"] + tasks[name]["unseen_prompts"])


def tokenize(tokenizer, messages):
    """(token ids, labels) of a conversation: only the answers and their <|im_end|> carry loss."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces = re.split(r"(?<=assistant\n)(.*?<\|im_end\|>)", text)  # odd pieces are answers

    ids, labels = [], []
    for i, piece in enumerate(pieces):
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        if i % 2:
            labels += tokens
        else:
            labels += [IGNORED] * len(tokens)
    return ids, labels


def conversation_batches(tokenizer, tasks, seed, batch_size, hesitant, weights, bucket=16):
    """Endless batches, each batch_size rows (token ids, labels) of similar length.

    `bucket` batches are drawn at a time and sorted by length. hesitant, weights: see
    conversation().
    """
    rng = random.Random(seed)
    stream = world.draws(f"llm-{seed}", held_out=False)
    while True:
        rows = []
        for _ in range(bucket * batch_size):
            messages = conversation(rng, tasks, stream, hesitant, weights)
            rows.append(tokenize(tokenizer, messages))
        rows.sort(key=lambda row: len(row[0]))

        starts = list(range(0, len(rows), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield rows[start : start + batch_size]


def pad_conversations(rows, pad_token_id, device):
    """(token ids, labels, mask), each (B, T), of rows as tokenize() returns them.

    Labels are padded with -100.
    """
    ids = [torch.tensor(row_ids) for row_ids, _ in rows]
    labels = [torch.tensor(row_labels) for _, row_labels in rows]
    mask = [torch.ones(len(row_ids), dtype=torch.long) for row_ids, _ in rows]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(device),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(device),
        pad_sequence(mask, batch_first=True).to(device),
    )


def blend_hesitations(embeds, ids, labels, hesitations, blended=BLENDED):
    """Some of the rows that hesitate read like speech: what stands between the words is no token.

    embeds (B, T, D) of ids (B, T); hesitations: the ids of "uh", "um" and "er"; blended: the share
    of the rows with one of these. In such a row each of them becomes a mixture of the embeddings
    before and after it, quieter than these are, and all that is read and not answered gets a little
    noise, as an ear's output would have. A row without hesitations stays clean text.
    """
    is_hesitation = torch.isin(ids, hesitations)  # (B, T)
    rows = torch.rand(len(ids), 1).to(ids.device) < blended  # (B, 1), drawn on the CPU as all here
    rows = rows & is_hesitation.any(1, keepdim=True)  # (B, 1)
    is_read = rows & (labels == IGNORED)  # (B, T)
    is_hesitation = is_hesitation & is_read  # (B, T)

    # What takes the place of a hesitation.
    share = torch.rand(*ids.shape, 1).to(embeds)  # (B, T, 1)
    strength = 0.8 * torch.rand(*ids.shape, 1).to(embeds)  # (B, T, 1)
    before, after = embeds.roll(1, 1), embeds.roll(-1, 1)
    blended = strength * (share * before + (1 - share) * after)  # (B, T, D)
    embeds = torch.where(is_hesitation[..., None], blended, embeds)

    # The noise, of up to 0.3 of the embeddings' own loudness.
    rms = embeds.detach().pow(2).mean().sqrt()
    loudness = torch.rand(len(ids), 1, 1).to(embeds)  # (B, 1, 1)
    noise = torch.randn(embeds.shape).to(embeds)  # (B, T, D)
    return embeds + 0.3 * rms * loudness * noise * is_read[..., None]


# ---- speech ----


def render_utterances(extractor, tokenizer, split, seed, n, desc, echo=0.0):
    """n utterances of a split, rendered in its voices and sorted by length.

    extractor, tokenizer: see pretrain_models.build_processors. desc names the progress bar.
    echo: share of the training utterances with an echo (speech.render).

    Returns rows (features (T, 240) in half precision, label ids, words); T is in frames of 30 ms.
    """
    rng = random.Random(f"speech-{split}-{seed}")
    stream = world.draws(f"speech-{seed}", held_out=split == "test")
    rows = []
    for _ in tqdm(range(n), desc=desc):
        words = next(stream).words
        audio, _, _ = speech.render(words, rng, split, echo)
        features = extract(extractor, audio)["input_features"][0]  # (T, 240)
        rows.append((features.half(), tokenizer(words)["input_ids"], words))
    return sorted(rows, key=lambda row: len(row[0]))


def extract(extractor, audio):
    """The encoder's inputs for one rendered utterance: {"input_features": (1, T, 240), ...}."""
    return extractor(
        audio, sampling_rate=speech.SAMPLE_RATE, return_tensors="pt", pad_to_multiple_of=3
    )


def speech_batches(rows, seed, batch_size):
    """Endless batches of rows of similar length, each epoch in another order, as pad_speech()'s.

    The features are masked as SpecAugment does.
    """
    rng = random.Random(seed)
    while True:
        starts = list(range(0, len(rows) - batch_size + 1, batch_size))
        rng.shuffle(starts)
        while starts:
            start = starts.pop()
            features, mask, labels = pad_speech(rows[start : start + batch_size], "cpu")
            yield mask_bands(rng, features, mask), mask, labels


def pad_speech(rows, device):
    """(features (B, T, 240), mask (B, T), labels (B, L)) of rows; labels are padded with -100."""
    features = [row[0] for row in rows]
    mask = [torch.ones(len(row[0]), dtype=torch.long) for row in rows]
    labels = [torch.tensor(row[1]) for row in rows]
    return (
        pad_sequence(features, batch_first=True).float().to(device),
        pad_sequence(mask, batch_first=True).to(device),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(device),
    )


def mask_bands(rng, features, mask):
    """SpecAugment (arXiv 1904.08779, section 2), in place: features (B, T, 240), mask (B, T).

    Every utterance gets two time masks of up to 0.2 s and two masks of up to 12 mel bins.
    """
    bins = features.view(*features.shape[:2], 3, 80)  # (B, T, 240) -> (B, T, 3 stacked, 80 bins)
    for b, length in enumerate(mask.sum(1).tolist()):
        for _ in range(2):
            width = rng.randint(0, 6)
            start = rng.randrange(length)
            bins[b, start : start + width] = 0

            width = rng.randint(0, 12)
            start = rng.randrange(80)
            bins[b, :, :, start : start + width] = 0
    return features
