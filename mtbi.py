"""MTBI: a frozen speech encoder and a small trained connector give a frozen, 4-bit LLM ears.

    prepare      speech and transcripts, of any common corpus  ->  DATA/manifest.jsonl
    word-times   word times for speech that has none, by CTC forced alignment
    encode       encoder frames beforehand; train and bench make them by themselves
    recognizer   a CTC head on the encoder's frames: for a fair cascade, and for word times
    behaviors    stage 1: the LLM answers the transcripts, over many tasks  ->  RUN/behaviors.jsonl
    train        stage 2, Imitate: the connector learns to get the same answers from the speech
    bench        unseen prompts, unseen tasks, unseen voices  ->  RUN/report.md
    generate     ask a trained model about sound files
    chat         talk to it, in several turns
    inspect      a picture of what it makes of a recording, or of a training example
    serve        a page in the browser: a microphone, every model side by side
    export       a folder of it that can be published, with a model card
    doctor       what will run on this machine, and how to mend what will not
    info         what a run folder is: models, recipes, data, steps, scores
    plan         will it fit my GPU? before anything is loaded
    recipes      the table of recipes
    compare      every recipe, several seeds: which of the papers' claims hold?
    demo         all of it in the tiny world: offline, on a laptop CPU; or on human digits

`python mtbi.py COMMAND --help` explains every option of a command.
"""

import gc
import inspect
import os
import random
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

gc.disable()  # a second less: a million objects of libraries are made, and none is garbage

import support  # noqa: F401  first: torch reads what it sets
import transformers

import app.chat
import app.doctor
import app.export
import app.generate
import app.inspecting
import app.serve
import lab.compare
import lab.demo
import lab.info
import lab.plan
import lab.report
from corpora.digits import download_digits
from corpora.encoding import EncodeOptions, encode_data
from corpora.prepare import PrepareOptions, prepare
from corpora.recognizing import RecognizerOptions, train_recognizer
from corpora.word_times import WordTimesOptions, add_word_times
from data import Behavior, Recipe, chat_parts, fingerprint_of_utterances, load_tasks
from data import open_run, read_manifest, transcript_tokens
from eval import BenchOptions, measure_all, plan_bench
from lab.probes import LooksInto
from model import SpeechLLM, compute_precision, llm_of, shared_llm
from support.answers import answer_all, forget_parts
from support.console import is_out_of_memory, say_device, timed, want_of_memory
from support.files import PROJECT, UserError, WriteError, fingerprint, fingerprint_of_file
from support.files import relative, write_jsonl
from support.hub import absolute_if_local, fingerprint_of_small_files, fingerprint_of_weights
from support.hub import pinned
from support.options import Between, Count, DataFolder, RunFolder, Seed, names_in, parse_options
from support.processes import MAIN, WORLD
from support.runs import IS_PERCENT, begin, finish, is_done, lock_folder, option_before
from support.runs import read_config, settings_of
from train import TrainOptions, train_recipe

gc.freeze()
gc.enable()

# ---- recipes: what makes one paper's system differ from another's ----

MTBI = "multi-task behavior imitation with speech-text interleaving (arXiv 2505.18644)"
# VoiceTextBlender's speech tasks: recognition, translation, and questions about what was said; the
# names are of either task table, and those that a table lacks do not count
SPOKEN_TASKS = ("repeat", "translate*", "who", "where", "what", "how_many", "category", "topic")
SPOKEN_TASKS += ("question_about", "smallest")
# Self-Powered LSM's six kinds of tasks; "category" stands for "intent", which the tiny world lacks
SELF_MADE_TASKS = (
    "repeat",
    "continue",
    "keywords",
    "intent",
    "category",
    "sentiment",
    "translate*",
)

