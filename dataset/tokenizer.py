"""Loading a tokenizer folder, its fingerprint, and how many bytes each token stands for."""

import hashlib
import json
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.errors import UserError


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder ``path``, read from disk only. Raises ``UserError`` if it is not one we can train with."""
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


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 over everything that decides which ids a text or a chat becomes."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: backend[key] for key in ("normalizer", "pre_tokenizer", "model")}
    added = {token_id: token.content for token_id, token in sorted(tokenizer.added_tokens_decoder.items())}
    text = json.dumps([decisive, added, tokenizer.chat_template], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes each id stands for, (vocabulary,) int64; 0 for control tokens.

    In a byte-level vocabulary every character of a token's spelling is one byte.
    """
    sizes = np.zeros(len(tokenizer), dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        sizes[token_id] = len(token)
    sizes[tokenizer.all_special_ids] = 0
    return sizes
