"""The command line: every option of every command, with its default and what it does."""

import argparse

from connectors import CONNECTORS
from features import KEEP
from files import UserError
from model import PRECISIONS


def command_words(chosen, *names):
    """Options as the words of a command: those of these names that have a value in the dictionary `chosen`."""
    return [word for name in names if chosen.get(name) is not None for word in (f"--{name.replace('_', '-')}", str(chosen[name]))]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):        # "(default: None)" explains nothing; such options say in words what happens without them
        return action.help if action.default in (None, "") or action.default is False else super()._get_help_string(action)


def whole(low, high):
    """The type of an option that is a whole number from low to high."""
    def parse(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)
    return parse


positive, seed, rank = whole(1, 2**20), whole(0, 2**31 - 1), whole(0, 1024)


def rate(text):
    try:
        if 0 < float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number over 0, at most 1")


def positive_number(text):
    try:
        if 0 < float(text) < 1e6:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number over 0")


def option(sub, flag, default, text, **more):
    kind = positive if type(default) is int and default else str if default is None else type(default)
    sub.add_argument(flag, default=default, help=text, **(more or {"type": kind}))


def build_parser(story, functions, recipes):
    """The parser of all commands; functions: {command: the function that does it}, whose docstring is its help."""
    parser = Parser(prog="mtbi.py", description=story, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, *positional):
        function = functions[name]
        sub = commands.add_parser(name, help=function.__doc__.split("\n")[0], description=function.__doc__, formatter_class=Defaults)
        sub.set_defaults(function=function)
        for dest, text in positional:
            sub.add_argument(dest, help=text)
        if name not in ("align", "generate", "info", "plan", "compare", "recipes"):
            option(sub, "--seed", 0, "seed of every random choice", type=seed)
        if name not in ("generate", "info", "plan", "compare", "recipes"):
            sub.add_argument("--force", action="store_true", help="do the step again, whatever is there (default: what is done is kept)")
        return sub

    speech_options(command)
    imitate_options(command("imitate", ("data", "a data folder made by prepare")))
    train_options(command("train", ("run", "a run folder made by imitate")), recipes)
    bench_options(command("bench", ("run", "a run folder with a trained recipe")))
    generate_options(command("generate", ("run", "a run folder with a trained recipe"), ("audio", "a WAV, FLAC, OGG or MP3 file"), ("prompt", "what to ask")))
    command("info", ("run", "a run folder made by imitate"))
    plan_options(command("plan"))
    compare_options(command("compare"))
    command("recipes")
    sub = command("demo")
    option(sub, "--out", "runs/demo", "the run folder")
    sub.add_argument("--short", action="store_true", help="a few steps only, to see that everything runs")
    sub.add_argument("--profile", action="store_true", help="print a table of where the time went")
    return parser


def speech_options(command):
    sub = command("prepare", ("source", "`tiny`, `librispeech`, a manifest or table, or a folder: see above"))
    sub.add_argument("part", nargs="?", help="librispeech: which part, like dev-clean (337 MB) or train-clean-100 (6.3 GB)")
    sub.add_argument("--out", required=True, help="the data folder to write")
    option(sub, "--download-to", "datasets", "librispeech: the folder it is downloaded to, and found in the next time")
    option(sub, "--join", "", "make strings of single-word recordings of one speaker, fewest:most words, like 3:6; default: rows as they are")
    option(sub, "--count", 1500, "how many such strings")
    option(sub, "--test-speakers", "", "speakers to hold out, separated by commas; default: the manifest's split, or one transcript in eight")
    sub.add_argument("--skip-bad", action="store_true", help="leave bad rows out and list them in skipped.jsonl, instead of stopping")
    option(sub, "--train", 1500, "tiny: training utterances to render")
    option(sub, "--test", 300, "tiny: held-out utterances to render, in held-out voices")

    sub = command("align", ("manifest", "a JSONL manifest, or a data folder made by prepare"))
    option(sub, "--out", None, "the manifest to write; default: in a data folder made by prepare that manifest itself, elsewhere NAME-aligned.jsonl beside it")
    option(sub, "--asr", "tiny", "the CTC model: `tiny`, a local folder, or a Hugging Face name")


