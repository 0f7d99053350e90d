"""The training benchmark measures what it says: same rows, counted targets, no step that is not
asked for.
"""

import json

import pytest
import torch

from benchmarks import bench_train, sweep_recipe
from benchmarks.training.data import (
    FILLED_IN,
    Score,
    chats,
    document_files,
    documents,
    initial_weights,
    write_chats,
)
from benchmarks.training.llama import TARGETS, llama_of, lora_of_llama
from benchmarks.training.measure import Paced, train_paced, training_mflop
from benchmarks.training.sides import Sides, compare
from core.errors import UserError
from core.paths import bundled_data
from dataset.batches import PretrainDataset, SFTDataset
from model.LMConfig import LMConfig
from model.loss import loss_sum
from model.model import MiniMindLM
from model.model_lora import apply_lora, save_lora
from model.weights import model_of, read_tensors
from trainer.options import TrainOptions
from trainer.runtime import Runtime
from trainer.stage import batches_of

LENGTH = 64
SMALL = [
    "--dim",
    "32",
    "--n_layers",
    "1",
    "--max_seq_len",
    str(LENGTH),
    "--rounds",
    "1",
    "--rows",
    "4",
]
SMALL += ["--chat_rows", "16", "--threads", str(torch.get_num_threads())]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the command sets it for its children


@pytest.fixture
def small():
    return bench_train.Options(only=("memory",), dim=32, n_layers=1, max_seq_len=LENGTH)


def texts():
    return documents((bundled_data("pretrain_mini.jsonl"),))


@pytest.mark.parametrize("part", ["pretrain", "lora", "time_to_loss", "lora_to_loss"])
def test_a_comparison_without_minimind_says_what_is_missing(part):
    with pytest.raises(
        UserError, match=rf"--only {part} needs --minimind DIR.*without it there is --only floor"
    ):
        bench_train.main(["--only", part])


def test_a_folder_that_is_not_minimind_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--minimind .* holds no model/LMConfig\.py"):
        bench_train.main(["--minimind", str(tmp_path)])


def test_flops_of_the_default_model():
    """6 x 25,821,184 weights of matrix products, and attention over half the square."""
    assert training_mflop(LMConfig(), 256) == pytest.approx(161.2, abs=0.1)
    assert training_mflop(LMConfig(), 512) == pytest.approx(167.5, abs=0.1)


