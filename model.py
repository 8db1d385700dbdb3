"""Frozen speech encoder + trainable connector + frozen 4-bit LLM = SpeechLLM.

Shapes:  B conversations, L positions, T encoder frames, N speech tokens, D the LLM's width, V its vocabulary.
"""

import hashlib
import logging
import math
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoModelForCTC, AutoTokenizer, BitsAndBytesConfig

from data import AUDIO_MARK, SAMPLE_RATE, Response, Speech, UserError, chat_parts, load_audio, read_json, timed, whole_file, write_json

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)         # it warns of an optional kernel package it would load from the network
TINY = Path(__file__).with_name("tiny")                            # the tiny world's checkpoints, by the name "tiny"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100                # label of a position without loss
DROPOUT = 0.1                # in connectors: little speech is soon learned by heart


def weights_id(name, kind):
    """Names the weights in a local model folder, so that a folder with other weights is noticed; empty for a hub name."""
    folder = TINY / kind if name == "tiny" else Path(name)
    hashed = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with open(file, "rb") as content:                          # the end of a file holds weights, and a large file is not read whole
            content.seek(max(0, file.stat().st_size - 2**20))
            hashed.update(file.name.encode() + content.read())
    return hashed.hexdigest()[:12] if folder.is_dir() else ""


# ---- connectors: encoder frames (T, D_encoder) -> speech tokens (N, D) ----

class StackMLP(nn.Module):
    """Stack k neighbouring frames, then a two-layer MLP (as in SLAM-ASR, arXiv 2402.08846).

    frames (B, N * k, D_encoder) -> (B, N, k * D_encoder) -> LayerNorm, MLP with dropout -> (B, N, D)
    """

    def __init__(self, width_in, width_out, k, hidden):
        super().__init__()
        self.k = k
        self.norm = nn.LayerNorm(k * width_in)
        self.mlp = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(k * width_in, hidden), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(hidden, width_out))

    def forward(self, x):
        return self.mlp(self.norm(x.reshape(len(x), -1, self.k * x.shape[-1])))     # (B, N, k * D_encoder) -> (B, N, D)


class Conv(nn.Module):
    """Strided 1-d convolutions, each halving the rate, then a bottleneck MLP with a residual (BLSP, arXiv 2309.00916, section 3.1).

    frames (B, N * k, D_encoder) -> log2(k) convolutions of stride 2 -> (B, N, D_encoder) -> (B, N, D)
    """

    def __init__(self, width_in, width_out, k, hidden):
        super().__init__()
        if k & (k - 1):
            raise UserError(f"the conv connector halves the frame rate, so --k must be a power of two, not {k}")
        self.convs = nn.ModuleList(nn.Conv1d(width_in, width_in, 5, stride=2, padding=2) for _ in range(int(math.log2(k))))
        self.project = nn.Linear(width_in, width_out)
        self.norm = nn.LayerNorm(width_out)
        self.adapter = nn.Sequential(nn.Linear(width_out, hidden), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(hidden, width_out))

    def forward(self, x):
        for conv in self.convs:
            x = F.gelu(conv(x.transpose(1, 2))).transpose(1, 2)    # (B, T, D_encoder) -> (B, T / 2, D_encoder)
        x = self.norm(self.project(x))                             # (B, N, D)
        return x + self.adapter(x)


CONNECTORS = {"stack-mlp": StackMLP, "conv": Conv}


