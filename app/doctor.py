"""What this machine has for the project, what will run on it, and how to mend what is missing."""

import importlib
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch

from data import read_manifest
from support.files import PROJECT, UserError, first_line, nearest_existing
from support.hub import TINY
from support.processes import DEVICE, WHY_DEVICE

INSTALL = "pip install -r requirements.txt"
MEMORY, DISK = 4e9, 2e9  # bytes that the demo wants free
# optional packages: what for, and how they come
OPTIONAL = {
    "gradio": ("the page (`serve`)", "pip install -r requirements-page.txt"),
    "sounddevice": ("the microphone in the terminal", "pip install sounddevice"),
}


@dataclass
class DoctorOptions:
    data: str | None = None
    """a data folder to look at, and at the free disk there; default: the disk where you are"""


@dataclass
class Finding:
    """A line of the table."""

    what: str
    found: str
    mend: str = ""  # what to do; "": nothing is wrong
    needed: bool = True  # or does only something optional want it?


def examine(options):
    """Say what runs on this machine, and the command that mends what does not. Needs no network."""
    findings = [python(), *packages(), card(), quantizer(), voices(), memory()]
    findings += [disk(options.data or "."), tiny_world(), *optional_packages()]
    if options.data:
        findings.append(speech_in(options.data))
    width = max(len(finding.what) for finding in findings)
    for f in findings:
        mark = "ok" if not f.mend else "MISSING" if f.needed else "-"
        print(f"{mark:<8} {f.what:<{width}}  {f.found}")
        if f.mend:
            print(f"{'':<8} {'':<{width}}  mend: {f.mend}")
    print()
    for line in verdict(findings):
        print(line)


def verdict(findings):
    """What will run here, in a few lines."""
    wrong = [f.what for f in findings if f.mend and f.needed]
    if wrong:
        yield f"Not ready: {', '.join(wrong)}."
        return
    yield "python mtbi.py demo                          runs here, offline, on the CPU or the GPU"
    yield "python mtbi.py demo digits                   the same on human voices, once downloaded"
    if "gradio" not in [f.what for f in findings if f.mend]:
        yield "python mtbi.py serve RUN                     opens the page of what was trained"
    if DEVICE == "cpu":
        yield "real LLMs train on a GPU; `plan --vram GB`   says which card trains which"
    else:
        yield "python mtbi.py plan --llm NAME               says whether an LLM trains on this card"
        yield "python -m lab.gpu --smoke                    tries every path that only a GPU takes"


def python():
    return Finding("Python", f"{platform.python_version()} on {platform.platform(terse=True)}")


def packages():
    """A Finding for the required packages: those that are missing or older than was tested."""
    wanted = {}
    for line in (PROJECT / "requirements.txt").read_text("utf-8").splitlines():
        name, pinned, version = line.partition("==")
        if pinned and not line.startswith("#"):
            wanted[name.strip()] = version.strip()
    missing, other = [], []
    for name, version in wanted.items():
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if there.split("+")[0] != version:
            other.append(f"{name} {there} (tested: {version})")
    if missing:
        yield Finding("packages", f"missing: {', '.join(missing)}", INSTALL)
    else:
        yield Finding("packages", f"all {len(wanted)} of requirements.txt are there")
    if other:
        yield Finding("versions", "; ".join(other), INSTALL, needed=False)


def card():
    built = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if DEVICE == "cpu":
        mend = ""
        if shutil.which("nvidia-smi"):  # then there is a card, or there was
            mend = "its driver: nvidia-smi says more; or torch for its CUDA: pytorch.org"
        found = f"none, because {WHY_DEVICE}; {built}: everything runs on the CPU"
        return Finding("GPU", found, mend, needed=False)
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    found = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {built}"
    if free < 0.5 * total:
        return Finding("GPU", found, "close what else uses the card (nvidia-smi)", needed=False)
    return Finding("GPU", found)


def quantizer():
    """bitsandbytes packs a small layer, and unpacks it again."""
    try:
        import bitsandbytes

        weight = torch.randn(64, 64, device=DEVICE)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        bitsandbytes.functional.dequantize_4bit(packed, state)
    except Exception as error:  # whatever a broken library raises
        found = f"{first_line(error)}; LLMs are not quantized"
        return Finding("bitsandbytes", found, INSTALL, needed=False)
    return Finding("bitsandbytes", f"{bitsandbytes.__version__}: NF4 works on {DEVICE}")


def voices():
    """espeak-ng says a word."""
    try:
        from tiny.speech import speak

        samples, rate, _ = speak("three", {"voice": "en", "rate": 160, "pitch": 50, "range": 50})
    except Exception as error:  # whatever a broken library raises
        return Finding("espeak-ng", first_line(error), INSTALL)
    return Finding("espeak-ng", f"speaks ({len(samples) / rate:.1f} s of sound)")


def memory():
    free = psutil.virtual_memory().available
    found = f"{free / 1e9:.1f} GB free, {psutil.cpu_count()} cores"
    return Finding(
        "memory", found, "" if free > MEMORY else "close other programs: 4 GB are wanted"
    )


def disk(folder):
    there = nearest_existing(folder)
    free = shutil.disk_usage(there).free
    found = f"{free / 1e9:.1f} GB free in {there.resolve()}"
    return Finding("disk", found, "" if free > DISK else "make room: the demo wants 2 GB")


def tiny_world():
    for name in ("llm/model.safetensors", "encoder/model.safetensors", "tasks.toml"):
        if not (TINY / name).exists():
            return Finding("tiny world", f"{name} is missing", "clone the repository again")
    return Finding("tiny world", "both checkpoints are there")


def speech_in(folder):
    """What `prepare` has put there."""
    try:
        utterances = read_manifest(Path(folder) / "manifest.jsonl")
    except UserError as error:
        return Finding("data", str(error), f"python mtbi.py prepare … --out {folder}")
    hours = sum(u.duration for u in utterances) / 3600
    return Finding("data", f"{len(utterances)} utterances, {hours:.2f} hours in {folder}")


def optional_packages():
    for name, (purpose, command) in OPTIONAL.items():
        try:
            importlib.import_module(name) if name == "sounddevice" else metadata.version(name)
        except (ImportError, OSError, metadata.PackageNotFoundError):
            yield Finding(name, f"not there; {purpose} wants it", command, needed=False)
            continue
        yield Finding(name, f"there, for {purpose}")
