"""The states of a training: what it goes on from after it was interrupted or killed.

A state is one safetensors file, RUN/RECIPE/state/STEP.safetensors; the last two are kept, or all,
so that the benchmark can tell how a training went.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.files import UserError, first_line, whole_file
from support.processes import first_process
from support.runs import delete_made

TRAINED = (  # what a training ends with
    "model.json",
    "connector.safetensors",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/README.md",  # peft's
)
ON_THE_WAY = ("log.jsonl", f"state/{8 * '[0-9]'}.safetensors")


@first_process
def clear(folder, anew):
    """Delete what an earlier training left; its log and states only if this one begins anew."""
    delete_made(folder, TRAINED + ON_THE_WAY if anew else TRAINED)


def saved_states(folder):
    """The saved states of a training, newest first."""
    return sorted(Path(folder).glob(ON_THE_WAY[1]), reverse=True)


@first_process
def save_state(folder, parameters, optimizer, progress, made_with="", keep=2):
    """Write trainable weights, both Adam moments, and the progress (a dataclass with a step).

    keep: how many states stay; None: all.
    """
    tensors = {}
    for name, p in parameters.items():
        tensors[f"weight.{name}"] = p.detach().contiguous()
        for moment, value in optimizer.state[p].items():
            tensors[f"{moment}.{name}"] = value.contiguous()
    about = {"progress": json.dumps(asdict(progress)), "made_with": made_with}
    about["checksum"] = checksum_of_state(tensors, about)
    with whole_file(Path(folder) / "state" / f"{progress.step:08d}.safetensors") as temporary:
        save_file(tensors, temporary, metadata=about)
    for old in saved_states(folder)[keep:] if keep else ():
        old.unlink(missing_ok=True)


def checksum_of_state(tensors, about):
    """Names everything in a state, so that a single bit that flipped on the disk is noticed."""
    hashed = hashlib.sha256(repr((about["progress"], about["made_with"])).encode())
    for name in sorted(tensors):
        hashed.update(name.encode())
        hashed.update(tensors[name].cpu().numpy().tobytes())
    return hashed.hexdigest()[:12]


def load_state(folder, parameters, optimizer, start, made_with=""):
    """Put the newest whole state back; returns its progress, or `start` if there is no state."""
    states = saved_states(folder)
    for path in states:
        try:
            progress = restore(path, parameters, optimizer, start, made_with)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            print(f"{path}: is no state of this training ({first_line(error)})")
            continue
        print(f"resuming at step {progress.step}")
        return progress
    if states:
        raise UserError(
            f"{folder / 'state'}: holds no state that can be read; delete it, or --force starts "
            "again"
        )
    return start


def state_at(folder, step):
    """The state of a training after so many steps; UserError if it was not kept."""
    path = Path(folder) / "state" / f"{step:08d}.safetensors"
    if not path.exists():
        there = ", ".join(str(int(state.stem)) for state in reversed(saved_states(folder)))
        raise UserError(
            f"{folder}: no state after {step} steps was kept ({there or 'none'} are there); train "
            "with --keep-states, and --save-every a divisor of it"
        )
    return path


def load_weights(path, parameters):
    """The trainable weights of one state file, nothing else; UserError if it is damaged."""
    try:
        tensors, _ = read_state(path)
        for name, p in parameters.items():
            p.data.copy_(tensors[f"weight.{name}"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: is no state of this training ({first_line(error)})") from None


def read_state(path):
    """(tensors, what is said about them) of a state file; ValueError if its checksum is wrong."""
    with safe_open(path, "pt") as file:
        # copies: Windows deletes no file of which a tensor is still a part
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        about = file.metadata()
    if about["checksum"] != checksum_of_state(tensors, about):
        raise ValueError("it is damaged: its checksum does not fit")
    return tensors, about


def restore(path, parameters, optimizer, start, made_with):
    """Weights and moments from one state file, all of them or none; returns its progress."""
    tensors, about = read_state(path)
    if about["made_with"] != made_with:
        raise ValueError("it was saved by a training with other settings")
    progress = replace(start, **json.loads(about["progress"]))
    moments = {}
    for name, p in parameters.items():
        if tensors[f"weight.{name}"].shape != p.shape:
            raise ValueError(f"{name} has another shape")
        moments[p] = {}
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"{moment}.{name}")
            if value is not None:
                moments[p][moment] = value  # on the CPU: the optimizer takes it where it has room
    for name, p in parameters.items():
        p.data.copy_(tensors[f"weight.{name}"])
        if moments[p]:
            optimizer.state[p] = moments[p]
    return progress
