"""MTBI: a frozen speech encoder and a small trained connector give a frozen, 4-bit LLM ears (arXiv 2505.18644).

    prepare   speech and transcripts, of any common corpus        ->  DATA/manifest.jsonl
    align     word times for speech that has none, by CTC forced alignment
    imitate   stage 1: the LLM answers the transcripts, over many tasks   ->  RUN/behaviors.jsonl
    train     stage 2: the connector learns to get the same answers from the speech  ->  RUN/<recipe>/
    bench     unseen prompts, unseen tasks, unseen voices  ->  RUN/report.md
    generate  ask a trained model about a sound file
    info      what a run folder is: models, recipes, data, steps, scores
    plan      will it fit my GPU? before anything is loaded
    recipes   the table of recipes
    compare   every recipe, several seeds, one report: which of the papers' claims hold?
    demo      all of it in the tiny world: offline, on a laptop CPU
"""

import argparse
import hashlib
import os
import sys
import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")                # waiting threads sleep: half the time where others use the cores too, a tenth more alone

import torch
import transformers

import eval as benchmark
import report as reports
from answers import answer_in_text, forget_parts
from compare import compare
from connectors import CONNECTORS, frames_a_token, hidden_width
from corpora import align, prepare
from demo import show_demo
from data import ask, normalize, read_manifest, utterances_id
from encoder import shared_encoder
from examples import ALWAYS, Examples, Recipe, draw_dialogues, draw_questions, load_tasks, read_behaviors
from features import audio_id, encode_all
from files import UserError, alone, claim, is_done, name_of, read_config, relative, timed, write_jsonl
from model import CHECKPOINT_FROM, SpeechLLM, compute_precision, load_llm, shared_llm
from hub import named, weights_id
from options import build_parser
from parallel import DEVICE, MAIN, WORLD, wait
from plan import plan
from train import AS_BEFORE, as_before, begin, train

PEAK_AT_192 = 4e-3           # the best peak learning rate for the tiny LLM; see docs/notes.md
# VoiceTextBlender's speech tasks: recognition, translation, and questions about what was said; of both task tables
SPOKEN_TASKS = ("repeat", "translate*", "who", "where", "what", "how_many", "category", "topic", "question_about", "smallest")
RECIPES = {
    "mtbi": Recipe("multi-task behavior imitation with speech-text interleaving (arXiv 2505.18644)", interleave=0.4, repeat=(1.0, 0.2)),
    "mtbi-no-interleave": Recipe("mtbi without interleaving: what does it add?", repeat=(1.0, 0.2)),
    "mtbi-kl": Recipe("mtbi that imitates the whole next-token distribution", interleave=0.4, repeat=(1.0, 0.2), loss="kl"),
    "asr": Recipe("the task repeat alone: the baseline that was never shown another task", tasks=("repeat",), repeat=(1.0, 1.0)),
    "blsp": Recipe("the task continue alone, with a convolutional connector (arXiv 2309.00916)", tasks=("continue",), connector="conv"),
    "self-powered": Recipe("Self-Powered LSM: up to six kinds of self-made tasks, Q-Former and LoRA (arXiv 2410.03798)", repeat=(1.0, 0.2),
                           tasks=("repeat", "continue", "keywords", "intent", "category", "sentiment", "translate*"), connector="qformer", lora=8, lr=0.25),
    "vanilla-it": Recipe("the same model tuned on ASR instructions alone: speech anchor bias", tasks=("repeat",), repeat=(1.0, 1.0), connector="qformer",
                         lora=8, lr=0.25),
    "vtb": Recipe("VoiceTextBlender: speech tasks, mixed-modal turns and text-only SFT in one stage, LoRA (arXiv 2410.17485)", tasks=SPOKEN_TASKS, lora=8,
                  repeat=(0.5, 0.2), text_only=0.25, mixed=0.25),
    "vtb-no-text": Recipe("vtb without text-only SFT: are text skills forgotten?", tasks=SPOKEN_TASKS, lora=8, repeat=(0.5, 0.2), mixed=0.25),
    "cascade": Recipe("nothing is trained: a CTC model transcribes, the LLM reads that", tasks=(), connector=""),
    "text": Recipe("nothing is trained: the LLM reads the true transcript, the top line", tasks=(), connector=""),
}


