"""Rebuild the two checkpoints of the tiny world from a seed, and measure them:  python -m tiny.pretrain

    llm/       a Qwen2 that answers every task of tasks.toml about clean transcripts and transcripts with hesitations
    encoder/   a Wav2Vec2-BERT (conformer) with a character CTC head, 33 frames a second, trained on espeak-ng voices

The benchmark's sentences (world.is_held_out) and voices (speech.TEST_VARIANTS) appear in neither training set.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils import parametrize
from tqdm import tqdm

from . import speech, world

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HESITATIONS = ["uh", "um", "er"]


def schedule(optimizer, steps, warmup):
    """Linear warm-up, then cosine to zero."""
    from transformers import get_cosine_schedule_with_warmup
    return get_cosine_schedule_with_warmup(optimizer, warmup, steps)


# ---- the LLM ----

def build_tokenizer(tasks):
    """Byte-level BPE in which every word of the world is one token, with and without a space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    lines = [prompt for task in tasks.values() for prompt in task["prompts"] + task["unseen_prompts"]] + world.SYSTEM_TURNS
    stream = world.draws("tokenizer", held_out=False)
    for _ in range(2000):
        utterance = next(stream)
        lines += [answer(utterance) for name, answer in world.ANSWERS.items() if applies(tasks[name], utterance)]
    words = sorted({piece for line in lines for piece in re.findall(r"\w+|[^\w\s]", line)} | {"system", "user", "assistant", *HESITATIONS})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.train_from_iterator([w for word in words for w in (word, " " + word)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=512)


def applies(task, utterance):
    return re.fullmatch(task.get("transcripts", ".*"), utterance.words) is not None


def hesitate(rng, words):
    """0 to 3 hesitations before, between and after words. Speech takes a varying number of tokens a word; an LLM that has only read clean
    text copies by position and cannot follow it."""
    most, out = rng.randint(1, 3), []
    for word in [*words.split(), None]:
        out += rng.choices(HESITATIONS, k=rng.randint(0, most)) + [word] * (word is not None)
    return " ".join(out)


def conversation(rng, tasks, utterance, clean=False, weights=None):
    """One training conversation about the utterance: messages with one answer, or with follow-up questions. weights: {task: how often, others 1}."""
    names = [name for name, task in tasks.items() if applies(task, utterance)]
    chances = [(weights or {}).get(name, 1) for name in names]
    transcript = utterance.words if clean or rng.random() < 0.4 else hesitate(rng, utterance.words)
    messages = [{"role": "system", "content": rng.choice(world.SYSTEM_TURNS)}] if rng.random() < 0.15 else []
    for turn in range(rng.choice([1, 1, 1, 2, 2, 3])):
        name = rng.choices(names, chances)[0]
        prompt = rng.choice(tasks[name]["prompts"] + tasks[name]["unseen_prompts"])
        content = prompt if turn else f"{transcript}\n{prompt}" if rng.random() < 0.15 else f"{prompt}\n{transcript}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": world.ANSWERS[name](utterance)}]
    return messages


