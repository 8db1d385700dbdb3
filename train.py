"""Stage 2, Imitate: the frozen LLM is to answer speech as it answered the transcripts.

The connector learns that. One loop for every recipe, on one GPU, several, or a CPU. Interrupted or
killed at any point, it goes on; on a CPU it ends with the very same weights.

    python train.py RUN --recipe mtbi
"""

import math
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import support  # noqa: F401  first: torch reads what it sets
import torch
from tqdm import tqdm

from data import FULL, Examples, Speech, open_run, read_behaviors
from model import FULL_WEIGHTS, LOSSES, SpeechLLM, check_size, compute_precision, connector_class
from model import embedding_width, encode_all, fingerprint_of_encoder, llm_of, load_encoder
from model import load_llm, pinned_encoder, shared_llm
from support.adam import RoomyAdamW
from support.ahead import ahead
from support.console import is_out_of_memory, progress_bar, say_device, stop_signals, timed
from support.files import UserError, explained, fingerprint, fingerprint_of_file, first_line
from support.frames import FramesAtEveryUse, fingerprint_of_audio
from support.hub import parameters_of
from support.logs import Log
from support.options import Count, FramesPerToken, RankOrFull, Rate, RunFolder, Seed
from support.options import as_option, check
from support.processes import DEVICE, RANK, WORLD, add_up, add_up_gradients, anyone, my_share
from support.runs import begin, finish, is_done, lock_folder, option_before, read_config
from support.runs import settings_of
from support.states import ON_THE_WAY, TRAINED, clear, load_state, save_state, saved_states
from support.tracking import TRACKERS, Tracker

PEAK_AT_192 = 4e-3  # the best peak learning rate for the tiny LLM; see docs/notes.md
SHARE_OF_FULL = 0.1  # of the learning rate, for all of an LLM that is trained: a guess
CHECKPOINT_FROM = 2.5e9  # parameters; "3B" models count 3.1e9
FIRST_SCALE = 2.0**14  # of the loss in fp16
LARGEST_NORM = 1.0  # of the gradient, which is clipped to it
SKIPS_ALLOWED = 20  # steps in a row without a finite gradient; after them the training stops


# ---- options ----


@dataclass
class TrainOptions:
    run: RunFolder
    """a run folder made by `behaviors`"""
    recipe: str = "mtbi"
    """a row of the table that `recipes` prints; NAME@10 is NAME on 10% of the speech"""
    resume: bool = False
    """go on with a training that was interrupted, with the options it was begun with, whatever
    else is said here (the same command as before goes on, too)"""
    force: bool = False
    """train again, whatever is there"""
    seed: Seed = 0
    """seed of every random choice"""

    # the two ends of the connector
    encoder: str = "tiny"
    """the speech encoder: `tiny`, a local folder, or a Hugging Face name"""
    pad_whisper: bool = False
    """run a Whisper encoder on 30 s of padding instead of the audio's own length"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """what the LLM computes in; auto: bf16 on a GPU that has it, fp16 on an older one; on a CPU
    fp32, or bf16 if it has AVX512-BF16 and the LLM is no tiny one; what is trained is
    always fp32"""

    # what is trained; None: as the recipe has it, or derived, which is printed with its reason
    connector: str | None = None
    """a key of CONNECTORS in model.py, like stack-mlp; default: the recipe's"""
    loss: str | None = None
    """a key of LOSSES in model.py, like ce (the LLM's answer) or kl (its whole distribution);
    default: the recipe's"""
    lora: RankOrFull | None = None
    """rank of a LoRA adapter on the LLM, 0 for none; full: all of the LLM is trained, which needs a
    run whose `behaviors` were made with --bits 16; default: the recipe's"""
    k: FramesPerToken | None = None
    """encoder frames per speech token; default: by the encoder's frame rate and the recipe's speech
    tokens a second"""
    hidden: Count | None = None
    """width of the connector's hidden layer; default: by the connector and the LLM's width"""

    # how it is trained
    steps: Count = 1000
    """training steps"""
    batch_size: Count = 32
    """conversations in a micro-batch"""
    accumulate: Count = 1
    """micro-batches in a step; several processes divide the step among them"""
    lr: Rate | None = None
    """peak learning rate; default: by the LLM's width and the connector's share"""

    # what changes no weight
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """compute activations again in the backward pass instead of keeping them; auto: from 2.5
    billion parameters on"""
    cache_features: Literal["disk", "ram", "off"] = "disk"
    """keep encoder frames on disk (memory-mapped), in ram, or off: encode at every use, up to 24
    batches at once, as batches are drawn together"""
    save_every: Count = 100
    """steps between two saved states; the last two are kept"""
    keep_states: bool = False
    """keep all saved states, so that `bench --step` can measure how the training went"""
    track: Literal[TRACKERS] = "off"
    """also show the log in TensorBoard (RUN/tensorboard) or in Weights & Biases, which are packages
    of their own"""

    # support/runs.py reads both: what this command may write, and which options may be others
    # when it goes on
    MAKES: ClassVar = TRAINED + ON_THE_WAY
    CHANGES_NOTHING: ClassVar = (
        "run",
        "resume",
        "gradient_checkpointing",
        "cache_features",
        "save_every",
        "keep_states",
        "track",
    )


