"""`train --track`: the rows of a training's log also go to TensorBoard or Weights & Biases.

Through the trackers of accelerate, which are optional packages.
"""

from importlib.util import find_spec

from support.files import UserError, first_line
from support.processes import process_group

TRACKERS = ("off", "tensorboard", "wandb")
PROJECT_NAME = "mtbi"  # at Weights & Biases
NOT_TRACKED = ("step", "skipped")  # of a row; the step is the axis


class Tracker:
    """Takes the rows of a log to one of TRACKERS; `with` ends it, however the training ends.

    UserError at once if its package is missing.
    """

    def __init__(self, name, folder, settings):
        if name != "off" and find_spec(name) is None:
            raise UserError(f"--track {name}: the package is missing; pip install {name}")
        self.name, self.folder, self.settings, self.client = name, folder, settings, None

    def __enter__(self):
        if self.name != "off":
            self.client = start(self.name, self.folder)
            known = {name: str(value) for name, value in self.settings.items()}
            self.client.store_init_configuration(known)
        return self

    def __exit__(self, *_):
        if self.client:
            self.client.finish()

    def log(self, row):
        """A row of log.jsonl; what was not finite in it is left out."""
        if self.client:
            values = {}
            for name, value in row.items():
                if name not in NOT_TRACKED and value is not None:
                    values[name] = value
            self.client.log(values, step=row["step"])


def start(name, folder):
    """accelerate's tracker of this name; UserError where it refuses."""
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    process_group()  # the trackers ask it which process is the first
    if name == "tensorboard":
        client = TensorBoardTracker(str(folder.name), logging_dir=folder.parent / "tensorboard")
    else:
        client = WandBTracker(PROJECT_NAME, name=f"{folder.parent.name}/{folder.name}")
    try:
        client.start()
    except Exception as error:  # no account, no network, a folder that cannot be written
        raise UserError(f"--track {name}: cannot begin ({first_line(error)})") from None
    return client
