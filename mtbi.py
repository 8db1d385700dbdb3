"""MTBI: a frozen speech encoder and a small trained connector give a frozen, 4-bit LLM ears (arXiv 2505.18644).

    prepare   speech and transcripts, of any common corpus        ->  DATA/manifest.jsonl
    align     word times for speech that has none, by CTC forced alignment
    imitate   stage 1: the LLM answers the transcripts, over many tasks   ->  RUN/behaviors.jsonl
    train     stage 2: the connector learns to get the same answers from the speech  ->  RUN/<recipe>/
    bench     unseen prompts, unseen tasks, unseen voices  ->  RUN/report.md
    generate  ask a trained model about a sound file
    info      what a run folder is: models, recipes, data, steps, scores
    plan      will it fit my GPU? before anything is loaded
    demo      all of it in the tiny world: offline, on a laptop CPU
"""

import hashlib
import os
import platform
import random
import shlex
import shutil
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
from answers import forget_parts, generate_all
from connectors import CONNECTORS, frames_a_token
from corpora import align, prepare
from data import ask, chat_parts, normalize, read_manifest, transcript_tokens, utterances_id
from examples import Behavior, Examples, Recipe, load_tasks, read_behaviors
from features import encode_all
from files import TIMES, UserError, claim, is_done, read_config, read_json, relative, timed, write_jsonl
from model import CHECKPOINT_FROM, SpeechLLM, compute_precision, load_llm, named, shared_encoder, shared_llm, weights_id
from options import build_parser
from parallel import DEVICE, MAIN, WORLD, wait
from plan import plan
from train import read_log, saved_states, train

RECIPES = {
    "mtbi": Recipe("multi-task behavior imitation with speech-text interleaving (arXiv 2505.18644)", interleave=0.4, repeat=(1.0, 0.2)),
    "mtbi-no-interleave": Recipe("mtbi without interleaving: what does it add?", repeat=(1.0, 0.2)),
    "mtbi-kl": Recipe("mtbi that imitates the whole next-token distribution", interleave=0.4, repeat=(1.0, 0.2), loss="kl"),
    "asr": Recipe("the task repeat alone: the baseline that was never shown another task", tasks="repeat", repeat=(1.0, 1.0)),
    "blsp": Recipe("the task continue alone, with a convolutional connector (arXiv 2309.00916)", tasks="continue", connector="conv"),
}


def digest(path):
    """Names the content of a file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def name_of(settings):
    """Names a set of settings."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


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
                "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    utterances = [u for u in utterances if u.split == "train"]
    if not utterances:
        raise UserError(f"{data / 'manifest.jsonl'}: has no row with split train; run prepare first")
    if is_done(out, settings, "behaviors.jsonl", args.force, half_way="behaviors.part-*"):
        return print(f"{out}: has its behaviors already")
    say_where()
    model = SpeechLLM(*shared_llm(named(args.llm), args.bits, args.precision))
    todo = draw_questions(tasks, utterances, args.per_utterance, args.seed)
    if args.force:
        forget_parts(out / "behaviors")
    wait()
    if MAIN:
        claim(out, settings)
    print(f"{len(todo)} questions about {len(utterances)} transcripts: repeat and {args.per_utterance} of the other training tasks each")
    with timed("imitate"):                                         # (text, did it end by itself) of each answer
        parts = [chat_parts(model.tokenizer, ask(prompt), [[transcript_tokens(model.tokenizer, u.text)]]) for u, _, prompt in todo]
        answers = generate_all(model, parts, [(task.name, len(u.text)) for u, task, _ in todo], "imitate", args.batch_size, args.max_new_tokens,
                               out / "behaviors", model.fingerprint)
    behaviors = [Behavior(u.id, task.name, prompt, answer, ended, model.fingerprint)
                 for (u, task, prompt), (answer, ended) in zip(todo, answers) if answer or ended]
    if not behaviors:
        raise UserError(f"LLM {args.llm}: gives no answer to any question")
    if MAIN:
        write_jsonl(out / "behaviors.jsonl", map(asdict, behaviors))
        claim(out, settings, done=True)
    forget_parts(out / "behaviors")
    cut = sum(not b.ended for b in behaviors)
    print(f"{out / 'behaviors.jsonl'}: {len(behaviors)} behaviors" +
          (f"; {cut} were cut off at --max-new-tokens {args.max_new_tokens}: their beginning is imitated, and no end" if cut else ""))
    texts = {u.id: u.text for u in utterances}
    for b in behaviors[:3]:
        print(f"  {b.prompt}  [{texts[b.utterance]}]  ->  {' '.join(b.response.split())}")