def precision_option(sub):
    option(sub, "--precision", "auto", "what the LLM computes in; auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU; "
           "what is trained is always fp32", choices=["auto", *PRECISIONS])


def features_option(sub):
    option(sub, "--cache-features", "disk", "keep encoder frames on disk (memory-mapped), in ram, or off: encode at every use", choices=KEEP)


def llm_options(sub):
    option(sub, "--llm", "tiny", "the LLM: `tiny`, a local folder, or a Hugging Face name")
    option(sub, "--bits", 4, "load the LLM in 4 (NF4), 8 or 16 (not quantized) bits", type=int, choices=[4, 8, 16])
    option(sub, "--tasks", None, "task table; default: tiny/tasks.toml for the tiny LLM, tasks.toml for any other")


def imitate_options(sub):
    sub.add_argument("--out", required=True, help="the run folder to write")
    llm_options(sub)
    precision_option(sub)
    option(sub, "--per-utterance", 4, "tasks asked about each transcript, beside repeat and continue")
    option(sub, "--dialogues", 1, "conversations of two turns about each transcript, for recipes with mixed-modal turns", type=whole(0, 64))
    option(sub, "--batch-size", 128, "transcripts the LLM answers at once")
    option(sub, "--max-new-tokens", 64, "longest answer, in tokens; longer ones are cut off")


def train_options(sub, recipes):
    option(sub, "--recipe", "mtbi", "; ".join(f"{name}: {recipe.about}" for name, recipe in recipes.items()))
    sub.add_argument("--resume", action="store_true", help="go on with a training that was interrupted: with the steps, rate and so on it was begun with, "
                     "whatever else is said here (the same command as before goes on, too)")
    option(sub, "--encoder", "tiny", "the speech encoder: `tiny`, a local folder, or a Hugging Face name")
    sub.add_argument("--pad-whisper", action="store_true", help="run a Whisper encoder on 30 s of padding instead of the audio's own length")
    features_option(sub)
    option(sub, "--connector", None, f"{', '.join(CONNECTORS)}; default: the recipe's")
    option(sub, "--loss", None, "ce (the LLM's answer) or kl (its whole distribution); default: the recipe's", choices=["ce", "kl"])
    option(sub, "--lora", None, "rank of a LoRA adapter on the LLM, 0 for none; default: the recipe's", type=rank)
    option(sub, "--k", None, "encoder frames a speech token; default: by the encoder's frame rate and the recipe's speech tokens a second", type=whole(1, 256))
    option(sub, "--hidden", None, "width of the connector's hidden layer; default: four times the LLM's width, at most 2048 (qformer: once, at most 1024)",
           type=positive)
    option(sub, "--steps", 1000, "training steps")
    option(sub, "--batch-size", 32, "utterances in a micro-batch")
    option(sub, "--accumulate", 1, "micro-batches in a step; several processes divide the step among them")
    option(sub, "--lr", None, "peak learning rate; default: by the LLM's width and the recipe's share", type=rate)
    precision_option(sub)
    option(sub, "--gradient-checkpointing", "auto", "compute activations again in the backward pass instead of keeping them; auto: from 3B parameters on",
           choices=["auto", "on", "off"])
    option(sub, "--save-every", 100, "steps between two saved states; the last two are kept")


def question_options(sub):
    option(sub, "--per-prompt", 8, "questions for each prompt of each task")
    option(sub, "--dialogues", 60, "conversations of two turns of each kind: speech then a text question, text then speech, two speeches")
    option(sub, "--probes", 96, "questions on which the behavior gap and the attention shares are measured")


