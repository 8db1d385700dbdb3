"""A short attack, with fixed seeds; see tests/torture.py.

What once fell short is kept by name beside what it is about: in test_data.py, test_corpora.py,
test_support.py and test_train.py.
"""

import re

from programs import program

SHORT = 120  # cases; thousands, by hand: see tests/torture.py


def test_a_short_attack_finds_nothing():
    attack = ["tests/torture.py", "--cases", SHORT, "--seed", 7, "--seconds", 60]
    done = program(attack)
    assert done.returncode == 0, done.said
    asked, held = re.search(r"\| all \| (\d+) \| (\d+) \|", done.said).groups()
    assert asked == held and int(asked) >= SHORT