def draw_questions(tasks, utterances, per_utterance, seed):
    """[(utterance, task, prompt)]: training tasks and training prompts only."""
    rng, questions = random.Random(f"imitate-{seed}"), []
    for u in utterances:
        fitting = [t for t in tasks.values() if t.split == "train" and t.applies(u.text) and t.name != "repeat"]
        for task in [tasks["repeat"], *rng.sample(fitting, min(per_utterance, len(fitting)))]:
            questions.append((u, task, rng.choice(task.prompts)))
    return questions


def run_settings(run):
    """(settings, data folder, utterances) of a run folder made by `imitate`; UserError if its data has changed since."""
    settings, done = read_config(run, "imitate", data=str, utterances=str, llm=str, bits=int, tasks=str, task_table=str, seed=int)
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
    if args.recipe not in RECIPES:
        raise UserError(f"there is no recipe {args.recipe!r}; there are {', '.join(RECIPES)}")
    settings, data, utterances = run_settings(run)
    folder = run / args.recipe
    if args.resume:
        as_before(args, folder)
    recipe = replace(RECIPES[args.recipe], **{key: getattr(args, key) for key in ("connector", "loss", "lora") if getattr(args, key) is not None})
    if recipe.connector not in CONNECTORS:
        raise UserError(f"there is no connector {recipe.connector!r}; there are {', '.join(CONNECTORS)}")
    spec = {"llm": settings["llm"], "bits": settings["bits"], "encoder": named(args.encoder), "pad_whisper": args.pad_whisper,
            "connector": recipe.connector, "k": args.k, "hidden": args.hidden, "lora": recipe.lora}
    chosen = {**spec, "encoder_weights": weights_id(args.encoder, "encoder"), "recipe": {k: v for k, v in asdict(recipe).items() if k != "about"},
              "behaviors": digest(run / "behaviors.jsonl"), "manifest": digest(data / "manifest.jsonl"), "steps": args.steps, "batch_size": args.batch_size,
              "accumulate": args.accumulate, "lr": args.lr, "precision": compute_precision(args.precision), "seed": args.seed}
    if is_done(folder, chosen, "connector.safetensors", args.force):
        return print(f"{folder}: is trained already")
    say_where()
    utterances, behaviors = [u for u in utterances if u.split == "train"], read_behaviors(run / "behaviors.jsonl")
    encoder = shared_encoder(spec["encoder"], spec["pad_whisper"])
    frames = encode_all(encoder, utterances, data / "features", args.cache_features)      # before the LLM needs the memory
    llm = (load_llm if recipe.lora else shared_llm)(spec["llm"], spec["bits"], args.precision)
    spec |= connector_size(args, recipe, llm[0].get_input_embeddings().weight.shape[1], encoder)
    model = SpeechLLM.build(spec, llm, encoder, args.seed)
    if wrong := next((b for b in behaviors if b.llm not in ("", model.fingerprint)), None):
        raise UserError(f"{run / 'behaviors.jsonl'}: was answered by another LLM ({wrong.llm}) than the one that is now at {spec['llm']} "
                        f"({model.fingerprint}); run `imitate` again with --force")
    examples = Examples(model, utterances, behaviors, frames, recipe, args.steps, args.batch_size, args.seed, args.accumulate)
    examples.explain()
    checkpoint_if_large(model, args.gradient_checkpointing)
    begin(folder, chosen, args.force)
    with timed(f"train {args.recipe}"):
        train(model, examples, folder, lr=args.lr, save_every=args.save_every)
    if MAIN:
        model.save(folder, spec)
        claim(folder, chosen, done=True)
    wait()


def as_before(args, folder):
    """Take every option from the training that was begun in `folder`."""
    chosen, _ = read_config(folder, "train", encoder=str, connector=str, lora=int, steps=int, batch_size=int, accumulate=int, lr=float, recipe=dict)
    if not saved_states(folder):
        raise UserError(f"{folder}: there is no saved state to resume from; train without --resume")
    for key in ("encoder", "pad_whisper", "connector", "k", "hidden", "lora", "steps", "batch_size", "accumulate", "lr", "precision", "seed"):
        setattr(args, key, chosen.get(key))
    args.loss, args.force = chosen["recipe"].get("loss"), False


def begin(folder, chosen, anew):
    """Claim a training's folder, and clear it of another training's results; with `anew`, of its states too."""
    wait()
    if MAIN:
        for name in ("model.json", "connector.safetensors", *(["log.jsonl"] if anew else [])):
            (folder / name).unlink(missing_ok=True)
        for name in ("adapter", *(["state"] if anew else [])):
            shutil.rmtree(folder / name, ignore_errors=True)
        claim(folder, chosen)
    wait()