# ---- the command: load, build, train, save ----


def train_recipe(options, row):
    """Stage 2: train the connector (and the adapter, if the recipe has one) on RUN's behaviors.

    row: the recipe's row of the table.
    """
    folder = Path(options.run) / options.recipe
    if options.resume:
        options = options_as_before(options, folder)
    run = open_run(options.run)
    recipe = with_options(row, options)
    if recipe.lora == FULL:
        check_all_trainable(run, options)
        options = replace(options, precision="fp32")  # as all that is trained
    options = replace(
        options,
        encoder=pinned_encoder(options.encoder, option_before(folder, options, "encoder")),
        precision=compute_precision(options.precision, run.options["llm"]),
    )
    utterances = [u for u in run.utterances if u.split == "train"]
    content = made_from(run, utterances, recipe, options)
    if is_trained(folder, options, content):
        return
    say_device()
    tracker = Tracker(options.track, folder, asdict(options))

    model, spec, examples = build(run, utterances, recipe, options)
    checkpoint_if_large(model, options.gradient_checkpointing)
    lr = peak_rate(options.lr, model, connector_class(recipe.connector).lr_share)
    with lock_folder(folder):
        # by another process, while this one loaded its models?
        if is_trained(folder, options, content):
            return
        clear(folder, options.force)
        begin(folder, "train", options, content)
        with timed(f"train {options.recipe}"), tracker:
            train(
                model,
                examples,
                folder,
                lr=lr,
                save_every=options.save_every,
                keep=None if options.keep_states else 2,
                made_with=fingerprint(settings_of(options, content)),
                track=tracker.log,
            )
        model.save(folder, spec)
        finish(folder, "train", options, content)


def is_trained(folder, options, content):
    """True, and says so, if it was trained with these options; UserError if with others."""
    advice = "make another RUN with `behaviors`, or --force to redo it"
    trained, half_way = "connector.safetensors", "state/[0-9]*"
    if is_done(folder, "train", options, content, trained, half_way=half_way, advice=advice):
        print(f"{folder}: is trained already")
        return True
    return False


def options_as_before(options, folder):
    """The options that the training in `folder` was begun with."""
    before, _, _ = read_config(folder, "train", recipe=str, encoder=str)
    if not saved_states(folder):
        raise UserError(f"{folder}: there is no saved state to resume from; train without --resume")
    with explained(f"{folder}: its config.json holds options that are none", TypeError):
        before |= {"run": options.run, "resume": True, "force": False}
        options = replace(options, **before)
        check(options)
    return options


