"""What every module stands on: files and errors, options, run folders, checkpoints, processes.

The scripts import this first: torch and tokenizers read these settings when they are loaded.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# waiting threads sleep: half the time where others use the cores too, a tenth more alone
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
