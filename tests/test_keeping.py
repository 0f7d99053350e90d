"""A skill takes nothing away: some general chats hold it, others judge it, and it is said."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CPU,
    SMALL,
    divergence_sum,
    flags,
    logits_of,
    ragged_batch,
    rows_of,
    strengthen,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train_lora
from core.errors import UserError
from core.paths import TOKENIZER_DIR, bundled_data, cache_dir
from dataset.batches import IGNORED, Batches, SFTDataset, masked
from dataset.cache import CHAT, digest
from dataset.questions import Neighbours, chats_in, questions_in
from dataset.tokenizer import foreign_tokenizer
from model.generation import Sampling, generate
from model.LMConfig import LMConfig
from model.lora.layer import adapted, lora_parameters, without_lora
from model.lora.skill_file import read_lora
from model.loss import keep_sum
from model.model import MiniMindLM
from model.model_lora import apply_lora, attach_lora
from model.weights import load_base, read_record
from trainer import keeping, loop
from trainer.checkpoints import RunStates
from trainer.keeping import General, summary_of, verdict, warnings_on
from trainer.metrics import Metrics, Validation, evaluate_kept
from trainer.optimizer import param_groups
from trainer.run import Run
from trainer.stage import Base

VARIANTS = [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}]


def taught_by(options):
    return chats_in(options.data_path)


def kept(model, batch, base=None) -> torch.Tensor:
    return keep_sum(model, base or model, batch.inputs, batch.labels)


# the divergence


@pytest.mark.parametrize("options", [*VARIANTS, {"lora_dropout": 0.5}])
def test_an_untrained_skill_is_where_its_base_is(sharp_model, options):
    dora = {"use_dora": True} if "lora_dropout" in options else {}
    for more in ({}, dora):
        model = copy.deepcopy(sharp_model).train()
        apply_lora(model, 4, target_modules="all-linear", **options, **more)
        batch = ragged_batch(3, seed=1)
        assert abs(kept(model, batch).item()) <= 1e-6
        strengthen(model, 2)
        assert kept(model, batch).item() > 1e-2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", VARIANTS)
def test_the_divergence_and_its_gradient_are_those_of_two_models(sharp_model, options, training):
    """In double precision, with dropout, and with a base whose weights could get gradients."""
    for block in sharp_model.layers:
        block.feed_forward.dropout.p = 0.3
    model = sharp_model.double()
    apply_lora(model, 4, **options, lora_dropout=0.2)
    strengthen(model.double(), 3)
    model.train(training).requires_grad_(True)
    batch, found = ragged_batch(4, seed=4), []
    batch.labels[0] = batch.labels[:, :3] = IGNORED
    for divergence in (kept, divergence_sum):
        model.zero_grad()
        torch.manual_seed(5)
        value = divergence(model, batch)
        value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    assert found[0][0] > 1e-3 and all(p.grad.any() for p in lora_parameters(model))


def test_without_a_learned_label_nothing_diverges_and_nothing_moves(sharp_model):
    apply_lora(sharp_model, 4)
    strengthen(sharp_model, 6)
    value = kept(sharp_model, masked(ragged_batch(2, seed=7)))
    value.backward()
    assert value.item() == 0 and not any(p.grad.any() for p in lora_parameters(sharp_model))


def test_neither_rows_nor_padding_beside_a_row_change_what_it_counts(sharp_model):
    apply_lora(sharp_model, 4)
    strengthen(sharp_model, 8)
    batch = ragged_batch(4, seed=9)
    alone = sum(kept(sharp_model, rows_of(batch, n, n + 1)) for n in range(4))
    torch.testing.assert_close(kept(sharp_model, batch), alone, rtol=1e-5, atol=1e-5)
    inputs = {"input_ids": torch.nn.functional.pad(batch.inputs["input_ids"], (0, 5))}
    labels = torch.nn.functional.pad(batch.labels, (0, 5), value=IGNORED)
    padded = kept(sharp_model, replace(batch, inputs=inputs, labels=labels))
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


class Failed(Exception):
    pass


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails_in", [None, 1, 2])
def test_afterwards_modes_and_skill_are_as_before(sharp_model, training, fails_in):
    """Also when a pass fails: the first is the base's, which needs no gradient."""
    apply_lora(sharp_model, 4, lora_dropout=0.5)
    strengthen(sharp_model.train(training), 10)
    passes = []

    def watch(*_) -> None:
        is_on = {linear.lora.is_on for _, linear in adapted(sharp_model)}
        passes.append((is_on, torch.is_grad_enabled(), sharp_model.training))
        if len(passes) == fails_in:
            raise Failed

    def modes() -> list[bool]:
        return [module.training for module in sharp_model.modules()]

    before, logits = modes(), logits_of(sharp_model.eval())
    hook = sharp_model.train(training).register_forward_pre_hook(watch)
    if fails_in:
        with pytest.raises(Failed):
            kept(sharp_model, ragged_batch(2, seed=11))
    else:
        kept(sharp_model, ragged_batch(2, seed=11))
        assert passes == [({False}, False, False), ({True}, True, training)]
    hook.remove()
    assert modes() == before
    assert torch.equal(logits_of(sharp_model.eval()), logits)


