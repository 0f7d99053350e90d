"""The one loop: exact under accumulation, safe with bad numbers, and honest about what it did."""

import contextlib
import copy
import io
import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import CPU, Source, ragged_batch, rows_of, run_training

from core.errors import UserError
from trainer import metrics
from trainer.loop import accumulate_gradients, clip_gradients, loss_sum
from trainer.metrics import Metrics, RunLog, Validation, evaluate
from trainer.optimizer import lr_at
from trainer.options import TrainOptions
from trainer.run import MAX_OVERFLOWS
from trainer.runtime import Runtime

CONTROL = {0, 1, 2}
WARM_UP_PASSES = 1


def gradients(model, batches) -> list[torch.Tensor]:
    model.zero_grad()
    accumulate_gradients(model, batches, CPU.scaler(), CPU, loss_sum)
    return [parameter.grad.clone() for parameter in model.parameters()]


def relative_difference(left, right) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(left, right, strict=True))


def test_accumulation_weighs_tokens_not_micro_batches(tiny_model):
    model = tiny_model.double()
    whole = ragged_batch(8, seed=0)
    quarters = [rows_of(whole, n, n + 2) for n in range(0, 8, 2)]
    at_once = gradients(model, [whole])
    assert relative_difference(gradients(model, quarters), at_once) <= 1e-10

    # The control: a mean of each micro-batch's mean is another gradient.
    model.zero_grad()
    for part in quarters:
        (loss_sum(model, part) / part.n_targets / len(quarters)).backward()
    mean_of_means = [parameter.grad for parameter in model.parameters()]
    assert relative_difference(mean_of_means, at_once) > 1e-2


def test_a_step_without_targets_changes_nothing_by_its_gradient(tiny_model):
    batch = ragged_batch(2, seed=1)
    empty = replace(batch, labels=torch.full_like(batch.labels, -100), n_targets=0, n_bytes=0)
    tiny_model.zero_grad()
    loss, n_targets = accumulate_gradients(tiny_model, [empty], CPU.scaler(), CPU, loss_sum)
    assert (loss, n_targets) == (0.0, 0)
    assert all(parameter.grad.abs().max() == 0 for parameter in tiny_model.parameters())