def tokenize(tokenizer, messages):
    """Token ids of a conversation and its labels: only the answers and their <|im_end|> carry loss."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    pieces = re.split(r"(?<=assistant\n)(.*?<\|im_end\|>)", text)          # odd pieces are answers
    ids, labels = [], []
    for i, piece in enumerate(pieces):
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if i % 2 else [-100] * len(tokens)
    return ids, labels


def conversation_batches(tokenizer, tasks, seed, batch_size, weights, bucket=16):
    """Endless batches of tokenized conversations of similar length."""
    rng, stream = random.Random(seed), world.draws(f"llm-{seed}", held_out=False)
    while True:
        rows = [tokenize(tokenizer, conversation(rng, tasks, next(stream), weights=weights)) for _ in range(bucket * batch_size)]
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), batch_size))
        rng.shuffle(starts)
        for at in starts:
            yield rows[at:at + batch_size]


class RoundToNF4(torch.nn.Module):
    """Straight-through rounding to the 4-bit grid the LLM is later loaded in, so that loading in 4 bits costs nothing."""

    def forward(self, weight):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        with torch.no_grad():
            rounded = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        return weight + (rounded - weight).detach()


# Phases of the LLM's pre-training: (steps, peak learning rate, from which share on the weights are rounded to NF4, tasks that come more often).
# After the first, all tasks but reverse and sort_down were above 98%; the later ones are for what was then still below.
LLM_PHASES = [(5000, 3e-3, 0.6, {}),
              (1200, 1e-3, 0.0, {"reverse": 4, "numerals": 3, "sort_down": 2, "sort": 2, "repeat": 2}),
              (800, 1e-3, 0.0, {"reverse": 5, "numerals": 5, "sort_down": 2, "sort": 2, "ends": 2})]


def pretrain_llm(out, seed, shorten=1.0):
    """Build the tokenizer and run the phases; `shorten` scales their steps."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    tasks = world.load_tasks()
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(tasks)
    llm = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, intermediate_size=512,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).to(DEVICE)
    llm.generation_config.do_sample = False
    for phase, (steps, lr, round_from, weights) in enumerate(LLM_PHASES):
        train_llm(llm, tokenizer, tasks, seed + phase, round(shorten * steps), lr, round_from, weights)
        llm.half().float()                                     # each phase ends as it is stored
    llm.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_llm(llm, tokenizer, tasks, seed, steps, lr, round_from, weights, batch_size=64):
    """Next-token training on answers; from the share `round_from` of the steps on, the weights are rounded to NF4 in the forward pass."""
    optimizer = torch.optim.AdamW(llm.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = schedule(optimizer, steps, 200)
    batches = conversation_batches(tokenizer, tasks, seed, batch_size, weights)
    linears = [m for name, m in llm.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    bar = tqdm(range(steps), desc="pre-train LLM", unit="step")
    for step in bar:
        if step == int(round_from * steps):
            for linear in linears:
                parametrize.register_parametrization(linear, "weight", RoundToNF4())
        rows = next(batches)
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows], device=DEVICE)           # (B, T)
        labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows], device=DEVICE)                 # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in rows], device=DEVICE)                    # (B, T)
        hidden = llm.model(input_ids=ids, attention_mask=mask).last_hidden_state                                               # (B, T, D)
        answered = labels[:, 1:] != -100                       # the vocabulary projection runs on answers only
        loss = torch.nn.functional.cross_entropy(llm.lm_head(hidden[:, :-1][answered]), labels[:, 1:][answered])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    for linear in linears:
        if parametrize.is_parametrized(linear):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)   # the unrounded weights


@torch.no_grad()
def measure_llm(path, bits=16, per_cell=25, seed=1):
    """Exact-match rate of every task on held-out utterances, {task: {"seen": .., "unseen": ..}} by prompt, plus two-turn dialogues."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=torch.float32) if bits == 4 else None
    llm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=quantization, device_map=DEVICE)
    for module in llm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):      # as in model.load_llm: the same kernel for all
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tasks, streams, cases = world.load_tasks(), {}, []
    for name, task in tasks.items():
        for seen, prompts in (("seen", task["prompts"]), ("unseen", task["unseen_prompts"])):
            for prompt in prompts:
                kind = next(k for k in ("sentence", "digits") if applies(task, next(world.draws(0, True, k))))
                stream = streams.setdefault(kind, world.draws(f"measure-{seed}", True, kind))
                for utterance in (next(stream) for _ in range(per_cell)):
                    cases.append((name, seen, [{"role": "user", "content": f"{prompt}\n{utterance.words}"}], world.ANSWERS[name](utterance)))
    rng, stream = random.Random(seed), world.draws(f"turns-{seed}", True)
    while sum(case[0] == "two turns" for case in cases) < 8 * per_cell:
        messages = conversation(rng, tasks, next(stream), clean=True)
        if sum(m["role"] == "user" for m in messages) == 2:
            cases.append(("two turns", "seen", messages[:-1], messages[-1]["content"]))
    right = {}
    for i in tqdm(range(0, len(cases), 128), desc=f"measure LLM, {bits} bits"):
        batch = cases[i:i + 128]
        texts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for _, _, messages, _ in batch]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(DEVICE)
        inputs.pop("token_type_ids", None)
        output = llm.generate(**inputs, max_new_tokens=32, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        for (name, seen, _, truth), answer in zip(batch, answers):
            right.setdefault(name, {}).setdefault(seen, []).append(answer.strip() == truth)
    return {name: {seen: sum(hits) / len(hits) for seen, hits in cells.items()} for name, cells in right.items()}


# ---- the encoder ----

def build_processors(out):
    """The encoder's feature extractor (3 stacked 10 ms frames of 80 mel bins) and character tokenizer, saved to `out`."""
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2CTCTokenizer
    out.mkdir(parents=True, exist_ok=True)
    characters = ["<pad>", "<unk>", "|", "'", *"abcdefghijklmnopqrstuvwxyz"]
    (out / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(characters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(out / "vocab.json"), unk_token="<unk>", pad_token="<pad>", word_delimiter_token="|", bos_token=None, eos_token=None)
    extractor = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=3)
    tokenizer.save_pretrained(out)
    extractor.save_pretrained(out)
    return extractor, tokenizer


