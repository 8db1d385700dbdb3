"""What the papers claim, and the rule that decides each claim; both stand here before any run.

No hand touches the verdicts.
"""

from dataclasses import dataclass

from lab.statistics import QUESTION, RESAMPLES, ROUNDING, is_whole, over_runs, rows_of
from lab.statistics import utterances_of
from support.files import UserError


@dataclass(frozen=True)
class Claim:
    """A sum of measured values, recipe by recipe with a sign, that must be over a margin."""

    says: str
    paper: str
    measure: str  # a key of statistics.MEASURES
    terms: tuple  # (+1 or -1, recipe), ...
    margin: float = 0.0  # it must be over this
    tasks: tuple = ()  # of questions of these tasks alone, names or patterns; none: of all

    def recipes(self):
        return [name for _, name in self.terms]

    def formula(self):
        terms = " ".join(f"{'+' if sign > 0 else '−'} {name}" for sign, name in self.terms)
        terms = terms.removeprefix("+ ")
        return f"{terms} > {100 * self.margin:g}" if self.margin else terms


def above(better, worse):
    return ((1, better), (-1, worse))


MTBI, SELF = "MTBI, 2505.18644", "Self-Powered LSM, 2410.03798"
VTB, BLSP = "VoiceTextBlender, 2410.17485", "BLSP, 2309.00916"
CLAIMS = []
INSIDE = ("behavior gap", "attention on instruction")  # read off a model, and no answers
FEWEST = 20  # utterances that a verdict needs: the bootstrap of fewer is too sure of itself

# Prompt generalization: how much is lost on prompts that no training saw, of tasks that both were
# trained on: mtbi on all, the other on those of its row in mtbi.RECIPES (a test holds them
# together). Task generalization: tasks that neither was trained on.
BOTH_TRAINED_ON = {
    "asr": ("repeat",),
    "blsp": ("continue",),
    "vtb": (
        "repeat",
        "translate*",
        "who",
        "where",
        "what",
        "how_many",
        "category",
        "topic",
        "question_about",
        "smallest",
    ),
}
for other, tasks in BOTH_TRAINED_ON.items():
    CLAIMS.append(
        Claim(
            f"MTBI loses less than {other} on unseen prompts of tasks both were trained on",
            MTBI,
            "drop from seen to unseen prompts",
            above(other, "mtbi"),
            tasks=tasks,
        )
    )
for other in ("asr", "blsp", "vtb"):
    CLAIMS.append(
        Claim(
            f"MTBI generalizes to unseen tasks better than {other}",
            MTBI,
            "gain, unseen tasks",
            above("mtbi", other),
        )
    )
