"""The best validation decides: its weights are what a file gets, and patience waits for it."""

import json
import math
import signal

import pytest
import torch
from conftest import Source, ragged_batch, run_training

from core.errors import Stopped
from trainer.checkpoints import TENSORS, newest_state
from trainer.loop import causal_loss_sum
from trainer.metrics import KeptMetrics, Metrics, Validation, score_of

SOURCE = Source([ragged_batch(2, seed=1)])
EVERY_STEP = {"val_interval": 1, "keep_best": True}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class Script:
    """Held-out losses as they are told, and what was seen of ``model``.

    ``seen`` are its weights at each validation, ``saved`` the metrics and weights of each file.
    """

    def __init__(self, model, *losses: float):
        self.model, self.losses, self.seen, self.saved = model, losses, [], []
        self.measures = {"val": self.measure}

    def measure(self) -> Metrics:
        self.seen.append(weights_of(self.model))
        return Metrics(self.losses[len(self.seen) - 1], 1.0, 5, 9)

    def write(self, metrics: dict) -> None:
        self.saved.append((metrics, weights_of(self.model)))

    def train(self, folder, **settings):
        parts = {"validation": Validation(self.measures), "write": self.write}
        return run_training(self.model, SOURCE, folder, **parts, **EVERY_STEP | settings)


def state_in(folder) -> dict[str, torch.Tensor]:
    return newest_state(folder / "states").tensors


def weights_in(state: dict, prefix: str) -> dict[str, torch.Tensor]:
    found = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def test_a_file_gets_the_best_weights_and_the_state_the_last_ones_too(tiny_model, tmp_path):
    script = Script(tiny_model, 3.0, 1.0, 2.0, 1.0, 1.5)  # as good again is no better
    script.train(tmp_path, epochs=5, save_interval=3)
    best, last = script.seen[1], script.seen[4]
    assert not equal(best, script.seen[2]) and not equal(best, last)
    assert [metrics["step"] for metrics, _ in script.saved] == [2, 2]
    assert all(equal(weights, best) for _, weights in script.saved)
    result = script.saved[-1][0]["val"]
    assert {when: (r["step"], r["loss"]) for when, r in result.items()} == {
        "first": (1, 3.0),
        "last": (5, 1.5),
        "best": (2, 1.0),
    }
    assert equal(weights_of(tiny_model), best), "and so is the model in memory"
    state = state_in(tmp_path)
    assert equal(weights_in(state, "model."), last) and equal(weights_in(state, "best."), best)


def test_without_keep_best_a_file_gets_the_last_weights(tiny_model, tmp_path):
    script = Script(tiny_model, 1.0, 2.0)
    script.train(tmp_path, epochs=2, keep_best=False)
    assert [metrics["step"] for metrics, _ in script.saved] == [2]
    assert equal(script.saved[0][1], script.seen[1])
    assert equal(weights_of(tiny_model), script.seen[1])
    assert not weights_in(state_in(tmp_path), "best.")


def test_where_nothing_is_held_out_the_last_weights_are_the_best(tiny_model, tmp_path, capsys):
    script = Script(tiny_model)
    script.measures["val"] = lambda: Metrics(math.nan, math.nan, 0, 0)
    script.train(tmp_path, epochs=2)
    ((metrics, weights),) = script.saved
    assert metrics == {"step": 2, "val": {}} and equal(weights, weights_of(tiny_model))
    assert equal(weights, weights_in(state_in(tmp_path), "model."))
    assert "the last weights" in capsys.readouterr().out


def test_a_run_that_is_stopped_leaves_the_best_weights(tiny_model, tmp_path):
    script, passes = Script(tiny_model, 2.0, 1.0, 3.0, 4.0), []

    def interrupted(model, batch):
        passes.append(None)
        if len(passes) == 1 + 4:  # after the warm-up, in step 4
            signal.raise_signal(signal.SIGINT)
        return causal_loss_sum(model, batch)

    settings = {"loss": interrupted, "verdict": lambda: pytest.fail("on half a run")}
    with pytest.raises(Stopped):
        script.train(tmp_path, epochs=50, **settings)
    ((metrics, weights),) = script.saved
    assert metrics["step"] == 2 and equal(weights, script.seen[1])
    assert equal(weights_of(tiny_model), script.seen[1])
    assert equal(weights_in(state_in(tmp_path), "model."), script.seen[3])


