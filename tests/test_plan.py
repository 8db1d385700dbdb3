"""`plan` says beforehand what a training will need, and benchmarks/step.py measures it."""

import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import mtbi
import plan
from benchmarks import step
from connectors import Connector
from files import read_json
from model import SpeechLLM, load_llm

SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8000}


@pytest.mark.parametrize("name, billions", [("qwen2.5-0.5b", 0.494), ("qwen2.5-1.5b", 1.544), ("qwen2.5-3b", 3.086), ("qwen2.5-7b", 7.616),
                                            ("qwen2.5-14b", 14.77), ("llama-3.2-1b", 1.236), ("llama-3.2-3b", 3.213), ("llama-3.1-8b", 8.030),
                                            ("smollm2-360m", 0.362), ("smollm2-1.7b", 1.711)])
def test_the_shapes_have_as_many_parameters_as_the_published_models(name, billions):
    llm, _ = plan.llm_shape(plan.known(name, plan.LLMS, "llm"), torch.bfloat16)
    assert llm.num_parameters() / 1e9 == pytest.approx(billions, rel=2e-3)


def test_encoders_are_measured_from_their_configurations(tmp_path):
    from checkpoints import save_encoder
    assert plan.encoder_shape(plan.known("openai/whisper-large-v3", plan.ENCODERS, "encoder"), "") == (636968960, 1280, 50.0)
    for family, rate in (("wav2vec2-ctc", 50.0), ("parakeet", 12.5), ("parakeet-encoder", 12.5), ("whisper", 50.0), ("tiny", 100 / 3)):
        if family != "tiny":
            (tmp_path / family).mkdir()
            save_encoder(tmp_path / family, family)
        name = "tiny" if family == "tiny" else str(tmp_path / family)
        _, width, found = plan.encoder_shape(plan.known(name, plan.ENCODERS, "encoder"), name)
        assert (width, found) == (192 if family == "tiny" else 32, pytest.approx(rate, rel=0.02)), family


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(bits, checkpointing, precision):
    """On a CPU: the tensors that are alive in a real step, on real weights."""
    import transformers
    config, dtype = transformers.Qwen2Config(**SMALL, tie_word_embeddings=True), plan.PRECISIONS[precision]
    args = type("", (), {"batch_size": 6, "prompt_tokens": 40, "answer_tokens": 30, "seconds": 6.0})
    llm = step.random_llm(config, bits, dtype)
    connector = Connector("stack-mlp", 128, 256, 9, 1024)
    model = SpeechLLM(llm, transformers.AutoTokenizer.from_pretrained(ROOT / "tiny" / "llm"), None, connector)
    model = (model.checkpoint_gradients() if checkpointing else model).train()
    optimizer, rows = torch.optim.AdamW(model.trainable().values()), step.conversations(args, 128, 300)
    step.our_step(model, optimizer, rows, None)
    measured = step.peak_bytes(step.our_step, model, optimizer, rows, None)
    planned = plan.estimate(config, 128, 50.0, bits=bits, dtype=dtype, seconds=6.0, prompt=40, answer=30, batch=6, checkpointing=checkpointing)
    assert planned["peak"] == pytest.approx(measured, rel=0.15), {k: round(v / 1e6, 1) for k, v in planned.items()}


def test_the_weights_are_estimated_to_the_percent():
    llm, _ = load_llm("tiny", 4)
    shape, _ = plan.llm_shape(llm.config, torch.float32)
    real = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in step.tensors_of(llm)}.values())
    assert plan.weight_bytes(shape, 4, torch.float32)[0] == pytest.approx(real, rel=0.02)


def test_what_is_said_to_fit_is_a_command_that_runs_and_more_memory_never_fits_less(capsys):
    parser, micro = mtbi.build_parser(mtbi.__doc__, mtbi.COMMANDS, mtbi.RECIPES), []
    for vram in (8, 16, 80):
        assert mtbi.main(["plan", "--vram", str(vram)]) == 0
        said = capsys.readouterr().out
        for line in said.splitlines():
            if line.startswith("  python mtbi.py"):
                args = parser.parse_args(shlex.split(line)[2:])
                if args.command == "train":
                    micro.append(args.batch_size)
                    assert args.batch_size * args.accumulate == 32 and args.gradient_checkpointing == "on"
                else:
                    assert args.llm == "Qwen/Qwen2.5-7B-Instruct"
        peak = float(next(line for line in said.splitlines() if line.startswith("| peak")).split("|")[2])
        assert peak <= vram
        rows = [float(line.split("|")[2]) for line in said.splitlines()[2:7]]
        assert sum(rows) == pytest.approx(peak, abs=0.03), "the table adds up"
    assert len(micro) == 3 and micro == sorted(micro) and micro[-1] > micro[0]


def test_what_does_not_fit_is_said_with_what_would_help(tmp_path, capsys):
    from checkpoints import save_encoder
    assert mtbi.main(["plan", "--llm", "qwen2.5-14b", "--vram", "6"]) == 0
    said = capsys.readouterr().out
    assert "It does not fit 6 GB" in said and "GB are needed" in said and "python mtbi.py train" not in said
    assert mtbi.main(["plan", "--llm", str(save_encoder(tmp_path, "whisper"))]) == 2 and "is no causal LLM" in capsys.readouterr().err
    assert mtbi.main(["plan", "--vram", "-1"]) == 2 and "is no number over 0" in capsys.readouterr().err


def test_a_lora_adapter_and_other_connectors_are_counted(capsys):
    def trained(*more):
        assert mtbi.main(["plan", "--llm", "qwen2.5-0.5b", "--encoder", "whisper-small", *more]) == 0
        return float(next(line for line in capsys.readouterr().out.splitlines() if "connector and optimizer" in line).split("|")[2])
    plain = trained()
    assert trained("--lora", "16") == pytest.approx(plain + 8.8e6 * 16 / 1e9, abs=0.02), "8.8M parameters, as PEFT counts them"
    assert trained("--connector", "qformer") > plain


def test_the_benchmark_of_a_step_runs_beside_the_baseline(tmp_path):
    done = subprocess.run([sys.executable, "benchmarks/step.py", "--llm", "tiny/llm", "--encoder", "whisper-tiny", "--steps", "2", "--batch-size", "2",
                           "--seconds", "3", "--out", str(tmp_path / "step.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "step.json", "ours", "plain", "planned_peak_gb", "torch", "date")
    assert "ours / plain" in done.stdout and "`plan` says" in done.stdout
    assert result["ours"]["samples_s"] > result["plain"]["samples_s"] > 0 and result["plain"]["peak_gb"] > result["ours"]["peak_gb"]
    assert 0 < result["ours"]["share_of_flop_limit"] < 1