def digest(path):
    """Names the content of a file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def say_where():
    print(f"device: {DEVICE} ({torch.get_num_threads()} threads), because " + ("there is no CUDA" if DEVICE == "cpu" else "CUDA is there") +
          (f"; {WORLD} processes share the work" if WORLD > 1 else ""))


# ---- imitate (stage 1) ----

def imitate(args):
    """Stage 1, text only: the LLM answers the training transcripts over the training tasks. These answers are the behaviors."""
    out, data = Path(args.out), Path(args.data)
    tasks_path = Path(args.tasks or HERE / ("tiny/tasks.toml" if args.llm == "tiny" else "tasks.toml"))
    tasks, utterances = load_tasks(tasks_path), read_manifest(data / "manifest.jsonl")
    settings = {"data": relative(data, out), "utterances": utterances_id(utterances), "llm": named(args.llm), "bits": args.bits,
                "llm_weights": weights_id(args.llm, "llm"), "precision": compute_precision(args.precision), "decoding": "greedy",
                "tasks": relative(tasks_path, HERE), "task_table": digest(tasks_path), "per_utterance": args.per_utterance,
                "dialogues": args.dialogues, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    utterances = [u for u in utterances if u.split == "train"]
    if not utterances:
        raise UserError(f"{data / 'manifest.jsonl'}: has no row with split train; run prepare first")
    if is_done(out, settings, "behaviors.jsonl", args.force, half_way="behaviors.part-*"):
        return print(f"{out}: has its behaviors already")
    say_where()
    model = SpeechLLM(*shared_llm(named(args.llm), args.bits, args.precision))
    with alone(out), timed("imitate"):
        if args.force:
            forget_parts(out / "behaviors*")
        wait()
        if MAIN:
            claim(out, settings)
        behaviors = ask_llm(model, tasks, utterances, args, name_of([settings, model.fingerprint]))
        if MAIN:
            write_jsonl(out / "behaviors.jsonl", map(asdict, behaviors))
            claim(out, settings, done=True)
        forget_parts(out / "behaviors*")
    cut, texts = sum(not b.ended for b in behaviors), {u.id: u.text for u in utterances}
    print(f"{out / 'behaviors.jsonl'}: {len(behaviors)} behaviors" +
          (f"; {cut} were cut off at --max-new-tokens {args.max_new_tokens}: their beginning is imitated, and no end" if cut else ""))
    for b in behaviors[:3]:
        print(f"  {b.prompt}  [{texts[b.utterance]}]  ->  {' '.join(b.response.split())}")


def ask_llm(model, tasks, utterances, args, key):
    """The behaviors: the LLM's answers about the transcripts, first of one turn, then, with these as first turns, of two."""
    texts, kept = {u.id: u.text for u in utterances}, Path(args.out) / "behaviors"
    todo = draw_questions(tasks, utterances, args.per_utterance, args.seed)
    print(f"{len(todo)} questions about {len(utterances)} transcripts: {' and '.join(ALWAYS)}, and {args.per_utterance} of the other training tasks each")
    behaviors = answer_in_text(model, todo, texts, args.batch_size, args.max_new_tokens, kept, key)
    if not behaviors:
        raise UserError(f"LLM {args.llm}: gives no answer to any question")
    later = draw_dialogues(tasks, utterances, behaviors, args.dialogues, args.seed)
    return behaviors + answer_in_text(model, later, texts, args.batch_size, args.max_new_tokens, kept.with_name("behaviors-dialogues"), key)


