"""The one loop: exact under accumulation, safe with bad numbers, and honest about what it did."""

import contextlib
import copy
import io
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import CPU, Source, divergence_sum, ragged_batch, rows_of, run_training, strengthen

from core.errors import UserError
from dataset.batches import KEEP, KINDS, OWN, masked
from model.lora.layer import lora_parameters
from model.model_lora import apply_lora
from trainer import metrics
from trainer.keeping import skill_loss_sum
from trainer.loop import accumulate_gradients, causal_loss_sum
from trainer.metrics import Metrics, RunLog, Validation, evaluate, plot_losses
from trainer.optimizer import BETAS, lr_at
from trainer.options import TrainOptions
from trainer.run import MAX_OVERFLOWS, Run
from trainer.runtime import Runtime

CONTROL = {0, 1, 2}
WARM_UP_PASSES = 1


def records_in(folder) -> list[dict]:
    """The lines of the metrics file that ``run_training`` wrote."""
    text = (folder / "metrics" / "run.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def gradients(model, batches) -> list[torch.Tensor]:
    model.zero_grad()
    accumulate_gradients(model, batches, CPU.scaler(), CPU, causal_loss_sum)
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
        (causal_loss_sum(model, part) / part.n_targets / len(quarters)).backward()
    mean_of_means = [parameter.grad for parameter in model.parameters()]
    assert relative_difference(mean_of_means, at_once) > 1e-2


def test_each_kind_of_batch_counts_by_its_weight_whatever_its_size(sharp_model):
    """The mean over own targets + weight * the mean divergence over general ones, of a skill."""
    model, weight = sharp_model.double(), 0.3
    apply_lora(model, 4)
    strengthen(model.double(), 1)
    own, general = ragged_batch(6, seed=1), ragged_batch(5, seed=2)
    targets = [own.n_targets, general.n_targets]
    assert targets[0] != targets[1]
    loss, divergence = causal_loss_sum(model, own), divergence_sum(model, general)
    (loss / targets[0] + weight * divergence / targets[1]).backward()
    expected = [parameter.grad.clone() for parameter in lora_parameters(model)]
    batches = [rows_of(own, 0, 1), rows_of(own, 1, 6)]
    kept = [rows_of(general, 0, 3), rows_of(general, 3, 5)]
    batches += [replace(batch, kind=KEEP, weight=weight) for batch in kept]
    model.zero_grad()
    loss_sum = partial(skill_loss_sum, base=model)
    losses, n_targets = accumulate_gradients(model, batches, CPU.scaler(), CPU, loss_sum)
    found = [parameter.grad for parameter in lora_parameters(model)]
    assert relative_difference(found, expected) <= 1e-10
    assert n_targets == dict(zip((OWN, KEEP), targets, strict=True))
    means = {OWN: loss.item() / targets[0], KEEP: divergence.item() / targets[1]}
    assert losses == pytest.approx(means, rel=1e-12), "each without its weight"


@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_a_run_is_the_loop_that_one_would_write(tiny_model, tmp_path, grad_clip):
    """Rates, gradients of their own step alone, clipping, decay: all in double precision."""
    steps = [[ragged_batch(1, seed=0), ragged_batch(2, seed=1)], [ragged_batch(6, seed=2)]]
    source, twin = Source(*steps), copy.deepcopy(tiny_model.double())
    decays = {0.1: [p for p in twin.parameters() if p.dim() > 1]}
    decays[0.0] = [p for p in twin.parameters() if p.dim() == 1]
    groups = [{"params": found, "weight_decay": decay} for decay, found in decays.items()]
    optimizer, norms = torch.optim.AdamW(groups, betas=BETAS), []
    rates = [0.005, 0.01, 0.01, 0.01 / 3 / 0.4]  # one step of warm-up, then 3 of which 1.2 decay
    for rate, batches in zip(rates, steps * 2, strict=True):
        n_targets = sum(batch.n_targets for batch in batches)
        twin.zero_grad()
        sum(causal_loss_sum(twin, batch) for batch in batches).div(n_targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), grad_clip or math.inf)
        norms.append(float(norm))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    run_training(tiny_model, source, tmp_path, epochs=2, grad_clip=grad_clip, log_interval=1)
    for name, tensor in tiny_model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-9, atol=1e-9, msg=name)
    records = records_in(tmp_path)[:4]
    assert [record["lr"] for record in records] == pytest.approx(rates)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms)
    assert min(norms) > grad_clip and source.asked == [(0, 0), (1, 0)]


