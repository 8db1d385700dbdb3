"""The card of the tiny world's two checkpoints, README.md, written from what was measured."""

from safetensors import safe_open

from support.files import write_text

from . import speech

CARD = """# The tiny world's two checkpoints

Made by `python -m tiny.pretrain --out FOLDER` from seed {seed}, from nothing but `world.py`,
`tasks.toml` and espeak-ng voices; scores below are printed by `python -m tiny.pretrain --measure`.
License: MIT, like the rest of the project. They know a closed grammar and nothing else: sentences
("the farmer sold three red apples in the market yesterday"), strings of digits, and directives
("which is larger two or five").

| | `llm/` | `encoder/` |
|---|---|---|
| architecture | Qwen2, 5 layers, width 192, 6 heads, byte-level BPE of 640 pieces, \
untied head | Wav2Vec2-BERT (conformer), 4 layers, width 192, character CTC head |
| parameters | {llm_parameters:.2f}M | {encoder_parameters:.2f}M |
| training data | endless conversations about random sentences, digit strings and \
directives; {llm_hesitant:.0%} with hesitations between the words, {llm_blended:.0%} of them \
blended \
| espeak-ng voices |
| steps | {llm_steps} of 64 conversations in phases, \
from 60% of the first on with weights rounded to NF4 \
| {encoder_steps} of 16, in the latter half of the utterances with an echo |
| time | {llm_time} | {encoder_time} |

*Hesitations* are words like "uh"; *blended* are those in whose place stands a mixture of the
neighbours' embeddings, as speech tokens are no words. The encoder heard {utterances} utterances
in {n_train} voice variants x {n_accents} accents of espeak-ng, with SpecAugment. Held out for the
benchmark are, from both, one sentence in eight (by a hash of its words), and from the encoder the
voice variants {test_voices}.

**Encoder**: WER {seen_wer:.2%} on new sentences in the training voices, {unseen_wer:.2%} on
held-out sentences in held-out voices ({n_measured} utterances each). Its letters come
{ctc_delay} s late (median), which `config.json` records for word alignment.

**LLM**, exact match on held-out sentences, by prompt:

| task | unquantized, seen / unseen prompts in stage 2 | NF4, seen / unseen |
|---|---|---|
{rows}

"Seen" and "unseen" are stage 2's words: the LLM itself was pre-trained on all prompts and all
tasks, as a real LLM knows more than the connector is taught. *Two turns*: the second question is
about the same utterance; *two utterances*: about another. *Directive as prompt*: it is not spoken
about, but asked, and answered.
"""


def write_card(folder, figures):
    """README.md of the folder that has llm/ and encoder/, from what measured.json says.

    figures: what measured.json holds (pretrain.main).
    """
    rows = []
    for name, unquantized in figures["llm_16_bits"].items():
        in_4_bits = figures["llm_4_bits"][name]
        rows.append(f"| {name} | {percentages(unquantized)} | {percentages(in_4_bits)} |")

    card = CARD.format(
        seed=figures["seed"],
        llm_parameters=millions_of_parameters(folder / "llm" / "model.safetensors"),
        encoder_parameters=millions_of_parameters(folder / "encoder" / "model.safetensors"),
        llm_steps=by_phase(figures["llm_steps"]),
        encoder_steps=by_phase(figures["encoder_steps"]),
        llm_time=figures["llm_time"],
        llm_hesitant=figures["llm_hesitant"],
        llm_blended=figures["llm_blended"],
        encoder_time=figures["encoder_time"],
        utterances=by_phase(figures["utterances"]),
        n_train=len(speech.TRAIN_VARIANTS),
        n_accents=len(speech.ACCENTS),
        test_voices=", ".join(speech.TEST_VARIANTS),
        seen_wer=figures["encoder_wer"]["seen voices"],
        unseen_wer=figures["encoder_wer"]["unseen voices"],
        n_measured=figures["n_measured"],
        ctc_delay=figures["ctc_delay"],
        rows="\n".join(rows),
    )
    write_text(folder / "README.md", card)


def millions_of_parameters(path):
    """How many million numbers the safetensors file holds."""
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys()) / 1e6


def percentages(scores):
    """One task's rates, seen prompts before unseen ones: 99.2% / 100.0%."""
    return " / ".join(f"{value:.1%}" for value in scores.values())


def by_phase(counts):
    """What each phase had: 5000 + 1200 + 800."""
    return " + ".join(str(count) for count in counts)
