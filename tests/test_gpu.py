"""What only a GPU does, by stand-ins on a CPU: the smoke test's own checks, and want of memory."""

import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
import transformers
from checkpoints import save_encoder, save_llm, too_little_memory_at_first
from conftest import ROOT, shared
from programs import one_line, python

import lab.memory
import lab.smoke
import lab.step
import model
import mtbi
import support.adam
import support.frames
import support.hub
import support.states
import train
from app.systems import Systems, Turn
from data import Example, Recipe, Text, load_audio, read_manifest
from lab.memory import LiveBytes
from lab.model_shapes import find_config, llm_shape
from lab.programs import run_program
from model import HuggingFaceEncoder, SpeechLLM, encode_all
from support.ahead import ahead
from support.files import UserError, read_json


# ---- what a check of the smoke test says when its path is taken away ----


def check_named(function):
    return next(check for check in lab.smoke.CHECKS if check.function is function)


def failing(function, folder, capsys):
    """What the smoke test says of a check that must not work now."""
    folder.mkdir(exist_ok=True)
    assert not lab.smoke.run_check(check_named(function), folder)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "function",
    [
        lab.smoke.nf4_is_right,
        lab.smoke.int8_is_close,
        lab.smoke.projection_in_nf4_is_right,
        lab.smoke.checkpointing_changes_nothing,
        lab.smoke.embeddings_may_be_on_the_host,
        lab.smoke.fp16_with_embeddings_on_the_host_scales_its_loss,
    ],
)
def test_a_check_of_packed_weights_fails_where_nothing_is_packed(
    function, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(support.hub, "quantization", lambda bits, compute, **more: None)
    monkeypatch.setattr(model, "pack_head", lambda *_: None)
    monkeypatch.setattr(model, "keep_embeddings_on_host", lambda *_: None)
    assert "no layer of the LLM is in" in failing(function, tmp_path, capsys)


def test_the_check_of_a_packed_projection_fails_where_its_slices_are_in_disorder(
    tmp_path, capsys, monkeypatch
):
    pack_head = model.pack_head

    def in_disorder(llm, *more):
        pack_head(llm, *more)
        head = llm.get_output_embeddings()
        head.slices = torch.nn.ModuleList([*head.slices[1:], head.slices[0]])

    monkeypatch.setattr(model, "pack_head", in_disorder)
    said = failing(lab.smoke.projection_in_nf4_is_right, tmp_path, capsys)
    assert "weights unpacked and as they were differ" in said
    monkeypatch.setattr(model, "pack_head", lambda *_: None)
    said = failing(lab.smoke.projection_in_nf4_is_right, tmp_path / "again", capsys)
    assert "FAILED" in said


def test_the_check_of_an_adapter_fails_where_it_adapts_the_projection(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(model.PackedHead, "PARTS", "no such module")
    said = failing(lab.smoke.adapter_leaves_the_projection_alone, tmp_path, capsys)
    assert "weights of the adapter are on the projection" in said
    monkeypatch.undo()
    monkeypatch.setattr(model, "with_adapter", lambda llm, rank: llm)
    said = failing(lab.smoke.adapter_leaves_the_projection_alone, tmp_path / "again", capsys)
    assert "nothing is adapted" in said


def test_the_check_of_checkpointing_fails_where_no_layer_is_run_twice(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(model, "checkpointed_layers", lambda llm: [])
    said = failing(lab.smoke.checkpointing_changes_nothing, tmp_path, capsys)
    assert "0 of 5 layers do so" in said
    monkeypatch.setattr(model, "checkpointed_layers", lambda llm: list(llm.model.layers))
    said = failing(lab.smoke.checkpointing_changes_nothing, tmp_path / "again", capsys)
    assert "5 layers were run 5 times" in said


def test_the_check_of_clips_fails_where_they_are_heard_one_by_one_or_otherwise(
    tmp_path, capsys, monkeypatch
):
    def one_by_one(self, clips):
        return [self.hear([clip])[0] for clip in clips]

    monkeypatch.setattr(HuggingFaceEncoder, "hear_together", one_by_one)
    said = failing(lab.smoke.clips_heard_together, tmp_path, capsys)
    assert "the encoder was run 3 times, not once" in said
    monkeypatch.setattr(
        HuggingFaceEncoder, "hear_together", lambda self, clips: self.hear(clips)[::-1]
    )
    said = failing(lab.smoke.clips_heard_together, tmp_path / "again", capsys)
    assert "frames heard together and alone differ" in said


def test_the_check_of_fp16_on_the_host_fails_where_the_loss_is_not_scaled(
    tmp_path, capsys, monkeypatch
):
    as_fp32 = property(lambda self: self.hidden[0].weight.float())
    monkeypatch.setattr(support.hub.HostEmbeddings, "weight", as_fp32)
    said = failing(lab.smoke.fp16_with_embeddings_on_the_host_scales_its_loss, tmp_path, capsys)
    assert "the scale is 1, not 16384" in said


def at_once(monkeypatch, most):
    """Stands in for a GPU: within `allowed`, only so many questions can be answered at once."""
    limits = []
    generate_rows = SpeechLLM.generate_rows

    def limited(self, rows, *more):
        if limits and len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate_rows(self, rows, *more)

    @contextmanager
    def allowed(_):
        limits.append(1)
        yield
        limits.pop()

    monkeypatch.setattr(SpeechLLM, "generate_rows", limited)
    monkeypatch.setattr(lab.smoke, "allowed", allowed)
    monkeypatch.setattr(lab.smoke, "peak_of", lambda action: (action(), 0, 100))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_the_check_of_the_benchmark_fails_where_the_memory_did_not_run_out(tmp_path, monkeypatch):
    monkeypatch.setattr(lab.smoke, "conversations", lambda model, *_: few_conversations(model, 4))
    at_once(monkeypatch, 99)
    with pytest.raises(AssertionError, match="nothing was tried"):
        lab.smoke.benchmark_is_halved(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(lab.smoke, "conversations", lambda model, *_: few_conversations(model, 4))
    at_once(monkeypatch, 2)
    assert "4 of 4 answers are the same, in 2 more" in lab.smoke.benchmark_is_halved(tmp_path)


few_conversations = lab.smoke.conversations


@pytest.mark.parametrize(
    "function", [lab.smoke.encoder_goes_on, lab.smoke.encoder_without_room_goes_on]
)
def test_the_checks_of_the_encoder_fail_where_the_memory_did_not_run_out(
    function, tmp_path, monkeypatch
):
    some_speech = lab.smoke.some_speech
    monkeypatch.setattr(lab.smoke, "some_speech", lambda folder, *_: some_speech(folder, (1.0,)))
    monkeypatch.setattr(lab.smoke, "allowed", lambda _: nullcontext())
    with pytest.raises(AssertionError, match="nothing was tried"):
        function(tmp_path)


def test_a_training_that_began_anew_has_not_resumed():
    assert lab.smoke.resumed_at("device: cpu\nresuming at step 20\n") == 20
    for said in ("device: cpu", "resuming at step 0"):
        with pytest.raises(AssertionError, match="began anew"):
            lab.smoke.resumed_at(said)


def test_a_small_run_that_failed_on_the_way_is_made_again(tmp_path, monkeypatch):
    made = []

    def stand_in(*words):
        made.append(words[0])
        if len(made) == 2:
            raise AssertionError("killed")
        Path(words[words.index("--out") + 1]).mkdir()

    monkeypatch.setattr(lab.smoke, "mtbi", stand_in)
    with pytest.raises(AssertionError, match="killed"):
        lab.smoke.small_run(tmp_path)
    folders = lab.smoke.small_run(tmp_path)
    assert all(folder.is_dir() for folder in folders)
    assert made == ["prepare", "behaviors"] * 2
    assert lab.smoke.small_run(tmp_path) == folders and len(made) == 4


def test_without_bitsandbytes_the_gpu_programs_can_be_imported():
    done = python("import sys; sys.modules['bitsandbytes'] = None; import lab.gpu")
    assert done.returncode == 0, done.said


def test_without_bitsandbytes_a_projection_in_nf4_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="does not work on this machine .* --head-bits 16 does"):
        model.load_llm("tiny", 16, "auto", 4)


@pytest.mark.parametrize("bits", [4, 16])
def test_a_projection_that_bitsandbytes_unpacks_wrongly_on_a_cpu_is_refused(bits, tmp_path):
    odd = save_llm(tmp_path, "qwen2", hidden_size=96, num_attention_heads=4)
    with pytest.raises(UserError, match="rows of 96 weights, no multiple of 64"):
        model.load_llm(odd, bits, "auto", 4)


def test_a_card_without_bf16_does_not_fail_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lab.smoke, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(lab.smoke, "load_llm", None)
    assert "this card has none" in lab.smoke.bf16_is_close(tmp_path)


# ---- an encoder for which a GPU has too little memory; "elsewhere" stands in for the GPU ----


def test_an_encoder_without_room_for_its_weights_hears_on_the_cpu(monkeypatch, capsys):
    expected = HuggingFaceEncoder("tiny")
    no_room_elsewhere(monkeypatch)
    ears = HuggingFaceEncoder("tiny")
    assert ears.left_gpu and ears.device.type == "cpu"
    assert "hears on the CPU" in capsys.readouterr().err
    assert ears.fingerprint == expected.fingerprint
    assert torch.equal(ears(noise()), expected(noise()))


def no_room_elsewhere(monkeypatch):
    move = torch.nn.Module.to

    def to(self, device):
        if device == "elsewhere":
            raise RuntimeError("CUDA error: CUDNN_STATUS_ALLOC_FAILED")
        return move(self, device)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(model, "DEVICE", "elsewhere")
    monkeypatch.setattr(support.frames, "DEVICE", "elsewhere")


def noise(seconds=1):
    samples = torch.randn(16000 * seconds, generator=torch.Generator().manual_seed(0))
    return 0.1 * samples.numpy()


@pytest.mark.parametrize("keep", ["ram", "off"])
def test_frames_are_kept_of_an_encoder_that_finds_no_room_when_it_comes_back(
    keep, tmp_path, monkeypatch
):
    utterances = lab.smoke.some_speech(tmp_path, (1.0,))
    ears = HuggingFaceEncoder("tiny")
    expected = encode_all(ears, utterances, tmp_path / "a", keep)
    no_room_elsewhere(monkeypatch)
    found = encode_all(ears, utterances, tmp_path / "b", keep)
    here = utterances[0].id
    assert torch.equal(found[here], expected[here]) and ears.left_gpu


def test_an_encoder_that_leaves_the_gpu_takes_along_what_it_remembers_of_the_last_clip():
    ears = HuggingFaceEncoder("tiny")
    expected = ears(noise())
    positions = ears.model.encoder.embed_positions
    angles = positions.cached_rotary_positional_embedding
    positions.cached_rotary_positional_embedding = angles.half()  # as a GPU would have them
    ears.leave_gpu("a clip", "2 GB are missing")
    assert positions.cached_rotary_positional_embedding.dtype == torch.float32
    assert torch.allclose(ears(noise()).float(), expected.float(), atol=2e-2)


@pytest.mark.parametrize("keep", ["ram", "off"])
def test_an_encoder_that_left_the_gpu_stays_on_the_cpu(keep, tmp_path, monkeypatch):
    ears = HuggingFaceEncoder("tiny")
    hear = too_little_memory_at_first(ears.hear)
    monkeypatch.setattr(ears, "hear", hear)
    utterances = lab.smoke.some_speech(tmp_path, (1.0, 1.5))
    frames = encode_all(ears, utterances, tmp_path / "a", keep)
    assert all(len(frames[u.id]) for u in utterances) and ears.left_gpu
    monkeypatch.setattr(support.frames, "DEVICE", "meta")  # where no weight keeps its values
    frames = encode_all(ears, utterances, tmp_path / "b", keep)
    assert all(len(frames[u.id]) for u in utterances) and ears.device.type == "cpu"
    assert len(hear.calls) == 5


# ---- clips heard together; "cpu:0" stands in for a GPU ----


def together_and_alone(ears, samples):
    """(frames of the clips heard together, of each alone)."""
    together = ears.hear_together([ears.clip(own, "noise") for own in samples])
    return together, [ears(own) for own in samples]


@pytest.mark.parametrize("kind", ["tiny", "whisper", "wav2vec2", "wavlm-ctc", "parakeet"])
def test_clips_of_equal_length_heard_together_are_those_heard_alone(kind, tmp_path):
    ears = HuggingFaceEncoder(kind if kind == "tiny" else save_encoder(tmp_path, kind))
    samples = [noise(1), noise(1)[::-1].copy(), 0.3 * noise(1)]
    for found, expected in zip(*together_and_alone(ears, samples)):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert ears.clip(noise(1), "").shape == ears.clip(0.5 * noise(1), "").shape
    assert ears.clip(noise(1), "").shape != ears.clip(noise(2), "").shape


def test_pieces_of_clips_longer_than_whisper_hears_at_once_go_together(tmp_path):
    ears = HuggingFaceEncoder(save_encoder(tmp_path, "whisper"))
    samples = [noise(32), noise(32)[::-1].copy()]
    for found, expected in zip(*together_and_alone(ears, samples)):
        assert found.shape == (1600, 32)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["whisper-tiny.en", "whisper-base"])
def test_real_speech_is_heard_together_as_alone(name):
    """Also clips that differ in length by less than a frame of features."""
    ears = HuggingFaceEncoder(shared(f"models/{name}"))
    rows = read_manifest(shared("data/ljspeech") / "manifest.jsonl")
    samples = load_audio(max(rows, key=lambda u: u.duration).audio)
    samples = [samples[:16000], samples[16000:32100]]
    clips = [ears.clip(own, "") for own in samples]
    assert clips[0].shape == clips[1].shape
    for found, expected in zip(*together_and_alone(ears, samples)):
        difference = (found.float() - expected.float()).norm()
        assert difference < 2e-3 * expected.float().norm()


@pytest.fixture
def on_a_stand_in(monkeypatch):
    """Frames are made as on a GPU; the sizes of the groups that the encoder heard."""
    sizes = []
    hear = HuggingFaceEncoder.hear

    def counted(self, clips):
        sizes.append(len(clips))
        return hear(self, clips)

    monkeypatch.setattr(HuggingFaceEncoder, "hear", counted)
    monkeypatch.setattr(support.frames, "DEVICE", "cpu:0")
    return sizes


@pytest.mark.parametrize("keep", ["disk", "ram"])
def test_on_a_gpu_the_clips_of_equal_length_are_heard_together(
    keep, tmp_path, monkeypatch, capsys, on_a_stand_in
):
    utterances = lab.smoke.some_speech(tmp_path, (1.0, 2.0, 1.0, 1.0, 2.0, 1.5, 1.0))
    ears = HuggingFaceEncoder("tiny")
    alone = {u.id: ears(load_audio(u.audio)) for u in utterances}
    ears.seconds_at_once = 3.0
    on_a_stand_in.clear()
    frames = encode_all(ears, utterances, tmp_path / "features", keep)
    assert on_a_stand_in == [1, 1, 1, 3, 1], "the longest first, 3 s at most"
    assert "at once: clips of equal length, up to 3 s" in capsys.readouterr().out
    for u in utterances:
        torch.testing.assert_close(frames[u.id], alone[u.id], rtol=2e-3, atol=2e-3)
    on_a_stand_in.clear()
    monkeypatch.setattr(support.frames, "DEVICE", "cpu")
    encode_all(ears, utterances, tmp_path / "again", keep)
    assert on_a_stand_in == [1] * 7
    assert "at once: 1 clip, because one keeps a CPU busy" in capsys.readouterr().out


def test_without_memory_for_clips_together_half_as_many_go_and_at_last_one_on_the_cpu(
    tmp_path, monkeypatch, capsys, on_a_stand_in
):
    utterances = lab.smoke.some_speech(tmp_path, (1.0,) * 6)
    ears = HuggingFaceEncoder("tiny")
    expected = {u.id: ears(load_audio(u.audio)) for u in utterances}
    ears.seconds_at_once = 4.0
    hear, room = ears.hear, 2

    def limited(clips):
        if len(clips) > room and not ears.left_gpu:
            out_of_memory()
        return hear(clips)

    monkeypatch.setattr(ears, "hear", limited)
    on_a_stand_in.clear()
    frames = encode_all(ears, utterances, tmp_path / "a", "ram")
    assert on_a_stand_in == [2, 2, 2] and not ears.left_gpu
    assert capsys.readouterr().err.count("out of memory with 4 clips at once") == 1
    room = 0
    frames = encode_all(ears, utterances, tmp_path / "b", "ram")
    assert ears.left_gpu and on_a_stand_in[3:] == [1] * 6
    for u in utterances:
        torch.testing.assert_close(frames[u.id], expected[u.id], rtol=2e-3, atol=2e-3)


def test_an_encoder_that_hears_no_clips_together_hears_one_after_the_other(
    tmp_path, capsys, on_a_stand_in
):
    class Loudness:
        name, width, frame_rate, fingerprint = "loudness", 400, 40.0, "loudness-1"

        def __call__(self, samples, name):
            return torch.from_numpy(samples[:16000]).reshape(-1, 400).half()

        def to(self, device):
            pass

    utterances = lab.smoke.some_speech(tmp_path, (1.0, 1.0))
    frames = encode_all(Loudness(), utterances, tmp_path / "features")
    for u in utterances:
        assert torch.equal(frames[u.id], Loudness()(load_audio(u.audio), ""))
    assert "1 clip, because the encoder loudness hears no more" in capsys.readouterr().out


def test_a_recording_that_cannot_be_read_ahead_is_the_same_line_at_its_turn(tmp_path, monkeypatch):
    utterances = lab.smoke.some_speech(tmp_path, (3.0, 2.0, 1.0))
    utterances[1].audio.write_text("no sound")
    ears = HuggingFaceEncoder("tiny")
    said = []
    for device in ("cpu:0", "cpu"):
        monkeypatch.setattr(support.frames, "DEVICE", device)
        with pytest.raises(UserError, match="noise-1.wav: ") as error:
            encode_all(ears, utterances, tmp_path / device)
        said.append(str(error.value))
    assert said[0] == said[1] and "\n" not in said[0]
    assert not ahead_threads()


def ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_what_is_made_ahead_comes_in_turn_and_little_of_it_waits():
    made = []

    def slowly(i):
        made.append(i)
        time.sleep(0.02 / (i + 1))
        return i

    with ahead(slowly, range(20), 2) as results:
        for i, result in enumerate(results):
            assert result == i and max(made) <= i + 4, "at most four are ahead"
            assert ahead_threads()
    assert i == 19 and sorted(made) == list(range(20)) and not ahead_threads()
    made.clear()
    with pytest.raises(KeyboardInterrupt), ahead(slowly, range(1000), 2) as results:
        next(results)
        raise KeyboardInterrupt
    assert len(made) <= 6 and not ahead_threads(), "it is over at once"
    with ahead(slowly, range(3), 0) as results:
        assert not ahead_threads() and list(results) == [0, 1, 2]


# ---- loading; "cpu:0" stands in for a GPU ----


def small_shape(tied):
    config = find_config("qwen2.5-0.5b" if tied else "qwen2.5-7b", "llm")
    return type(config)(**{**config.to_dict(), "num_hidden_layers": 2, "layer_types": None})


@pytest.mark.parametrize(
    "tied, head_bits, embeddings, on_host",
    [
        (False, 16, "gpu", set()),
        (False, 4, "gpu", {"lm_head"}),
        (False, 16, "host", {"model.embed_tokens"}),
        (False, 4, "host", {"model.embed_tokens", "lm_head"}),
        (True, 4, "gpu", set()),
        (True, 4, "host", {"model.embed_tokens", "lm_head"}),
        (True, 16, "host", set()),
    ],
)
def test_what_is_shrunk_is_loaded_to_host_memory(tied, head_bits, embeddings, on_host):
    config = small_shape(tied)
    found = support.hub.places_of_parts(config, "cuda:0", head_bits, embeddings)
    assert {name for name, place in found.items() if place == "cpu"} == on_host
    if not on_host:
        assert found == {"": "cuda:0"}
        return
    llm = llm_shape(config, torch.float32)
    for name, _ in (*llm.named_parameters(remove_duplicate=False), *llm.named_buffers()):
        above = [part for part in found if name == part or name.startswith(f"{part}.")]
        assert len(above) == 1, f"{name} is in {above}: each has one place"


@pytest.fixture
def stand_in_gpu(monkeypatch):
    """ "cpu:0" is another device than "cpu"; [(its shape, where it went)] of every tensor."""
    # a tensor of "cpu:0" says that it is on "cpu"; one of a GPU names the GPU
    monkeypatch.setattr(
        accelerate.utils.modeling, "check_device_same", lambda a, b: a.type == b.type
    )
    went = []
    materialize = transformers.core_model_loading.spawn_materialize
    move = accelerate.hooks.set_module_tensor_to_device

    def spawn_materialize(pool, tensor, device, *more, **options):
        went.append((tuple(tensor.get_shape()), str(device)))
        return materialize(pool, tensor, device, *more, **options)

    def set_module_tensor_to_device(module, name, device, *more, **options):
        tensor = dict(accelerate.utils.modeling.named_module_tensors(module, recurse=True))[name]
        went.append((tuple(tensor.shape), str(device)))
        return move(module, name, device, *more, **options)

    loading = transformers.core_model_loading
    monkeypatch.setattr(loading, "spawn_materialize", spawn_materialize)
    monkeypatch.setattr(
        accelerate.hooks, "set_module_tensor_to_device", set_module_tensor_to_device
    )
    return went


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(
    "family, head_bits, embeddings",
    [
        ("qwen2", 4, "host"),
        ("qwen2", 4, "gpu"),
        ("qwen2", 16, "host"),
        ("tied", 4, "host"),
        ("gemma3", 4, "host"),
    ],
)
def test_an_llm_loaded_in_two_places_is_the_one_loaded_in_one(
    bits, family, head_bits, embeddings, tmp_path, monkeypatch, stand_in_gpu
):
    more = {"tie_word_embeddings": True} if family == "tied" else {}
    folder = save_llm(tmp_path, "qwen2" if family == "tied" else family, **more)
    options = (bits, "bf16", head_bits, embeddings)
    whole, _ = model.load_llm(folder, *options)
    monkeypatch.setattr(model, "DEVICE", "cpu:0")
    stand_in_gpu.clear()
    llm, _ = model.load_llm(folder, *options)

    vocabulary = llm.config.vocab_size
    places = {place for shape, place in stand_in_gpu if shape[:1] == (vocabulary,)}
    assert "cpu" in places and any(place == "cpu:0" for _, place in stand_in_gpu)
    if embeddings == "host" and head_bits == 4:
        assert "cpu:0" not in places, "the table or the projection took the GPU's memory"

    expected, found = whole.state_dict(), llm.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for module in llm.modules():
        assert not hasattr(module, "_hf_hook") and "forward" not in vars(module)
    assert not hasattr(llm, "hf_device_map") and not any(p.is_meta for p in llm.parameters())
    ids = torch.arange(4, 20)[None]
    assert torch.equal(llm(ids).logits, whole(ids).logits)


def out_of_memory(*_, **__):
    """A GPU that is too small."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_room_for_cublas(*_, **__):
    """The same, said by a library that torch calls."""
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")


@pytest.mark.parametrize("say", [out_of_memory, no_room_for_cublas])
def test_out_of_memory_while_an_llm_is_loaded_is_not_laid_to_its_files(say, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", say)
    with pytest.raises(RuntimeError, match="out of memory|ALLOC_FAILED"):
        model.load_llm("tiny")


def test_out_of_memory_while_a_recipe_is_loaded_is_not_laid_to_its_files(
    trained_world, monkeypatch
):
    monkeypatch.setattr(SpeechLLM, "load_trained", no_room_for_cublas)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        SpeechLLM.from_pretrained(trained_world / "run" / "mtbi")


# ---- out of memory with nothing to be done: a line for people ----

NO_MEMORY = "the GPU's memory does not suffice (CUDA out of memory"


@pytest.mark.parametrize("command", ["behaviors", "train", "bench", "generate", "chat", "serve"])
def test_out_of_memory_in_a_command_is_one_line_with_what_to_do(
    command, trained_world, tmp_path, monkeypatch, capsys
):
    run, data = trained_world / "run", trained_world / "data"
    words = {
        "behaviors": [data, "--out", tmp_path / "run"],
        "train": [run, "--recipe", "blsp", "--steps", "1"],
        "bench": [run],
        "generate": [run, data / "audio" / "test-00000.wav", "Who did it?"],
    }.get(command, [run])
    monkeypatch.setattr(model, "load_in_places", out_of_memory)
    model.shared_llm.cache_clear()
    assert mtbi.main([command, *map(str, words)]) == 2
    one_line(capsys, NO_MEMORY, "--batch-size", "--head-bits 4 --embeddings host")


def test_out_of_memory_in_a_program_of_the_lab_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["step"])
    assert run_program("step", lab.step.StepOptions, out_of_memory) == 2
    assert capsys.readouterr().err.startswith(f"step: {NO_MEMORY}")


def test_an_answer_without_memory_is_a_line_and_the_chat_goes_on(
    trained_world, monkeypatch, capsys
):
    run = trained_world / "run"
    monkeypatch.setattr(SpeechLLM, "generate_rows", out_of_memory)
    lines = iter(["Who did it?", "And where?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert mtbi.main(["chat", str(run)]) == 0
    assert capsys.readouterr().err.count(f"chat: {NO_MEMORY}") == 2
    wav = trained_world / "data" / "audio" / "test-00000.wav"
    assert mtbi.main(["generate", str(run), str(wav), "Who did it?"]) == 2
    one_line(capsys, NO_MEMORY)


def test_an_answer_without_memory_is_said_on_the_page(trained_world, monkeypatch):
    systems = Systems(trained_world / "run", list(mtbi.RECIPES), 8)
    monkeypatch.setattr(SpeechLLM, "generate_rows", out_of_memory)
    *_, (said, notice) = systems.answer("text", [Turn("Repeat this.", noise(), "three red apples")])
    assert said == "" and notice.startswith(NO_MEMORY)
    assert not systems.lock.locked(), "the next one can ask"


# ---- steps made ahead; "cpu:0" stands in for a GPU ----


class FewSteps(lab.smoke.OneStep):
    """Four conversations a step, and none like the one before; where each step was made."""

    steps = 6

    def __init__(self, examples):
        super().__init__(examples)
        self.made = []

    def batch(self, step, micro):
        self.made.append((step, threading.current_thread().name.startswith("ahead")))
        return self.examples[step : step + 4]


def weights_after(folder, steps, stop_at=None, precision="fp32"):
    """The weights after a training of the tiny model from one and the same start."""
    llm = lab.smoke.tiny_model(16, precision)
    real = train.update

    def update(*args):
        if args[3].step == stop_at:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "update", update)
        train.train(llm, steps, folder, lr=1e-3, save_every=2)
    return torch.cat([p.detach().flatten() for p in llm.trainable().values()])


def test_steps_made_ahead_and_pinned_give_the_same_weights_resumed_or_not(tmp_path, monkeypatch):
    examples = lab.smoke.conversations(lab.smoke.tiny_model(), 9)
    steps = FewSteps(examples)
    expected = weights_after(tmp_path / "cpu", steps)
    assert steps.made == [(i, False) for i in range(6)], "on a CPU each when its turn comes"

    pinned = []

    def pin_memory(frames):
        pinned.append(threading.current_thread().name.startswith("ahead"))
        return frames.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(train, "DEVICE", "cpu:0")
    steps = FewSteps(examples)
    assert torch.equal(weights_after(tmp_path / "ahead", steps), expected)
    assert steps.made == [(i, True) for i in range(6)] and pinned == [True] * 24

    steps = FewSteps(examples)
    with pytest.raises(KeyboardInterrupt):
        weights_after(tmp_path / "stopped", steps, stop_at=3)
    assert not ahead_threads()
    steps = FewSteps(examples)
    assert torch.equal(weights_after(tmp_path / "stopped", steps), expected)
    assert steps.made[0] == (2, True), "it goes on from the state of step 2"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_the_precisions_of_a_gpu_a_stopped_training_goes_on_to_the_same_weights(
    precision, tmp_path, capsys
):
    steps = FewSteps(lab.smoke.conversations(lab.smoke.tiny_model(), 9))
    expected = weights_after(tmp_path / "whole", steps, precision=precision)
    with pytest.raises(KeyboardInterrupt):
        weights_after(tmp_path / "stopped", steps, stop_at=3, precision=precision)
    assert torch.equal(weights_after(tmp_path / "stopped", steps, precision=precision), expected)
    assert "resuming at step 2" in capsys.readouterr().out
    if precision == "fp16":
        states = [support.states.saved_states(tmp_path / name)[0] for name in ("whole", "stopped")]
        scales = []
        for state in states:
            about = support.states.read_state(state)[1]
            scales.append(json.loads(about["progress"])["loss_scale"])
        assert scales[0] == scales[1] > 1


def test_where_the_encoder_hears_at_every_use_no_step_is_made_ahead(monkeypatch):
    monkeypatch.setattr(train, "DEVICE", "cpu:0")
    written = Example([Text([1])], None)  # of a conversation without speech nothing is pinned
    steps = FewSteps([written])
    steps.frames = support.frames.FramesAtEveryUse(None, None, [])
    with train.steps_ahead(steps, 0) as made:
        assert next(made)[0].examples == [written] and steps.made == [(0, False)]


# ---- the optimizer without room for its moments ----


def steps_of(optimizer, weights, n=3):
    generator = torch.Generator().manual_seed(1)
    for i in range(n):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
        optimizer.step()
    return [p.detach().clone() for p in weights]


def some_weights():
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 41), (5,), (3, 4, 100), ()]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def named(weights):
    return {f"weight {i}": w for i, w in enumerate(weights)}


@pytest.mark.parametrize("when", [0, 1, 2, 6, 11, 99])
def test_an_optimizer_that_finds_no_room_at_any_parameter_goes_on_to_the_same_weights(
    when, monkeypatch, capsys
):
    before, weights, calls = some_weights(), some_weights(), []
    usual = torch.optim.AdamW(before, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    expected = steps_of(usual, before)

    def make_room(p):
        calls.append(p)
        if len(calls) > when:
            no_room_for_cublas()

    monkeypatch.setattr(support.adam, "make_room", make_room)
    monkeypatch.setattr(support.adam, "PIECE", 64)
    optimizer = train.adam_w(named(weights), 1e-2)
    found = steps_of(optimizer, weights)
    assert optimizer.on_host == (when < 12)
    assert len(calls) == min(when + 1, 12), "it tries once, and then never again"
    assert capsys.readouterr().err.count("from here on they are in host memory") == (when < 12)
    assert all(map(torch.equal, found, expected))
    for p, q in zip(weights, before):
        for name in ("step", *support.adam.MOMENTS):
            assert torch.equal(optimizer.state[p][name], usual.state[q][name])


def test_moments_made_beforehand_change_no_weight_and_go_to_the_host_at_once(monkeypatch, capsys):
    found = []
    for room in ("none said", "enough", "too little"):
        weights = some_weights()
        optimizer = train.adam_w(named(weights), 1e-2)
        if room == "too little":
            monkeypatch.setattr(support.adam, "make_room", no_room_for_cublas)
        if room != "none said":
            optimizer.prepare()
        assert optimizer.on_host == (room == "too little")
        there = [set(support.adam.MOMENTS) <= set(optimizer.state[p]) for p in weights]
        assert all(there) == (room == "enough")
        found.append(steps_of(optimizer, weights))
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))
    assert capsys.readouterr().err.count("from here on they are in host memory") == 1


def test_the_check_of_the_optimizer_fails_where_the_memory_did_not_run_out(tmp_path, monkeypatch):
    limits = []

    @contextmanager
    def allowed(n_bytes):
        limits.append(n_bytes)
        yield

    def make_room(p):
        if enough is False and len(limits) == 2:
            out_of_memory()

    monkeypatch.setattr(lab.smoke, "allowed", allowed)
    monkeypatch.setattr(lab.smoke, "WEIGHTS", 1000)
    monkeypatch.setattr(support.adam, "make_room", make_room)
    enough = True
    with pytest.raises(AssertionError, match="nothing was tried"):
        lab.smoke.optimizer_goes_on(tmp_path)
    limits.clear()
    enough = False
    assert lab.smoke.optimizer_goes_on(tmp_path) == "the same to the bit"


# ---- a GPU of Windows, whose driver lends host memory ----


@pytest.mark.parametrize(
    "system, release, limits",
    [
        ("win32", "11", [0.6]),
        ("linux", "6-microsoft-WSL", [0.6]),
        ("linux", "6", []),
    ],
)
def test_under_windows_torch_takes_what_is_free_of_the_card_and_no_more(
    system, release, limits, monkeypatch, capsys
):
    found = []
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr(support.hub, "DEVICE", "cuda:0")
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4.0e9, 8e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1.0e9)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: found.append(share)
    )
    support.hub.stay_on_the_card.__wrapped__()
    assert found == pytest.approx(limits)
    assert ("up to 4.8 GB" in capsys.readouterr().err) == bool(limits)


@pytest.mark.parametrize("before", [1.0, 0.5])
def test_a_limit_of_the_smoke_test_leaves_the_one_that_was_there(before, monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8e9)
    )
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: before)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    with lab.smoke.allowed(2e9):
        pass
    with lab.smoke.allowed(2**40):
        pass
    assert shares == [0.25, before, before, before]


def test_a_command_of_the_smoke_test_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(lab.smoke, "AT_MOST", 0.1)
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    with pytest.raises(AssertionError, match="not done after 0.1 s"):
        lab.smoke.ended(process)
    assert process.wait(10) != 0


# ---- random weights of a real size, and how many weights there are ----

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 512,
}


@pytest.mark.parametrize("shrunk", [{}, {"head_bits": 4, "embeddings": "host"}])
@pytest.mark.parametrize("family", ["Qwen3", "Gemma", "Gemma2", "Gemma3Text"])
def test_an_llm_of_random_weights_is_whole_and_scales_its_embeddings(family, shrunk):
    config = getattr(transformers, f"{family}Config")(**SMALL)
    llm = lab.step.random_llm(config, 4, torch.float32, **shrunk)
    assert not any(tensor.is_meta for tensor in (*llm.parameters(), *llm.buffers()))
    expected = 0.02 * (128**0.5 if "Gemma" in family else 1)
    assert model.embedding_rms(llm).item() == pytest.approx(expected, rel=0.05)
    table, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    if not shrunk:
        assert (table.weight is head.weight) == config.tie_word_embeddings
    assert llm(torch.arange(10, 30)[None]).logits.isfinite().all()


def test_a_random_table_takes_no_memory_beside_its_own():
    table = torch.nn.Embedding(50_000, 128, device="meta")
    llm = SimpleNamespace(_init_weights=lambda module: module.weight.data.normal_())
    with LiveBytes() as live:
        lab.step.begin_anew(llm, table)
    assert table.weight.isfinite().all()
    assert live.peak < 1.1 * 50_000 * 128 * 4


def test_an_llm_that_cannot_be_made_without_its_checkpoint_is_one_line(monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedModel, "_init_weights", lambda *_: None)
    with pytest.raises(UserError, match="Embedding.weight of a model of type qwen3 cannot be"):
        lab.step.random_llm(transformers.Qwen3Config(**SMALL), 16, torch.float32)
    config = find_config("whisper-tiny", "encoder")
    with pytest.raises(UserError, match="is no causal LLM"):
        lab.step.random_llm(config, 16, torch.float32)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_bits, embeddings", [(16, "gpu"), (4, "gpu"), (4, "host")])
def test_a_weight_counts_once_however_it_is_packed_and_wherever_it_is(
    bits, tied, head_bits, embeddings, monkeypatch, capsys
):
    config = transformers.Qwen3Config(**SMALL, tie_word_embeddings=tied)
    layers = 2 * (128 * 64 * 6 + 128 * 256 * 3 + 2 * 128 + 2 * 64) + 128
    expected = layers + 512 * 128 * (1 if tied else 2)
    llm = lab.step.random_llm(config, bits, torch.float32, head_bits, embeddings)
    assert support.hub.parameters_of(llm.config) == expected

    on_disk, _ = model.load_llm("tiny", bits, "auto", head_bits, embeddings)
    whole, _ = model.shared_llm("tiny", 16, "auto", 16, "gpu")
    assert support.hub.parameters_of(on_disk.config) == sum(p.numel() for p in whole.parameters())

    asked = SimpleNamespace(llm=llm, checkpoint_gradients=lambda: None)
    for limit, said in ((expected, "on"), (expected + 1, "off")):
        monkeypatch.setattr(train, "CHECKPOINT_FROM", limit)
        train.checkpoint_if_large(asked, "auto")
        assert f"gradient checkpointing: {said}, " in capsys.readouterr().out


# ---- plan beside what was measured on a GPU ----


@pytest.fixture
def as_when_measured(monkeypatch):
    """5.6 speech tokens a second, and the loss in one piece, all of it in fp32."""
    of_llm = lab.memory.logits_on_shapes

    def logits_in_fp32(llm, embeds):
        logits = of_llm(llm, embeds).float()  # (R, V)
        return logits if torch.is_grad_enabled() else logits.log_softmax(-1)

    def loss_in_one_piece(loss, logits, answers, target):
        if not loss.has_teacher:
            return loss(logits, answers, target)
        found = logits.log_softmax(-1)  # (R, V)
        del logits
        return torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True)

    monkeypatch.setattr(Recipe, "tokens_per_second", 5.6)
    monkeypatch.setattr(lab.memory, "logits_on_shapes", logits_in_fp32)
    monkeypatch.setattr(lab.memory, "loss_in_slices", loss_in_one_piece)


@pytest.mark.parametrize("row", ["0.5B-whisper-large-v3-15s-x16", "7B-whisper-large-v3-15s-x4"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_plan_says_what_a_step_took_of_a_gpu(row, loss, as_when_measured):
    measured = read_json(ROOT / "docs/results/gpu/gpu.json")["rows"][f"step-Qwen2.5-{row}-{loss}"]
    names = ("llm", "encoder", "seconds", "batch_size", "loss")
    options = lab.step.StepOptions(**{name: measured[name] for name in names})
    configs = lab.step.configs_of(options)
    checkpointing = measured["gradient_checkpointing"]
    planned = lab.step.plan_of_step(options, *configs, torch.bfloat16, checkpointing)["peak"]
    assert 0 <= planned / 1e9 / measured["ours"]["peak_gb"] - 1 < 0.07