def run_settings(run):
    """(settings, data folder, utterances) of a run folder made by `imitate`; UserError if its data has changed since."""
    settings, done = read_config(run, "imitate", data=str, utterances=str, llm=str, llm_weights=str, bits=int, tasks=str,
                                 task_table=str, seed=int)
    if not done:
        raise UserError(f"{run}: its behaviors are not complete; run `imitate … --out {run}` first")
    data = Path(run) / settings["data"]
    utterances = read_manifest(data / "manifest.jsonl")
    if utterances_id(utterances) != settings["utterances"]:
        raise UserError(f"{data / 'manifest.jsonl'}: has changed since `imitate` wrote {run}; run `imitate` again with --force")
    return settings, data, utterances


# ---- train (stage 2) ----

def train_recipe(args):
    """Stage 2: train the connector (and the adapter, if the recipe has one) on the behaviors of RUN."""
    run = Path(args.run)
    row = find_recipe(args.recipe)
    if not row.connector:
        return print(f"{args.recipe}: {row.about}; `bench` measures it beside the others")
    settings, data, utterances = run_settings(run)
    folder = run / args.recipe
    if args.resume:                                                # checked like any other options
        before = ["train", args.run, "--recipe", args.recipe, *as_before(folder)]
        before = vars(build_parser(__doc__, COMMANDS, RECIPES).parse_args(before))
        args = argparse.Namespace(**{**vars(args), **{key: before[key] for key in (*AS_BEFORE, "pad_whisper")}, "force": False})
    recipe = replace(row, **{key: getattr(args, key) for key in ("connector", "loss", "lora") if getattr(args, key) is not None})
    if recipe.connector not in CONNECTORS:
        raise UserError(f"there is no connector {recipe.connector!r}; there are {', '.join(CONNECTORS)}")
    spec = {"llm": settings["llm"], "bits": settings["bits"], "encoder": named(args.encoder), "pad_whisper": args.pad_whisper,
            "connector": recipe.connector, "k": args.k, "hidden": args.hidden, "lora": recipe.lora}
    if weights_id(settings["llm"], "llm") != settings["llm_weights"]:
        raise UserError(f"{settings['llm']}: is not the LLM any more that gave the behaviors of {run}; run `imitate` again with --force")
    utterances = [u for u in utterances if u.split == "train"]
    chosen = {**spec, "encoder_weights": weights_id(args.encoder, "encoder"), "recipe": {k: v for k, v in asdict(recipe).items() if k != "about"},
              "audio": audio_id(utterances, data / "features"), "behaviors": digest(run / "behaviors.jsonl"),
              "manifest": digest(data / "manifest.jsonl"), "steps": args.steps, "batch_size": args.batch_size,
              "accumulate": args.accumulate, "lr": args.lr, "precision": compute_precision(args.precision), "seed": args.seed}
    if is_done(folder, chosen, "connector.safetensors", args.force, advice="make another RUN with `imitate`, or --force to redo it"):
        return print(f"{folder}: is trained already")
    say_where()
    behaviors, encoder = read_behaviors(run / "behaviors.jsonl"), shared_encoder(spec["encoder"], spec["pad_whisper"])
    frames = encode_all(encoder, utterances, data / "features", args.cache_features)      # before the LLM needs the memory
    llm = (load_llm if recipe.lora else shared_llm)(spec["llm"], spec["bits"], args.precision)
    width = llm[0].get_input_embeddings().weight.shape[1]
    spec |= connector_size(args, recipe, width, encoder)
    model = SpeechLLM.build(spec, llm, encoder, args.seed)
    if wrong := next((b for b in behaviors if b.llm not in ("", model.fingerprint)), None):
        raise UserError(f"{run / 'behaviors.jsonl'}: was answered by another LLM ({wrong.llm}) than the one that is now at {spec['llm']} "
                        f"({model.fingerprint}); run `imitate` again with --force")
    examples = Examples(model, utterances, behaviors, frames, recipe, args.steps, args.batch_size, args.seed, args.accumulate)
    examples.explain()
    checkpoint_if_large(model, args.gradient_checkpointing)
    lr = peak_rate(args.lr, width, recipe.lr)
    with alone(folder):
        begin(folder, chosen, args.force)
        with timed(f"train {args.recipe}"):
            train(model, examples, folder, lr=lr, save_every=args.save_every, key=name_of(chosen))
        if MAIN:
            model.save(folder, spec)
            claim(folder, chosen, done=True)
        wait()