def test_evaluation_tells_the_divergence_per_target_and_keeps_the_mode(sharp_model):
    apply_lora(sharp_model, 4, lora_dropout=0.5)
    strengthen(sharp_model, 12)
    batches = [ragged_batch(2, seed=13), ragged_batch(5, seed=14)]
    nats = sum(divergence_sum(sharp_model.eval(), batch).item() for batch in batches)
    found = evaluate_kept(sharp_model.train(), batches, CPU, set(), sharp_model)
    assert found.targets == sum(batch.n_targets for batch in batches)
    assert found.kl == pytest.approx(nats / found.targets, rel=1e-5) and sharp_model.training


@pytest.mark.parametrize("options", VARIANTS)
def test_without_its_lora_a_model_is_its_base(sharp_model, options):
    base = logits_of(sharp_model)
    with pytest.raises(UserError, match="no LoRA"), without_lora(sharp_model):
        pass
    apply_lora(sharp_model, 4, target_modules="all-linear", **options)
    strengthen(sharp_model, 15)
    skilled = logits_of(sharp_model)
    assert not torch.equal(skilled, base)
    with pytest.raises(Failed), without_lora(sharp_model):
        assert torch.equal(logits_of(sharp_model), base)
        raise Failed
    assert torch.equal(logits_of(sharp_model), skilled)


# which chats hold and which judge