def with_options(row, options):
    """The recipe, with what the command line says otherwise."""
    changed = {}
    for name in ("connector", "loss", "lora"):
        if getattr(options, name) is not None:
            changed[name] = getattr(options, name)
    recipe = replace(row, **changed)
    # what cannot be trained is said before all speech is encoded
    connector_class(recipe.connector).check(options.k, options.hidden)
    recipe.check()
    if recipe.loss not in LOSSES:
        raise UserError(f"there is no loss {recipe.loss!r}; there are {', '.join(LOSSES)}")
    return recipe


def check_all_trainable(run, options):
    """UserError unless the LLM of a run can be trained as a whole."""
    another, same = "make another RUN:", "this run can change that:"
    whole = {"bits": (16, another), "head_bits": (16, another), "embeddings": ("gpu", same)}
    for name, (wanted, advice) in whole.items():
        if run.options[name] != wanted:
            raise UserError(
                f"{run.folder}: all of the LLM is to be trained (--lora {FULL}), and this run has "
                f"its LLM with {as_option(name)} {run.options[name]}; {advice} `behaviors` with "
                f"{as_option(name)} {wanted}"
            )
    if options.precision not in ("auto", "fp32"):
        raise UserError(
            f"--precision {options.precision}: with --lora {FULL} the LLM is trained, and what is "
            "trained is in fp32; leave --precision out"
        )


def made_from(run, utterances, recipe, options):
    """Fingerprints of all that a training depends on beside its options."""
    run.check_llm()
    changed = recipe.changed()  # so that a field added to Recipe changes no earlier training
    share = connector_class(recipe.connector).lr_share
    if share != 1:  # no field of a Recipe, and the weights depend on it; lab/look.py leaves it out
        changed["lr"] = share
    return {
        "recipe": changed,
        "llm": run.content["llm"],
        **run.packing(),
        "encoder": fingerprint_of_encoder(options.encoder),
        "audio": fingerprint_of_audio(utterances, run.data / "features"),
        "behaviors": fingerprint_of_file(run.folder / "behaviors.jsonl"),
        "manifest": fingerprint_of_file(run.data / "manifest.jsonl"),
    }


def build(run, utterances, recipe, options):
    """(model, its spec, examples): everything that is loaded or derived before the first step."""
    behaviors = read_behaviors(run.folder / "behaviors.jsonl")
    encoder = load_encoder(options.encoder, options.pad_whisper)
    # the frames come before the LLM, which needs the memory
    frames = encode_all(encoder, utterances, run.data / "features", options.cache_features)
    load = shared_llm
    if recipe.lora:
        shared_llm.cache_clear()  # with an adapter it is nobody else's, and two may be too many
        load = load_llm
    llm = load(*llm_of(run.options, options.precision))
    spec = {
        "llm": run.options["llm"],
        **run.packing(),
        "embeddings": run.options["embeddings"],
        "encoder": options.encoder,
        "pad_whisper": options.pad_whisper,
        "connector": recipe.connector,
        "lora": recipe.lora,
        **connector_size(options, recipe, embedding_width(llm[0]), encoder),
    }
    model = SpeechLLM.build(spec, llm, encoder, options.seed)
    for b in behaviors:
        if b.llm not in ("", model.fingerprint):
            raise UserError(
                f"{run.folder / 'behaviors.jsonl'}: was answered by another LLM ({b.llm}) than the "
                f"one that is now at {spec['llm']} ({model.fingerprint}); run `behaviors` again "
                "with --force"
            )
    examples = Examples(
        model.tokenizer,
        utterances,
        behaviors,
        frames,
        recipe,
        k=spec["k"],
        steps=options.steps,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        seed=options.seed,
        with_teacher=LOSSES[recipe.loss].has_teacher,
    )
    explain(model, examples)
    return model, spec, examples


