"""Loading a tokenizer folder, its fingerprint, and how many bytes each token stands for."""

import hashlib
import json
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.errors import UserError
from core.paths import TOKENIZER_DIR

# How byte-level vocabularies spell (GPT-2's choice): a printable byte as its Latin-1 character, the others from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))
}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder ``path``, read from disk only. Raises ``UserError`` if we cannot train with it."""
    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"no tokenizer.json in {path}; make one with scripts/train_tokenizer.py or fix --tokenizer_path"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the libraries raise bare Exception for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the tokenizer in {path} cannot be read ({reason}); train or copy it again") from error
    if tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {path} lacks an end-of-turn token or a chat template")
    return tokenizer


def tokenizer_of(record: dict, base: Path, named: Path | None, out_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the base file with this ``record`` was trained with: the one ``named`` if it is that, else the
    shipped one or ``out_dir/tokenizer``.

    Raises ``UserError`` if none of them is, or if the record does not say (MiniMind's files) and none is named.
    """
    wanted = record.get("tokenizer")
    if named is None and wanted is None:
        raise UserError(f"{base} does not say which tokenizer it was trained with; name it with --tokenizer_path")
    folders = [named] if named else [folder for folder in (TOKENIZER_DIR, out_dir / "tokenizer") if folder.is_dir()]
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        if wanted not in (None, tokenizer_fingerprint(tokenizer)):
            continue
        if len(tokenizer) != (size := record["config"]["vocab_size"]):
            raise UserError(f"{folder} has {len(tokenizer)} entries, {base} has {size}; name its own --tokenizer_path")
        return tokenizer
    tried = " or ".join(map(str, folders))
    raise UserError(f"{base} was trained with another tokenizer than {tried}; name it with --tokenizer_path")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 over everything that decides which ids a text or a chat becomes."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: backend[key] for key in ("normalizer", "pre_tokenizer", "model")}
    added = {token_id: token.content for token_id, token in sorted(tokenizer.added_tokens_decoder.items())}
    text = json.dumps([decisive, added, tokenizer.chat_template], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def spelled_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """The bytes an id stands for, a part of a character perhaps; a control token's are those of its name."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    is_byte_level = all(character in BYTE_OF for character in token)
    return bytes(BYTE_OF[character] for character in token) if is_byte_level else token.encode()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes each id stands for, (vocabulary,) int64; 0 for control tokens.

    In a byte-level vocabulary every character of a token's spelling is one byte.
    """
    sizes = np.zeros(len(tokenizer), dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        sizes[token_id] = len(token)
    sizes[tokenizer.all_special_ids] = 0
    return sizes
