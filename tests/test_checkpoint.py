"""Training state: what is read back is what was written, whole, whatever stopped the writer and wherever."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # tests/ is no package
import killed_saver

from athanor import atomic
from athanor.checkpoint import export_model, load_latest_state
from athanor.checkpoint import save_state as save_state_of_ranks
from athanor.config import ModelConfig, OptimizerConfig
from athanor.errors import UserError
from athanor.model.transformer import Decoder, PackedAttention
from athanor.optim import Optimizer
from athanor.parallel import Ranks
from athanor.tokenizer import Tokenizer, symbol_tokenizer
from athanor.weights import load_model

CONFIG = ModelConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24)


class Killed(BaseException):
    """Not an Exception: no handler of the code under test may clean up, as after kill -9."""


RANKS = Ranks("cpu", threads=1)
FILES = ("shard-00001-model-00001-of-00001.safetensors", "extra.json")


def save_state(folder, step, model, optimizer, extra, **options):
    return save_state_of_ranks(folder, step, model, optimizer, extra, RANKS, **options)


def state_of(step: int) -> tuple[torch.nn.Module, Optimizer, dict]:
    """A state all of whose parts say which step they are of."""
    model = torch.nn.Linear(3, 2)
    optimizer = Optimizer(model, OptimizerConfig(), RANKS)
    with torch.no_grad():
        for value in (*model.parameters(), *optimizer.state_tensors().values()):
            value.fill_(step)
    return model, optimizer, {"step": step, "note": "é"}


def restored(folder):
    """What is read into a fresh model; None when there is nothing."""
    model, optimizer, _ = state_of(-1)
    state = load_latest_state(folder, model, optimizer, RANKS)
    wanted = -1 if state is None else state.step
    assert all((value == wanted).all() for value in (*model.parameters(), *optimizer.state_tensors().values()))
    return state


def assert_is(state, step: int) -> None:
    assert state.step == step and state.extra == {"step": step, "note": "é"}


def folders(path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_state_is_read_back_exactly(tmp_path):
    path = save_state(tmp_path / "a" / "b", 10, *state_of(10))
    assert path.name == "step-00000010" and sorted(os.listdir(path)) == sorted([*FILES, "checksums.json"])
    assert_is(restored(tmp_path / "a" / "b"), 10)


def test_nothing_saved_is_none(tmp_path):
    assert restored(tmp_path / "nowhere") is None
    assert restored(tmp_path) is None


def test_bf16_and_empty_tensors_survive(tmp_path):
    def build():
        model = torch.nn.Module()
        model.a = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
        model.register_buffer("b", torch.zeros(0, 4, dtype=torch.int64))
        model.register_buffer("view", torch.zeros(3, 2).T)
        return model, Optimizer(model, OptimizerConfig(), RANKS)

    model, optimizer = build()
    with torch.no_grad():
        model.a.copy_(torch.arange(6).view(3, 2) / 3)
        model.view.copy_(torch.arange(6).view(2, 3))
    optimizer.state_tensors()["a.exp_avg"].fill_(1 / 3)
    save_state(tmp_path, 0, model, optimizer, {})
    other, other_optimizer = build()
    assert load_latest_state(tmp_path, other, other_optimizer, RANKS).step == 0
    for one, two in ((model.state_dict(), other.state_dict()), (optimizer.state_tensors(), other_optimizer.state_tensors())):
        assert one.keys() == two.keys() and all(torch.equal(two[k], v) and two[k].dtype == v.dtype for k, v in one.items())


def test_a_state_of_another_model_is_refused_in_one_line(tmp_path):
    save_state(tmp_path, 1, *state_of(1))
    for model in (torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(3, 2))):
        optimizer = Optimizer(model, OptimizerConfig(), RANKS)
        if isinstance(model, torch.nn.Linear) and model.bias is None:
            assert load_latest_state(tmp_path, model, optimizer, RANKS).step == 1  # more was saved than is wanted
            continue
        with pytest.raises(UserError, match="step-00000001 is not of this model and optimizer") as error:
            load_latest_state(tmp_path, model, optimizer, RANKS)
        assert "\n" not in str(error.value)


def test_the_last_two_are_kept(tmp_path):
    for step in (5, 10, 100_000_000, 100_000_001):
        save_state(tmp_path, step, *state_of(step))
    assert folders(tmp_path) == ["step-100000000", "step-100000001"]
    assert_is(restored(tmp_path), 100_000_001)


def test_the_best_state_outlives_the_last_ones(tmp_path):
    """best: of the state of step 20 first, then of 40; a state that is kept keeps what it calls the best."""
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 40), (50, 40), (60, 40)):
        model, optimizer, extra = state_of(step)
        save_state(tmp_path, step, model, optimizer, extra | {"best": {"step": best, "metric": "pass@1", "value": best / 100}}, keep=1 + (step == 40))
        wanted = {10: [10], 20: [20], 30: [20, 30], 40: [20, 30, 40], 50: [40, 50], 60: [40, 60]}[step]
        assert folders(tmp_path) == ["best.json", *(f"step-{number:08d}" for number in wanted)]
        assert json.loads((tmp_path / "best.json").read_text()) == {
            "step": best, "metric": "pass@1", "value": best / 100, "state": f"step-{best:08d}",
        }  # fmt: skip
    model, optimizer, _ = state_of(-1)
    assert load_latest_state(tmp_path, model, optimizer, RANKS, step=40).step == 40 and (model.weight == 40).all()
    assert load_latest_state(tmp_path, model, optimizer, RANKS, step=50) is None and (model.weight == 40).all()


def test_saving_a_step_again_replaces_it_and_drops_the_steps_beyond(tmp_path):
    for step in (10, 20, 30, 20):
        save_state(tmp_path, step, *state_of(step))
    assert folders(tmp_path) == ["step-00000020"]  # 10 went when 30 came
    assert_is(restored(tmp_path), 20)


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "delete", "empty"])
def test_a_damaged_newest_state_is_named_and_the_previous_one_is_read(tmp_path, capsys, name, damage):
    for step in (10, 20):
        save_state(tmp_path, step, *state_of(step))
    file = tmp_path / "step-00000020" / name
    data = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "flip a bit":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"")
    assert_is(restored(tmp_path), 10)
    warning = capsys.readouterr().err
    assert "step-00000020 is damaged" in warning and warning.count("\n") == 1
    # Training goes on and overtakes the damaged one.
    for step in (15, 20):
        save_state(tmp_path, step, *state_of(step))
    assert folders(tmp_path) == ["step-00000015", "step-00000020"]
    assert_is(restored(tmp_path), 20)


def test_when_all_are_damaged_nothing_is_read(tmp_path, capsys):
    save_state(tmp_path, 10, *state_of(10))
    (tmp_path / "step-00000010" / FILES[0]).unlink()
    assert restored(tmp_path) is None and FILES[0] in capsys.readouterr().err


def test_a_renamed_state_is_not_taken_for_another_step(tmp_path, capsys):
    save_state(tmp_path, 10, *state_of(10))
    os.rename(tmp_path / "step-00000010", tmp_path / "step-00000011")
    assert restored(tmp_path) is None and "of step 10" in capsys.readouterr().err


@pytest.mark.parametrize("extra, message", [
    ({"a": torch.ones(1)}, r"extra\['a'\] is a Tensor, wanted JSON"),
    ({"a": [{"b": object()}]}, r"extra\['a'\]\[0\]\['b'\] is a object"),
    ({"a": (1, 2)}, r"extra\['a'\] is a tuple"),
    ({1: 2}, "extra has the key 1, wanted text"),
])  # fmt: skip
def test_what_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        save_state(tmp_path, 1, *state_of(1)[:2], extra)
    assert folders(tmp_path) == []


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resumed_training_continues_bit_for_bit(tmp_path, name):
    config = OptimizerConfig(name=name, lr=0.01, weight_decay=0.1)

    def train(model, optimizer, steps):
        for step in steps:
            ids = torch.randint(12, (9,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            hidden = model(ids, torch.arange(9), PackedAttention(torch.tensor([0, 9], dtype=torch.int32)))
            torch.nn.functional.cross_entropy(hidden @ model.lm_head_weight.T, ids.roll(-1)).backward()
            optimizer.step(config.lr)

    straight = Decoder(CONFIG).initialize_(0)
    optimizer = Optimizer(straight, config, RANKS)
    train(straight, optimizer, range(3))
    save_state(tmp_path, 3, straight, optimizer, {})
    train(straight, optimizer, range(3, 6))

    resumed = Decoder(CONFIG).initialize_(1)
    optimizer = Optimizer(resumed, config, RANKS)
    assert load_latest_state(tmp_path, resumed, optimizer, RANKS).step == 3
    train(resumed, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def killed_at(monkeypatch, call: int, after: bool, work) -> bool:
    """Run `work` and die just before the call-th durable operation, or just after the first one from there on that succeeds.

    False when the work ended before that.
    """
    count = 0

    def dying(real):
        def operation(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= call and not after:
                raise Killed
            result = real(*args, **kwargs)
            if count >= call:
                raise Killed
            return result

        return operation

    with monkeypatch.context() as patch:
        for name in ("rename", "fsync", "mkdir", "rmdir", "unlink", "open"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_in_a_save_the_old_or_the_new_state_is_read(tmp_path, monkeypatch, capsys, after):
    for call in range(1, 200):
        folder = tmp_path / str(call)
        for step in (10, 20):
            save_state(folder, step, *state_of(step))
        died = killed_at(monkeypatch, call, after, lambda folder=folder: save_state(folder, 30, *state_of(30)))
        state = restored(folder)
        assert_is(state, state.step)
        assert state.step in (20, 30)
        # The next run writes over whatever was left.
        save_state(folder, 30, *state_of(30))
        save_state(folder, 40, *state_of(40))
        assert folders(folder) == ["step-00000030", "step-00000040"]
        if not died:
            break
    assert not died and call > 10
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_while_a_step_is_saved_again_a_whole_state_is_read(tmp_path, monkeypatch, after):
    for call in range(1, 200):
        folder = tmp_path / str(call)
        save_state(folder, 10, *state_of(10))
        died = killed_at(monkeypatch, call, after, lambda folder=folder: save_state(folder, 10, *state_of(10)))
        assert_is(restored(folder), 10)
        if not died:
            break
    assert not died and call > 10


@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_in_an_export_the_old_or_the_new_model_is_read(tmp_path, monkeypatch, after):
    tokens = symbol_tokenizer([*"01234567"])
    old, new = Decoder(CONFIG).initialize_(0), Decoder(CONFIG).initialize_(1)
    seen = set()
    for call in range(1, 300):
        folder = tmp_path / str(call)
        export_model(old, tokens, folder)
        (folder / "notes.txt").write_text("mine")
        died = killed_at(monkeypatch, call, after, lambda folder=folder: export_model(new, tokens, folder))
        loaded = load_model(folder)
        which = [name for name, model in (("old", old), ("new", new)) if torch.equal(model.embed.weight, loaded.embed.weight)]
        assert len(which) == 1 and Tokenizer.from_folder(folder).encode("7 0") == [11, 4] and (folder / "notes.txt").read_text() == "mine"
        seen.update(which)
        # What stands aside under the name that recovery trusts is whole, always.
        assert not list(tmp_path.glob(".*.old")) or load_model(next(tmp_path.glob(".*.old")))
        if not died:
            break
    assert not died and which == ["new"] and seen == {"old", "new"}


def test_an_export_is_a_whole_huggingface_folder(tmp_path):
    tokens = symbol_tokenizer([*"01234567"])
    model = Decoder(CONFIG).initialize_(0)
    export_model(model, tokens, tmp_path / "m")
    assert folders(tmp_path / "m") == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (test extra)")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("1 2 3", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [tokens.encode("1 2 3")]
    # Generation stops at our end token, and its greedy tokens are ours.
    out = theirs.generate(ids, do_sample=False, max_new_tokens=5)[0].tolist()
    for n in range(3, len(out)):
        hidden = model(torch.tensor(out[:n]), torch.arange(n), PackedAttention(torch.tensor([0, n], dtype=torch.int32)))
        assert int((hidden[-1] @ model.lm_head_weight.T).argmax()) == out[n]


def test_kill_9_in_a_saving_loop_never_loses_a_finished_state(tmp_path):
    assert killed_saver.last_step(tmp_path) >= killed_saver.KILLS


def test_a_full_disk_is_one_clear_error_and_the_previous_state_stays(tmp_path):
    save_state(tmp_path, 10, *state_of(10))
    large = torch.nn.Linear(500, 500)
    optimizer = Optimizer(large, OptimizerConfig(), RANKS)
    # The file-size limit stands in for a full disk: a write fails half-way with an OSError.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(UserError, match="cannot write .*step-00000020") as error:
                save_state(tmp_path, 20, large, optimizer, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(error.value) and folders(tmp_path) == ["step-00000010"]
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert_is(restored(tmp_path), 10)


def test_one_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    for call in range(1, 50):
        atomic.write_file(tmp_path / "a.json", "old")
        died = killed_at(monkeypatch, call, False, lambda: atomic.write_file(tmp_path / "a.json", "new" * 1000))
        assert (tmp_path / "a.json").read_text() in ("old", "new" * 1000)
        if not died:
            break
    assert not died and (tmp_path / "a.json").read_text() == "new" * 1000 and folders(tmp_path) == ["a.json"]
    with pytest.raises(UserError, match="cannot write .*nowhere/b"):
        atomic.write_file(tmp_path / "nowhere" / "b", "")