def test_one_batch_is_learned_by_heart_and_everything_is_recorded(tiny_model, tmp_path):
    saved = []
    source = Source([replace(ragged_batch(4, seed=2), n_tokens=40)])
    summary = run_training(
        tiny_model, source, tmp_path, epochs=60, write=saved.append, log_interval=7
    )
    assert abs(summary.first_loss - math.log(320)) <= 0.3
    assert summary.last_loss < 0.1 * summary.first_loss
    assert summary.tokens == 60 * 40  # what the batch says, not its 4 x 12 slots
    assert saved == [
        {"step": 60, "val": {}}
    ]  # save_interval never came: a run always saves at its end
    *records, last = [
        json.loads(line) for line in (tmp_path / "metrics" / "run.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == [1, *range(7, 60, 7), 60]
    assert records[0]["loss"] == summary.first_loss
    assert all(record["lr"] <= 1e-2 and record["grad_norm"] > 0 for record in records)
    assert all(0 < record["matmul_share"] < 1.5 for record in records)
    assert (
        last["summary"]["last_loss"] == summary.last_loss
        and last["summary"]["tokens"] == summary.tokens
    )
    assert (tmp_path / "metrics" / "run.png").read_bytes().startswith(b"\x89PNG")
    assert not tiny_model.training


def test_the_logged_loss_is_the_token_mean_of_its_window(tiny_model, tmp_path):
    steps = [[ragged_batch(1, seed=3)], [ragged_batch(6, seed=4)]]
    with torch.no_grad():
        nats = [float(loss_sum(tiny_model, batches[0])) for batches in steps]
    targets = [batches[0].n_targets for batches in steps]
    # A vanishing learning rate, so that both steps see the same weights.
    run_training(
        tiny_model, Source(*steps), tmp_path, epochs=2, log_interval=2, learning_rate=1e-30
    )
    *records, _ = [
        json.loads(line) for line in (tmp_path / "metrics" / "run.jsonl").read_text().splitlines()
    ]
    assert records[-1]["loss"] == pytest.approx(sum(nats) / sum(targets), rel=1e-6)


def test_saves_come_at_intervals_after_validation_and_at_the_end(tiny_model, tmp_path):
    events = []

    def measure():
        events.append("validate")
        return evaluate(tiny_model, [ragged_batch(2, seed=5)], CPU, CONTROL)

    run_training(
        tiny_model,
        Source([ragged_batch(1, seed=6)], [ragged_batch(1, seed=7)]),
        tmp_path,
        save_interval=3,
        max_steps=7,
        write=lambda metrics: events.append((metrics["step"], metrics["val"]["last"]["step"])),
        validation=Validation({"val": measure}),
    )
    assert events == ["validate", (3, 3), "validate", (6, 6), "validate", (7, 7)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_never_reaches_the_weights(tiny_model, tmp_path, bad):
    calls = []
    weights = []

    def poisoned(model, batch):
        calls.append(None)
        if len(calls) == WARM_UP_PASSES + 3:
            weights.append(copy.deepcopy(model.state_dict()))
            return loss_sum(model, batch) * bad
        return loss_sum(model, batch)

    saved = []
    with pytest.raises(UserError, match=r"step 3: loss (nan|inf).* the save of step 2 stands"):
        source = Source([ragged_batch(2, seed=8)])
        run_training(
            tiny_model, source, tmp_path, loss=poisoned, write=saved.append, save_interval=2
        )
    assert [metrics["step"] for metrics in saved] == [2]
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, weights[0][name]), name


def test_a_non_finite_loss_with_a_finite_gradient_is_caught_too(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"step 1: loss inf, gradient norm [0-9]"):
        run_training(
            tiny_model,
            Source([ragged_batch(2, seed=9)]),
            tmp_path,
            loss=lambda model, batch: loss_sum(model, batch) + math.inf,
        )


def test_a_non_finite_gradient_with_a_finite_loss_is_caught_too(tiny_model, tmp_path):
    before = copy.deepcopy(tiny_model.state_dict())

    def infinite_slope(model, batch):
        loss = loss_sum(model, batch)
        return loss + torch.sqrt(loss * 0.0)  # the root's slope at 0 is infinite, its value is not

    with pytest.raises(UserError, match="gradient norm"):
        run_training(tiny_model, Source([ragged_batch(2, seed=9)]), tmp_path, loss=infinite_slope)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items()
    )


@pytest.mark.parametrize(
    ("good_every", "ends"), [(MAX_OVERFLOWS + 1, True), (MAX_OVERFLOWS + 2, False)]
)
def test_fp16_gives_up_after_overflows_in_a_row_only(tmp_path, good_every, ends):
    passes = []

    def overflowing(model, batch):
        passes.append(None)
        loss = model(torch.ones(2, 2)).float().square().sum()
        good = (len(passes) - WARM_UP_PASSES) % good_every == 0
        return loss if good else loss + torch.sqrt(loss * 0.0)

    settings = {"runtime": replace(CPU, dtype=torch.float16), "epochs": 2 * good_every}
    refused = pytest.raises(UserError, match=f"step {MAX_OVERFLOWS + 1}: .*gradient norm")
    with nullcontext() if ends else refused:
        source = Source([ragged_batch(1, seed=9, length=4)])
        summary = run_training(
            torch.nn.Linear(2, 2), source, tmp_path, loss=overflowing, **settings
        )
        assert summary.steps == 2 * good_every


@pytest.mark.parametrize(("rate", "loss"), [(1e39, 1.0), (1e-2, math.nan)])
def test_weights_that_an_update_made_useless_are_not_saved(tiny_model, tmp_path, rate, loss):
    saved = []
    settings = {
        "learning_rate": rate,
        "max_steps": 2,
        "save_interval": 1,
        "validation": Validation({"val": lambda: Metrics(loss, 1.0, 5, 9)}),
    }
    with pytest.raises(
        UserError, match=r"step 1: the weights became useless and nothing was saved"
    ):
        run_training(
            tiny_model,
            Source([ragged_batch(2, seed=9)]),
            tmp_path,
            write=saved.append,
            **settings,
        )
    assert not saved and not list(tmp_path.rglob("step-*"))


@pytest.mark.parametrize(("largest", "norm_after"), [(0.5, 0.5), (10.0, 5.0), (math.inf, 5.0)])
def test_gradients_are_scaled_down_to_the_largest_norm_and_no_others_are_touched(
    largest, norm_after
):
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 1, 1)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, largest) == 5.0
    norm = torch.cat([parameters[0].grad, parameters[1].grad]).norm()
    assert norm == 5.0 if norm_after == 5.0 else norm == pytest.approx(norm_after, rel=1e-5)