# `repeat` is the share of the task *repeat*, at the start and from half-way on: that schedule is
# ours. We know the papers by their abstracts and code; docs/papers.md says what is whose.
RECIPES = {
    "mtbi": Recipe(MTBI, interleave=0.4, repeat=(1.0, 0.2)),
    "mtbi-no-interleave": Recipe(
        "mtbi without interleaving: what does it add?",
        repeat=(1.0, 0.2),
    ),
    "mtbi-flat": Recipe(
        "mtbi without our schedule that repeats first",
        interleave=0.4,
        repeat=(0.2, 0.2),
    ),
    "mtbi-4": Recipe(
        "mtbi on four tasks of the tiny world; tasks.toml has repeat and two translations",
        tasks=("repeat", "translate*", "who", "numerals"),
        interleave=0.4,
        repeat=(1.0, 0.2),
    ),
    "mtbi-1": Recipe(
        "mtbi on one task, repeat: asr with interleaving",
        tasks=("repeat",),
        interleave=0.4,
        repeat=(1.0, 1.0),
    ),
    "mtbi-kl": Recipe(
        "mtbi that imitates the whole next-token distribution",
        interleave=0.4,
        repeat=(1.0, 0.2),
        loss="kl",
    ),
    "asr": Recipe(
        "the task repeat alone: the baseline that was never shown another task",
        tasks=("repeat",),
        repeat=(1.0, 1.0),
    ),
    "asr-one-prompt": Recipe(
        "asr in one wording, as most ASR tuning is",
        tasks=("repeat",),
        repeat=(1.0, 1.0),
        prompts=1,
    ),
    "asr-sentences": Recipe(
        "asr on sentences alone, which are what blsp can train on",
        tasks=("repeat",),
        repeat=(1.0, 1.0),
        kinds=("sentence",),
    ),
    "blsp": Recipe(
        "the task continue alone, with a convolutional connector (arXiv 2309.00916)",
        tasks=("continue",),
        connector="conv",
    ),
    "blsp-mlp": Recipe(
        "blsp with mtbi's connector and speech tokens: is it the task or the connector?",
        tasks=("continue",),
    ),
    "self-powered": Recipe(
        "Self-Powered LSM: up to six kinds of self-made tasks, Q-Former and LoRA "
        "(arXiv 2410.03798)",
        tasks=SELF_MADE_TASKS,
        repeat=(1.0, 0.2),
        connector="qformer",
        lora=8,
    ),
    "vanilla-it": Recipe(
        "the same model tuned on one ASR instruction and true transcripts: speech anchor bias",
        tasks=("repeat",),
        repeat=(1.0, 1.0),
        prompts=1,
        true_transcripts=True,
        connector="qformer",
        lora=8,
    ),
    "vtb": Recipe(
        "VoiceTextBlender: speech tasks, mixed-modal turns and text-only SFT in one stage, LoRA "
        "(arXiv 2410.17485)",
        tasks=SPOKEN_TASKS,
        repeat=(0.5, 0.2),
        lora=8,
        text_only=0.25,
        mixed=0.25,
    ),
    "vtb-no-text": Recipe(
        "vtb without text-only SFT: are text skills forgotten?",
        tasks=SPOKEN_TASKS,
        repeat=(0.5, 0.2),
        lora=8,
        mixed=0.25,
    ),
    "vtb-no-mixed": Recipe(
        "vtb without mixed-modal turns: do they emerge?",
        tasks=SPOKEN_TASKS,
        repeat=(0.5, 0.2),
        lora=8,
        text_only=0.25,
    ),
    "cascade": Recipe(
        "nothing is trained: a CTC model transcribes, the LLM reads that",
        tasks=(),
        connector="",
    ),
    "text": Recipe(
        "nothing is trained: the LLM reads the true transcript, the top line",
        tasks=(),
        connector="",
    ),
    "copy": Recipe(
        "nothing is trained: the transcript is the answer, the bottom line",
        tasks=(),
        connector="",
    ),
}


def find_recipe(name):
    """The row of a recipe; NAME@PERCENT is NAME on so many percent of the training utterances."""
    row, at, percent = name.partition("@")
    is_well_formed = not at or IS_PERCENT.fullmatch(percent)
    if row not in RECIPES or not is_well_formed:
        raise UserError(
            f"there is no recipe {name!r}; there are {', '.join(RECIPES)}, and each with a part of "
            "the speech alone, like mtbi@10 for 10%"
        )
    return replace(RECIPES[row], speech=int(percent) / 100) if at else RECIPES[row]


def parse_recipes(text):
    """The names in a list separated by commas whose recipes are trained."""
    names = [name for name in names_in(text) if find_recipe(name).connector]
    names = list(dict.fromkeys(names))
    if not names:
        raise UserError(
            "--recipes: names no recipe that is trained; `text`, `copy` and `cascade` are measured "
            "beside any that is"
        )
    return names


# ---- stage 1, Behaviors: the LLM answers the transcripts ----

ALWAYS = ("repeat", "continue")  # asked about every transcript: some recipes train on one of them