CLAIMS += [
    # which part of MTBI does it
    Claim(
        "many tasks generalize better than ASR alone, both without interleaving",
        MTBI,
        "gain, unseen tasks",
        above("mtbi-no-interleave", "asr"),
    ),
    Claim(
        "four tasks generalize better than one",
        MTBI,
        "gain, unseen tasks",
        above("mtbi-4", "mtbi-1"),
    ),
    Claim(
        "all tasks generalize better than four",
        MTBI,
        "gain, unseen tasks",
        above("mtbi", "mtbi-4"),
    ),
    Claim(
        "interleaving helps",
        MTBI,
        "gain, unseen tasks",
        above("mtbi", "mtbi-no-interleave"),
    ),
    Claim(
        "interleaving helps with 30% of the speech",
        MTBI,
        "gain, unseen tasks",
        above("mtbi@30", "mtbi-no-interleave@30"),
    ),
    Claim(
        "interleaving helps with 10% of the speech",
        MTBI,
        "gain, unseen tasks",
        above("mtbi@10", "mtbi-no-interleave@10"),
    ),
    Claim(
        "and more than with all of it",
        MTBI,
        "gain, unseen tasks",
        above("mtbi@10", "mtbi-no-interleave@10") + above("mtbi-no-interleave", "mtbi"),
    ),
    Claim(
        "fewer hours are needed: MTBI with 30% of the speech beats ASR tuning with all of it",
        MTBI,
        "gain, unseen tasks",
        above("mtbi@30", "asr"),
    ),
    Claim(
        "interleaving makes alignment faster: it is ahead after 250 steps",
        MTBI,
        "gain, unseen tasks",
        above("mtbi-at-250", "mtbi-no-interleave-at-250"),
    ),
    Claim(
        "repeating first helps (ours)",
        "ours",
        "gain, unseen tasks",
        above("mtbi", "mtbi-flat"),
    ),
    # BLSP
    Claim(
        "behavior imitation with one task, continuation, generalizes better than ASR tuning, with "
        "one connector on the same speech",
        BLSP,
        "gain, unseen tasks",
        above("blsp-mlp", "asr-sentences"),
        tasks=("when", "colour", "sentiment", "question", "future"),  # those about sentences
    ),
    # anchor bias, and its cure
    Claim(
        "one ASR instruction makes the model do what the speech says (anchor bias)",
        SELF,
        "anchor rate",
        above("vanilla-it", "self-powered"),
    ),
    Claim(
        "one ASR instruction makes the model ignore other instructions",
        SELF,
        "ignored instruction",
        above("vanilla-it", "self-powered"),
    ),
    Claim(
        "self-powered data brings attention back to the instruction",
        SELF,
        "attention on instruction",
        above("self-powered", "vanilla-it"),
    ),
    Claim(
        "self-powered data generalizes better than ASR instructions alone",
        SELF,
        "gain, everything unseen",
        above("self-powered", "vanilla-it"),
    ),
    Claim(
        "self-powered data keeps speech recognition: no more than two points are lost, on the "
        "wording that both were trained on",
        SELF,
        "word accuracy on one wording",
        above("self-powered", "vanilla-it"),
        margin=-0.02,
        tasks=("repeat",),
    ),
    Claim(
        "self-powered data is better at translation",
        SELF,
        "gain, all",
        above("self-powered", "vanilla-it"),
        tasks=("translate*",),
    ),
    Claim(
        "self-powered data is better at questions about what was said",
        SELF,
        "gain, all",
        above("self-powered", "vanilla-it"),
        tasks=("who", "where", "what", "when", "how_many", "question_about"),
    ),
    Claim(
        "self-powered data is better at understanding",
        SELF,
        "gain, all",
        above("self-powered", "vanilla-it"),
        tasks=("category", "sentiment", "keywords", "summar*", "topic", "intent"),
    ),
    # VoiceTextBlender
    Claim(
        "without text-only data text skills are lost: more than one point of them",
        VTB,
        "text retention",
        above("text", "vtb-no-text"),
        margin=0.01,
    ),
    Claim(
        "text-only data keeps them better",
        VTB,
        "text retention",
        above("vtb", "vtb-no-text"),
    ),
    Claim(
        "joint tuning loses less than ASR tuning on unseen prompts",
        VTB,
        "drop from seen to unseen prompts",
        above("asr", "vtb"),
        tasks=("repeat",),
    ),
    Claim(
        "two turns emerge: a second turn about speech, never trained on, is at most five points "
        "worse than trained on",
        VTB,
        "gain, a second turn about speech",
        above("vtb-no-mixed", "vtb"),
        margin=-0.05,
    ),
    Claim(
        "mixed input emerges: speech after a typed turn, never trained on, is at most five points "
        "worse than trained on",
        VTB,
        "gain, a second turn after text",
        above("vtb-no-mixed", "vtb"),
        margin=-0.05,
    ),
    Claim(
        "imitating the whole distribution narrows the behavior gap",
        "ours",
        "behavior gap",
        above("mtbi", "mtbi-kl"),
    ),
]

RULE = f"""holds: the 95% interval lies above zero (or the margin named); does not hold: it lies \
below; undecided: it includes it, or fewer than {FEWEST} utterances were asked about. The interval \
is Student's t over the paired differences of the runs; where runs share test recordings, or agree \
exactly, what a bootstrap over these shows is added ({RESAMPLES} resamples), as variances add. One \
run shows nothing of how trainings differ: its verdicts are about that one training of each \
recipe, by the bootstrap over utterances (percentiles 2.5 and 97.5). It is about these tasks: how \
other unseen tasks would differ is in no interval. Each claim is decided by itself: of forty \
without any truth in them one may seem to hold."""