def checkpoint_if_large(model, choice):
    """Gradient checkpointing, as asked for, or by the size of the LLM; printed with the reason."""
    size = model.llm.num_parameters()
    on = choice == "on" or choice == "auto" and size >= CHECKPOINT_FROM
    if on:
        model.checkpoint_gradients()
    print(f"gradient checkpointing: {'on' if on else 'off'}, " + ("as asked" if choice != "auto" else f"because the LLM has {size / 1e9:.2g} billion "
          f"parameters, and {'less memory' if on else 'speed'} matters more {'from' if on else 'below'} {CHECKPOINT_FROM / 1e9} billion on"))


def connector_size(args, recipe, llm_width, encoder):
    """{"k", "hidden"}: as asked for, or derived; printed with the reason."""
    k = args.k or frames_a_token(recipe.connector, encoder.frame_rate, recipe.tokens_per_second)
    hidden = args.hidden or min(2048, 4 * llm_width)
    print(f"k: {k} encoder frames a speech token, " + ("as asked by --k" if args.k else
          f"because the encoder gives {encoder.frame_rate:.1f} frames/s and the recipe wants about {recipe.tokens_per_second} speech tokens/s"))
    print(f"hidden: {hidden}, " + ("as asked by --hidden" if args.hidden else f"four times the LLM's width of {llm_width}, at most 2048"))
    return {"k": k, "hidden": hidden}


# ---- bench ----