# ---- derived numbers, each printed once with its reason ----


def connector_size(options, recipe, llm_width, encoder):
    """{"k", "hidden"}: as asked for, or derived; prints them with their reasons.

    UserError if there is no memory to train a connector of that size.
    """
    body = connector_class(recipe.connector)
    if options.k:
        k, why = options.k, "as asked by --k"
    else:
        k = body.frames_per_token(encoder.frame_rate, recipe.tokens_per_second)
        why = (
            f"because the encoder gives {encoder.frame_rate:.1f} frames/s and the recipe wants "
            f"about {recipe.tokens_per_second} speech tokens/s"
        )
    print(f"k: {k} encoder frames per speech token, {why}")
    if options.hidden:
        hidden, why = options.hidden, "as asked by --hidden"
    else:
        hidden, why = body.hidden_width(llm_width)
    print(f"hidden: {hidden}, {why}")
    # its gradients, too, and AdamW's two moments, which leave a GPU that is full
    copies = 4 if DEVICE == "cpu" else 2
    check_size(recipe.connector, encoder.width, llm_width, k, hidden, copies)
    return {"k": k, "hidden": hidden}


def peak_rate(asked, model, share):
    """The peak learning rate: as asked for, or derived."""
    width = embedding_width(model.llm)
    if asked:
        lr, why = asked, "as asked by --lr"
    else:
        lr = share * PEAK_AT_192 * 192 / max(192, width)
        why = (
            f"{share:g} times {PEAK_AT_192}, which was best for `mtbi` and an LLM of width 192; "
            f"this one's is {width}, and the wider, the smaller"
        )
    if model.lora == FULL:
        why += f"; {SHARE_OF_FULL:g} times that for the LLM, which has learnt before"
    print(f"learning rate: {lr:.2g} at its peak, {why}")
    return lr


def checkpoint_if_large(model, choice):
    """Gradient checkpointing, as asked for, or by the size of the LLM."""
    size = parameters_of(model.llm.config)
    on = choice == "on" or (choice == "auto" and size >= CHECKPOINT_FROM)
    if on:
        model.checkpoint_gradients()
    why = "as asked"
    if choice == "auto":
        side, matters = ("from", "less memory") if on else ("below", "speed")
        why = (
            f"because the LLM has {size / 1e9:.2g} billion parameters, and {side} "
            f"{CHECKPOINT_FROM / 1e9} billion {matters} matters more"
        )
    print(f"gradient checkpointing: {'on' if on else 'off'}, {why}")


def explain(model, examples):
    """Print how much speech there is, what a step is, and how much is trained."""
    n = len(examples.trained_on)
    seconds = sum(u.duration for u in examples.trained_on)
    rate, k = model.encoder.frame_rate, model.connector.k
    print(
        f"speech: {n} utterances, {seconds / 60:.1f} minutes; {rate:.1f} encoder frames/s / k = "
        f"{rate / k:.1f} speech tokens/s"
    )
    step = examples.batch_size * examples.accumulate
    print(
        f"batch: {examples.batch_size} x accumulation {examples.accumulate} = {step} conversations "
        f"a step; {examples.steps} steps = {examples.steps * step / n:.1f} for each utterance"
    )
    trainable = sum(p.numel() for p in model.trainable().values())
    if model.lora == FULL:
        adapter, frozen = ", all of the LLM", "the encoder is frozen"
    else:
        bits = "NF4" if getattr(model.llm, "is_loaded_in_4bit", False) else "not 4-bit"
        adapter = ", LoRA" if model.lora else ""
        frozen = f"the LLM ({bits}) and the encoder are frozen"
    print(
        f"trainable: {trainable / 1e6:.2f}M parameters in fp32 (connector "
        f"{examples.recipe.connector}{adapter}); {frozen}"
    )


# ---- one step ----


