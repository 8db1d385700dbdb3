"""AdamW that goes on, with the same result, where a GPU has no room for its moments.

It changes one parameter after another, and asks for all the memory that this takes before the
parameter changes: so it is out of memory with a step half taken and none of it lost. From then on
the moments are in host memory, and travel to the GPU a piece at a time. The arithmetic is the same
on the same device, number by number.
"""

import sys

import torch
from torch.optim.adamw import adamw
from tqdm import tqdm

from support.console import is_out_of_memory
from support.files import first_line

PIECE = 2**22  # numbers that travel at once
MOMENTS = ("exp_avg", "exp_avg_sq")


class RoomyAdamW(torch.optim.AdamW):
    """torch.optim.AdamW; `on_host`: are the moments in host memory?"""

    on_host = False

    @torch.no_grad()
    def prepare(self):
        """Make every parameter's moments before the first step.

        So that a GPU which has no room for them and a step says so at once, and not later, when a
        longer step than the first is halved for it.
        """
        gradients = []  # as large as those that a step has beside the moments
        for group in self.param_groups:
            for p in group["params"]:
                moments = self.moments_of(p, gradients)  # none, if they are to be on the host
                self.state[p].update(zip(MOMENTS, moments))

    @torch.no_grad()
    def step(self):
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.change(p, group)

    def change(self, p, group):
        """Change one parameter; an error of torch if not even a piece of it finds room."""
        moments, state = self.moments_of(p), self.state[p]
        if not moments:
            self.change_in_pieces(p, state, group)
            return
        adam_step(p, p.grad, moments, state["step"], group)
        state.update(zip(MOMENTS, moments))

    def moments_of(self, p, gradients=None):
        """The moments of a parameter on its device; none if they are to be on the host.

        gradients: a list that gets room for the parameter's gradient, where it has none yet.
        """
        state = self.state[p]
        state.setdefault("step", torch.tensor(0.0))
        if self.on_host:
            return []
        try:
            if gradients is not None:
                gradients.append(torch.empty_like(p))
            moments = [moment_on_device(state, name, p) for name in MOMENTS]
            make_room(p)
            return moments
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        moments = None  # of which one may be on the GPU
        self.leave_gpu(why)
        return []

    def leave_gpu(self, why):
        """All moments to host memory, for good."""
        tqdm.write(
            f"no memory for the optimizer's moments ({why}): from here on they are in host memory; "
            "slower, and the same result",
            file=sys.stderr,
        )
        for state in self.state.values():
            for name in MOMENTS:
                if name in state:
                    state[name] = state[name].to("cpu")
        self.on_host = True
        torch.cuda.empty_cache()

    def change_in_pieces(self, p, state, group):
        """Change one parameter, whose moments travel a piece at a time."""
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(
                    p, device="cpu", memory_format=torch.contiguous_format
                )
        numbers, gradients = p.data.view(-1), p.grad.reshape(-1)  # (all numbers of p,) each
        before = state["step"].clone()
        for start in range(0, p.numel(), PIECE):
            piece = slice(start, start + PIECE)
            at_home = [state[name].view(-1)[piece] for name in MOMENTS]
            moments = [moment.to(p.device) for moment in at_home]
            state["step"].copy_(before)  # which every piece counts up
            adam_step(numbers[piece], gradients[piece], moments, state["step"], group)
            for kept, moment in zip(at_home, moments):
                kept.copy_(moment)


def moment_on_device(state, name, p):
    """A moment of a parameter where the parameter is: zeros before its first step."""
    if name in state:
        return state[name].to(p.device)  # from the host where it was restored
    return torch.zeros_like(p, memory_format=torch.preserve_format)


def make_room(p):
    """What adam_step takes on the way is asked for and given back: torch keeps it for the step."""
    scratch = [torch.empty_like(p) for _ in range(2)]
    del scratch


def adam_step(p, gradient, moments, step, group):
    """torch's own step of a tensor, in place."""
    adamw(
        [p],
        [gradient],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        foreach=False,  # which would take memory for all parameters at once
        fused=p.device.type == "cpu",  # one pass over the numbers: eight times as fast there
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