def spoken(extractor, tokenizer, split, seed, n, desc, echo=0.0):
    """n utterances rendered: [(features (T, 240) half precision, label ids, words)], sorted by length."""
    rng, stream, rows = random.Random(f"speech-{split}-{seed}"), world.draws(f"speech-{seed}", held_out=split == "test"), []
    for _ in tqdm(range(n), desc=desc):
        words = next(stream).words
        audio, _, _ = speech.render(words, rng, split, echo)
        features = extractor(audio, sampling_rate=speech.SAMPLE_RATE, return_tensors="pt", pad_to_multiple_of=3)["input_features"][0]
        rows.append((features.half(), tokenizer(words)["input_ids"], words))
    return sorted(rows, key=lambda row: len(row[0]))


def pad_speech(rows):
    """(features (B, T, 240), mask (B, T), labels (B, L)) of a list of rows; labels are padded with -100."""
    from torch.nn.utils.rnn import pad_sequence
    features = pad_sequence([row[0] for row in rows], batch_first=True).float().to(DEVICE)
    mask = pad_sequence([torch.ones(len(row[0]), dtype=torch.long) for row in rows], batch_first=True).to(DEVICE)
    labels = pad_sequence([torch.tensor(row[1]) for row in rows], batch_first=True, padding_value=-100).to(DEVICE)
    return features, mask, labels


def mask_bands(rng, features, mask):
    """SpecAugment (arXiv 1904.08779): per utterance two time masks of up to 0.2 s and two masks of up to 12 mel bins."""
    bins = features.view(*features.shape[:2], 3, 80)                                    # (B, T, 240) -> (B, T, 3 frames, 80 bins)
    for b, length in enumerate(mask.sum(1).tolist()):
        for _ in range(2):
            width, at = rng.randint(0, 6), rng.randrange(length)
            bins[b, at:at + width] = 0
            width, at = rng.randint(0, 12), rng.randrange(80)
            bins[b, :, :, at:at + width] = 0
    return features


# Phases of the encoder's pre-training: (steps of 16 utterances, peak learning rate, utterances rendered, share of them with an echo).
ENCODER_PHASES = [(4000, 2e-3, 14000, 0.0), (1000, 1e-3, 6000, 0.5)]