def test_a_log_line_that_cannot_be_written_comes_with_the_next_save(tmp_path, capsys):
    options = TrainOptions(device="cpu")
    with RunLog(tmp_path / "run.jsonl", options) as log:
        (tmp_path / "run.part.jsonl").touch()  # a kill may leave it
        log.keep()
        assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]
        (tmp_path / "run.jsonl").unlink()
        (tmp_path / "run.jsonl").mkdir()
        log.write({"step": 1, "loss": 2.0, "grad_norm": math.inf, "summary": {"loss": math.nan}})
        assert "cannot write" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"run\.jsonl"):
            log.keep()
        (tmp_path / "run.jsonl").rmdir()
        log.keep()
    assert json.loads((tmp_path / "run.jsonl").read_text()) == {
        "step": 1,
        "loss": 2.0,
        "grad_norm": None,  # JSON has no infinity
        "summary": {"loss": None},
    }


def test_measuring_the_speed_leaves_no_trace(tiny_model, tmp_path):
    """The first step draws the dropout that it would draw without the measurement; no gradient is
    left over.
    """
    for block in tiny_model.layers:
        block.feed_forward.dropout.p = 0.3
    batch = ragged_batch(3, seed=10)
    torch.manual_seed(5)
    expected = accumulate_gradients(tiny_model.train(), [batch], CPU.scaler(), CPU, loss_sum)[0]
    norm = float(
        torch.cat([parameter.grad.flatten() for parameter in tiny_model.parameters()]).norm()
    )
    tiny_model.zero_grad()
    torch.manual_seed(5)
    assert run_training(tiny_model, Source([batch]), tmp_path).first_loss == expected
    first = json.loads((tmp_path / "metrics" / "run.jsonl").read_text().splitlines()[0])
    assert first["grad_norm"] == pytest.approx(
        norm, rel=1e-4
    )  # one fp32 sum against a norm of norms


def test_lines_stand_clear_of_the_bar(tiny_model, tmp_path, monkeypatch, capsys):
    def measure():
        return evaluate(tiny_model, [ragged_batch(2, seed=5)], CPU, CONTROL)

    def lines(text: str) -> list[str]:
        """What one sees: after a carriage return, text stands over what was there."""
        seen = []
        for line in text.split("\n"):
            cells = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            seen.append("".join(cells).rstrip())
        return seen

    terminal = io.StringIO(newline="")
    terminal.isatty = lambda: True
    source = Source([ragged_batch(2, seed=6)])
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        run_training(
            tiny_model, source, tmp_path, validation=Validation({"val": measure}), save_interval=2
        )
    run_training(
        tiny_model, source, tmp_path, validation=Validation({"val": measure}), save_interval=2
    )
    in_a_file = capsys.readouterr().out
    assert "\r" not in in_a_file
    for text in (terminal.getvalue(), in_a_file):
        validations = [line for line in lines(text) if "validation" in line]
        assert [line.partition(":")[0] for line in validations] == ["step 2", "step 4"]
        assert not [line for line in validations if "|" in line]


def test_a_frozen_model_is_refused(tiny_model, tmp_path):
    tiny_model.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        run_training(tiny_model, Source([ragged_batch(2, seed=12)]), tmp_path)


def test_a_warm_up_longer_than_the_run_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="a warm-up of 4 steps must be shorter than the run of 4"):
        run_training(tiny_model, Source([ragged_batch(2, seed=16)]), tmp_path, warmup_iters=4)


def test_a_failing_run_leaves_the_metrics_of_an_earlier_one(tiny_model, tmp_path):
    run_training(tiny_model, Source([ragged_batch(2, seed=17)]), tmp_path)
    metrics = tmp_path / "metrics" / "run.jsonl"
    before = {path: path.read_bytes() for path in metrics.parent.iterdir()}
    with pytest.raises(UserError, match=r"step 1: loss nan.* and nothing was saved"):
        run_training(
            tiny_model,
            Source([ragged_batch(2, seed=17)]),
            tmp_path,
            loss=lambda model, batch: loss_sum(model, batch) * math.nan,
        )
    assert before == {path: path.read_bytes() for path in metrics.parent.iterdir()}


def test_parameters_without_gradient_are_reported(tiny_model, tmp_path, capsys):
    tiny_model.bypassed = torch.nn.Linear(2, 2)
    run_training(tiny_model, Source([ragged_batch(2, seed=13)]), tmp_path, epochs=2)
    assert "bypassed.weight, bypassed.bias" in capsys.readouterr().out