def bench(args):
    """Score the trained recipes of RUN beside the top line and the cascade on the held-out speech of DATA; write report.json, report.md, plots."""
    run, (settings, data, utterances) = Path(args.run), run_settings(args.run)
    known = {normalize(u.text) for u in utterances if u.split == "train"}
    if args.data and Path(args.data).resolve() != data.resolve():
        data = Path(args.data)
        utterances = read_manifest(data / "manifest.jsonl")
    tested = [u for u in utterances if u.split == "test" and normalize(u.text) not in known]
    trained = trained_recipes(run)
    if not trained:
        raise UserError(f"{run}: holds no trained recipe; run `train {run} --recipe mtbi` first")
    for name, chosen in trained.items():                           # a recipe that imitated other behaviors may have trained on what is tested now
        if chosen["behaviors"] != digest(run / "behaviors.jsonl"):
            raise UserError(f"{run / name}: was trained on other behaviors than those in {run} now; run `train {run} --recipe {name}` again with --force")
    tasks_path = HERE / settings["tasks"]
    if digest(tasks_path) != settings["task_table"]:
        raise UserError(f"{tasks_path}: has changed since `imitate`; run `imitate` again with --force")
    asked = {"manifest": digest(data / "manifest.jsonl"), "per_prompt": args.per_prompt, "seed": args.seed, "asr": args.asr,
             "max_new_tokens": args.max_new_tokens, "trained": {name: digest(run / name / "connector.safetensors") for name in trained}}
    if not args.force and (report := benchmark.earlier_report(run, asked)):
        print(f"{run / 'report.md'}: is written already")
        return benchmark.show(report, run)
    say_where()
    tasks = load_tasks(tasks_path)
    cases = benchmark.draw_cases(tasks, tested, args.per_prompt, args.seed)
    encoders = {name: (chosen["encoder"], chosen["pad_whisper"]) for name, chosen in trained.items()}
    llm = shared_llm(settings["llm"], settings["bits"], args.precision)
    systems = benchmark.systems(run, {name: partial(shared_encoder, *key) for name, key in encoders.items()},
                                shared_encoder(named(args.asr)) if args.asr else shared_encoder(*next(iter(encoders.values()))), llm, tested, data / "features",
                                args.cache_features, args.precision)
    train_seconds = {name: read_log(run / name / "log.jsonl")[-1]["seconds"] for name in trained}
    for name in systems if args.force else []:
        forget_parts(run / f"answers-{name}")
    answers, seconds = benchmark.run_systems(systems, cases, args.batch_size, args.max_new_tokens, run, name_of(asked))
    speakers, heard = {c.utterance.speaker for c in cases}, {u.speaker for u in utterances if u.split == "train"}
    report = {"recipes": {name: benchmark.grade(cases, answers["text"], rows, seconds[name] + train_seconds.get(name, 0)) for name, rows in answers.items()},
              "samples": benchmark.draw_samples(cases, answers, args.seed),
              "meta": {"n_utterances": len({c.utterance.id for c in cases}), "n_speakers": len(speakers), "n_unheard_speakers": len(speakers - heard - {""}),
                       "n_cases": len(cases), "task_splits": {t.name: t.split for t in tasks.values()}, "llm": settings["llm"], "asked": asked,
                       "llm_is_4_bit": bool(getattr(llm[0], "is_loaded_in_4bit", False)), "training": trained,
                       "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {DEVICE}",
                       "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}}
    if MAIN:
        with timed("write the report"):
            benchmark.write_report(run, report, cases, answers)
        benchmark.show(report, run)
    for name in systems:
        forget_parts(run / f"answers-{name}")


def trained_recipes(run):
    """{recipe: its settings} of the recipes whose training is finished, in the order of the recipe table."""
    folders = {name: run / name for name in RECIPES if (run / name / "config.json").exists()}
    configs = {name: read_config(folder, "train", encoder=str, pad_whisper=bool, behaviors=str) for name, folder in folders.items()}
    return {name: settings for name, (settings, done) in configs.items() if done and (folders[name] / "connector.safetensors").exists()}


# ---- generate, demo ----

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
    behaviors, report = read_behaviors(run / "behaviors.jsonl"), {}
    if (run / "report.json").exists():
        report = read_json(run / "report.json", "recipes", "meta")["recipes"]
    spoken = {split: [u for u in utterances if u.split == split] for split in ("train", "test")}
    print(f"run        {run}, seed {settings['seed']}\nLLM        {settings['llm']}, " +
          {4: "4 bits (NF4)", 8: "8 bits", 16: "not quantized"}.get(settings["bits"], ""))
    print(f"data       {data.resolve()}")
    for split, rows in spoken.items():
        print(f"  {split:<8} {len(rows)} utterances, {sum(u.duration for u in rows) / 60:.1f} minutes, {len({u.speaker for u in rows} - {''})} known speakers, "
              f"{sum(bool(u.words) for u in rows)} with word times")
    print(f"behaviors  {len(behaviors)} over {len({b.task for b in behaviors})} tasks of {settings['tasks']}")
    for name in RECIPES:
        if (run / name / "config.json").exists():
            print("\n".join([f"{name}", *("  " + line for line in benchmark.describe_recipe(run / name, report.get(name)))]))
    for name in [n for n in report if n not in RECIPES]:
        print(f"{name}\n  {benchmark.describe_scores(report[name])}")
    print(f"report     {run / 'report.md'}" if report else f"report     none yet: run `bench {run}`")


def demo(args):
    """The whole pipeline in the tiny world: the other commands in a row."""
    out, start = Path(args.out), time.perf_counter()
    data, seed = str(out / "data"), ["--seed", str(args.seed)]
    short = {"prepare": ["--train", "200", "--test", "40"], "train": ["--steps", "30"], "bench": ["--per-prompt", "2"]} if args.short else {}
    commands = [["prepare", "tiny", "--out", data], ["imitate", data, "--out", str(out)], ["train", str(out), "--recipe", "mtbi"],
                ["train", str(out), "--recipe", "asr"], ["bench", str(out), "--data", data]]
    for command in commands:
        command += short.get(command[0], []) + seed + ["--force"] * args.force
        print(f"\n$ python mtbi.py {shlex.join(command)}")
        with timed(f"== {command[0]}" + (f" {command[3]}" if command[0] == "train" else "")):
            run_command(command)
    print(f"\ndemo: {time.perf_counter() - start:.0f} s" + (" (shortened: the scores mean nothing)" if args.short else ""))
    if args.profile:
        total = sum(s for name, s in TIMES.items() if name.startswith("== "))
        print("\n| step | seconds | share |\n|---|---|---|")
        print("\n".join(f"| {name} | {s:.1f} | {s / total:.0%} |" for name, s in TIMES.items()))
    wav = str(out / "data" / "audio" / "test-00000.wav")
    print(f"""
What to try next
  python mtbi.py generate {out} {wav} "Translate this into Spanish."
  python mtbi.py generate {out} {wav} "Translate this into Spanish." --recipe asr
  python mtbi.py train {out} --recipe mtbi-no-interleave, then bench {out}: what does interleaving add?
  Record yourself saying a sentence like those in {out / 'report.md'} and generate from it.
  Open model.py: SpeechLLM.embed is where speech becomes tokens.""")


# ---- the command line ----

COMMANDS = {"prepare": prepare, "align": align, "imitate": imitate, "train": train_recipe, "bench": bench, "generate": generate, "info": info, "plan": plan,
            "demo": demo}
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