# the data-efficiency curve: recipes, and percents of the speech beside 100
CURVE = {"mtbi": (10, 30), "mtbi-no-interleave": (10, 30), "asr": (10, 30)}
STEPS = (125, 250, 500)  # the recipes of CURVE are measured after so many steps, too
# what mtbi should reach in the tiny world
BAR = {
    "gain, seen": 0.93,
    "gain, unseen prompts": 0.92,
    "gain, unseen tasks": 0.88,
}


class Results:
    """The table of answers of several runs, and what a measure is in it.

    answers: the rows of all runs, with a column `run`.
    """

    def __init__(self, answers):
        self.groups = dict(list(answers.groupby(["run", "system"], sort=False)))
        self.runs = list(answers["run"].unique())
        self.found = {}

    def systems(self):
        return list(dict.fromkeys(system for _, system in self.groups))

    def runs_with(self, *systems):
        return [run for run in self.runs if all((run, name) in self.groups for name in systems)]

    def rows(self, run, system, measure, tasks=()):
        """The rows of a measure (statistics.rows_of), in the order in which it was asked."""
        key = (run, system, measure, tasks)
        if key not in self.found:
            self.found[key] = rows_of(self.groups[run, system], measure, tasks)
        return self.found[key]

    def over(self, system, measure):
        """{"score", "ci95", "n", "by_run"} of a system, over its runs."""
        return over_runs([self.rows(run, system, measure) for run in self.runs_with(system)])


def paired_difference(results, run, claim):
    """The rows (statistics.rows_of) of a claim's sum in one run; none if a term has none."""
    terms = []
    for sign, system in claim.terms:
        terms.append((sign, results.rows(run, system, claim.measure, claim.tasks)))
    first = terms[0][1]
    total = 0.0
    for sign, rows in terms:
        if not len(rows):
            return rows
        if rows[QUESTION].to_numpy().tolist() != first[QUESTION].to_numpy().tolist():
            if claim.measure in INSIDE:  # some number was none, as where a model overflows
                return first[:0]
            raise UserError(
                "the recipes of one run were asked different questions; choose another folder for "
                "--out"
            )
        total = total + sign * rows["value"].to_numpy()
    return first.assign(value=total)  # the weights are the questions', so they are the same


def decide(claim, results):
    """A claim's row: the value, its interval, the number of runs, and the verdict by RULE."""
    runs = results.runs_with(*claim.recipes())
    differences = [paired_difference(results, run, claim) for run in runs]
    found = over_runs(differences)
    low, high = found["ci95"]
    tasks, utterances = set(), set()
    for rows in differences:
        tasks.update(rows["task"])
        utterances.update(utterances_of(rows))
    if not found["n"]:
        verdict = "not measured"
    elif len(utterances) < FEWEST:
        verdict = "undecided"
    elif low > claim.margin + ROUNDING:
        verdict = "holds"
    elif high < claim.margin - ROUNDING:
        verdict = "does not hold"
    else:
        verdict = "undecided"
    of = sorted(tasks or claim.tasks) if claim.tasks else []
    return {
        "claim": claim.says,
        "paper": claim.paper,
        "measure": claim.measure + (f" ({', '.join(of)})" if of else ""),
        "difference": claim.formula(),
        "recipes": claim.recipes(),
        **found,
        "verdict": verdict,
    }


def all_differences(results, systems, measures):
    """A row for every measure and every pair of systems: what `decide` finds of one − the other.

    Every pair, not those alone that a claim is about.
    """
    whole, rows = [name for name in systems if is_whole(name)], []
    for measure in measures:
        for i, a in enumerate(whole):
            for b in whole[i + 1 :]:
                found = decide(Claim("", "", measure, above(a, b)), results)
                if found["n"]:
                    low, high = found["ci95"]
                    rows.append(
                        {
                            "measure": measure,
                            "system": a,
                            "minus": b,
                            "score": found["score"],
                            "low": low,
                            "high": high,
                            "runs": found["n"],
                            "verdict": found["verdict"],
                        }
                    )
    return rows