def bench_options(sub):
    option(sub, "--data", None, "the data folder whose held-out speech is used; default: the one the run was made from")
    option(sub, "--recipes", "", "which of the trained recipes, separated by commas: the report then holds only these; default: all")
    question_options(sub)
    option(sub, "--batch-size", 96, "questions answered at once")
    option(sub, "--max-new-tokens", 64, "longest answer, in tokens")
    option(sub, "--asr", None, "CTC model for the cascade; default: the speech encoder's own head, if it has one")
    precision_option(sub)
    features_option(sub)


def compare_options(sub):
    sub.add_argument("--out", required=True, help="the folder to write: a run folder for each seed, report.md, plots")
    option(sub, "--recipes", "all", "which recipes, separated by commas")
    option(sub, "--seeds", 3, "how many seeds")
    sub.add_argument("--quick", action="store_true", help="one seed, 300 steps, fewer questions: 25 minutes at most on two cores")
    sub.add_argument("--no-curve", action="store_true", help="without the trainings on 10 and 30%% of the speech")
    option(sub, "--steps", 1000, "training steps of every recipe")
    option(sub, "--batch-size", 32, "utterances in a micro-batch")
    option(sub, "--accumulate", 1, "micro-batches in a step")
    question_options(sub)
    option(sub, "--speech", "tiny", "what `prepare` is given: `tiny`, a manifest, or a folder")
    option(sub, "--train", 1500, "tiny: training utterances to render")
    option(sub, "--test", 300, "tiny: held-out utterances to render")
    option(sub, "--join", None, "of a manifest of single-word recordings: make strings of them, fewest:most words")
    option(sub, "--count", None, "how many such strings; default: as many as `prepare` makes", type=positive)
    sub.add_argument("--leave-one-speaker-out", action="store_true", help="a run for each speaker, held out in it, instead of one for each seed")
    llm_options(sub)
    option(sub, "--encoder", "tiny", "the speech encoder: `tiny`, a local folder, or a Hugging Face name")
    option(sub, "--asr", None, "CTC model for the cascade; default: the speech encoder's own head, if it has one")
    option(sub, "--k", None, "encoder frames a speech token, of every recipe (blsp needs a power of two); default: by the encoder's frame rate and the "
           "recipe's speech tokens a second", type=whole(1, 256))
    option(sub, "--jobs", None, "commands at once, each in a process of its own; default: with the tiny models on a CPU one a core, at most 4, elsewhere one",
           type=whole(1, 64))


def generate_options(sub):
    option(sub, "--recipe", None, "which of its recipes; default: the first of the table that is there")
    option(sub, "--system", "", "a system turn before the question; default: none")
    option(sub, "--max-new-tokens", 64, "longest answer, in tokens")


def plan_options(sub):
    option(sub, "--llm", "Qwen/Qwen2.5-7B-Instruct", "a Hugging Face name or a local folder; the ones in plan.py's table need no download")
    option(sub, "--encoder", "openai/whisper-large-v3", "likewise")
    option(sub, "--vram", 8.0, "GPU memory, GB", type=positive_number)
    option(sub, "--bits", 4, "the LLM's weights in 4 (NF4), 8 or 16 (not quantized) bits", type=int, choices=[4, 8, 16])
    option(sub, "--precision", "bf16", "what the LLM computes in", choices=list(PRECISIONS))
    option(sub, "--seconds", 15.0, "length of the longest clips, seconds", type=positive_number)
    option(sub, "--prompt-tokens", 48, "tokens of the prompt and the chat template")
    option(sub, "--answer-tokens", 64, "tokens of the longest answers")
    option(sub, "--connector", "stack-mlp", f"{', '.join(CONNECTORS)}", choices=list(CONNECTORS))
    option(sub, "--lora", 0, "rank of a LoRA adapter on the LLM, 0 for none", type=rank)
    option(sub, "--batch-size", 32, "utterances in a step; how many go through at once is what the plan finds")
    option(sub, "--hours", 100.0, "hours of speech, for the size of the features", type=positive_number)