def checkpoint_if_large(model, choice):
    """Gradient checkpointing, as asked for, or by the size of the LLM; printed with the reason."""
    size = model.llm.num_parameters()
    on = choice == "on" or choice == "auto" and size >= CHECKPOINT_FROM
    if on:
        model.checkpoint_gradients()
    print(f"gradient checkpointing: {'on' if on else 'off'}, " + ("as asked" if choice != "auto" else f"because the LLM has {size / 1e9:.2g} billion "
          f"parameters, and {'from' if on else 'below'} {CHECKPOINT_FROM / 1e9} billion {'less memory' if on else 'speed'} matters more"))


def connector_size(args, recipe, llm_width, encoder):
    """{"k", "hidden"}: as asked for, or derived; printed with the reason."""
    k = args.k or frames_a_token(recipe.connector, encoder.frame_rate, recipe.tokens_per_second)
    hidden, why = (args.hidden, "as asked by --hidden") if args.hidden else hidden_width(recipe.connector, llm_width)
    print(f"k: {k} encoder frames a speech token, " + ("as asked by --k" if args.k else
          f"because the encoder gives {encoder.frame_rate:.1f} frames/s and the recipe wants about {recipe.tokens_per_second} speech tokens/s"))
    print(f"hidden: {hidden}, {why}")
    return {"k": k, "hidden": hidden}


def peak_rate(asked, llm_width, share):
    """The peak learning rate: as asked for, or derived; printed with the reason."""
    lr = asked or share * PEAK_AT_192 * 192 / max(192, llm_width)
    print(f"learning rate: {lr:.2g} at its peak, " + ("as asked by --lr" if asked else f"{share:g} times {PEAK_AT_192}, which was best for `mtbi` and an LLM "
          f"of width 192; this one's is {llm_width}, and the wider, the smaller"))
    return lr


# ---- bench ----

