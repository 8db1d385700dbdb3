"""log.jsonl of a training: a row for each step."""

import math
import time

from support.files import UserError, read_jsonl, write_jsonl


class Log:
    """log.jsonl: a row for each step.

    track: also gets each row, or None.
    """

    def __init__(self, path, step, track=None):
        self.track = track
        self.path, self.rows, self.smooth = path, earlier_rows(path, step), None
        spent = self.rows[-1]["seconds"] if self.rows else 0
        self.start = time.perf_counter() - spent

    def add(self, step, finite, loss, rate, norm, tokens, audio_seconds):
        row = {"step": step, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens}
        row["audio_seconds"] = round(audio_seconds, 2)
        row["seconds"] = round(time.perf_counter() - self.start, 2)
        if not finite:
            row |= {"loss": None, "grad_norm": None, "skipped": True}
        elif self.smooth is None:
            self.smooth = loss
        else:
            self.smooth = 0.95 * self.smooth + 0.05 * loss
        self.rows.append(row)
        if self.track:
            self.track(row)

    def shown(self, skipped):
        """What the progress bar says."""
        said = {"loss": f"{self.smooth or math.nan:.3f}"}
        return {**said, "skipped": skipped} if skipped else said

    def write(self):
        write_jsonl(self.path, self.rows)


def earlier_rows(path, step):
    """The rows of the log before this step.

    It is for the reader, not for the training: one that is lost or damaged is begun anew.
    """
    if not step:
        return []
    try:
        return [row for row in read_log(path) if row["step"] < step]
    except UserError as error:
        print(f"{error}; the training goes on without its earlier rows")
        return []


def read_log(path):
    """The rows of a training log; the loss of a skipped step is None."""
    rows = [row for _, row in read_jsonl(path, ours=True)]
    if not rows or not all(is_log_row(row) for row in rows):
        raise UserError(f"{path}: is no whole training log; train again with --force")
    return rows


def is_log_row(row):
    if not isinstance(row, dict):
        return False
    numbers = ["step", "seconds"] if "skipped" in row else ["step", "seconds", "loss"]
    return all(isinstance(row.get(name), (int, float)) for name in numbers)