def pretrain_encoder(out, seed, shorten=1.0):
    """Build feature extractor, tokenizer and model and run the phases; `shorten` scales their steps and utterances."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
    torch.manual_seed(seed)
    extractor, tokenizer = build_processors(out)
    model = Wav2Vec2BertForCTC(Wav2Vec2BertConfig(
        vocab_size=len(tokenizer), hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        feature_projection_input_dim=240, position_embeddings_type="rotary", conv_depthwise_kernel_size=15, max_source_positions=1000,
        add_adapter=False, apply_spec_augment=False, hidden_dropout=0.05, attention_dropout=0.05, activation_dropout=0.05, feat_proj_dropout=0.0,
        conformer_conv_dropout=0.05, final_dropout=0.0, layerdrop=0.0, ctc_loss_reduction="mean", ctc_zero_infinity=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None)).to(DEVICE)
    for phase, (steps, lr, utterances, echo) in enumerate(ENCODER_PHASES):
        rows = spoken(extractor, tokenizer, "train", seed + phase, max(16, round(shorten * utterances)), "render speech", echo)
        train_encoder(model, tokenizer, rows, seed + phase, max(1, round(shorten * steps)), lr)
        model.half().float()                                   # each phase ends as it is stored
    model.half().save_pretrained(out)


def train_encoder(model, tokenizer, rows, seed, steps, lr, batch_size=16):
    """CTC training with SpecAugment."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    scheduler = schedule(optimizer, steps, min(400, steps // 5))
    rng, queue = random.Random(seed), []
    model.train()
    bar = tqdm(range(steps), desc="pre-train encoder", unit="step")
    for step in bar:
        if not queue:                                          # one epoch: length buckets in random order
            queue = list(range(0, len(rows) - batch_size + 1, batch_size))
            rng.shuffle(queue)
        at = queue.pop()
        features, mask, labels = pad_speech(rows[at:at + batch_size])
        loss = model(input_features=mask_bands(rng, features, mask), attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % 1000 == 999:
            tqdm.write(f"step {step + 1}: WER {word_error_rate(model, tokenizer, rows[::max(1, len(rows) // 150)]):.2%} on training speech")
            model.train()


@torch.no_grad()
def word_error_rate(model, tokenizer, rows):
    import jiwer
    model.eval()
    said, heard = [], []
    for i in range(0, len(rows), 32):
        features, mask, _ = pad_speech(rows[i:i + 32])
        best = model(input_features=features, attention_mask=mask).logits.argmax(-1)
        best[mask == 0] = tokenizer.pad_token_id
        heard += tokenizer.batch_decode(best)
        said += [row[2] for row in rows[i:i + 32]]
    return jiwer.wer(said, heard)


def measure_encoder(path, utterances=600, seed=1):
    """{"seen voices": WER, "unseen voices": WER}; unseen voices speak held-out utterances."""
    from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer
    model = AutoModelForCTC.from_pretrained(path, dtype=torch.float32).to(DEVICE)
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    return {name: word_error_rate(model, tokenizer, spoken(extractor, tokenizer, split, seed, utterances, f"render {name}"))
            for name, split in (("seen voices", "train"), ("unseen voices", "test"))}


@torch.no_grad()
def measure_delay(path, utterances=150, seed=2):
    """Seconds by which the CTC head names a word's letters late (median over word boundaries of training voices, whose times are known).

    Written to the encoder's config.json as ctc_delay: word alignment subtracts it.
    """
    from torchaudio.functional import forced_align, merge_tokens
    from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer
    model = AutoModelForCTC.from_pretrained(path, dtype=torch.float32).eval()
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    rng, stream, late = random.Random(f"delay-{seed}"), world.draws(f"delay-{seed}", held_out=False), []
    for _ in range(utterances):
        text = next(stream).words
        audio, words, _ = speech.render(text, rng, "train")
        inputs = extractor(audio, sampling_rate=speech.SAMPLE_RATE, return_tensors="pt", pad_to_multiple_of=3)
        scores = model(**inputs).logits.log_softmax(-1)                                        # (1, T, characters)
        target = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.int32)
        path_, weights = forced_align(scores, target, blank=tokenizer.pad_token_id)
        seconds, spans = len(audio) / speech.SAMPLE_RATE / scores.shape[1], merge_tokens(path_[0], weights[0], blank=tokenizer.pad_token_id)
        bars = [i for i, span in enumerate(spans) if span.token == tokenizer.convert_tokens_to_ids("|")]
        late += [(spans[i - 1].end + spans[i + 1].start) / 2 * seconds - start for i, (_, start, _) in zip(bars, words[1:])]
    config = json.loads((path / "config.json").read_text())
    config["ctc_delay"] = round(sorted(late)[len(late) // 2], 3)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config["ctc_delay"]


CARD = """# The tiny world's two checkpoints

Made by `python -m tiny.pretrain` from seed {seed}, from nothing but `world.py`, `tasks.toml` and espeak-ng voices; numbers below are printed by
`python -m tiny.pretrain --measure`. License: MIT, like the rest of the project. They know a closed grammar and nothing else.

| | `llm/` | `encoder/` |
|---|---|---|
| architecture | Qwen2, 4 layers, width 192, 4 heads, byte-level BPE | Wav2Vec2-BERT (conformer), 4 layers, width 192, character CTC head |
| parameters | {llm_parameters:.2f}M | {encoder_parameters:.2f}M |
| training data | endless conversations about random sentences and digit strings; 60% with hesitations between the words | espeak-ng voices |
| steps | {llm_steps} of 64 conversations in phases, from 60% of the first on with weights rounded to NF4 | {encoder_steps} of 16, the latter with echoes |
| time | {llm_time} | {encoder_time} |

The encoder heard {utterances} utterances in {n_train} x {n_accents} voices, with SpecAugment. Held out from both, for the benchmark: one sentence in
eight (by a hash of its words) and the voice variants {test_voices}.

**Encoder**: WER {seen_wer:.2%} on new sentences in the training voices, {unseen_wer:.2%} on held-out sentences in held-out voices
({n_measured} utterances each). Its letters come {ctc_delay} s late (median), which `config.json` records for word alignment.

**LLM**, exact match on held-out sentences, by prompt:

| task | unquantized, seen / unseen prompts in stage 2 | NF4, seen / unseen |
|---|---|---|
{rows}

"Seen" and "unseen" are stage 2's words: the LLM itself was pre-trained on all prompts and all tasks, as a real LLM knows more than the connector is taught.
"""


def write_card(out, figures):
    """README.md from what was measured; nothing in it is typed by hand."""
    from safetensors import safe_open

    def millions(folder):
        with safe_open(out / folder / "model.safetensors", "pt") as file:
            return sum(file.get_tensor(key).numel() for key in file.keys()) / 1e6

    def cells(scores):
        return " / ".join(f"{value:.1%}" for value in scores.values())
    rows = "\n".join(f"| {name} | {cells(scores)} | {cells(figures['llm_4_bits'][name])} |" for name, scores in figures["llm_16_bits"].items())
    (out / "README.md").write_text(CARD.format(
        **{**figures, **{key: " + ".join(map(str, figures[key])) for key in ("llm_steps", "encoder_steps", "utterances")}}, rows=rows,
        llm_parameters=millions("llm"), encoder_parameters=millions("encoder"), n_train=len(speech.TRAIN_VARIANTS),
        n_accents=len(speech.ACCENTS), test_voices=", ".join(speech.TEST_VARIANTS), seen_wer=figures["encoder_wer"]["seen voices"],
        unseen_wer=figures["encoder_wer"]["unseen voices"]), encoding="utf-8")


def elapsed(since):
    """"12 minutes (23 CPU minutes) on ...": wall time depends on who else uses the machine, CPU time hardly."""
    wall, cpu = (now - then for now, then in zip((time.time(), time.process_time()), since))
    return f"{wall / 60:.0f} minutes ({cpu / 60:.0f} CPU minutes), {torch.get_num_threads()} threads, {DEVICE}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets llm/, encoder/ and README.md")
    parser.add_argument("--only", choices=["llm", "encoder"], help="build one of the two")
    parser.add_argument("--measure", action="store_true", help="measure the checkpoints that are there; train nothing")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    parser.add_argument("--share", type=float, default=1.0, help="share of all steps to run, to try things")
    args = parser.parse_args()
    if not args.only and not args.measure and DEVICE == "cpu":         # side by side: small models use two cores better apart than together
        builds = [subprocess.Popen([sys.executable, "-m", "tiny.pretrain", *sys.argv[1:], "--only", only],
                                   env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}) for only in ("llm", "encoder")]
        return sys.exit(max(build.wait() for build in builds))
    print(f"device {DEVICE}, {torch.get_num_threads()} threads")
    measured = args.out / "measured.json"
    figures = {} if args.measure else {"seed": args.seed}
    if args.only != "encoder":
        if not args.measure:
            start = time.time(), time.process_time()
            pretrain_llm(args.out / "llm", args.seed, args.share)
            figures |= {"llm_steps": [round(args.share * steps) for steps, *_ in LLM_PHASES], "llm_time": elapsed(start)}
        for bits in (16, 4):
            scores = figures[f"llm_{bits}_bits"] = measure_llm(args.out / "llm", bits)
            worst = min((min(cells.values()), name) for name, cells in scores.items())
            print(f"LLM, {bits} bits: exact on held-out utterances, worst {worst[0]:.1%} ({worst[1]})")
            print("\n".join(f"  {name:<12}" + "".join(f"  {seen} prompts {value:.1%}" for seen, value in cells.items()) for name, cells in scores.items()))
    if args.only != "llm":
        if not args.measure:
            start = time.time(), time.process_time()
            pretrain_encoder(args.out / "encoder", args.seed, args.share)
            figures |= {"encoder_steps": [round(args.share * steps) for steps, *_ in ENCODER_PHASES],
                        "utterances": [round(args.share * n) for _, _, n, _ in ENCODER_PHASES], "encoder_time": elapsed(start)}
        figures["ctc_delay"] = measure_delay(args.out / "encoder")
        figures |= {"n_measured": 600, "encoder_wer": measure_encoder(args.out / "encoder", utterances=600)}
        print("encoder: " + ", ".join(f"WER {value:.2%} on {name}" for name, value in figures["encoder_wer"].items()))
    figures = {**(json.loads(measured.read_text()) if measured.exists() else {}), **figures}       # the other build may have written its own
    measured.write_text(json.dumps(figures, indent=1) + "\n")
    if all(key in figures for key in ("llm_steps", "llm_4_bits", "encoder_steps", "encoder_wer")):
        write_card(args.out, figures)


if __name__ == "__main__":
    main()
