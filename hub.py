"""Checkpoints of Hugging Face: a local folder, a hub name, or "tiny" for the tiny world's; weights come from safetensors only, code from transformers only."""

import hashlib
import logging
from pathlib import Path

from huggingface_hub.utils import enable_progress_bars
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from files import UserError

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)         # it warns of an optional kernel package it would load from the network
transformers_logging.disable_progress_bar()                        # loading weights takes seconds,
enable_progress_bars()                                             # but a download is seen
TINY = Path(__file__).with_name("tiny")                            # the tiny world's checkpoints, by the name "tiny"


def weights_id(name, kind):
    """Names the weights in a local model folder, or the revision of a hub name, so that other weights are noticed."""
    folder = TINY / kind if name == "tiny" else Path(name)
    if not folder.is_dir():
        load_or_explain(AutoConfig, name, {"llm": "LLM", "encoder": "speech encoder"}[kind])
        return Path(cached_file(name, "config.json")).parent.name          # …/snapshots/COMMIT/config.json
    hashed = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        hashed.update(f"{file.name} {size}".encode())
        with open(file, "rb") as content:                          # a large file is not read whole: 256 samples from its beginning to its end
            for i in range(256):
                content.seek(max(0, size - 2**14) * i // 255)
                hashed.update(content.read(2**14))
    return hashed.hexdigest()[:12]


def named(name):
    """A local model folder as an absolute path; "tiny" and hub names as they are."""
    return str(Path(name).resolve()) if name != "tiny" and Path(name).exists() else name


def load_or_explain(auto_class, name, what, **options):
    """auto_class.from_pretrained with an error for people; weights come from safetensors only and must be whole, code comes from transformers only."""
    try:
        options["trust_remote_code"] = False                       # unset, transformers would ask on the terminal, and run what comes with the weights
        if "dtype" not in options:
            return auto_class.from_pretrained(name, **options)
        model, found = auto_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
        lost = sorted(str(key) for key in [*found["missing_keys"], *found["mismatched_keys"]] if "masked_spec_embed" not in str(key))    # of pre-training only
        if lost:
            raise ValueError(f"its weights are not whole: {len(lost)} tensors are missing or of another shape, like {lost[0]}")
        return model
    except Exception as error:                                     # damaged files raise anything
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} {name}: cannot be loaded as a Hugging Face checkpoint, local folder or hub name ({why})") from None


def load_tensors(path, advice="delete it and run again"):
    """The tensors of a safetensors file; UserError if it is not whole."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is no readable safetensors file ({error}); {advice}") from None