def test_the_schedule_warms_up_stays_and_decays():
    rates = [lr_at(step, 110, 10, 0.4, 1.0) for step in range(110)]
    assert rates[:11] == sorted(set(rates[:11])) and 0 < rates[0] <= 0.1
    assert rates[10:71] == [1.0] * 61, "60 of the 100 steps after the warm-up"
    assert rates[70:] == pytest.approx([n / 40 for n in range(40, 0, -1)])


def test_bits_per_byte_leaves_control_tokens_out(tiny_model):
    """Against a slow recount, one token at a time."""
    batch = ragged_batch(3, seed=14)
    batch.labels[:, -1] = batch.inputs["input_ids"][:, -1] = (
        2  # every row ends with a control token
    )
    batch = replace(batch, n_targets=int((batch.labels != -100).sum()), n_bytes=57)
    metrics = evaluate(tiny_model, [batch], CPU, CONTROL)
    every, text = [], []
    log_probabilities = tiny_model(batch.inputs["input_ids"]).logits.detach().log_softmax(-1)
    for row in range(3):
        for position in range(1, batch.labels.size(1)):
            label = int(batch.labels[row, position])
            if label != -100:
                nats = -float(log_probabilities[row, position - 1, label])
                every.append(nats)
                text += [nats] if label not in CONTROL else []
    assert len(text) == len(every) - 3
    assert metrics.loss == pytest.approx(sum(every) / len(every), rel=1e-5)
    assert metrics.bits_per_byte == pytest.approx(sum(text) / math.log(2) / 57, rel=1e-5)


def test_evaluation_of_nothing_is_no_perfect_score_and_keeps_the_mode(tiny_model):
    tiny_model.train()
    metrics = evaluate(tiny_model, [], CPU, CONTROL)
    assert math.isnan(metrics.loss) and math.isnan(metrics.bits_per_byte)
    assert tiny_model.training


def test_wandb_offline_works(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_training(tiny_model, Source([ragged_batch(2, seed=15)]), tmp_path, epochs=2, use_wandb=True)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_autocast_uses_the_dtype_of_the_flag():
    seen = []

    class Probe(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    probe = Probe(4, 4)
    for flag, dtype in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("auto", torch.float32),
    ):
        with Runtime.start("cpu", flag).autocast():
            probe(torch.ones(1, 4))
        assert seen[-1] is dtype


def test_flags_for_machines_that_are_not_here_are_refused():
    for device in ("cuda:99", "nonsense", "xpu"):
        with pytest.raises(UserError, match="device"):
            Runtime.start(device)
    with pytest.raises(UserError, match="float16 needs a GPU"):
        Runtime.start("cpu", "float16")


def test_speed_and_time_left_ignore_the_first_steps_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = metrics.Clock(CPU)
    for seconds in (60.0, 30.0, 10.0, 1.0, 1.0):  # slow first steps, then one second each
        now[0] += seconds
        clock.tick(tokens=500)
    assert clock.pace() == (500, 1)
    with clock.paused():
        now[0] += 1000.0
    assert clock.pace() == (500, 1) and clock.elapsed() == 102.0
    assert [metrics.duration(seconds) for seconds in (5, 89, 91, 5399, 5400)] == [
        "5 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
    ]


def test_a_dry_run_measures_and_writes_nothing(tiny_model, tmp_path, capsys):
    source = Source([ragged_batch(2, seed=18)])
    summary = run_training(
        tiny_model,
        source,
        tmp_path,
        epochs=500,
        dry_run=True,
        write=lambda metrics: pytest.fail("saved"),
    )
    assert summary.steps == 20 and summary.tokens_per_second > 0
    printed = capsys.readouterr().out
    assert "nothing written" in printed and "the whole run of 500 steps takes about" in printed
    assert not list(tmp_path.iterdir())


def test_the_gpu_of_the_flag_is_the_one_that_is_meant(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    Runtime.start("cuda:1", "float32")
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {
                "WORLD_SIZE": "two",
                "RANK": "0",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "x",
                "MASTER_PORT": "1",
            },
            "'two'",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
            "WORLD_SIZE is set but MASTER_ADDR is not",
        ),
    ],
)
def test_a_broken_launch_is_one_sentence(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{said}.*start several processes with torchrun"):
        Runtime.start("cpu")
