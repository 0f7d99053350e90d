"""The rows, initial weights and scores that the sides of a training measurement share."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import UserError
from dataset.batches import ChatSamples, PretrainDataset, SFTDataset
from dataset.cache import TEXT
from dataset.chat import encode_chats
from dataset.rows import BadRow, clean_chat, clean_text, read_rows
from model.LMConfig import LMConfig
from model.model import MiniMindLM
from model.model_lora import apply_lora, load_lora
from model.weights import load_base, model_of, read_tensors
from trainer.options import TrainOptions
from trainer.runtime import Runtime
from trainer.stage import Validation

SEED = 1337
FILLED_IN = {"{{name}}": "MiniMind", "{{author}}": "the MiniMind project"}
PADDED_SHARE = (
    0.45  # mean length of the short documents over the length they are padded to: 230 of 512
)


@dataclass
class RowFile:
    """A JSON-lines file that every side reads, and how many tokens its rows hold, cut at the row
    length.
    """

    path: Path
    rows: int
    tokens: int


def documents(paths: tuple[Path, ...], seed: int = SEED) -> list[str]:
    """All texts of the files, in a random order."""
    return _shuffled([row["text"] for path in paths for row in _good_rows(path, clean_text)], seed)


def document_files(
    texts: list[str], kind: str, tokenizer, length: int, files: int, rows: int, folder: Path
):
    """``files`` files of ``rows`` documents each, none longer than ``length`` tokens, so that
    nobody cuts any off.

    ``kind``: ``as they are`` (their first ``length`` tokens); ``mean 0.45`` of the length, evenly
    spread from 0.1 to 0.8 of it; ``full``: all of that length. For the last two, documents are
    joined and cut.
    """
    rng, queue, made = random.Random(SEED), iter(texts), []
    for number in range(files):
        cut = []
        for _ in range(rows):
            wanted = (
                length
                if kind != "mean 0.45"
                else round(length * rng.uniform(0.1, 2 * PADDED_SHARE - 0.1))
            )
            cut.append(
                _next_document(queue, tokenizer, wanted - 2, join=kind != "as they are")
            )  # 2: bos and eos
        tokens = sum(len(_ids(tokenizer, text)) + 2 for text in cut)
        made.append(
            _write(folder / f"documents-{number}.jsonl", [{"text": text} for text in cut], tokens)
        )
    return made


def chats(path: Path, tokenizer, length: int, limit: int, seed: int = SEED) -> list[dict]:
    """Rows of a chat file in a random order, at most ``limit`` (0: all), that every side reads
    alike.

    MiniMind takes turns for user, assistant, user, ... whatever their role, so chats with a system
    turn are left out; so are those of whose answer nothing is left within ``length`` tokens, over
    which MiniMind's loss is 0 / 0.
    """
    rows = []
    for row in _shuffled(list(_good_rows(path, clean_chat)), seed):
        for message in row["conversations"]:
            for name, value in FILLED_IN.items():
                message["content"] = message["content"].replace(name, value)
        learned = encode_chats(tokenizer, [row["conversations"]])[0][1]
        if row["conversations"][0]["role"] == "user" and any(learned[1:length]):
            rows.append(row)
        if limit and len(rows) == limit:
            break
    if not rows:
        raise UserError(f"{path} holds no chat that begins with a user's turn; give another file")
    return rows


def write_chats(path: Path, rows: list[dict], tokenizer, length: int) -> RowFile:
    encoded = encode_chats(tokenizer, [row["conversations"] for row in rows])
    return _write(path, rows, sum(min(len(ids), length) for ids, _ in encoded))


def initial_weights(options, tokenizer, folder: Path) -> tuple[Path, dict]:
    """A file with the weights that every side starts from, ``--base``'s or seeded ones, and the
    model's settings.
    """
    if options.base is None:
        torch.manual_seed(SEED)
        model = MiniMindLM(
            LMConfig(dim=options.dim, n_layers=options.n_layers, vocab_size=len(tokenizer))
        )
    else:
        model, _ = load_base(options.base, torch.device("cpu"))
    torch.save(model.state_dict(), folder / "initial.pth")
    names = (
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "hidden_dim",
        "norm_eps",
        "rope_theta",
    )
    return folder / "initial.pth", {name: getattr(model.config, name) for name in names}


class DocumentDataset(PretrainDataset):
    """Documents one by one, as chats are: the neutral way to score sides that pack and sides that
    pad.
    """

    kind, samples = TEXT, ChatSamples


class Score:
    """Held-out loss of any side's weights, full or LoRA, all measured by the same code on the same
    rows.
    """

    def __init__(
        self,
        options,
        rows: str,
        held_out: Path,
        tokenizer,
        weights: Path,
        config: dict,
        folder: Path,
    ):
        self.weights, self.config = weights, config
        reader = {"text": DocumentDataset, "chat": SFTDataset}[rows]
        cache = {"cache": folder / "score", "val_ratio": 0.0}
        self.samples = reader((held_out,), tokenizer, options.max_seq_len, **cache).train
        self.options = TrainOptions(batch_size=8, val_tokens=options.val_tokens)
        self.tokenizer, self.runtime = tokenizer, Runtime.start("cpu", "float32")

    def __call__(
        self, weights: Path | None = None, lora: Path | None = None, rank: int = 16
    ) -> float:
        """Nats a supervised target."""
        weights = weights or self.weights
        model = model_of(LMConfig(**self.config), read_tensors(weights), weights)
        if lora is not None:
            apply_lora(model, rank)
            load_lora(model, lora)
        return Validation(
            model, {"val": self.samples}, self.tokenizer, self.options, self.runtime, memory={}
        )().loss


def _good_rows(path: Path, clean):
    return (row for _, row in read_rows(path, clean) if not isinstance(row, BadRow))


def _shuffled(rows: list, seed: int) -> list:
    random.Random(seed).shuffle(rows)
    return rows


def _write(path: Path, rows: list[dict], tokens: int) -> RowFile:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    return RowFile(path, len(rows), tokens)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def _next_document(queue, tokenizer, limit: int, join: bool) -> str:
    """The next document's first ``limit`` tokens; with ``join``, so many documents that there are
    as many.
    """
    text = ""
    while not text or (join and len(_ids(tokenizer, text)) < limit):
        following = next(queue, None)
        if following is None:
            raise UserError(
                "--pretrain holds too few documents for so many rounds; lower --rounds or --rows"
            )
        text = f"{text}\n{following}" if text else following
    settings = {
        "add_special_tokens": False,
        "split_special_tokens": True,
        "return_offsets_mapping": True,
    }
    offsets = tokenizer(text, **settings).offset_mapping
    if len(offsets) <= limit:
        return text
    text = text[: offsets[limit - 1][1]]
    while (
        len(_ids(tokenizer, text)) > limit
    ):  # the cut may fall into a character or part a word elsewhere
        text = text[:-1]
    return text