def chat(*contents: str) -> list[dict]:
    roles = ["user", "assistant"] * (len(contents) // 2)
    return [{"role": r, "content": text} for r, text in zip(roles, contents, strict=True)]


def rows(chats) -> list[dict]:
    return [{"conversations": messages} for messages in chats]


OWN = [chat("What is your name?", "Pebble."), chat("Who made you?", "The Pebble Team.")]
OTHERS = [chat(f"How far is village {n * 37} from the sea?", f"{n} miles.") for n in range(20)]
ALIKE = [
    chat("what is  your NAME", "Bob."),
    chat("Hello there, old friend.", "Hello.", "So, what is your name?", "Bob."),
]


def named(chats) -> set[int]:
    return {digest({"conversations": messages}) for messages in chats}


def held_by(samples) -> set[int]:
    return set(samples.digests()) if samples else set()


STRANGE = [chat(f"The {n}th snow falls, dear.", "Lemons are yellow.") for n in range(30)]
STRANGE_ALIKE = [chat(f"What is your name, {n}?", "Lemons are yellow.") for n in range(10)]


@pytest.fixture
def read(trained, tokenizer, tmp_path, monkeypatch):
    """Chooses among general chats for a skill of the rows ``OWN``, as the door does."""
    path = trained.out / "full_sft_64.pth"
    own = write_rows(tmp_path / "own.jsonl", rows(OWN))
    strange = write_rows(tmp_path / "strange.jsonl", rows(STRANGE + STRANGE_ALIKE))
    monkeypatch.setattr(keeping, "STRANGE", strange)

    def read(general, val_ratio=None, **more) -> General:
        if isinstance(general, list):
            general = write_rows(tmp_path / "general.jsonl", rows(general))
        record = read_record(path)
        record = record if val_ratio is None else replace(record, val_ratio=val_ratio)
        settings = {"out_dir": tmp_path, "max_seq_len": 64, "device": "cpu"} | more
        options = train_lora.Options(data_path=(own,), general_data=(general,), **settings)
        return keeping.read_general(
            options, Base(path, None, tokenizer, record), CPU, taught_by(options)
        )

    return read


def test_chats_like_the_skill_s_neither_hold_nor_judge_and_no_chat_does_both(read, capsys):
    general = read([*OTHERS, *ALIKE])
    held, judged = held_by(general.holding), held_by(general.judging)
    assert judged == {each for each in named(OTHERS) if each < keeping.JUDGING_SHARE * 2**63}
    assert 0 < len(judged) < len(OTHERS) / 2
    assert held & named(OTHERS) == named(OTHERS) - judged
    assert "12 are left out" in capsys.readouterr().out, "ten of them are strange texts"
    assert held <= named(OTHERS + STRANGE), "those hold only"
    strange = [each for each in general.holding.digests() if each in named(STRANGE)]
    assert len(held & named(STRANGE)) == len(STRANGE), "all of them"
    assert 3 * len(strange) == len(general.holding.digests()), "and half as often as the others"


def test_few_chats_judge_however_many_could(read, monkeypatch):
    could = held_by(read(OTHERS).judging)
    monkeypatch.setattr(keeping, "MOST_JUDGES", len(could) - 1)
    general = read(OTHERS)
    assert len(general.judging.lengths) == len(could) - 1 and held_by(general.judging) < could
    assert not held_by(general.holding) & could, "the others do not hold either"


def test_whatever_becomes_of_control_tokens_a_chat_like_the_skill_s_is_left_out(read):
    alike = [chat("What is your<|im_end|> name?", "Bob.")]
    for control_text in ("keep", "drop"):
        general = read(OTHERS + alike, control_text=control_text)
        left = held_by(general.holding) | held_by(general.judging)
        cleaned = [chat("What is your name?", "Bob.")]
        assert not left & named(alike + cleaned), control_text


def test_only_what_the_base_never_learned_judges(read, trained, tokenizer, tmp_path, capsys):
    """Its own run tells how many of its rows, whatever this one holds out of the skill's."""
    data = SFTDataset((trained.chats,), tokenizer, 64, cache=tmp_path, val_ratio=0.02)
    learned, held_out = held_by(data.train), held_by(data.val)
    general = read(trained.chats, keep=0.5)
    asked = Neighbours(question for messages in OWN for question in questions_in(messages))
    far = [
        messages
        for messages in chats_in((trained.chats,))
        if max(map(asked.similarity, questions_in(messages))) <= keeping.ALIKE
    ]
    assert held_by(general.judging) == held_out & named(far) != set()
    assert held_by(general.holding) & learned == learned & named(far)
    assert "can judge" not in capsys.readouterr().out
    general = read(trained.chats, val_ratio=0)
    assert general.judging is None and held_by(general.holding) & learned
    assert "full_sft_64.pth" in capsys.readouterr().out


@pytest.mark.parametrize(
    "general", [ALIKE, [chat("far away " * 99, "x")] * 3], ids=["all alike", "nothing to learn"]
)
def test_a_skill_that_nothing_can_hold_is_refused_unless_nothing_should(read, capsys, general):
    with pytest.raises(UserError, match=r"general_data.*keep=0"):
        read(general)
    capsys.readouterr()
    assert read(general, keep=0.0) == General()
    assert "note: " in capsys.readouterr().out


def test_with_keep_0_nothing_holds_and_the_others_still_judge(read):
    general = read([*OTHERS, *ALIKE], keep=0.0)
    assert general.holding is None
    assert held_by(general.judging) == held_by(read([*OTHERS, *ALIKE]).judging) != set()
    assert not held_by(general.judging) & named(STRANGE)


def test_with_keep_0_a_skill_is_what_plain_training_makes_of_it(trained, tmp_path, monkeypatch):
    """Bit for bit, as if there were no general chats."""
    given, start = [], loop.train

    def train(model, source, groups, run, loss_sum):
        given.append((copy.deepcopy(model), source, run))
        return start(model, source, groups, run, loss_sum)

    monkeypatch.setattr("trainer.stage.train", train)
    argv = flags(out_dir=tmp_path, data_path=trained.chats, general_data=trained.general, **SMALL)
    argv += flags(base=trained.out / "full_sft_64.pth", lora_name="x", keep=0)
    path = train_lora.main([*argv, "--no-keep_best"])
    ((model, source, run),) = given
    assert type(source) is Batches
    options, samples = run.options, source.samples
    plain = Batches(samples, options.batch_size, options.accumulation_steps, options.seed)
    states = RunStates(tmp_path / "states", {}, resume=False)
    nothing = Validation({"val": lambda: Metrics(0.0, 0.0, 0, 0)})
    parts = states, nothing, lambda metrics: None, tmp_path / "metrics" / "plain.jsonl"
    start(model, plain, param_groups(model, 0.0, "adamw"), Run(options, CPU, *parts))
    tensors, trained_here = read_lora(path)[0], dict(model.named_parameters())
    assert len(tensors) == 8
    assert all(torch.equal(tensor, trained_here[name]) for name, tensor in tensors.items())


# what a base answers itself


def test_a_base_of_other_makers_answers_for_itself_and_once(tmp_path, monkeypatch):
    """The bundled questions, and those that it shall go on to answer as it does."""
    folder = tmp_path / "llama"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 6400, "initializer_range": 0.2}
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **ends)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER_DIR).save_pretrained(folder)
    monkeypatch.setattr(keeping, "ASKED", 6)
    asked, chosen, likeliest = [], [], keeping.likeliest

    def counted(model, tokenizer, chats) -> list[str]:
        asked.extend(chats)
        return likeliest(model, tokenizer, chats)

    monkeypatch.setattr(keeping, "likeliest", counted)
    own = write_rows(tmp_path / "own.jsonl", rows(OWN))
    more = write_rows(tmp_path / "more.jsonl", rows(OTHERS[:4] + ALIKE))

    def files(seed: int, **settings) -> list[Path]:
        """The answers that a run asks for which names no general chats."""
        model, record = load_base(folder)
        apply_lora(model, 4)
        strengthen(model, seed)
        settings |= {"data_path": (own,), "out_dir": tmp_path, "max_seq_len": 64}
        options = train_lora.Options(**settings)
        base = Base(folder, model, foreign_tokenizer(folder), record)
        general = keeping.read_general(options, base, CPU, taught_by(options))
        chosen.append([held_by(general.holding), held_by(general.judging)])
        return [path for path in options.general_data if path.parent == cache_dir(tmp_path)]

    (path,) = files(seed=1)
    assert len(asked) == 6
    found = list(chats_in((path,)))
    bundled = {questions_in(messages)[0] for messages in chats_in([bundled_data("sft_mini")])}
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), foreign_tokenizer(folder)
    assert 3 < len({messages[0]["content"] for messages in found} & bundled) == len(found) <= 6
    for question, answer in found:
        inputs = tokenizer.apply_chat_template(
            [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        limit = {"do_sample": False, "max_new_tokens": keeping.LONGEST_ANSWER}
        ids = theirs.generate(**inputs, **limit)[0, inputs["input_ids"].shape[1] :]
        assert answer["content"] == tokenizer.decode(ids, skip_special_tokens=True).strip() != ""

    before = {path: path.read_bytes()}
    assert files(seed=2) == [path] and path.read_bytes() == before[path]
    assert len(asked) == 6, "it was asked again"
    questions = [path for path in files(seed=1, keep_questions=(more,)) if path not in before]
    found, (held, judged) = list(chats_in(questions)), chosen[-1]
    asked_too = {questions_in(messages)[0] for messages in OTHERS[:4] + ALIKE}
    assert {messages[0]["content"] for messages in found} == asked_too and len(asked) == 12
    alike = [messages for messages in found if messages[0] == ALIKE[0][0]]
    assert held & named(found) == named(found) - named(alike) and not judged & named(found)
    own_file = cache_dir(tmp_path) / "own_questions.jsonl"
    write_rows(own_file, rows([chat(f"Is {n} odd?", "No.") for n in range(9)]))
    known = set(files(seed=1, keep_questions=(more,)))
    (of_own,) = set(files(seed=1, keep_questions=(more, own_file))) - known
    odd = [each for each in chats_in((of_own,)) if "odd" in each[0]["content"]]
    assert len(odd) == keeping.ASKED == len(list(chats_in((of_own,)))), "of each file"
    count = len(asked)
    theirs.lm_head.weight.data.neg_()
    theirs.save_pretrained(folder)
    (other,) = files(seed=1)
    assert other not in before and len(asked) == count + 6
    assert other.read_bytes() != before[path]


# the verdict


def test_a_run_ends_with_what_its_file_has_learned(trained, tokenizer, tmp_path, capsys):
    """Its answers are those of the weights in the file, which are not the last ones."""
    argv = flags(out_dir=tmp_path, data_path=trained.chats, general_data=trained.general)
    argv += flags(base=trained.out / "full_sft_64.pth", lora_name="x", val_ratio=0.2)
    argv += flags(**SMALL | {"max_steps": 6, "learning_rate": 3, "val_interval": 1})
    path = train_lora.main(argv)
    printed, metrics = capsys.readouterr().out, read_lora(path)[1].metrics
    assert metrics["step"] == metrics["domain"]["best"]["step"] < 6
    told = metrics["verdict"]
    assert 0 <= told["changed"] <= told["general_answers"] > 0
    assert told["sentence"] in printed and len(told["answers"]) == keeping.SHOWN
    (line,) = (line for line in printed.splitlines() if line.startswith("domain loss"))
    measured = (metrics["domain"][when]["loss"] for when in ("first", "best"))
    assert line.split()[-2:] == [f"{loss:.4f}" for loss in measured]
    model = load_base(trained.out / "full_sft_64.pth")[0]
    own = list(chats_in((trained.chats,)))
    asked = {questions_in(chat)[-1]: chat[:-1] for chat in own}
    answered, found = {questions_in(chat)[-1]: chat[-1] for chat in own}, []
    for skill in (None, path):
        if skill:
            attach_lora(model, skill)
        for each in told["answers"]:
            turns = asked[each["question"]]
            assert {"role": "assistant", "content": each["row"]} == answered[each["question"]]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            greedy = Sampling(temperature=0.0, max_new_tokens=keeping.LONGEST_ANSWER)
            said = tokenizer.decode(list(generate(model, ids, greedy, {2}, torch.Generator())))
            found.append((each["before" if skill is None else "after"], said.strip()))
    assert all(shown == said for shown, said in found)
    assert any(each["before"] != each["after"] for each in told["answers"])
    assert all(each["question"] in printed for each in told["answers"])
    assert "chose the best weights" in printed, "few chats did"


def test_a_question_that_fills_the_context_does_not_cost_the_run_its_last_save(tokenizer, tmp_path):
    torch.manual_seed(0)
    shape = {"n_layers": 1, "n_heads": 2, "vocab_size": 6400, "max_seq_len": 128}
    model = MiniMindLM(LMConfig(dim=32, **shape)).eval()
    apply_lora(model, 2)
    long = chat("Hello.", "Hello, my friend.", "far away " * 99, "So it is.")
    path = write_rows(tmp_path / "own.jsonl", rows([long, long[:2]]))
    samples = SFTDataset((path,), tokenizer, 64, cache=tmp_path, val_ratio=0).train
    options = train_lora.Options(data_path=(path,), general_data=(path,))
    data = SimpleNamespace(train=samples, val=samples, kind=CHAT)
    base = Base(path, model, tokenizer, None)
    told = verdict(model, base, options, data, General(judging=samples), Validation({}))["verdict"]
    assert (told["general_answers"], told["changed"]) == (1, 0)
    assert [each["question"] for each in told["answers"]] == ["Hello."]
    assert keeping.answered(base, ["far away " * 99]) == [], "nor does it end a run at its start"


def losses(domain=None, general=None) -> dict:
    """What was measured before and after, by kind."""
    found = {"domain": domain, "general": general}
    return {kind: tuple({"loss": loss} for loss in pair) for kind, pair in found.items() if pair}


@pytest.mark.parametrize(
    ("measured", "changed", "said", "unsaid"),
    [
        (losses((2.0, 1.0), (3.0, 3.0)), 0, ["learned", "costs nothing"], ["but"]),
        (losses((2.0, 1.0), (3.0, 2.5)), 0, ["learned", "costs nothing"], ["but"]),
        (losses((2.0, 1.0), (3.0, 3.5)), 0, ["learned", "but", "0.500", "keep"], ["nothing"]),
        (losses((2.0, 1.0), (3.0, 3.0)), 20, ["learned", "but", "20 of 20", "keep"], ["nothing"]),
        (losses((2.0, 2.0), (3.0, 3.0)), 0, ["learned nothing", "learning_rate"], ["costs"]),
        (losses((2.0, 2.5), (3.0, 3.5)), 20, ["learned nothing", "learning_rate"], ["costs"]),
        (losses((2.0, 1.0)), 0, ["learned", "not measured"], ["nothing", "but"]),
        (losses(general=(3.0, 3.0)), 0, ["val_ratio"], ["learned;", "costs"]),
        (losses(), 0, ["val_ratio"], ["learned;", "costs"]),
    ],
)
def test_one_sentence_says_what_was_learned_and_what_it_costs(measured, changed, said, unsaid):
    sentence = summary_of(measured, changed, 20)
    assert [word for word in said if word not in sentence] == [], sentence
    assert [word for word in unsaid if word in sentence] == [], sentence


@pytest.fixture
def warned(tokenizer, tmp_path):
    def warned(chats) -> list[str]:
        path = write_rows(tmp_path / "own.jsonl", rows(chats))
        return warnings_on(SFTDataset((path,), tokenizer, 64, cache=tmp_path, val_ratio=0).train)

    return warned


def test_few_rows_and_contradicting_ones_are_named(warned):
    assert warned(OTHERS) == []
    (few,) = warned(OTHERS[:19])
    assert "19 rows" in few
    assert warned(OTHERS + OTHERS[:5]) == [], "the same answer again is none of another kind"
    others = [chat(messages[0]["content"], "Nobody knows.") for messages in OTHERS[:3]]
    (several,) = warned(OTHERS + others)
    assert "3 questions" in several


def test_chats_that_part_later_do_not_contradict(warned):
    more = [chat("Hello.", "Hello!", f"How far is village {n}?", "1 mile.") for n in (1, 2)]
    assert warned(OTHERS + more) == []
