"""More than one process: `torchrun` or `accelerate launch` starts the same command several times, each process with a GPU of its own (or a share of the cores).

Every process holds the whole model, does its share of the work, and learns what the others found by sums. The first one alone writes files and talks.
With one process, the usual case, every function here does nothing.
"""

import os
from functools import lru_cache

import torch
from accelerate import PartialState
from accelerate.utils import reduce

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
MAIN = RANK == 0


@lru_cache(maxsize=1)
def processes():
    """The process group: NCCL between GPUs, gloo between CPUs."""
    return PartialState(cpu=DEVICE == "cpu")


def wait():
    """Until every process is here."""
    if WORLD > 1:
        processes().wait_for_everyone()


def mine(items):
    """This process's share of the items."""
    return items[RANK::WORLD]


def add_up(values):
    """The sum over all processes of a tensor, or of a list of numbers."""
    if WORLD == 1:
        return values
    processes()
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.float64, device=DEVICE)
    total = reduce(tensor, "sum")
    return total if isinstance(values, torch.Tensor) else total.tolist()


def add_up_gradients(parameters):
    """Replace every gradient by its sum over all processes: one message for all of them."""
    if WORLD == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]      # a process may have had nothing to do
    total = add_up(torch.cat([g.flatten() for g in gradients]))
    for p, part in zip(parameters, total.split([p.numel() for p in parameters])):
        p.grad = part.reshape(p.shape)