def bench(args):
    """Score the trained recipes of RUN beside the top line and the cascade on the held-out speech of DATA.

    Writes RUN/report.md, report.json, answers.jsonl, plots, and RUN/bench/, where every answer is kept for the next time."""
    run, (settings, data, utterances) = Path(args.run), run_settings(args.run)
    known, heard = {normalize(u.text) for u in utterances if u.split == "train"}, {u.speaker for u in utterances if u.split == "train"}
    if args.data and Path(args.data).resolve() != data.resolve():
        data = Path(args.data)
        utterances = read_manifest(data / "manifest.jsonl")
    tested = [u for u in utterances if u.split == "test" and normalize(u.text) not in known]
    trained, tasks_path = recipes_to_bench(run, args.recipes), HERE / settings["tasks"]
    if digest(tasks_path) != settings["task_table"]:
        raise UserError(f"{tasks_path}: has changed since `imitate`; run `imitate` again with --force")
    asked = {"manifest": digest(data / "manifest.jsonl"), "tasks": settings["task_table"], "llm": settings["llm_weights"], "per_prompt": args.per_prompt,
             "bits": settings["bits"], "precision": compute_precision(args.precision), "audio": audio_id(tested, data / "features"),
             "dialogues": args.dialogues, "probes": args.probes, "seed": args.seed, "max_new_tokens": args.max_new_tokens,
             "asr": args.asr and [args.asr, weights_id(named(args.asr), "encoder")], "trained": {name: trained_weights(run / name) for name in trained}}
    if not args.force and (report := reports.earlier_report(run, asked)):
        print(f"{run / 'report.md'}: is written already")
        return reports.show(report, run)
    say_where()
    encoders = {name: (chosen["encoder"], chosen["pad_whisper"]) for name, chosen in trained.items()}
    llm = shared_llm(settings["llm"], settings["bits"], args.precision)
    reader = SpeechLLM(*llm)
    transcriber = shared_encoder(*((named(args.asr), False) if args.asr else next(iter(encoders.values()))))
    systems = benchmark.systems(run, {name: partial(shared_encoder, *key) for name, key in encoders.items()}, transcriber, llm, reader, tested,
                                data / "features", args.cache_features, args.precision)
    same = {key: value for key, value in asked.items() if key not in ("trained", "asr")}
    keys = {name: name_of([same, asked["trained"].get(name), weights_id(transcriber.name, "encoder") if name == "cascade" else ""]) for name in systems}
    with alone(run / "bench"):
        for path in (run / "bench").glob("*.json*") if args.force and MAIN else []:
            path.unlink()
        wait()
        tasks = load_tasks(tasks_path)
        questions = benchmark.Bench(run, tasks, tested, reader, keys, per_prompt=args.per_prompt, dialogues=args.dialogues, probes=args.probes,
                                    seed=args.seed, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
        records = {name: questions.record(name, load) for name, load in systems.items()}
    meta = {**reports.describe_cases(questions, heard), "task_splits": {t.name: t.split for t in tasks.values()}, "llm": settings["llm"], "asked": asked,
            "llm_is_4_bit": bool(getattr(llm[0], "is_loaded_in_4bit", False)), "training": trained, **reports.where_it_ran()}
    if MAIN:
        with timed("write the report"):
            report = reports.write_report(run, questions, records, meta, args.seed)
        reports.show(report, run)


def recipes_to_bench(run, chosen=""):
    """{name: settings} of the trained recipes of a run, or of those among them that are named; UserError if they did not train on its behaviors."""
    wanted = named_recipes(chosen) if chosen else []
    trained = trained_recipes(run, wanted)
    if missing := [name for name in wanted if name not in trained] or (not trained and ["mtbi"]):
        raise UserError(f"{run}: holds no trained recipe {missing[0]!r}; run `train {run} --recipe {missing[0]}` first")
    for name, settings in trained.items():                         # a recipe that imitated other behaviors may have trained on what is tested now
        if settings["behaviors"] != digest(run / "behaviors.jsonl"):
            raise UserError(f"{run / name}: was trained on other behaviors than those in {run} now; run `train {run} --recipe {name}` again with --force")
    return trained


def trained_weights(folder):
    """Names what was trained: the connector, and the adapter if there is one."""
    return name_of([digest(path) for path in (folder / "connector.safetensors", folder / "adapter" / "adapter_model.safetensors") if path.exists()])


def find_recipe(name):
    """The row of the recipe table; NAME@PERCENT is the recipe NAME on so many percent of the training utterances. UserError if there is none."""
    row, at, percent = name.partition("@")
    if row not in RECIPES or at and not (percent.isdecimal() and 1 <= int(percent) <= 99):
        raise UserError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}, and each with a part of the speech alone, like mtbi@10 for 10%")
    return replace(RECIPES[row], speech=int(percent) / 100) if at else RECIPES[row]


def named_recipes(text):
    """Those that are trained among the recipes of a list separated by commas. UserError if there are none, or one that is not in the table."""
    names = [name for name in text.split(",") if name and find_recipe(name).connector]
    if not names:
        raise UserError("--recipes: names no recipe that is trained; `text` and `cascade` are measured beside any that is")
    return names


def recipe_folders(run):
    """{recipe: its folder} of the recipes whose training was begun, in the order of the recipe table."""
    order, found = list(RECIPES), [path.parent for path in run.glob("*/config.json") if path.parent.name.partition("@")[0] in RECIPES]
    return {path.name: path for path in sorted(found, key=lambda p: (order.index(p.name.partition("@")[0]), len(p.name), p.name))}