class Connector(nn.Module):
    """Encoder frames to speech tokens: k frames a token, and a scale that starts the tokens at the norm of the LLM's own embeddings."""

    def __init__(self, kind, width_in, width_out, k, hidden, embedding_rms=1.0):
        super().__init__()
        if kind not in CONNECTORS:
            raise UserError(f"there is no connector {kind!r}; there are {', '.join(CONNECTORS)}")
        self.k, self.body = k, CONNECTORS[kind](width_in, width_out, k, hidden)
        self.scale = nn.Parameter(torch.full((width_out,), float(embedding_rms)))

    def forward(self, spans):
        """[frames (T_i, D_encoder)] -> [speech tokens (N_i, D)], N_i = T_i / k rounded up; the last token's missing frames are zeros.

        Spans of as many tokens go through together: nothing is padded beyond that, so a span's tokens do not depend on its batch.
        """
        tokens, by_length = [None] * len(spans), {}
        for i, frames in enumerate(spans):
            by_length.setdefault(-(-len(frames) // self.k), []).append(i)
        for n, rows in by_length.items():
            x = torch.stack([F.pad(spans[i], (0, 0, 0, n * self.k - len(spans[i]))) for i in rows]).to(self.scale)   # (B, N * k, D_encoder)
            y = self.body(x) if n else x.new_zeros(len(rows), 0, len(self.scale))                                    # (B, N, D)
            for i, row in zip(rows, F.rms_norm(y, y.shape[-1:]) * self.scale):
                tokens[i] = row
        return tokens


# ---- the frozen speech encoder ----

class SpeechEncoder(nn.Module):
    """Any Hugging Face speech encoder, frozen, in eval mode, one utterance at a time: with no padding there is nothing to mask.

    A Whisper encoder runs on the audio's own length (`pad_whisper`: on 30 s of padding, as it was trained; only the audio's frames are kept).
    A CTC model keeps its head: `transcribe` is what the cascade hears.
    """

    def __init__(self, name, pad_whisper=False):
        super().__init__()
        self.name, self.pad_whisper = str(name), pad_whisper
        name = TINY / "encoder" if name == "tiny" else name
        self.config = load_or_explain(AutoConfig, name, "speech encoder")
        self.extractor = load_or_explain(AutoFeatureExtractor, name, "speech encoder")
        self.is_whisper = self.config.model_type == "whisper"
        self.head, self.ctc_tokenizer = None, None
        if self.is_whisper:
            from transformers.models.whisper.modeling_whisper import WhisperEncoder
            self.model = load_or_explain(WhisperEncoder, name, "speech encoder", dtype=torch.float32,
                                         key_mapping={r"^(model\.)?encoder\.": ""})        # the decoder is never read
        elif any(a.endswith("ForCTC") for a in self.config.architectures or []):
            model = load_or_explain(AutoModelForCTC, name, "speech encoder", dtype=torch.float32)
            if not hasattr(model, "lm_head"):
                raise UserError(f"speech encoder {name}: CTC models of the kind {self.config.model_type} are not supported yet")
            self.model, self.head = getattr(model, model.base_model_prefix), model.lm_head
            self.ctc_tokenizer = load_or_explain(AutoTokenizer, name, "speech encoder")
        else:
            self.model = load_or_explain(AutoModel, name, "speech encoder", dtype=torch.float32)
        self.width = getattr(self.config, "d_model", None) or self.config.hidden_size
        self.to(DEVICE).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, audio, name="the audio"):
        """float32 samples at SAMPLE_RATE -> frames (T, D_encoder) on the CPU, half precision."""
        if self.is_whisper:
            return self.whisper(audio, name).half().cpu()
        inputs = self.extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(DEVICE)
        frames = self.model(**inputs).last_hidden_state[0]         # (T, D_encoder)
        if "input_features" in inputs:                             # stacked extractors pad to whole stacks
            frames = frames[:int(inputs["attention_mask"].sum())]
        return frames.half().cpu()

    def whisper(self, audio, name):
        """WhisperEncoder.forward of transformers without its check that the input is 30 s long."""
        seconds = len(audio) / SAMPLE_RATE
        if seconds > self.extractor.chunk_length:
            raise UserError(f"{name}: {seconds:.1f} s is more than the {self.extractor.chunk_length} s that a Whisper encoder hears; cut it into shorter clips")
        mel = self.extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt",
                             padding="max_length" if self.pad_whisper else "longest")["input_features"].to(DEVICE)     # (1, bins, 2T)
        x = F.gelu(self.model.conv1(mel))
        x = F.gelu(self.model.conv2(x)).transpose(1, 2)                                                                # (1, T, D_encoder)
        x = x + self.model.embed_positions.weight[:x.shape[1]]
        for layer in self.model.layers:
            x = layer(x, None)
        return self.model.layer_norm(x)[0, :math.ceil(len(audio) / SAMPLE_RATE * 50)]

    @torch.no_grad()
    def transcribe(self, frames):
        """Greedy CTC: frames (T, D_encoder) -> text."""
        return self.ctc_tokenizer.decode(self.head(frames.float().to(DEVICE)).argmax(-1).tolist())

    @torch.no_grad()
    def align(self, frames, text, duration):
        """Word times [[word, start_s, end_s], ...] of a transcript by CTC forced alignment (torchaudio.functional.forced_align).

        Characters the CTC vocabulary lacks are passed over; a word of only such characters gets the time between its neighbours. A CTC
        head names a letter some time after it was said; the tiny encoder's config.json holds its delay, as measured on espeak-ng's own times.
        """
        from torchaudio.functional import forced_align, merge_tokens
        vocabulary, bar = self.ctc_tokenizer.get_vocab(), self.ctc_tokenizer.word_delimiter_token
        spelled = [[vocabulary[c] for c in word if c in vocabulary and c != bar] or [vocabulary[c] for c in word.upper() if c in vocabulary]
                   for word in (text.lower().split())]
        targets = [i for letters in spelled if letters for i in [*letters, vocabulary[bar]]][:-1]
        try:
            path, scores = forced_align(self.head(frames.float().to(DEVICE)).log_softmax(-1)[None].cpu(), torch.tensor([targets], dtype=torch.int32),
                                        blank=self.ctc_tokenizer.pad_token_id)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the transcript does not fit the audio: {len(targets)} characters in {duration:.2f} s ({str(error).splitlines()[0]})") from None
        spans, seconds, times, at = merge_tokens(path[0], scores[0], blank=self.ctc_tokenizer.pad_token_id), duration / len(frames), [], 0
        for letters in spelled:
            if letters:
                times.append([spans[at].start * seconds, spans[at + len(letters) - 1].end * seconds])
                at += len(letters) + 1                             # and the delimiter
            else:
                times.append(None)
        for i, time in enumerate(times):
            if time is None:
                after = next((t[0] for t in times[i + 1:] if t), duration)
                times[i] = [times[i - 1][1] if i else 0.0, after]
        delay = getattr(self.config, "ctc_delay", 0.0)
        times = [[max(0.0, start - delay), max(0.0, end - delay)] for start, end in times]
        for a, b in zip(times, times[1:]):                         # CTC peaks are short: words meet midway between them
            a[1] = b[0] = (a[1] + b[0]) / 2
        return [[word, start, end] for word, (start, end) in zip(text.split(), times)]

    @cached_property
    def key(self):
        """Names what determines the frames: samples of every weight, the feature extractor, and the padding option."""
        samples = [p.flatten()[::max(1, p.numel() // 1024)].float().cpu().numpy().tobytes() for p in self.model.state_dict().values()]
        return hashlib.sha256(b"".join(samples) + repr((self.extractor.to_dict(), self.pad_whisper)).encode()).hexdigest()[:12]


def encode_all(encoder, utterances, cache):
    """{utterance id: frames (T, D_encoder)}, read from or written to safetensors files in the folder `cache`: the encoder is frozen, so once is enough."""
    stamp = repr([(u.id, u.audio.stat().st_size, u.audio.stat().st_mtime_ns) if u.audio.is_file() else u.id for u in utterances])
    path = Path(cache) / f"{encoder.key}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.safetensors"
    if path.exists():
        return load_tensors(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)               # numpy's threads and torch's, taking turns at one short clip, wait for each other: 88 ms a clip, not 14
    with timed(f"encode {len(utterances)} utterances"):
        frames = {u.id: encoder(load_audio(u.audio, u.duration), u.audio) for u in tqdm(utterances, desc="encode speech", unit="utt")}
        with whole_file(path) as temporary:
            save_file(frames, temporary)
    torch.set_num_threads(threads)
    return frames


def load_tensors(path, advice="delete it and run again"):
    """The tensors of a safetensors file; UserError if it is not whole."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is no readable safetensors file ({error}); {advice}") from None


# ---- the frozen LLM ----

def load_or_explain(auto_class, name, what, **options):
    """auto_class.from_pretrained with an error for people; weights come from safetensors only, code from transformers only."""
    try:
        if "dtype" in options:
            options["use_safetensors"] = True
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:      # what damaged files raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} {name}: cannot be loaded as a Hugging Face checkpoint, local folder or hub name ({why})") from None


def load_llm(name, bits=4):
    """(LLM frozen and in eval mode, tokenizer). bits: 4 = NF4 with double quantization, 8 = LLM.int8, 16 = not quantized."""
    name = TINY / "llm" if name == "tiny" else name
    compute = torch.float32 if DEVICE == "cpu" else torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    quantization = None
    if bits != 16:
        try:
            import bitsandbytes  # noqa: F401
            quantization = BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"bitsandbytes does not work on this machine ({type(error).__name__}): the LLM runs unquantized, in {compute}")
    tokenizer = load_or_explain(AutoTokenizer, name, "LLM")
    if not tokenizer.chat_template:
        raise UserError(f"LLM {name}: its tokenizer has no chat template; choose an instruction-tuned model")
    if not tokenizer("a b")["input_ids"]:
        raise UserError(f"LLM {name}: its tokenizer is empty; is tokenizer.json missing?")
    try:
        end_of_turn(tokenizer)
    except (TemplateError, IndexError) as error:
        raise UserError(f"LLM {name}: its chat template cannot be used ({type(error).__name__}: {error})") from None
    llm = load_or_explain(AutoModelForCausalLM, name, "LLM", dtype=compute, quantization_config=quantization, device_map={"": DEVICE})
    for module in llm.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks weights at the first call without gradients, into a kernel that has no backward
        # and other rounding. One set of weights for training and generation:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return llm.eval().requires_grad_(False), tokenizer


def fingerprint(llm, tokenizer):
    """Tells one LLM from another by what is never quantized: its shape, its vocabulary, a slice of its embeddings, its norms."""
    weights = [llm.get_input_embeddings().weight[:64], *(p for name, p in llm.named_parameters() if "norm" in name)]
    samples = b"".join(w.to(torch.bfloat16).float().cpu().numpy().tobytes() for w in weights)      # the same whatever precision it was loaded in
    return hashlib.sha256(samples + repr((llm.config.hidden_size, llm.config.num_hidden_layers, len(tokenizer))).encode()).hexdigest()[:12]


def end_of_turn(tokenizer):
    """The token the chat template puts after an answer."""
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": AUDIO_MARK}]
    after = tokenizer.apply_chat_template(turn, tokenize=False).rsplit(AUDIO_MARK, 1)[1]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids else tokenizer.eos_token_id


# ---- the speech LLM ----

class SpeechLLM(nn.Module):
    """forward() in five sentences: text parts are embedded by the LLM's own table; speech parts by the connector; both are spliced in order;
    the LLM reads them; only the response is scored."""

    def __init__(self, llm, tokenizer, encoder=None, connector=None, lora=0):
        super().__init__()
        self.llm, self.tokenizer, self.encoder, self.connector = llm, tokenizer, encoder, connector
        self.eot, self.fingerprint, self.lora = end_of_turn(tokenizer), fingerprint(llm, tokenizer), lora
        if lora:
            from peft import LoraConfig, get_peft_model
            self.llm = get_peft_model(llm, LoraConfig(r=lora, lora_alpha=2 * lora, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))

    def train(self, mode=True):
        """The LLM and the encoder stay in eval mode whatever happens."""
        super().train(False)
        if self.connector is not None:
            self.connector.train(mode)
        return self

    def trainable(self):
        """{name: parameter} of what training changes: the connector, and the LoRA adapter if there is one."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def embed(self, batch):
        """Parts -> (embeddings (B, L, D), attention mask (B, L), labels (B, L)). The one place where text and speech are spliced.

        Padded on the left, so that the answers of all rows end at the right edge, where generation goes on and the loss is read.
        """
        table = self.llm.get_input_embeddings()
        ids = [i for parts in batch for part in parts if not isinstance(part, Speech) for i in part.ids]
        text = iter(table(torch.tensor(ids, device=DEVICE)).split([len(p.ids) for parts in batch for p in parts if not isinstance(p, Speech)]))
        speech = iter(self.connector([p.frames.to(DEVICE) for parts in batch for p in parts if isinstance(p, Speech)]) if self.connector else [])
        rows = [torch.cat([(next(speech) if isinstance(p, Speech) else next(text)).to(table.weight.dtype) for p in parts]) for parts in batch]
        length = max(map(len, rows))
        embeds = torch.stack([F.pad(row, (0, 0, length - len(row), 0)) for row in rows])                                    # (B, L, D)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=DEVICE)                    # (B, L)
        answers = [parts[-1].ids if isinstance(parts[-1], Response) else [] for parts in batch]
        labels = torch.tensor([[IGNORE] * (length - len(a)) + a for a in answers], device=DEVICE)                           # (B, L)
        return embeds, mask, labels

    def logits(self, batch):
        """(logits (B, R, V), labels (B, R)) at the R last positions, which hold every answer: the vocabulary projection runs on no others."""
        embeds, mask, labels = self.embed(batch)
        R = max(len(parts[-1].ids) for parts in batch)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, logits_to_keep=R + 1, use_cache=False)
        return out.logits[:, :-1].float(), labels[:, -R:]          # the logits at one position predict the next

    def forward(self, batch, teacher=None):
        """The loss of conversations that end in a Response, summed over response tokens.

        teacher: the same conversations with the transcript as text; then the loss is KL(LLM reading text || LLM hearing speech).
        """
        logits, labels = self.logits(batch)
        answered = labels != IGNORE                                # (B, R)
        if teacher is None:
            return F.cross_entropy(logits[answered], labels[answered], reduction="sum")
        with torch.no_grad():
            target = self.logits(teacher)[0][answered].log_softmax(-1)
        return F.kl_div(logits[answered].log_softmax(-1), target, reduction="sum", log_target=True)

    @torch.no_grad()
    def generate(self, batch, max_new_tokens=64):
        """Greedy answers to open conversations: parts -> [text]."""
        embeds, mask, _ = self.embed(batch)
        ids = self.llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                                repetition_penalty=1.0, eos_token_id=self.eot, pad_token_id=self.eot)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def generate_all(self, conversations, order, desc, batch_size, max_new_tokens):
        """Answers to many open conversations, in batches of neighbours by the sort key `order[i]`, with a progress bar."""
        answers, by_key = [None] * len(conversations), sorted(range(len(conversations)), key=order.__getitem__)
        for at in tqdm(range(0, len(by_key), batch_size), desc=desc, unit="batch"):
            rows = by_key[at:at + batch_size]
            for i, answer in zip(rows, self.generate([conversations[i] for i in rows], max_new_tokens)):
                answers[i] = answer
        return answers

    def answer(self, messages, max_new_tokens=64):
        """The answer to one conversation in the Hugging Face message format; audio entries hold the path of a sound file."""
        paths = [c["audio"] for m in messages if not isinstance(m["content"], str) for c in m["content"] if c["type"] == "audio"]
        heard = [[Speech(self.encoder(load_audio(path), path))] for path in paths]
        return self.generate([chat_parts(self.tokenizer, messages, heard)], max_new_tokens)[0]

    def response(self, text):
        """The token ids to imitate: the answer and the end of its turn."""
        return Response(self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.eot])

    # -- a run folder holds the connector (and the adapter), and names the LLM and the encoder --

    def save(self, folder, spec):
        """Write connector.safetensors (and adapter/) and what is needed to load them again."""
        with whole_file(Path(folder) / "connector.safetensors") as temporary:
            save_file({k: v.contiguous() for k, v in self.connector.state_dict().items()}, temporary)
        if self.lora:
            self.llm.save_pretrained(Path(folder) / "adapter")
        write_json(Path(folder) / "model.json", {**spec, "llm_fingerprint": self.fingerprint, "encoder_key": self.encoder.key})

    @classmethod
    def build(cls, spec, llm=None, encoder=None, seed=0):
        """A SpeechLLM from its spec: llm, bits, encoder, pad_whisper, connector, k, hidden, lora. Pass loaded models to share them."""
        llm, tokenizer = llm or load_llm(spec["llm"], spec["bits"])
        encoder = encoder or SpeechEncoder(spec["encoder"], spec["pad_whisper"])
        table = llm.get_input_embeddings().weight
        torch.manual_seed(seed)                                    # after loading, which may draw random numbers itself
        connector = Connector(spec["connector"], encoder.width, table.shape[1], spec["k"], spec["hidden"], table.float().pow(2).mean().sqrt())
        return cls(llm, tokenizer, encoder, connector.to(DEVICE), spec["lora"])

    @classmethod
    def from_pretrained(cls, folder, llm=None, encoder=None):
        """Load what save() wrote. UserError if it was trained for another LLM."""
        spec = read_json(Path(folder) / "model.json", "llm", "bits", "encoder", "pad_whisper", "connector", "k", "hidden", "lora", "llm_fingerprint",
                         "encoder_key")
        model = cls.build(spec, llm, encoder)
        for what, name, now, then in (("LLM", spec["llm"], model.fingerprint, spec["llm_fingerprint"]),
                                      ("speech encoder", spec["encoder"], model.encoder.key, spec["encoder_key"])):
            if now != then:
                raise UserError(f"{folder}: its connector was trained for another {what} than the one that is now at {name}; train again with --force")
        try:
            model.connector.load_state_dict(load_tensors(Path(folder) / "connector.safetensors", "train again with --force"))
            if spec["lora"]:
                from peft import set_peft_model_state_dict
                set_peft_model_state_dict(model.llm, load_tensors(Path(folder) / "adapter" / "adapter_model.safetensors", "train again with --force"))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{folder}: the connector cannot be loaded ({str(error).splitlines()[0]}); train again with --force") from None
        return model.train(False)