def test_a_resumed_run_asks_for_the_step_after_its_save(tiny_model, tmp_path):
    passes = []

    def crashing(model, batch):
        passes.append(None)
        if len(passes) == WARM_UP_PASSES + 6:
            raise ZeroDivisionError
        return causal_loss_sum(model, batch)

    source = Source(*([ragged_batch(1, seed=n)] for n in range(3)))
    settings = {"epochs": 3, "save_interval": 4}
    with pytest.raises(ZeroDivisionError):
        run_training(tiny_model, source, tmp_path, loss=crashing, **settings)
    source.asked.clear()
    assert run_training(tiny_model, source, tmp_path, resume=True, **settings).steps == 9
    assert source.asked == [(1, 1), (2, 0)]


def test_a_step_without_targets_changes_nothing_by_its_gradient(tiny_model):
    empty = masked(ragged_batch(2, seed=1))
    tiny_model.zero_grad()
    found = accumulate_gradients(tiny_model, [empty], CPU.scaler(), CPU, causal_loss_sum)
    assert found == (dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0))
    assert all(parameter.grad.abs().max() == 0 for parameter in tiny_model.parameters())


def test_one_batch_is_learned_by_heart_and_everything_is_recorded(tiny_model, tmp_path):
    saved, source = [], Source([replace(ragged_batch(4, seed=2), n_tokens=40)])
    summary = run_training(
        tiny_model, source, tmp_path, epochs=60, write=saved.append, log_interval=7
    )
    assert abs(summary.first_loss - math.log(320)) <= 0.3
    assert summary.last_loss < 0.1 * summary.first_loss
    assert summary.tokens == 60 * 40  # what the batch says, not its 4 x 12 slots
    assert saved == [{"step": 60, "val": {}}]  # no interval was due: a run always saves at its end
    *records, last = records_in(tmp_path)
    assert [record["step"] for record in records] == [1, *range(7, 60, 7), 60]
    assert records[0]["loss"] == summary.first_loss
    assert all(0 < record["matmul_share"] < 1.5 for record in records)
    assert last["summary"]["last_loss"] == summary.last_loss
    assert last["summary"]["tokens"] == summary.tokens
    assert (tmp_path / "metrics" / "run.png").read_bytes().startswith(b"\x89PNG")
    assert not tiny_model.training


def test_the_logged_loss_is_the_token_mean_of_its_window(tiny_model, tmp_path):
    steps = [[ragged_batch(1, seed=3)], [ragged_batch(6, seed=4)]]
    with torch.no_grad():
        nats = [float(causal_loss_sum(tiny_model, batches[0])) for batches in steps]
    targets = [batches[0].n_targets for batches in steps]
    # A vanishing learning rate, so that both steps see the same weights.
    settings = {"epochs": 2, "log_interval": 2, "learning_rate": 1e-30}
    run_training(tiny_model, Source(*steps), tmp_path, **settings)
    expected = sum(nats) / sum(targets)
    assert records_in(tmp_path)[-2]["loss"] == pytest.approx(expected, rel=1e-6)


def test_validations_and_saves_come_at_intervals_of_their_own_and_at_the_end(tiny_model, tmp_path):
    events = []

    def measure():
        events.append("validate")
        return evaluate(tiny_model, [ragged_batch(2, seed=5)], CPU, CONTROL)

    run_training(
        tiny_model,
        Source([ragged_batch(1, seed=6)], [ragged_batch(1, seed=7)]),
        tmp_path,
        val_interval=2,
        save_interval=3,
        max_steps=7,
        write=lambda metrics: events.append((metrics["step"], metrics["val"]["last"]["step"])),
        validation=Validation({"val": measure}),
    )
    once = "validate"
    assert events == [once, (3, 2), once, once, (6, 6), once, (7, 7)], "first validated, then saved"


@pytest.mark.parametrize(("steps", "interval"), [(25, 10), (100, 10), (101, 11), (3000, 300)])
def test_about_ten_validations_a_run_and_none_too_often(steps, interval):
    run = Run(TrainOptions(epochs=steps), *[None] * 5)
    run.plan(Source([ragged_batch(1, seed=0)]))
    assert run.val_interval == interval


