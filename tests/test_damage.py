"""Damaged, foreign and half models and folders: refused in words, never loaded in silence."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import TEMPLATES, save_encoder, save_llm, tokenizer_of
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_data import one_line

import model as models
import mtbi
from corpora import spell
from data import ask, chat_parts
from files import UserError, read_json, write_json
from model import SpeechEncoder, SpeechLLM, load_llm


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("lost", ["layers.1", "embed_tokens", "lm_head"])
def test_an_llm_whose_weights_are_not_whole_is_refused(tmp_path, lost):
    change_weights(save_llm(tmp_path, "qwen2"), lambda tensors: {k: v for k, v in tensors.items() if lost not in k})
    for bits in (4, 16):
        with pytest.raises(UserError, match=f"weights are not whole: .*{lost}"):
            load_llm(tmp_path, bits)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2-ctc", "wavlm", "parakeet"])
def test_an_encoder_whose_weights_are_not_whole_or_not_numbers_is_refused(tmp_path, kind):
    whole = load_file(save_encoder(tmp_path, kind) / "model.safetensors")
    change_weights(tmp_path, lambda _: {k: v for k, v in whole.items() if "layers.1" not in k})
    with pytest.raises(UserError, match="weights are not whole"):
        SpeechEncoder(tmp_path)
    change_weights(tmp_path, lambda _: {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in whole.items()})
    with pytest.raises(UserError, match="NaN or infinite"):
        SpeechEncoder(tmp_path)


def test_what_wav2vec2_needs_for_pre_training_only_may_be_missing(tmp_path):
    change_weights(save_encoder(tmp_path, "wav2vec2-ctc"), lambda tensors: {k: v for k, v in tensors.items() if "masked_spec_embed" not in k})
    assert SpeechEncoder(tmp_path).head is not None


def test_an_extractor_of_another_model_is_refused(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor
    Wav2Vec2FeatureExtractor().save_pretrained(save_encoder(tmp_path, "whisper"))
    with pytest.raises(UserError, match="do not fit together"):
        SpeechEncoder(tmp_path)


def test_code_in_a_checkpoint_is_never_run_even_if_the_user_says_yes(tmp_path):
    config = read_json(save_llm(tmp_path, "qwen2") / "config.json")
    write_json(tmp_path / "config.json", {**config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}})
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\nclass Evil: pass\n")
    script = f"from model import load_llm\nfrom data import UserError\ntry: load_llm({str(tmp_path)!r}, 16)\nexcept UserError as error: print('refused', error)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, input="y\n" * 9, capture_output=True, text=True)
    assert "refused" in done.stdout and not (tmp_path / "it-ran").exists(), done.stderr


def test_the_compute_type_is_bf16_fp16_or_fp32(monkeypatch):
    assert models.compute_precision() == "fp32" or torch.cuda.is_available()
    monkeypatch.setattr(models, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for major, expected in ((7, "fp16"), (8, "bf16"), (9, "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, major=major: SimpleNamespace(major=major, minor=5))
        assert models.compute_precision() == expected


# ---- chat templates ----

@pytest.mark.parametrize("template", ["", "hello", "{{ 1 / 0 }}", "{% for m in messages %}{{ m['content'][:3] }}{% endfor %}",
                                      "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "{% broken"])
def test_a_template_that_cannot_say_what_is_asked_is_refused_with_the_models_name(tmp_path, template):
    save_llm(tmp_path, "qwen2")
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=f"LLM {tmp_path}: .*(chat template)"):
        load_llm(tmp_path, 16)


def test_a_system_turn_that_a_template_silently_drops_is_put_before_the_question():
    tokenizer = tokenizer_of("phi3")
    tokenizer.chat_template = TEMPLATES["phi3"].replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    parts = chat_parts(tokenizer, [{"role": "system", "content": "Be brief."}, *ask("Who did it?")], [[]])
    assert tokenizer.decode(parts[0].ids).count("Be brief.\n\nWho did it?") == 1


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "audio"}]}], ["hi"],
                                      [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], [{"role": "user", "content": [{"type": "text"}]}]])
def test_a_conversation_that_is_none_is_explained(model, messages):
    with pytest.raises(UserError, match="no message like"):
        model.answer(messages)


# ---- run folders ----

@pytest.fixture
def trained(data, tmp_path):
    run = tmp_path / "run"
    assert mtbi.main(["imitate", str(data), "--out", str(run), "--per-utterance", "1"]) == 0
    assert mtbi.main(["train", str(run), "--steps", "2", "--batch-size", "8", "--hidden", "16", "--lora", "2"]) == 0
    return run


def test_damaged_run_folders_are_explained(trained, capsys, data):
    folder, audio = trained / "mtbi", str(next((data / "audio").glob("*.wav")))
    adapter, connector = folder / "adapter" / "adapter_model.safetensors", folder / "connector.safetensors"
    good = {path: path.read_bytes() for path in (adapter, connector, folder / "model.json")}

    def refused(*reasons):
        capsys.readouterr()
        assert mtbi.main(["generate", str(trained), audio, "Who did it?"]) == 2
        one_line(capsys, *reasons)
        for path, content in good.items():
            path.write_bytes(content)

    save_file(dict(list(load_file(adapter).items())[:3]), adapter)
    refused("its adapter is not whole", "--force")
    save_file({k: torch.full_like(v, torch.nan) for k, v in load_file(connector).items()}, connector)
    refused("NaN or infinite")
    for key, value in (("k", "6"), ("k", -1), ("hidden", "x"), ("connector", []), ("lora", "x")):
        write_json(folder / "model.json", {**read_json(folder / "model.json"), key: value})
        refused("model.json" if key != "connector" else "")


@pytest.mark.parametrize("file, change", [("config.json", {"settings": 5}), ("config.json", {"settings": {}}), ("mtbi/config.json", {"settings": []}),
                                          ("mtbi/log.jsonl", None), ("report.json", {"recipes": {"mtbi": 5}, "meta": {}}), ("mtbi/model.json", {"k": None})])
def test_info_explains_files_that_are_not_its_own(trained, capsys, file, change):
    if change is None:
        (trained / file).write_text('{"step": "a", "loss": "b", "seconds": null}\n')
    else:
        before = read_json(trained / file) if (trained / file).exists() else {}
        write_json(trained / file, {k: v for k, v in {**before, **change}.items() if v is not None})
    capsys.readouterr()
    assert mtbi.main(["info", str(trained)]) == 2
    one_line(capsys, "--force")


def test_a_training_begun_anew_forgets_the_old_one(trained, capsys):
    from train import train as real
    argv = ["train", str(trained), "--steps", "50", "--batch-size", "8", "--hidden", "16", "--force"]
    mtbi.train = lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        assert mtbi.main(argv) == 130
    finally:
        mtbi.train = real
    assert not (trained / "mtbi" / "adapter").exists()
    capsys.readouterr()
    assert mtbi.main(["info", str(trained)]) == 0
    assert "steps 0 of 50" in capsys.readouterr().out


def test_the_same_recipe_with_lora_resumes_bit_for_bit(trained, data, tmp_path):
    argv = ["train", str(trained), "--recipe", "asr", "--steps", "4", "--batch-size", "8", "--hidden", "16", "--lora", "2", "--save-every", "1"]
    assert mtbi.main(argv) == 0
    whole = {path: load_file(trained / "asr" / path) for path in ("connector.safetensors", "adapter/adapter_model.safetensors")}
    import train as module
    saved, calls = module.save_state, []

    def dies(*args):
        saved(*args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
    module.save_state = dies
    try:
        assert mtbi.main([*argv, "--force"]) == 130
    finally:
        module.save_state = saved
    assert mtbi.main(argv) == 0
    for path, tensors in whole.items():
        again = load_file(trained / "asr" / path)
        assert all(torch.equal(tensors[k], again[k]) for k in tensors)


# ---- what the CTC vocabulary cannot spell ----

def test_numbers_are_any_sound_in_a_vocabulary_of_word_pieces_without_digits(tmp_path):
    from checkpoints import SENTENCES
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as bpe
    from transformers import ParakeetTokenizer
    words = Tokenizer(bpe.BPE(unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.train_from_iterator(SENTENCES[:2], trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<pad>"], show_progress=False))
    tokenizer = ParakeetTokenizer(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    assert [spell(tokenizer, word) for word in ("12", "$5", "नमस्ते", "—")] == [[None], [None], [None] * len(spell(tokenizer, "नमस्ते")), []]
    assert None not in spell(tokenizer, "farmer,") and spell(tokenizer, "farmer,") == spell(tokenizer, "FARMER")
    assert spell(tokenizer, "red2")[-1] is None and len(spell(tokenizer, "red2")) > 1


def test_answers_that_were_cut_off_in_the_middle_of_a_character_lose_that_half(model, monkeypatch):
    from conftest import shared
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers/qwen2.5-instruct"))
    ids = tokenizer("ok 🦔")["input_ids"]
    mine = SpeechLLM(model.llm, model.tokenizer)
    mine.tokenizer = tokenizer
    monkeypatch.setattr(mine, "embed", lambda batch: (None, None, None))
    monkeypatch.setattr(mine.llm, "generate", lambda **options: torch.tensor([ids[:-1], [*ids[:1], mine.eot, 0][:len(ids) - 1]]))
    assert mine.generate_rows([[], []]) == [("ok", False), ("ok", True)]


def test_documents_hold_no_placeholders():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "tiny" / "README.md"]:
        assert not [word for word in ("RUNTIME", "LOSSA", "LOSSB", "DEMOTIME", "TODO", "TBD", "XXX") if word in path.read_text(encoding="utf-8")], path
