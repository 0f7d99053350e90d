"""Loading a tokenizer folder, its fingerprint, and how many bytes each token stands for."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from core.errors import UserError, reason_of
from core.paths import TOKENIZER_DIR

# The byte that each character stands for in byte-level vocabularies.
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder ``path``. Raises ``UserError`` if it cannot be used for training."""
    if not (Path(path) / "tokenizer.json").is_file():
        raise UserError(f"no tokenizer.json in {path}; correct tokenizer_path, or train one")
    return foreign_tokenizer(path)


class BaseRecord(Protocol):
    """What the record of a base says of the tokenizer it was trained with."""

    stage: str | None
    tokenizer: str | None  # the fingerprint; MiniMind's files have none
    config: dict  # with "vocab_size"


def tokenizer_of(
    record: BaseRecord,
    base: Path,
    named: Path | None,
    out_dir: Path,
    prompt_template: str | None = None,
    otherwise: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that ``base``, whose file has this ``record``, was trained with.

    It is the one ``named``, else whichever has the fingerprint: the shipped one, the one in folder
    ``tokenizer`` beside ``base``, or the one in that of ``out_dir``. A base of other makers brings
    its own; ``prompt_template`` replaces its chat template, and ``otherwise`` serves if it has
    none. Raises ``UserError`` if no such tokenizer is found, if nothing tells which one it is, and
    for one without a chat template.
    """
    beside, folder = (base.parent / "tokenizer", out_dir / "tokenizer"), named or base
    found = list(filter(Path.is_dir, dict.fromkeys((TOKENIZER_DIR, *beside))))
    fingerprint, vocab_size = record.tokenizer, record.config["vocab_size"]
    is_foreign = fingerprint is None and record.stage is not None
    if is_foreign:
        tokenizer = foreign_tokenizer(folder, prompt_template, otherwise)
    elif prompt_template is not None:
        raise UserError(f"{base} has a chat template of its own; leave out prompt_template")
    elif named is None and fingerprint is None:
        raise UserError(f"{base} does not say which tokenizer it needs; name its tokenizer_path")
    else:
        for folder in [named] if named else found:
            tokenizer = load_tokenizer(folder)
            if fingerprint in (None, tokenizer_fingerprint(tokenizer)):
                break
        else:
            tried = named or " or ".join(map(str, found))
            raise UserError(f"{base} needs another tokenizer than {tried}; name its tokenizer_path")
    # Other makers pad their embeddings to round numbers.
    if len(tokenizer) > vocab_size or (len(tokenizer) < vocab_size and not is_foreign):
        sizes = f"the tokenizer in {folder} has {len(tokenizer)} entries"
        sizes += f" and the embedding of {base} has {vocab_size}"
        raise UserError(f"{sizes}; name the base's own as tokenizer_path")
    return tokenizer


def foreign_tokenizer(
    name: str | Path, prompt_template: str | None = None, otherwise: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name, with a chat template.

    ``prompt_template`` replaces its own template; ``otherwise`` serves if it has none. Raises
    ``UserError`` as ``read_tokenizer`` does, and without a token that ends a turn or any template.
    """
    tokenizer = read_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} lacks an end-of-turn token; name another")
    if prompt_template is None and not tokenizer.chat_template:
        prompt_template = otherwise
    if prompt_template is not None:
        use_template(tokenizer, prompt_template)
    if not tokenizer.chat_template:
        example = "prompt_template 'Q: {user}\\nA: '"
        raise UserError(f"{name} has no chat template: write one, such as {example}")
    return tokenizer


def use_template(tokenizer: PreTrainedTokenizerBase, prompt_template: str) -> None:
    """Give the tokenizer a chat template: ``prompt_template`` with a question for ``{user}``.

    An answer ends the text. ``\\n`` is a line break. The beginning-of-text token comes first if the
    tokenizer puts it before every text. Raises ``UserError`` unless ``{user}`` occurs exactly once.
    """
    if not isinstance(prompt_template, str):
        raise UserError(f"the skill's file gives a prompt_template {prompt_template!r}, not a text")
    if prompt_template != prompt_template.encode(errors="replace").decode():
        raise UserError("prompt_template holds bytes that are no text in the terminal's encoding")
    parts = prompt_template.replace("\\n", "\n").split("{user}")
    if len(parts) != 2:
        raise UserError(f"prompt_template {prompt_template!r} must have one {{user}}")
    before, after = (json.dumps(part, ensure_ascii=False) for part in parts)
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    tokenizer.chat_template = (
        ("{{ bos_token }}" if begins else "")
        + "{% for message in messages %}{% if message['role'] == 'user' %}"
        + f"{{{{ {before} + message['content'] + {after} }}}}"
        + "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        + "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    )


def read_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Any fast tokenizer of a Hugging Face folder or hub name. Raises ``UserError`` without one."""
    source, is_local = Path(name).as_posix(), Path(name).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_local)
    except Exception as error:  # the libraries raise bare Exception for a broken file
        reason = f"the tokenizer in {name} cannot be read ({reason_of(error)})"
        raise UserError(f"{reason}; train or copy it again") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"the tokenizer of {name} lacks a tokenizer.json; name another")
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 over everything that decides which ids a text or a chat becomes."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: backend[key] for key in ("normalizer", "pre_tokenizer", "model")}
    added = {n: token.content for n, token in tokenizer.added_tokens_decoder.items()}
    found = [decisive, added, tokenizer.chat_template]
    text = json.dumps(found, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_trained_with(tokenizer: PreTrainedTokenizerBase, fingerprint: str | None, skill: str):
    """Raise ``UserError`` unless the ``fingerprint`` that a skill names is None or this one's."""
    if fingerprint not in (None, tokenizer_fingerprint(tokenizer)):
        reason = f"skill {skill} was trained with another tokenizer or chat template"
        raise UserError(f"{reason}; name that one as tokenizer_path or set allow_base_mismatch")


def reading_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 over everything that decides which ids a classifier's framed, cut row becomes."""
    frame = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
    rest = frame, tokenizer.truncation_side, tokenizer.pad_token_id
    text = json.dumps([tokenizer_fingerprint(tokenizer), *rest])
    return hashlib.sha256(text.encode()).hexdigest()


def spelled_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """The bytes that each id stands for, perhaps a part of a character.

    Byte-level vocabularies spell a byte as a character; those with byte fallback write a space as
    U+2581 and a lone byte as <0xNN>. An id without a token stands for nothing.
    """
    is_byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    spelled = []
    for token in tokenizer.convert_ids_to_tokens(ids):
        token = token or ""
        if is_byte_level and BYTE_OF.keys() >= set(token):
            spelled.append(bytes(BYTE_OF[character] for character in token))
        elif not is_byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token):
            spelled.append(bytes.fromhex(token[3:5]))
        else:
            spelled.append((token if is_byte_level else token.replace("\u2581", " ")).encode())
    return spelled


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that stand for no text: those with a role, such as eos, and those marked special."""
    added = tokenizer.added_tokens_decoder.items()
    return {token_id for token_id, token in added if token.special} | set(tokenizer.all_special_ids)


def control_spelling(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Matches whatever in a text spells a control token."""
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.compile("|".join(map(re.escape, special)) or "(?!)")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes each id stands for, (largest id + 1,) int64; 0 for control tokens."""
    ids = range(1 + max(tokenizer.get_vocab().values()))
    sizes = np.array([len(spelled) for spelled in spelled_bytes(tokenizer, ids)], np.int64)
    sizes[sorted(control_ids(tokenizer))] = 0
    return sizes