def trained_recipes(run, wanted=()):
    """{recipe: its settings} of the recipes, or of those wanted, whose training is finished, in the order of the recipe table."""
    folders = {name: folder for name, folder in recipe_folders(run).items() if not wanted or name in wanted}
    configs = {name: read_config(folder, "train", encoder=str, pad_whisper=bool, behaviors=str) for name, folder in folders.items()}
    return {name: settings for name, (settings, done) in configs.items() if done and (folders[name] / "connector.safetensors").exists()}


# ---- generate, info, compare, demo ----

def generate(args):
    """Ask a trained model about a sound file."""
    run = Path(args.run)
    found = list(trained_recipes(run))
    name = args.recipe or (found[0] if found else "")
    if name not in found:
        raise UserError(f"{run}: holds no trained recipe{' ' + repr(name) if name else ''}; there are {', '.join(found) or 'none: run `train` first'}")
    model = SpeechLLM.from_pretrained(run / name)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    start = time.perf_counter()
    print(model.answer(messages + ask(args.prompt, args.audio), max_new_tokens=args.max_new_tokens))
    print(f"{run / name}: answered in {time.perf_counter() - start:.1f} s", file=sys.stderr)


def info(args):
    """Print what a run folder is: its models, recipes, data, steps and scores. Loads no model."""
    run, (settings, data, utterances) = Path(args.run), run_settings(args.run)
    print("\n".join(reports.describe_run(run, settings, data, utterances, read_behaviors(run / "behaviors.jsonl"), recipe_folders(run))))


def show_recipes(args):
    """Print the table of recipes; each is a row of RECIPES, and a row more is a recipe more."""
    default = asdict(Recipe(""))
    for name, recipe in RECIPES.items():
        changed = ", ".join(f"{column} {value}" for column, value in asdict(recipe).items() if column != "about" and value != default[column])
        print(f"{name:<20} {recipe.about}\n{'':<20} {changed if recipe.connector else 'no training'}")
    print("\nThe class Recipe in examples.py says what each value means; what is not named here is as it stands there.")


def compare_recipes(args):
    """Train and benchmark every recipe with several seeds, and test each paper's claims: OUT/report.md."""
    if args.quick:
        args.seeds, args.steps = 1, min(args.steps, 300)
        args.per_prompt, args.dialogues, args.probes = min(args.per_prompt, 4), min(args.dialogues, 30), min(args.probes, 48)
    compare(args, run_command, named_recipes(",".join(RECIPES) if args.recipes == "all" else args.recipes), reports.where_it_ran())


def demo(args):
    """The whole pipeline in the tiny world: the other commands in a row."""
    show_demo(args, run_command)


# ---- the command line ----

COMMANDS = {"prepare": prepare, "align": align, "imitate": imitate, "train": train_recipe, "bench": bench, "generate": generate, "info": info, "plan": plan,
            "recipes": show_recipes, "compare": compare_recipes, "demo": demo}
TOGETHER = ("imitate", "train", "bench")       # what several processes can share


def run_command(argv):
    args = build_parser(__doc__, COMMANDS, RECIPES).parse_args(argv)
    if WORLD > 1 and args.command not in TOGETHER:
        raise UserError(f"{args.command} runs in one process; {', '.join(TOGETHER)} are what torchrun and accelerate can start several times")
    if not MAIN:
        sys.stdout = open(os.devnull, "w")                         # the first process talks
    args.function(args)


def main(argv=None):
    transformers.logging.set_verbosity_error()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")                            # libraries' advice to developers
    sys.stdout.reconfigure(errors="replace") if hasattr(sys.stdout, "reconfigure") else None      # a console that cannot show "ñ" is no reason to stop
    try:
        run_command(sys.argv[1:] if argv is None else argv)
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):                     # `info RUN | head`: who reads has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"mtbi: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mtbi: interrupted; the same command goes on where it can", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