@dataclass
class BehaviorsOptions:
    data: DataFolder
    """a data folder made by `prepare`"""
    out: str
    """the run folder to write"""
    force: bool = False
    """do it again, whatever is there"""
    seed: Seed = 0
    """seed of every random choice"""

    # who answers
    llm: str = "tiny"
    """the LLM: `tiny`, a local folder, or a Hugging Face name"""
    bits: Literal[4, 8, 16] = 4
    """load the LLM in 4 (NF4), 8 or 16 (not quantized) bits"""
    head_bits: Literal[4, 16] = 16
    """load its vocabulary projection in 4 (NF4) or 16 bits: a smaller GPU, another LLM"""
    embeddings: Literal["gpu", "host"] = "gpu"
    """where its table of embeddings is: on the host it takes no memory of the GPU, changes no
    result, and costs little time; `train` and `bench` have it where RUN was told to last"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """what the LLM computes in; auto: bf16 on a GPU that has it, fp16 on an older one; on a CPU
    fp32, or bf16 if it has AVX512-BF16 and the LLM is no tiny one"""

    # what is asked
    tasks: str | None = None
    """task table; default: tiny/tasks.toml for the tiny LLM, tasks.toml for any other"""
    per_utterance: Count = 4
    """tasks asked about each transcript, beside repeat and continue"""
    dialogues: Annotated[int, Between(0, 64)] = 1
    """conversations of two turns about each transcript, for recipes with mixed-modal turns"""
    max_new_tokens: Count = 64
    """longest answer, in tokens; longer ones are cut off"""
    batch_size: Count = 128
    """questions the LLM answers at once"""

    MAKES: ClassVar = ("behaviors.jsonl", "behaviors*.part-[0-9]*.jsonl")
    CHANGES_NOTHING: ClassVar = ("out", "batch_size", "embeddings")


def ask_behaviors(options):
    """Stage 1, text only: the LLM answers the training transcripts over the training tasks.

    These answers are the behaviors that stage 2 imitates.
    """
    out, data = Path(options.out), Path(options.data)
    table = options.tasks or PROJECT / (
        "tiny/tasks.toml" if options.llm == "tiny" else "tasks.toml"
    )
    tasks = load_tasks(table)
    utterances = read_manifest(data / "manifest.jsonl")
    options = replace(
        options,
        data=relative(data, out),  # so that both can be moved together
        tasks=relative(table, PROJECT),
        llm=pinned(absolute_if_local(options.llm), "llm", option_before(out, options, "llm")),
        precision=compute_precision(options.precision, options.llm),
    )
    content = {
        "utterances": fingerprint_of_utterances(utterances),
        "llm": fingerprint_of_weights(options.llm, "llm"),
        "llm_files": fingerprint_of_small_files(options.llm, "llm"),
        "task_table": fingerprint_of_file(table),
    }
    utterances = [u for u in utterances if u.split == "train"]
    if not utterances:
        raise UserError(
            f"{data / 'manifest.jsonl'}: has no row with split train; run prepare first"
        )
    if has_behaviors(out, options, content):
        move_embeddings(out, options, content)
        return
    say_device()
    model = SpeechLLM(*shared_llm(*llm_of(asdict(options), options.precision)))
    with lock_folder(out), timed("behaviors"):
        if has_behaviors(out, options, content):  # of another process, while this one loaded it
            return
        if options.force:
            forget_parts(out / "behaviors*")
        begin(out, "behaviors", options, content)
        asked = fingerprint([settings_of(options, content), model.fingerprint])
        found = ask_llm(model, tasks, utterances, options, asked)
        write_jsonl(out / "behaviors.jsonl", [asdict(b) for b in found])
        finish(out, "behaviors", options, content)
        forget_parts(out / "behaviors*")
    show_behaviors(out, found, utterances, options)


def has_behaviors(out, options, content):
    """True, and says so, if they were made with these options; UserError if with others."""
    half_way = "behaviors.part-[0-9]*"
    if is_done(out, "behaviors", options, content, "behaviors.jsonl", half_way=half_way):
        print(f"{out}: has its behaviors already")
        return True
    return False


def move_embeddings(out, options, content):
    """Let train and bench have the table of embeddings of a run that is done in another place."""
    before, _, _ = read_config(out, "behaviors")
    if before.get("embeddings", "gpu") != options.embeddings:
        with lock_folder(out):
            finish(out, "behaviors", options, content)
        place = options.embeddings
        print(f"train and bench have its table of embeddings on the {place} from now on")


def ask_llm(model, tasks, utterances, options, asked):
    """The behaviors: first of one turn, then, with these as first turns, of two.

    asked: a fingerprint of the LLM and of the settings, as answer_all has it.
    """
    texts = {u.id: u.text for u in utterances}
    kept = Path(options.out) / "behaviors"
    questions = draw_questions(tasks, utterances, options.per_utterance, options.seed)
    print(
        f"{len(questions)} questions about {len(utterances)} transcripts: {' and '.join(ALWAYS)}, "
        f"and {options.per_utterance} of the other training tasks each"
    )
    found = answer_in_text(model, questions, texts, options, kept, asked)
    if not found:
        raise UserError(f"LLM {options.llm}: gives no answer to any question")
    later = draw_second_questions(tasks, utterances, found, options.dialogues, options.seed)
    kept = kept.with_name("behaviors-dialogues")
    return found + answer_in_text(model, later, texts, options, kept, asked)


def answer_in_text(model, questions, texts, options, kept, asked):
    """The LLM's own answers to questions about transcripts; texts: {Utterance.id: transcript}."""

    def conversation(at):
        q = questions[at]
        transcripts = [[transcript_tokens(model.tokenizer, texts[i])] for i in q.utterances()]
        return chat_parts(model.tokenizer, q.messages(), transcripts)

    answers = answer_all(
        model,
        conversation,
        sort_keys=[(q.task, len(texts[q.utterance])) for q in questions],  # alike share a batch
        desc=kept.name,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        kept=kept,
        asked=asked,
    )
    found = []
    for q, (answer, ended) in zip(questions, answers):
        if answer or ended:
            found.append(replace(q, response=answer, ended=ended, llm=model.fingerprint))
    return found