def test_a_validation_that_is_the_first_and_the_last_is_told_once():
    validation = Validation(
        {"val": lambda: Metrics(1.5, 1.0, 5, 9), "none": lambda: Metrics(0.0, 0.0, 0, 0)}
    )
    validation(4)
    assert str(validation).splitlines()[0].count("1.5") == 1
    validation(8)
    first, none = str(validation).splitlines()
    assert first.count("1.5") == 2 and "4" in first and "8" in first
    assert "none" in none and "1.5" not in none


def test_a_picture_of_any_run_is_drawn_without_a_warning(tmp_path, recwarn):
    plot_losses([{"step": 1, "loss": 2.0, "val_loss": 3.0}], tmp_path / "lora_小明_64.png")
    assert (tmp_path / "lora_小明_64.png").is_file() and not recwarn.list


@pytest.mark.parametrize(
    "spoil",
    [
        lambda loss: loss * math.nan,
        lambda loss: loss * math.inf,
        lambda loss: loss + math.inf,  # the gradient stays finite
        lambda loss: loss + torch.sqrt(loss * 0.0),  # the loss does: a root's slope at 0 is not
    ],
)
def test_a_number_that_is_not_finite_never_reaches_the_weights(tiny_model, tmp_path, spoil):
    passes, weights, saved = [], {}, []

    def spoiled(model, batch):
        passes.append(None)
        if len(passes) != WARM_UP_PASSES + 3:
            return causal_loss_sum(model, batch)
        weights.update(copy.deepcopy(model.state_dict()))
        return spoil(causal_loss_sum(model, batch))

    settings = {"loss": spoiled, "write": saved.append, "save_interval": 2}
    with pytest.raises(UserError, match=r"step 3: .*step 2"):
        run_training(tiny_model, Source([ragged_batch(2, seed=8)]), tmp_path, **settings)
    assert [metrics["step"] for metrics in saved] == [2]
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(
    ("good_every", "ends"), [(MAX_OVERFLOWS + 1, True), (MAX_OVERFLOWS + 2, False)]
)
def test_fp16_gives_up_after_overflows_in_a_row_only(tmp_path, good_every, ends):
    class Scaling(Runtime):
        def scaler(self):
            return torch.amp.GradScaler("cpu")

    passes = []

    def overflowing(model, batch):
        passes.append(None)
        loss = model(torch.ones(2, 2)).square().sum()
        good = (len(passes) - WARM_UP_PASSES) % good_every == 0
        return loss if good else loss + torch.sqrt(loss * 0.0)

    settings = {"runtime": Scaling(CPU.device, CPU.dtype), "epochs": 2 * good_every}
    refused = pytest.raises(UserError, match=f"step {MAX_OVERFLOWS + 1}: ")
    source = Source([ragged_batch(1, seed=9, length=4)])
    with nullcontext() if ends else refused:
        model = torch.nn.Linear(2, 2)
        summary = run_training(model, source, tmp_path, loss=overflowing, **settings)
        assert summary.steps == 2 * good_every


@pytest.mark.parametrize(("rate", "loss"), [(1e39, 1.0), (1e-2, math.nan)])
def test_weights_that_an_update_made_useless_are_not_saved(tiny_model, tmp_path, rate, loss):
    settings = {"learning_rate": rate, "max_steps": 2, "save_interval": 1, "val_interval": 1}
    settings["validation"] = Validation({"val": lambda: Metrics(loss, 1.0, 5, 9)})
    settings["write"] = lambda metrics: pytest.fail("saved")
    with pytest.raises(UserError, match=r"step 1: .*learning_rate"):
        run_training(tiny_model, Source([ragged_batch(2, seed=9)]), tmp_path, **settings)
    assert not list(tmp_path.rglob("step-*"))


def test_a_log_line_that_cannot_be_written_comes_with_the_next_save(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    with RunLog(path, TrainOptions(device="cpu")) as log:
        (tmp_path / "run.part.jsonl").touch()  # a kill may leave it
        log.keep()
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()
        path.mkdir()
        log.write({"step": 1, "loss": 2.0, "grad_norm": math.inf, "summary": {"loss": math.nan}})
        assert "cannot write" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"run\.jsonl"):
            log.keep()
        path.rmdir()
        log.keep()
    # JSON has no infinity.
    written = {"step": 1, "loss": 2.0, "grad_norm": None, "summary": {"loss": None}}
    assert json.loads(path.read_text(encoding="utf-8")) == written


