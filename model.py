"""Frozen speech encoder + trainable connector + frozen 4-bit LLM = SpeechLLM.

Shapes:  B conversations, L positions, T encoder frames, N speech tokens, D the LLM's width, V its vocabulary.
"""

import hashlib
import shutil
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from connectors import Connector
from data import AUDIO_MARK, Response, Speech, ask, chat_parts, check_messages, load_audio, render, tokenize_in_context
from encoder import SpeechEncoder
from files import UserError, read_json, timed, whole_file, write_json
from hub import TINY, load_or_explain, load_tensors
from parallel import DEVICE

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKPOINT_FROM = 2.5e9      # parameters: from this size on gradient checkpointing is on unless told otherwise ("3B" models count 3.1e9)
IGNORE = -100                # label of a position without loss


# ---- the frozen LLM ----

def compute_precision(precision="auto"):
    """What the LLM computes in, a key of PRECISIONS; "auto": bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    if precision != "auto":
        return precision
    return "fp32" if DEVICE == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def load_llm(name, bits=4, precision="auto"):
    """(LLM frozen and in eval mode, tokenizer). bits: 4 = NF4 with double quantization, 8 = LLM.int8, 16 = not quantized."""
    name = TINY / "llm" if name == "tiny" else name
    compute = PRECISIONS[compute_precision(precision)]
    quantization = None
    if bits != 16:
        try:
            import bitsandbytes  # noqa: F401
            quantization = BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"bitsandbytes does not work on this machine ({type(error).__name__}): the LLM runs unquantized, in {compute}")
    tokenizer = load_or_explain(AutoTokenizer, name, "LLM")
    vocabulary = len(tokenizer)
    if not tokenizer.chat_template:
        raise UserError(f"LLM {name}: its tokenizer has no chat template; choose an instruction-tuned model")
    if not tokenizer("a b")["input_ids"]:
        raise UserError(f"LLM {name}: its tokenizer is empty; is tokenizer.json missing?")
    if not tokenizer.is_fast:
        raise UserError(f"LLM {name}: its tokenizer gives no character offsets, which interleaving needs; it must have a tokenizer.json")
    try:
        end_of_turn(tokenizer)
        chat_parts(tokenizer, ask("Who did it, and when?"), [[]])
    except (UserError, IndexError) as error:
        raise UserError(f"LLM {name}: its chat template cannot be used ({error})") from None
    llm = load_or_explain(AutoModelForCausalLM, name, "LLM", dtype=compute, quantization_config=quantization, device_map={"": DEVICE})
    for module in llm.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks weights at the first call without gradients, into a kernel that has no backward
        # and other rounding. One set of weights for training and generation:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if vocabulary > len(llm.get_input_embeddings().weight):
        raise UserError(f"LLM {name}: its tokenizer has {vocabulary} tokens, but its weights only {len(llm.get_input_embeddings().weight)} embeddings")
    # Greedy decoding and nothing else, whatever sampling or penalties the checkpoint recommends; its end tokens are kept.
    llm.generation_config = GenerationConfig(eos_token_id=llm.generation_config.eos_token_id)
    return llm.eval().requires_grad_(False), tokenizer


@lru_cache(maxsize=1)
def shared_llm(name, bits, precision="auto"):
    with timed("load the LLM"):
        return load_llm(name, bits, precision)


def fingerprint(llm, tokenizer):
    """Tells one LLM from another by what is never quantized: its shape, its vocabulary, a slice of its embeddings, its norms."""
    text = llm.config.get_text_config()                            # of a model that also sees, the part that reads
    weights = [llm.get_input_embeddings().weight[:64], *(p for name, p in llm.named_parameters() if "norm" in name)]
    samples = b"".join(w.to(torch.bfloat16).float().cpu().numpy().tobytes() for w in weights)      # the same whatever precision it was loaded in
    return hashlib.sha256(samples + repr((text.hidden_size, text.num_hidden_layers, tokenizer.vocab_size)).encode()).hexdigest()[:12]


def end_of_turn(tokenizer):
    """The token the chat template puts after an answer: the first of its special tokens there."""
    after = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": AUDIO_MARK}], add_generation_prompt=False)
    ids = tokenize_in_context(tokenizer, after.rsplit(AUDIO_MARK, 1)[1])[0]
    return next((i for i in ids if i in tokenizer.added_tokens_decoder), ids[0] if ids else tokenizer.eos_token_id)


def embedding_rms(llm):
    """Root mean square of the LLM's input embeddings as its layers see them (Gemma scales them on the way), over up to 4096 tokens."""
    table = llm.get_input_embeddings()
    with torch.no_grad():
        return table(torch.arange(0, len(table.weight), -(-len(table.weight) // 4096), device=DEVICE)).float().pow(2).mean().sqrt()


def with_lora(llm, rank):
    """The LLM with a LoRA adapter of this rank on all its linear layers, the only part of it that is trained; the LLM itself for rank 0."""
    if not rank:
        return llm
    from peft import LoraConfig, get_peft_model
    return get_peft_model(llm, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))


def checkpoint_gradients(llm):
    """Let the LLM keep only what goes into each of its layers, and compute the rest again in the backward pass; returns the layers that do so.

    They do it while their own flag `training` is set; what is inside them stays in eval mode.
    """
    try:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"this LLM has no gradient checkpointing; say --gradient-checkpointing off ({str(error).splitlines()[0]})") from None
    return [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]


# ---- the speech LLM ----

class SpeechLLM(nn.Module):
    """forward() in five sentences: text parts are embedded by the LLM's own table; speech parts by the connector; both are spliced in order;
    the LLM reads them; only the response is scored."""

    def __init__(self, llm, tokenizer, encoder=None, connector=None, lora=0):
        super().__init__()
        self.llm, self.tokenizer, self.encoder, self.connector, self.checkpointed = llm, tokenizer, encoder, connector, []
        self.eot, self.fingerprint, self.lora = end_of_turn(tokenizer), fingerprint(llm, tokenizer), lora
        ends = llm.generation_config.eos_token_id
        self.ends = sorted({self.eot, tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        self.llm = with_lora(llm, lora)

    def train(self, mode=True):
        """The LLM and the encoder stay in eval mode whatever happens."""
        super().train(False)
        if self.connector is not None:
            self.connector.train(mode)
        for layer in self.checkpointed:
            layer.training = mode
        return self

    def checkpoint_gradients(self):
        """Less memory and a third more time for training."""
        self.checkpointed = checkpoint_gradients(self.llm)
        return self

    def trainable(self):
        """{name: parameter} of what training changes: the connector, and the LoRA adapter if there is one."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def embed(self, batch):
        """Parts -> (embeddings (B, L, D), attention mask (B, L), labels (B, L)). The one place where text and speech are spliced.

        [Text of 9 ids, Speech of 60 frames, Text of 4 ids, Response of 3 ids], k = 6  ->  9 + 10 + 4 + 3 = 26 rows of D; the last 3 are labelled.

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
        """(logits (R, V) that predict the R response tokens of the batch, those tokens (R)): the vocabulary projection runs at no other position."""
        embeds, mask, labels = self.embed(batch)
        positions, answered = (mask.cumsum(1) - 1).clamp(min=0), labels[:, 1:] != IGNORE      # one position predicts the next
        hook = self.llm.get_output_embeddings().register_forward_pre_hook(lambda head, args: (args[0][:, :-1][answered],))      # (B, L, D) -> (R, D)
        try:
            out = self.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        finally:
            hook.remove()
        return out.logits.float(), labels[:, 1:][answered]

    def forward(self, batch, teacher=None):
        """The loss of conversations that end in a Response, summed over response tokens.

        teacher: the same conversations with the transcript as text; then the loss is KL(frozen LLM reading text || LLM hearing speech).
        """
        if teacher is None:
            return F.cross_entropy(*self.logits(batch), reduction="sum")
        with torch.no_grad(), self.llm.disable_adapter() if self.lora else nullcontext():
            target = self.logits(teacher)[0].log_softmax(-1)
        return F.kl_div(self.logits(batch)[0].log_softmax(-1), target, reduction="sum", log_target=True)

    @torch.no_grad()
    def generate_rows(self, batch, max_new_tokens=64):
        """Greedy answers to open conversations: parts -> [(text, did it end by itself)]."""
        embeds, mask, _ = self.embed(batch)
        rows = self.llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                                 eos_token_id=self.ends, pad_token_id=self.eot).tolist()
        lengths = [next((i for i, token in enumerate(row) if token in self.ends), None) for row in rows]
        texts = self.tokenizer.batch_decode([row[:n] for row, n in zip(rows, lengths)], skip_special_tokens=True)
        # an answer that was cut off may end in half a character
        return [(text.strip() if n is not None else text.rstrip("\ufffd").strip(), n is not None) for text, n in zip(texts, lengths)]

    def generate(self, batch, max_new_tokens=64):
        """The texts of generate_rows."""
        return [text for text, _ in self.generate_rows(batch, max_new_tokens)]

    def answer(self, question, audio=None, max_new_tokens=64):
        """The answer to a question about a sound file; or to a whole conversation in the Hugging Face message format (audio entries hold a path)."""
        messages = ask(question, audio) if isinstance(question, str) else question
        check_messages(messages)
        paths = [c["audio"] for m in messages if not isinstance(m["content"], str) for c in m["content"] if c["type"] == "audio"]
        heard = [[Speech(self.encoder(load_audio(path), path))] for path in paths]
        return self.generate([chat_parts(self.tokenizer, messages, heard)], max_new_tokens)[0]

    def response(self, text, ended=True):
        """The token ids to imitate: the answer and, unless it was cut off, the end of its turn."""
        return Response(tokenize_in_context(self.tokenizer, text)[0] + [self.eot] * ended)

    # -- RUN/RECIPE holds the connector (and the adapter), and names the LLM and the encoder --

    def save(self, folder, spec):
        """Write connector.safetensors (and adapter/) and what is needed to load them again."""
        with whole_file(Path(folder) / "connector.safetensors") as temporary:
            save_file({k: v.contiguous() for k, v in self.connector.state_dict().items()}, temporary)
        if self.lora:                                              # a folder that PEFT loads by itself
            written, adapter = Path(folder) / ".adapter", Path(folder) / "adapter"
            self.llm.save_pretrained(written, save_embedding_layers=False)
            shutil.rmtree(adapter, ignore_errors=True)
            written.rename(adapter)
        write_json(Path(folder) / "model.json", {**spec, "llm_fingerprint": self.fingerprint, "encoder_key": self.encoder.key,
                                                 "trained_parameters": sum(p.numel() for p in self.trainable().values())})

    @classmethod
    def build(cls, spec, llm=None, encoder=None, seed=0, precision="auto"):
        """A SpeechLLM from its spec: llm, bits, encoder, pad_whisper, connector, k, hidden, lora. Pass loaded models to share them."""
        llm, tokenizer = llm or load_llm(spec["llm"], spec["bits"], precision)
        encoder = encoder or SpeechEncoder(spec["encoder"], spec["pad_whisper"])
        torch.manual_seed(seed)                                    # after loading, which may draw random numbers itself
        connector = Connector(spec["connector"], encoder.width, llm.get_input_embeddings().weight.shape[1], spec["k"], spec["hidden"], embedding_rms(llm))
        return cls(llm, tokenizer, encoder, connector.to(DEVICE), spec["lora"])

    @classmethod
    def from_pretrained(cls, folder, llm=None, encoder=None, precision="auto"):
        """Load what save() wrote (RUN/<recipe>). UserError if it was trained for another LLM or another encoder."""
        folder = Path(folder)
        spec = read_json(folder / "model.json", "llm", "bits", "encoder", "pad_whisper", "connector", "k", "hidden", "lora", "llm_fingerprint",
                         "encoder_key")
        try:
            model = cls.build(spec, llm, encoder, precision=precision)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"{folder / 'model.json'}: is not what training writes there ({error}); train again with --force") from None
        for what, name, now, then in (("LLM", spec["llm"], model.fingerprint, spec["llm_fingerprint"]),
                                      ("speech encoder", spec["encoder"], model.encoder.key, spec["encoder_key"])):
            if now != then:
                raise UserError(f"{folder}: its connector was trained for another {what} than the one that is now at {name}; train again with --force")
        try:
            tensors = load_tensors(folder / "connector.safetensors", "train again with --force")
            model.connector.load_state_dict(tensors)
            if spec["lora"]:
                from peft import get_peft_model_state_dict, set_peft_model_state_dict
                adapter = load_tensors(folder / "adapter" / "adapter_model.safetensors", "train again with --force")
                if set(adapter) != set(get_peft_model_state_dict(model.llm)):
                    raise ValueError("its adapter is not whole")
                set_peft_model_state_dict(model.llm, adapter)
                tensors |= adapter
            if not all(torch.isfinite(t).all() for t in tensors.values()):
                raise ValueError("it holds NaN or infinite weights")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{folder}: the connector cannot be loaded ({str(error).splitlines()[0]}); train again with --force") from None
        return model.train(False)
