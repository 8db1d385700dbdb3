"""What is measured of the tiny world's two checkpoints: exact match, word error rate, CTC delay.

transformers is imported where it is used: it takes seconds.
"""

import json
import random

import torch
from tqdm import tqdm

from support.files import write_text

from . import speech, world
from .pretrain_data import applies, conversation, extract, pad_speech, render_utterances
from .pretrain_models import DEVICE


# ---- the LLM ----


@torch.no_grad()
def measure_llm(folder, bits=16, per_cell=25, seed=1):
    """Exact-match rate of every task on held-out utterances, and of the second of two turns.

    folder: the checkpoint. bits: 16, which is loaded as float32, or 4, loaded in NF4.
    per_cell: utterances for each prompt.

    Returns {task: {"seen": rate, "unseen": rate}} by whether stage 2 has the prompt, plus
    "two turns", "two utterances" and "directive as prompt", which have only "seen".
    """
    from transformers import AutoTokenizer

    llm = open_llm(folder, bits)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tasks = world.read_task_table()
    cases = single_turns(tasks, per_cell, seed) + two_turns(tasks, 16 * per_cell, seed)
    cases += obeyed(8 * per_cell, seed)

    hits = {}
    for start in tqdm(range(0, len(cases), 128), desc=f"measure LLM, {bits} bits"):
        batch = cases[start : start + 128]
        answers = generate_answers(llm, tokenizer, [messages for _, _, messages, _ in batch])
        for (name, prompts, _, truth), answer in zip(batch, answers):
            hits.setdefault(name, {}).setdefault(prompts, []).append(answer.strip() == truth)

    rates = {}
    for name, cells in hits.items():
        rates[name] = {prompts: sum(cell) / len(cell) for prompts, cell in cells.items()}
    return rates


def open_llm(folder, bits):
    """The checkpoint in float32, or with 4 bits in NF4 with double quantization."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    llm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map=DEVICE
    )
    # As the product loads it: on CPUs with AVX512-BF16 bitsandbytes would repack the weights into
    # a kernel with other rounding.
    for module in llm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return llm


def single_turns(tasks, per_cell, seed):
    """Cases (task, "seen" or "unseen", messages, true answer): per_cell for each prompt."""
    cases = []
    for name, task in tasks.items():
        for prompts, key in (("seen", "prompts"), ("unseen", "unseen_prompts")):
            fitting = fitting_draws(task, f"measure-{seed}-{name}")
            for prompt in task[key]:
                for _ in range(per_cell):
                    utterance = next(fitting)
                    messages = [{"role": "user", "content": f"{prompt}\n{utterance.words}"}]
                    cases.append((name, prompts, messages, world.ANSWERS[name](utterance)))
    return cases


def fitting_draws(task, seed):
    """An endless stream of held-out utterances that the task is for."""
    for utterance in world.draws(seed, True):
        if applies(task, utterance):
            yield utterance


def two_turns(tasks, count, seed):
    """`count` cases as in single_turns, of conversations whose second answer is asked for."""
    rng = random.Random(seed)
    stream = world.draws(f"turns-{seed}", True)
    cases = []
    while len(cases) < count:
        messages = conversation(rng, tasks, stream, hesitant=0)
        questions = [message["content"] for message in messages if message["role"] == "user"]
        if len(questions) == 2 and not world.ASKS_FOR_A_FACT.match(questions[1]):
            name = "two utterances" if "\n" in questions[1] else "two turns"
            cases.append((name, "seen", messages[:-1], messages[-1]["content"]))
    return cases


def obeyed(count, seed):
    """`count` cases of directives that are the prompt, but for those that ask for a fact."""
    stream = world.draws(f"obeyed-{seed}", True, "directive")
    cases = []
    while len(cases) < count:
        directive = next(stream)
        if world.ASKS_FOR_A_FACT.match(directive.words):
            continue
        messages = [{"role": "user", "content": directive.words}]
        cases.append(("directive as prompt", "seen", messages, directive.reply))
    return cases


def generate_answers(llm, tokenizer, conversations):
    """The greedy answer to each conversation, at most 64 tokens."""
    texts = []
    for messages in conversations:
        texts.append(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(DEVICE)

    output = llm.generate(**inputs, max_new_tokens=64, do_sample=False)  # (B, T + up to 64)
    answers = output[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


# ---- the encoder ----


def measure_encoder(folder, utterances=600, seed=1):
    """{"seen voices": WER, "unseen voices": WER}; unseen voices speak held-out utterances."""
    model, extractor, tokenizer = open_encoder(folder)
    model = model.to(DEVICE)
    rates = {}
    for name, split in (("seen voices", "train"), ("unseen voices", "test")):
        rows = render_utterances(extractor, tokenizer, split, seed, utterances, f"render {name}")
        rates[name] = wer_on(model, tokenizer, rows)
    return rates


def open_encoder(folder):
    """(model in float32, feature extractor, character tokenizer) of the checkpoint."""
    from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

    model = AutoModelForCTC.from_pretrained(folder, dtype=torch.float32).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, extractor, tokenizer


@torch.no_grad()
def wer_on(model, tokenizer, rows):
    """WER of the CTC head's greedy transcripts of rows (pretrain_data.render_utterances)."""
    import jiwer

    model.eval()
    said, heard = [], []
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        features, mask, _ = pad_speech(batch, model.device)
        logits = model(input_features=features, attention_mask=mask).logits
        best = logits.argmax(-1)  # (B, T)
        best[mask == 0] = tokenizer.pad_token_id
        heard += tokenizer.batch_decode(best)
        said += [words for _, _, words in batch]
    return jiwer.wer(said, heard)


@torch.no_grad()
def measure_delay(folder, utterances=150, seed=2):
    """Seconds by which the CTC head names a word's letters late.

    The median over the word boundaries of training voices, whose times are known. Written to the
    encoder's config.json as ctc_delay: word alignment subtracts it.
    """
    model, extractor, tokenizer = open_encoder(folder)
    rng = random.Random(f"delay-{seed}")
    stream = world.draws(f"delay-{seed}", held_out=False)

    late = []
    for _ in range(utterances):
        text = next(stream).words
        audio, words, _ = speech.render(text, rng, "train")
        found = ctc_boundaries(model, extractor, tokenizer, audio, text)
        late += [at - start for at, (_, start, _) in zip(found, words[1:])]

    config = json.loads((folder / "config.json").read_text())
    config["ctc_delay"] = round(sorted(late)[len(late) // 2], 3)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return config["ctc_delay"]


def ctc_boundaries(model, extractor, tokenizer, audio, text):
    """Seconds at which the CTC head has each word of the text but the first begin.

    audio: samples at speech.SAMPLE_RATE. Each boundary is half way between the letters around a "|"
    of the best path that spells the text (torchaudio.functional.forced_align).
    """
    from torchaudio.functional import forced_align, merge_tokens

    scores = model(**extract(extractor, audio)).logits.log_softmax(-1)  # (1, T, characters)
    seconds = len(audio) / speech.SAMPLE_RATE / scores.shape[1]  # of one frame

    target = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.int32)  # (1, L)
    path, weights = forced_align(scores, target, blank=tokenizer.pad_token_id)
    spans = merge_tokens(path[0], weights[0], blank=tokenizer.pad_token_id)

    bar = tokenizer.convert_tokens_to_ids("|")
    boundaries = []
    for i, span in enumerate(spans):
        if span.token == bar:
            boundaries.append((spans[i - 1].end + spans[i + 1].start) / 2 * seconds)
    return boundaries