def test_the_best_weights_outlive_a_crash(tiny_model, tmp_path):
    script = Script(tiny_model, 2.0, 1.0, 3.0, 4.0, 5.0)
    settings = {"epochs": 5, "save_interval": 3}
    passes = []

    def crashing(model, batch):
        passes.append(None)
        if len(passes) == 1 + 4:
            raise ZeroDivisionError
        return causal_loss_sum(model, batch)

    with pytest.raises(ZeroDivisionError):
        script.train(tmp_path, loss=crashing, **settings)
    after = script.seen[2]
    torch.nn.init.normal_(tiny_model.norm.weight)  # as if in a new process
    script.train(tmp_path, resume=True, **settings)
    assert len(script.seen) == 5 and not equal(script.seen[3], after)
    metrics, weights = script.saved[-1]
    assert metrics["step"] == metrics["val"]["best"]["step"] == 2
    assert equal(weights, script.seen[1]) and equal(weights_of(tiny_model), script.seen[1])


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_a_run_for_good(tiny_model, tmp_path, patience):
    script = Script(tiny_model, 3.0, 1.0, 2.0, 1.0, 0.5)
    settings = {"epochs": 20, "val_interval": 2, "save_interval": 100, "patience": patience}
    ends = 4 + 2 * patience
    assert script.train(tmp_path, **settings).steps == ends
    state = newest_state(tmp_path / "states")
    progress = state.manifest["progress"]
    assert (progress["step"], progress["finished"], progress["best_step"]) == (ends, True, 4)
    ((metrics, weights),) = script.saved
    assert metrics["step"] == 4 and equal(weights, script.seen[1])

    SOURCE.asked.clear()
    before = (state.path / TENSORS).read_bytes()
    assert script.train(tmp_path, resume=True, **settings).steps == ends
    assert SOURCE.asked == [] and len(script.seen) == 2 + patience, "no step and no validation more"
    assert script.saved[1][0] == metrics and equal(script.saved[1][1], weights)
    assert (state.path / TENSORS).read_bytes() == before


def test_patience_begins_anew_with_each_better_validation(tiny_model, tmp_path):
    script = Script(tiny_model, 3.0, 4.0, 2.0, 2.5, 1.0, 1.1, 1.2)
    assert script.train(tmp_path, epochs=20, patience=2).steps == 7
    assert script.saved[-1][0]["step"] == 5


def test_no_score_is_better_for_what_is_not_learned_or_not_kept():
    def found(loss, kl, general_loss=9.0, targets=5):
        general = KeptMetrics(general_loss, 1.0, targets, 9, kl=kl)
        more = Metrics(7.0, 1.0, 5, 9)  # of a kind that is only watched
        return {"domain": Metrics(loss, 1.0, 5, 9), "general": general, "more": more}

    assert score_of(found(2.0, 0.5)) == score_of(found(2.0, 0.5, general_loss=1.0)) == 2.5
    assert score_of(found(2.0, math.nan, targets=0)) == 2.0
    assert score_of({"domain": Metrics(2.0, 1.0, 5, 9)}) == 2.0


def test_the_best_is_that_of_learning_and_keeping_together(tiny_model, tmp_path):
    script, kl = Script(tiny_model, 2.0, 1.5, 1.0), iter([0.0, 0.1, 1.5])
    script.measures["general"] = lambda: KeptMetrics(3.0, 1.0, 5, 9, kl=next(kl))
    script.train(tmp_path, epochs=3)
    ((metrics, _),) = script.saved
    assert metrics["step"] == 2 and metrics["general"]["best"]["kl"] == 0.1
    text = (tmp_path / "metrics" / "run.jsonl").read_text(encoding="utf-8")
    records = [record for record in map(json.loads, text.splitlines()) if "val_loss" in record]
    logged = [(r["val_loss"], r["val_general_kl"], r["val_score"]) for r in records]
    assert logged == [(2.0, 0.0, 2.0), (1.5, 0.1, 1.6), (1.0, 1.5, 2.5)]


def test_all_is_saved_before_the_verdict_on_the_best_weights(tiny_model, tmp_path):
    script, settings = Script(tiny_model, 1.0, 2.0), {"epochs": 2, "save_interval": 1}

    def failing() -> dict:
        raise ZeroDivisionError

    def verdict() -> dict:
        assert equal(weights_of(tiny_model), script.seen[0])
        return {"verdict": "fine"}

    with pytest.raises(ZeroDivisionError):
        script.train(tmp_path, verdict=failing, **settings)
    assert [metrics["step"] for metrics, _ in script.saved] == [1, 1]
    assert newest_state(tmp_path / "states").manifest["progress"]["finished"]
    script.train(tmp_path, verdict=verdict, resume=True, **settings)
    metrics, weights = script.saved[2]
    assert metrics == {**script.saved[1][0], "verdict": "fine"} and equal(weights, script.seen[0])
    assert len(script.saved) == 3 and len(script.seen) == 2
