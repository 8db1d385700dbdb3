"""What every module stands on: files and errors, options, run folders, checkpoints, processes.

The scripts import this first: torch and tokenizers read these settings when they are loaded.
"""

import os
import sys
from importlib.util import find_spec

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# waiting threads sleep: half the time where others use the cores too, a tenth more alone
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# on H100 and later torch would take cuDNN's attention, which is compiled anew for every length
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

# what is not there is said in a line, and not by a traceback
if sys.version_info < (3, 11):  # noqa: UP036  where it is, nothing of pip has been asked
    print("mtbi: Python is older than 3.11; install a newer one", file=sys.stderr)
    sys.exit(2)
NEEDED = "torch torchaudio transformers accelerate soundfile psutil tyro docstring_parser tqdm"
NEEDED += " filelock pandas matplotlib jiwer sacrebleu"
for name in NEEDED.split():
    if find_spec(name) is None:
        print(f"mtbi: {name} is not installed: pip install -r requirements.txt", file=sys.stderr)
        sys.exit(2)