@dataclass
class Progress:
    """Where a training is.

    With the weights and the optimizer's moments this is all there is to save: the learning rate and
    the data are functions of (seed, step), and so is the dropout of each piece.
    """

    step: int = 0  # steps done
    halvings: int = 0  # how often the micro-batch was halved for want of memory
    skipped: int = 0  # steps left out so far, as their loss or gradient was not finite
    in_a_row: int = 0  # how many of the latest steps were left out, one after the other
    loss_scale: float = 1.0  # fp16: the loss times this, so that small gradients do not vanish
    scale_steps: int = 0  # fp16: steps since one overflowed

    def advance(self, finite):
        """One step more, taken or skipped."""
        self.step += 1
        self.skipped += int(not finite)
        self.in_a_row = 0 if finite else self.in_a_row + 1

    def is_stuck(self):
        """Were so many steps in a row skipped that going on makes no sense?"""
        return self.in_a_row == SKIPS_ALLOWED

    def adjust_loss_scale(self, finite):
        """fp16: halve the scale after a step that overflowed, double it after 2000 that did not."""
        self.scale_steps = self.scale_steps + 1 if finite else 0
        if not finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.scale_steps % 2000 == 0:
            self.loss_scale *= 2


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, at most half of all, then a cosine to zero."""
    warmup = min(warmup, max(1, steps // 2))
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Piece:
    """Conversations that go through the model at once."""

    examples: list
    dropout_seed: str

    def tokens(self):
        """How many response tokens carry loss."""
        return sum(len(example.parts[-1].ids) for example in self.examples)

    def frames(self):
        """How many encoder frames are heard."""
        frames = 0
        for example in self.examples:
            frames += sum(len(part.frames) for part in example.parts if isinstance(part, Speech))
        return frames

    def pinned(self):
        """The same, with its frames where a GPU can copy them from while Python goes on."""
        examples = []
        for example in self.examples:
            parts = []
            for part in example.parts:
                is_speech = isinstance(part, Speech)
                parts.append(Speech(part.frames.pin_memory()) if is_speech else part)
            examples.append(replace(example, parts=parts))
        return Piece(examples, self.dropout_seed)

    def split(self, size):
        """The same in pieces of at most `size` conversations."""
        pieces = [Piece(self.examples[:size], self.dropout_seed)]
        for at in range(size, len(self.examples), size):
            pieces.append(Piece(self.examples[at : at + size], f"{self.dropout_seed}-{at}"))
        return pieces


def pieces_of_step(examples, step):
    """This process's share of a step: a Piece for each of its micro-batches.

    It has whole ones, if every process can have as many; else a part of each.
    """
    whole = examples.accumulate % WORLD == 0
    pieces = []
    for micro in range(examples.accumulate):
        seed = f"dropout-{examples.seed}-{step}-{micro}"
        if whole:
            if micro % WORLD == RANK:
                pieces.append(Piece(examples.batch(step, micro), seed))
            continue
        share = my_share(examples.batch(step, micro))
        if share:  # of a small one a process may have no row
            pieces.append(Piece(share, f"{seed}-{RANK}"))
    return pieces


def split_to_fit(pieces, progress):
    """The pieces, each halved as often as memory was wanting so far.

    The loss stays a mean over the step, however it is divided; only its dropout is drawn anew.
    """
    smaller = []
    for piece in pieces:
        smaller += piece.split(max(1, len(piece.examples) // 2**progress.halvings))
    return smaller


def steps_ahead(examples, first):
    """The pieces of each step from the first one on: a context, of an iterator (support/ahead.py).

    On a GPU a thread makes those of the next two steps while the GPU computes. What a step is does
    not depend on when it is made. Where the encoder hears at every use, nothing is made ahead: it
    would take its memory beside that of the step.
    """
    on_gpu = DEVICE != "cpu"
    kept = not isinstance(examples.frames, FramesAtEveryUse)

    def make(step):
        pieces = pieces_of_step(examples, step)
        try:
            return [piece.pinned() for piece in pieces] if on_gpu else pieces
        except RuntimeError:  # no more memory may be pinned; it only saves time
            return pieces

    return ahead(make, range(first, examples.steps), threads=int(on_gpu and kept))


def accumulate_gradients(model, pieces, tokens, loss="ce", scale=1.0):
    """Forward and backward of this process's pieces of a step; returns its share of the loss.

    tokens: the response tokens of the whole step, over all processes. Every sum is divided by that
    number, so that loss and gradient are the same however the step is divided. The gradients are
    added up in the parameters.
    """
    mean = 0.0
    for piece in pieces:
        torch.manual_seed(random.Random(piece.dropout_seed).getrandbits(62))
        batch = [example.parts for example in piece.examples]
        teacher = [example.teacher for example in piece.examples]
        summed = model(batch, teacher, loss)  # over the response tokens of the piece
        (summed * (scale / tokens)).backward()
        mean += summed.item() / tokens
    return mean


def step_gradients(model, pieces, progress, loss="ce"):
    """The gradients of a step, over all processes: (loss, response tokens, encoder frames).

    pieces: this process's share. Where a GPU's memory does not suffice, once more in pieces of half
    the size, and so from then on.
    """
    counts = [sum(p.tokens() for p in pieces), sum(p.frames() for p in pieces)]
    tokens, frames = (int(count) for count in add_up(counts))
    while True:
        fitting = split_to_fit(pieces, progress)
        try:
            mean = accumulate_gradients(model, fitting, tokens, loss, progress.loss_scale)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        halve_pieces(model, fitting, progress, why)
    add_up_gradients(model.trainable().values())
    return add_up([mean])[0], tokens, frames


def halve_pieces(model, pieces, progress, why):
    """After a step that found no memory; UserError if a piece is one conversation already."""
    size = max(len(piece.examples) for piece in pieces)
    if size <= 1:
        raise UserError(
            f"one utterance at a time is still too much for this GPU ({why}); `plan` says what "
            "fits: a smaller LLM, --bits 4, --gradient-checkpointing on, --cache-features disk"
        )
    progress.halvings += 1
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    tqdm.write(
        f"out of memory with micro-batches of {size}: from step {progress.step} on {size // 2} at "
        "a time and twice the accumulation; the step stays the same but for its dropout",
        file=sys.stderr,
    )


def update(optimizer, parameters, loss, progress):
    """Clip the gradients and take the step, unless they or the loss are not finite.

    Returns (gradient norm, was the step taken).
    """
    for p in parameters:
        if p.grad is not None:
            p.grad /= progress.loss_scale
    norm = torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM).item()
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        try:
            optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # not even for a piece of them; some weights are changed, so there is no way back
            raise UserError(
                f"no memory for the optimizer's moments ({first_line(error)}); train again with "
                "--force, half the --batch-size and twice the --accumulate; `plan` says what fits"
            ) from None
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


# ---- the loop ----


def train(
    model,
    examples,
    folder,
    *,
    lr,
    warmup=50,
    save_every=100,
    keep=2,
    made_with="",
    track=None,
):
    """Train what is trainable of `model` on `examples` for examples.steps steps.

    It resumes from the newest state in folder/state; keep: how many stay there, None: all.
    made_with: a fingerprint of the settings, so that the state of another training is not taken for
    one of this. track: gets each row of the log, too. Writes folder/log.jsonl and, every
    `save_every` steps and when it is interrupted, a state. UserError if there is no finite gradient
    any more.
    """
    folder, steps = Path(folder), examples.steps
    parameters = model.trainable()
    optimizer = adam_w(parameters, lr)
    fp16 = model.llm.get_input_embeddings().weight.dtype == torch.float16
    progress = where_it_was(folder, parameters, optimizer, fp16, made_with, steps)
    optimizer.prepare()  # makes its moments, so that a lack of memory shows now
    log = Log(folder / "log.jsonl", progress.step, track)
    bar = progress_bar(desc=f"train {folder.name}", initial=progress.step, total=steps, unit="step")

    model.train()
    with stop_signals() as wants_to_stop, bar, steps_ahead(examples, progress.step) as made:
        for pieces in made:
            # The rate follows from the step alone, so that it need not be saved.
            rate = learning_rate(progress.step, steps, lr, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]  # less for all of an LLM's weights: see adam_w

            # Forward and backward over all pieces: the gradients of the token-weighted mean loss.
            loss, tokens, frames = step_gradients(model, pieces, progress, examples.recipe.loss)

            # AdamW changes the connector (and an adapter), unless something is not finite.
            norm, finite = update(optimizer, list(parameters.values()), loss, progress)
            seconds = frames / model.encoder.frame_rate
            log.add(progress.step, finite, loss, rate, norm, tokens, seconds)
            progress.advance(finite)
            if fp16:
                progress.adjust_loss_scale(finite)
            bar.set_postfix(log.shown(progress.skipped), refresh=False)
            bar.update()

            # Save now and then, at the end, and where it stops on the way.
            stop = anyone(wants_to_stop)
            leaves = progress.step == steps or stop or progress.is_stuck()
            if leaves or progress.step % save_every == 0:
                log.write()  # first: what it is ahead of the state is dropped on resuming
                save_state(folder, parameters, optimizer, progress, made_with, keep)
            leave_if_it_stops(folder, progress, steps, stop)
    say_skipped(folder, progress)
    return model.train(False)


def where_it_was(folder, parameters, optimizer, fp16, made_with, steps):
    """The Progress to go on from: of the newest state, which is put back, or of a beginning."""
    start = Progress(loss_scale=FIRST_SCALE if fp16 else 1.0)
    progress = load_state(folder, parameters, optimizer, start, made_with)
    if progress.step < steps:  # after a stop for want of finite gradients it may try as often again
        progress.in_a_row = 0
    return progress


def leave_if_it_stops(folder, progress, steps, stop):
    """Leave the loop on the way, its state saved.

    UserError if there is no finite gradient any more, KeyboardInterrupt if somebody wants to stop.
    """
    if progress.is_stuck():
        raise UserError(explain_skips(folder, progress))
    if stop:
        print(f"\ninterrupted; {progress.step} of {steps} steps are saved in {folder}")
        raise KeyboardInterrupt


def adam_w(parameters, lr):
    """AdamW with the momenta that Transformers are usually trained with, and little decay.

    `share` of a group: of the learning rate.
    """
    of_the_llm = [p for name, p in parameters.items() if FULL_WEIGHTS in name]
    others = [p for name, p in parameters.items() if FULL_WEIGHTS not in name]
    groups = [{"params": others, "share": 1.0}]
    if of_the_llm:
        groups.append({"params": of_the_llm, "share": SHARE_OF_FULL})
    return RoomyAdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


def say_skipped(folder, progress):
    """How many steps were skipped; UserError if they were all, or all at the end."""
    if progress.is_stuck() or progress.skipped == progress.step:
        raise UserError(explain_skips(folder, progress))
    if progress.skipped:
        print(
            f"{progress.skipped} of {progress.step} steps were skipped, because their loss or "
            "gradient was not finite"
        )


def explain_skips(folder, progress):
    if progress.skipped == progress.step:
        return (
            f"{folder}: no step gave a finite loss and gradient, so the weights of the LLM or of "
            "the encoder must be damaged, or --precision too small"
        )
    return (
        f"{folder}: the last {SKIPS_ALLOWED} steps gave no finite loss and gradient; the weights "
        "from before them are saved; lower --lr and train again with --force"
    )


if __name__ == "__main__":  # the same as `python mtbi.py train`
    from mtbi import main

    sys.exit(main(["train", *sys.argv[1:]]))