def show_behaviors(out, found, utterances, options):
    """How many there are, and three of them."""
    cut = sum(not b.ended for b in found)
    texts = {u.id: u.text for u in utterances}
    said = f"{out / 'behaviors.jsonl'}: {len(found)} behaviors"
    if cut:
        said += (
            f"; {cut} were cut off at --max-new-tokens {options.max_new_tokens}: their beginning "
            "is imitated, and no end"
        )
    print(said)
    for b in found[:3]:
        print(f"  {b.prompt}  [{texts[b.utterance]}]  ->  {' '.join(b.response.split())}")


def training_tasks(tasks, utterance):
    """The tasks that may be asked of an utterance in training."""
    return [t for t in tasks.values() if t.split == "train" and t.applies(utterance.text)]


def draw_questions(tasks, utterances, per_utterance, seed):
    """Behaviors that lack their response: training tasks and training prompts only."""
    # the word is a part of the seed: with another one, other questions would be drawn
    rng = random.Random(f"imitate-{seed}")
    questions = []
    for u in utterances:
        fitting = training_tasks(tasks, u)
        always = [t for t in fitting if t.name in ALWAYS]
        others = [t for t in fitting if t.name not in ALWAYS]
        for task in always + rng.sample(others, min(per_utterance, len(others))):
            questions.append(Behavior(u.id, task.name, rng.choice(task.prompts), ""))
    return questions


def draw_second_questions(tasks, utterances, behaviors, n_each, seed):
    """Questions of a second turn, n_each for an utterance, after turns that are answered already.

    Half of them are about the utterance of the first turn once more; the first turn of the others
    is any behavior at all, by chance one of the same utterance or task.
    """
    rng = random.Random(f"dialogues-{seed}")
    questions = []
    about = {}  # utterance id -> the behaviors about it
    for b in behaviors:
        about.setdefault(b.utterance, []).append(b)
    for u in utterances * n_each:
        fitting = training_tasks(tasks, u)
        if not fitting:
            continue
        again = rng.random() < 0.5
        task = rng.choice(fitting)
        first = rng.choice(about.get(u.id, behaviors) if again else behaviors)
        questions.append(
            Behavior(
                u.id,
                task.name,
                rng.choice(task.prompts),
                response="",
                earlier=[[first.prompt, first.utterance, first.response]],
                again=again and first.utterance == u.id,
            )
        )
    return questions


# ---- the other commands ----


def train_named(options):
    """Stage 2: train the connector (and the adapter, if the recipe has one) on RUN's behaviors.

    It goes to RUN/RECIPE.
    """
    row = find_recipe(options.recipe)
    if row.connector:
        train_recipe(options, row)
    else:
        print(f"{options.recipe}: {row.about}; `bench` measures it beside the others")


def bench_run(options):
    """Score RUN's trained recipes beside the top line and the cascade on held-out speech.

    Writes report.md, report.json, answers.csv (a row for every answer) and plots: into RUN for the
    speech that RUN was made from, into RUN/on/NAME for another data folder.
    """
    if options.recipes:
        options = replace(options, recipes=",".join(parse_recipes(options.recipes)))
    planned = plan_bench(options, list(RECIPES))
    report = None if options.force else lab.report.earlier_report(planned)
    if report:
        print(f"{planned.folder / 'report.md'}: is written already")
    else:
        with planned.at_work():
            report = lab.report.write_report(measure_all(planned, LooksInto))
    lab.report.show(report, planned.folder)


