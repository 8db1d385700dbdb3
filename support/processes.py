"""More than one process, each with a GPU of its own (or a share of the cores).

`torchrun` or `accelerate launch` starts the same command several times. Every process holds the
whole model, does its share of the work, and learns what the others found by sums. The first one
alone writes files and talks. With one process, the usual case, there is nothing to wait for or to
add up, and its share is everything.
"""

import os
import re
import sys
from datetime import timedelta
from functools import lru_cache, wraps

import torch
from accelerate import PartialState
from accelerate.utils import reduce

RANK, WORLD = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
if not (RANK.isdecimal() and WORLD.isdecimal() and int(RANK) < int(WORLD)):
    print(
        f"mtbi: RANK is {RANK!r} and WORLD_SIZE {WORLD!r} in the environment: torchrun sets both; "
        "for one process unset them",
        file=sys.stderr,
    )
    sys.exit(2)
RANK, WORLD = int(RANK), int(WORLD)
MAIN = RANK == 0


def choose_device():
    """(the device of this process, the reason)."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "cpu", "no GPU is found" if built else "this torch was built without CUDA"
    n_gpus, index = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if index >= n_gpus:
        print(
            f"mtbi: process {index + 1} of this machine finds {n_gpus} GPUs: start one process for "
            "each, or, with CUDA_VISIBLE_DEVICES= before the command, as many as you like on CPUs",
            file=sys.stderr,
        )
        sys.exit(2)
    capability = torch.cuda.get_device_capability(index)
    if not has_kernels(capability, torch.cuda.get_arch_list()):
        card = torch.cuda.get_device_name(index)
        return "cpu", f"this torch has no kernels for the {card} ({capability[0]}.{capability[1]})"
    return f"cuda:{index}", "CUDA is there"


def has_kernels(capability, architectures):
    """Whether a torch that was built for some architectures runs on a card.

    capability: (major, minor) of the card. architectures: like "sm_86", machine code, which runs on
    cards of the same major number and no smaller minor one, or "compute_90", which any later card
    compiles for itself.
    """
    known = False
    for architecture in architectures:
        made_for = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture)
        if not made_for:
            continue  # such as those of AMD
        known = True
        major, minor = int(made_for[2]), int(made_for[3])
        if made_for[1] == "compute" and (major, minor) <= tuple(capability):
            return True
        if major == capability[0] and minor <= capability[1]:
            return True
    return not known


DEVICE, WHY_DEVICE = choose_device()


@lru_cache(maxsize=1)
def process_group():
    """The process group: NCCL between GPUs, gloo between CPUs.

    Its processes wait for each other as long as need be: for the one that encodes more speech, or
    on a folder in which another command is at work.
    """
    return PartialState(cpu=DEVICE == "cpu", timeout=timedelta(days=7))


def wait():
    """Until every process is here."""
    if WORLD > 1:
        process_group().wait_for_everyone()


def first_process(function):
    """Marks what the first process alone does; all go on together when it is done."""

    @wraps(function)
    def by_the_first(*args, **options):
        if MAIN:
            function(*args, **options)
        wait()

    return by_the_first


def my_share(items):
    """This process's share of the items."""
    return items[RANK::WORLD]


def add_up(values):
    """The sum over all processes of a tensor, or of a list of numbers."""
    if WORLD == 1:
        return values
    process_group()
    if isinstance(values, torch.Tensor):
        return reduce(values, "sum")
    return reduce(torch.tensor(values, dtype=torch.float64, device=DEVICE), "sum").tolist()


def anyone(flag):
    """Is it true in any process?"""
    return add_up([float(bool(flag))])[0] > 0


def add_up_gradients(parameters):
    """Replace every gradient by its sum over all processes, one after the other."""
    if WORLD == 1:
        return
    for p in parameters:
        # a process may have had nothing to do
        p.grad = add_up(torch.zeros_like(p) if p.grad is None else p.grad)