def test_the_warm_up_leaves_no_trace(tiny_model, tmp_path):
    """The first step draws the dropout that it would draw without; no gradient is left over."""
    for block in tiny_model.layers:
        block.feed_forward.dropout.p = 0.3
    batch = ragged_batch(3, seed=10)
    torch.manual_seed(5)
    losses, _ = accumulate_gradients(
        tiny_model.train(), [batch], CPU.scaler(), CPU, causal_loss_sum
    )
    norm = torch.cat([parameter.grad.flatten() for parameter in tiny_model.parameters()]).norm()
    tiny_model.zero_grad()
    torch.manual_seed(5)
    assert run_training(tiny_model, Source([batch]), tmp_path).first_loss == losses[OWN]
    assert records_in(tmp_path)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_lines_stand_clear_of_the_bar(tiny_model, tmp_path, capsys):
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
    source, settings = Source([ragged_batch(2, seed=6)]), {"val_interval": 2}
    settings["validation"] = Validation({"val": lambda: Metrics(1.0, 1.0, 5, 9)})
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        run_training(tiny_model, source, tmp_path, **settings)
    run_training(tiny_model, source, tmp_path, **settings)
    in_a_file = capsys.readouterr().out
    assert "\r" not in in_a_file
    for text in (terminal.getvalue(), in_a_file):
        validations = [line for line in lines(text) if "validation" in line]
        assert [line.partition(":")[0] for line in validations] == ["step 2", "step 4"]
        assert not [line for line in validations if "|" in line]


def test_a_run_that_cannot_learn_is_refused(tiny_model, tmp_path):
    source = Source([ragged_batch(2, seed=12)])
    with pytest.raises(UserError, match="warmup_iters"):
        run_training(tiny_model, source, tmp_path, warmup_iters=4)  # as long as the run
    with pytest.raises(UserError, match="no trainable parameter"):
        run_training(tiny_model.requires_grad_(False), source, tmp_path)


def test_a_failing_run_leaves_the_metrics_of_an_earlier_one(tiny_model, tmp_path):
    source = Source([ragged_batch(2, seed=17)])
    run_training(tiny_model, source, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "metrics").iterdir()}
    with pytest.raises(UserError, match="step 1: loss nan"):
        run_training(
            tiny_model, source, tmp_path, loss=lambda *two: causal_loss_sum(*two) * math.nan
        )
    assert before == {path: path.read_bytes() for path in (tmp_path / "metrics").iterdir()}


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
    batch.labels[:, -1] = batch.inputs["input_ids"][:, -1] = 2  # a control token ends every row
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
    settings = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    run_training(tiny_model, Source([ragged_batch(2, seed=15)]), tmp_path, epochs=2, use_wandb=True)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("flag", ["float32", "bfloat16", "auto"])
def test_autocast_uses_the_dtype_of_the_flag(flag):
    with Runtime.start("cpu", flag).autocast():
        found = torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype
    assert found is (torch.bfloat16 if flag == "bfloat16" else torch.float32)


def test_flags_for_machines_that_are_not_here_are_refused():
    for device in ("cuda:99", "nonsense", "xpu"):
        with pytest.raises(UserError, match="device"):
            Runtime.start(device)
    with pytest.raises(UserError, match="float16"):
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
    said = [metrics.duration(seconds) for seconds in (5, 89, 91, 5399, 5400)]
    assert said == ["5 s", "89 s", "2 min", "90 min", "1.5 h"]


def test_a_dry_run_measures_the_largest_micro_batch_and_writes_nothing(
    tiny_model, tmp_path, capsys
):
    sizes = []

    def measured(model, batch):
        sizes.append(batch.labels.numel())
        return causal_loss_sum(model, batch)

    small, large = ragged_batch(2, seed=18), ragged_batch(5, seed=19)
    source, settings = Source([small], [small, large], [small]), {"epochs": 200, "dry_run": True}
    settings |= {"loss": measured, "write": lambda metrics: pytest.fail("saved")}
    summary = run_training(tiny_model, source, tmp_path, **settings)
    assert sizes[0] == max(sizes) > sizes[WARM_UP_PASSES]
    assert summary.steps == 20 and summary.tokens_per_second > 0
    assert "the whole run of 600 steps takes about" in capsys.readouterr().out
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
        ("WORLD_SIZE=two RANK=0 LOCAL_RANK=0 MASTER_ADDR=x MASTER_PORT=1", "two"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0", "MASTER_ADDR"),
    ],
)
def test_a_broken_launch_is_one_sentence(variables, said, monkeypatch):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(UserError, match=f"{said}.*torchrun"):
        Runtime.start("cpu")