def test_the_llama_beside_us_is_our_model_and_its_skill_ours(tiny_model):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    config, ids = tiny_model.config, torch.arange(24).view(2, 12) + 3
    llama = llama_of(
        config, {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    )
    assert torch.allclose(llama(ids).logits, tiny_model(ids).logits, atol=1e-5)
    llama = peft.get_peft_model(llama, peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    torch.manual_seed(0)
    for parameter in llama.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    skill = lora_of_llama(llama, config.dim // config.n_heads)
    apply_lora(tiny_model, 4)
    missing, unexpected = tiny_model.load_state_dict(skill, strict=False)
    assert (
        len(skill) == 4 * config.n_layers
        and not unexpected
        and not any("lora" in name for name in missing)
    )
    assert torch.allclose(llama(ids).logits, tiny_model(ids).logits, atol=1e-5)
    with llama.disable_adapter():
        assert not torch.allclose(llama(ids).logits, tiny_model(ids).logits, atol=1e-2)


def test_parts_share_one_results_file(tmp_path):
    result = tmp_path / "results" / "bench.json"
    for part in ("floor", "lora_step"):
        bench_train.main(["--only", part, *SMALL, "--result", str(result)])
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found.keys() == {"floor", "lora_step"}
    assert {"date", "machine", "versions", "threads", "data"} <= found["floor"].keys()
    for floor in (found["floor"]["adamw"], found["floor"]["muon"]):
        assert floor["tokens_per_step"] == sum(
            rows * length for rows, length in floor["micro_batches"]
        )
        assert set(floor["seconds"]) == {"step", "linears", "sdpa"}
    assert (
        found["lora_step"]["windows"]["supervised_share"]
        > 0.9
        > found["lora_step"]["chats"]["supervised_share"]
    )


@pytest.mark.parametrize("content", [b'{"rows": [', b"[]", b"\xff\xfe", None])
@pytest.mark.parametrize(
    ("benchmark", "argv"), [(bench_train, ["--only", "floor"]), (sweep_recipe, [])]
)
def test_what_is_no_results_file_is_refused_before_the_work_and_kept(
    benchmark, argv, content, tmp_path, monkeypatch
):
    def measure(*arguments):
        raise AssertionError("the hours of work have begun")

    monkeypatch.setattr("benchmarks.training.floor.floor", measure)
    monkeypatch.setattr(sweep_recipe, "train_once", measure)
    path = tmp_path / "result.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"result\.json is no results file"):
        benchmark.main(["--result", str(path), *argv])
    assert path.is_dir() if content is None else path.read_bytes() == content


def test_a_sweep_goes_on_only_with_what_it_began_with(tmp_path):
    path = tmp_path / "result.json"
    path.write_text('{"tokens": 5000, "dtype": "auto", "rows": []}')
    with pytest.raises(
        UserError,
        match=r"result\.json was measured with tokens 5000, not 6000; name another --result",
    ):
        sweep_recipe.main(["--result", str(path), "--tokens", "6000"])


def test_a_sweep_of_less_than_a_step_is_refused():
    with pytest.raises(UserError, match="--tokens 0 must be at least 4096"):
        sweep_recipe.main(["--tokens", "0"])


def test_the_score_is_the_mean_loss_of_the_held_out_rows(small, tokenizer, tmp_path):
    weights, config = initial_weights(small, tokenizer, tmp_path)
    file = write_chats(
        tmp_path / "held_out.jsonl",
        chats(bundled_data("sft_mini.jsonl"), tokenizer, LENGTH, 9),
        tokenizer,
        LENGTH,
    )
    score = Score(small, "chat", file.path, tokenizer, weights, config, tmp_path)
    model = model_of(LMConfig(**config), read_tensors(weights), weights).eval()
    data = SFTDataset((file.path,), tokenizer, LENGTH, cache=tmp_path, val_ratio=0.0).train
    with torch.no_grad():
        rows = [data.collate([n]) for n in range(len(data))]
        nats = sum(float(loss_sum(model, row)) for row in rows)
    assert score() == pytest.approx(nats / sum(row.n_targets for row in rows), rel=1e-5)
    apply_lora(model, 4)
    save_lora(model, tmp_path / "a.pth")
    assert score(lora=tmp_path / "a.pth", rank=4) == pytest.approx(score(), rel=1e-6), (
        "a new LoRA changes nothing"
    )


@pytest.mark.parametrize("kind", ["as they are", "mean 0.45", "full"])
def test_nobody_cuts_a_document_that_all_sides_read(tokenizer, tmp_path, kind):
    files = document_files(texts(), kind, tokenizer, LENGTH, 2, 8, tmp_path)
    assert files[0].path.read_bytes() != files[1].path.read_bytes()
    for file in files:
        rows = PretrainDataset(
            (file.path,), tokenizer, LENGTH, cache=tmp_path, val_ratio=0.0
        ).train.rows
        lengths = rows.lengths
        assert len(lengths) == file.rows == 8 and lengths.sum() == file.tokens
        assert lengths.max() <= LENGTH
        assert kind != "full" or lengths.mean() > 0.97 * LENGTH
        assert kind != "mean 0.45" or 0.3 < lengths.mean() / LENGTH < 0.6


def test_too_few_documents_are_a_users_mistake(tokenizer, tmp_path):
    with pytest.raises(UserError, match="--pretrain holds too few documents"):
        document_files(texts()[:5], "full", tokenizer, LENGTH, 2, 8, tmp_path)


def test_chats_are_those_that_every_side_reads_alike(tokenizer, tmp_path):
    def row(*turns):
        return {"conversations": [{"role": role, "content": content} for role, content in turns]}

    rows = [
        row(("user", "Who are you?"), ("assistant", "{{name}} by {{author}}")),
        row(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")),
        row(("user", "long " * LENGTH), ("assistant", "Nothing of this is left")),
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    [kept] = chats(path, tokenizer, LENGTH, 0)
    assert kept["conversations"][1]["content"] == " by ".join(FILLED_IN.values())


def test_sides_that_learn_from_different_targets_are_not_compared():
    def answer(targets):
        figures = {
            "seconds": 1.0,
            "steps": 1,
            "slots": 200,
            "sgemm": 1.0,
            "bare_mib": 0.0,
            "peak_mib": 1.0,
        }
        return [figures | {"targets": targets}]

    fair = compare({"ours": answer(1000), "other": answer(1010)}, [200])
    assert (
        fair["sides"]["other"]["supervised_targets"] == 1010
        and fair["speed_over"]["other"]["median"] == 1.0
    )
    with pytest.raises(RuntimeError, match="other learned from 1011 targets, ours from 1000"):
        compare({"ours": answer(1000), "other": answer(1011)}, [200])


def test_the_paced_loop_trains_on_what_it_is_given_and_nothing_else(tokenizer, tmp_path):
    file = document_files(texts(), "full", tokenizer, LENGTH, 1, 8, tmp_path)[0]
    data = PretrainDataset((file.path,), tokenizer, LENGTH, cache=tmp_path, val_ratio=0.0).train
    options = TrainOptions(batch_size=4, max_seq_len=LENGTH)
    steps = list(batches_of(data, options, Runtime.start("cpu")).steps(0))
    model = MiniMindLM(LMConfig(dim=32, n_layers=1, vocab_size=len(tokenizer)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []

    def rounds(count):
        for step in steps[:count]:
            yield step
            seen.append(step)

    assert list(Paced(steps[0], lambda: rounds(2)).steps(0)) == [steps[0]] and not seen
    for count in (0, 2):
        source = Paced(steps[0], lambda count=count: rounds(count))
        train_paced(
            model, source, options, Runtime.start("cpu"), loss_sum, tmp_path / "metrics.jsonl"
        )
        changed = [
            name
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor, before[name])
        ]
        assert len(seen) == count and bool(changed) == bool(count)


def test_our_process_counts_saves_and_ends(small, tokenizer, tmp_path):
    weights, config = initial_weights(small, tokenizer, tmp_path)
    rows = chats(bundled_data("lora_medical.jsonl"), tokenizer, LENGTH, 20)
    file = write_chats(tmp_path / "chats.jsonl", rows, tokenizer, LENGTH)
    data = SFTDataset((file.path,), tokenizer, LENGTH, cache=tmp_path, val_ratio=0.0).train
    assert int(data.lengths.sum()) == file.tokens
    wanted = sum(
        batch.n_targets
        for step in batches_of(data, TrainOptions(), Runtime.start("cpu")).steps(0)
        for batch in step
    )
    with Sides(small, "chat", weights, config, tmp_path).ours(
        "ours", "train_lora", file.path, 2
    ) as side:
        rounds = [side.ask("round", data=str(file.path)) for _ in range(2)]
        side.ask("save", path=str(tmp_path / "lora.pth"))
    assert side.process.returncode == 0
    assert [answer["targets"] for answer in rounds] == [wanted, wanted]
    assert rounds[0]["parameters"] == 2 * 2 * 16 * 32  # A and B of wq and wo
    saved = read_tensors(tmp_path / "lora.pth")
    assert any(saved[name].any() for name in saved if name.endswith("lora.B.weight"))