def generate(options):
    """Ask a trained model about sound files, each by itself, or go on with a conversation.

    The answers stream.
    """
    app.generate.answer_questions(options, list(RECIPES))


def chat(options):
    """Talk to a trained model, in several turns of speech and text."""
    app.chat.talk(options, list(RECIPES))


def inspect_inside(options):
    """Draw what a trained model makes of a recording, from the sound to the LLM's attention.

    Or one conversation of its training, with what is text, what is speech, and what carries loss.
    """
    app.inspecting.draw_inside(options, list(RECIPES))


def serve(options):
    """A page in the browser: speak to the models of a run, side by side, and look inside them."""
    app.serve.serve_page(options, list(RECIPES))


def export(options):
    """Make a folder of a trained recipe that can be published as it is, with a model card."""
    app.export.write_folder(options, list(RECIPES))


@dataclass
class InfoOptions:
    run: RunFolder
    """a run folder made by `behaviors`"""


def info(options):
    """Print what a run folder is: its models, recipes, data, steps and scores. Loads no model."""
    print("\n".join(lab.info.describe_run(open_run(options.run), list(RECIPES))))


@dataclass
class RecipesOptions:
    pass


def recipes(options):
    """Print the table of recipes; each is a row of RECIPES, and a row more is a recipe more."""
    for name, recipe in RECIPES.items():
        changed = [f"{column} {value}" for column, value in recipe.changed().items()]
        print(f"{name:<20} {recipe.about}")
        print(f"{'':<20} {', '.join(changed) if recipe.connector else 'no training'}")
    print("\nThe class Recipe in data.py explains each value; one that is not named is as there.")


def compare_recipes(options):
    """Train and benchmark every recipe with several seeds, and test each paper's claims.

    Writes OUT/report.md.
    """
    names = ",".join(RECIPES) if options.recipes == "all" else options.recipes
    lab.compare.compare(options, run_command, parse_recipes(names))


def demo(options):
    """The whole pipeline, the other commands in a row: in the tiny world, or on human voices."""
    lab.demo.show_demo(options, run_command, download_digits)


# ---- the command line ----

COMMANDS = {  # the dataclass of its options, and the function that does it
    "prepare": (PrepareOptions, prepare),
    "word-times": (WordTimesOptions, add_word_times),
    "encode": (EncodeOptions, encode_data),
    "recognizer": (RecognizerOptions, train_recognizer),
    "behaviors": (BehaviorsOptions, ask_behaviors),
    "train": (TrainOptions, train_named),
    "bench": (BenchOptions, bench_run),
    "generate": (app.generate.GenerateOptions, generate),
    "chat": (app.chat.ChatOptions, chat),
    "inspect": (app.inspecting.InspectOptions, inspect_inside),
    "serve": (app.serve.ServeOptions, serve),
    "export": (app.export.ExportOptions, export),
    "doctor": (app.doctor.DoctorOptions, app.doctor.examine),
    "info": (InfoOptions, info),
    "plan": (lab.plan.PlanOptions, lab.plan.plan),
    "recipes": (RecipesOptions, recipes),
    "compare": (lab.compare.CompareOptions, compare_recipes),
    "demo": (lab.demo.DemoOptions, demo),
}
TOGETHER = ("encode", "behaviors", "train", "bench")  # what several processes can share


def run_command(words):
    """One command, given as the words of its command line."""
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}; there are {', '.join(COMMANDS)}")
    if WORLD > 1 and name not in TOGETHER:
        raise UserError(
            f"{name} runs in one process; {', '.join(TOGETHER)} are what torchrun and accelerate "
            "can start several times"
        )
    options_class, function = COMMANDS[name]
    about = inspect.getdoc(function)
    options = parse_options(options_class, list(words[1:]), f"mtbi.py {name}", about)
    function(options)


def main(words=None):
    """Run a command; what a user can mend is said in one line, with exit code 2."""
    transformers.logging.set_verbosity_error()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' advice to developers
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console without "ñ" is no reason to stop
    if not MAIN:
        sys.stdout = open(os.devnull, "w")  # the first process talks
    try:
        run_command(sys.argv[1:] if words is None else words)
    except BrokenPipeError:  # `info RUN | head`: who reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, WriteError, OSError) as error:
        print(f"mtbi: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, WriteError) else 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"mtbi: {want_of_memory(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "mtbi: interrupted; the same command goes on where it can (--force begins anew)",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
