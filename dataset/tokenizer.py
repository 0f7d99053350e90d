"""Loading a tokenizer folder, its fingerprint, and how many bytes each token stands for."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.errors import UserError, reason_of
from core.paths import TOKENIZER_DIR, pretrained_name

# How byte-level vocabularies spell (GPT-2's choice): a printable byte as its Latin-1 character, the
# others from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))
}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder ``path``, read from disk only. Raises ``UserError`` if we cannot
    train with it.
    """
    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"no tokenizer.json in {path}; make one with scripts/train_tokenizer.py or fix --tokenizer_path"
        )
    tokenizer = read_tokenizer(path, local_files_only=True)
    if tokenizer.eos_token_id is None or not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {path} lacks an end-of-turn token or a chat template")
    return tokenizer


def tokenizer_of(
    record,
    base: Path,
    named: Path | None,
    out_dir: Path,
    prompt_template: str | None = None,
    otherwise: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that the base with this ``record`` was trained with: the one ``named`` if it is
    that, else the shipped one or ``out_dir/tokenizer``, or what a Hugging Face base brings.
    ``prompt_template`` replaces its template, ``otherwise`` serves where there is none.

    Raises ``UserError`` if none of them is, if the record does not say (MiniMind's files) and none
    is named, and for a tokenizer without chat template.
    """
    wanted = record.tokenizer
    if is_foreign := wanted is None and record.stage is not None:
        folders = [named or base]
    elif prompt_template is not None:
        raise UserError(
            f"--prompt_template is for Hugging Face bases; {base} has a template of its own"
        )
    elif named is None and wanted is None:
        raise UserError(
            f"{base} does not say which tokenizer it was trained with; name it with --tokenizer_path"
        )
    else:
        folders = (
            [named]
            if named
            else [folder for folder in (TOKENIZER_DIR, out_dir / "tokenizer") if folder.is_dir()]
        )
    for folder in folders:
        tokenizer = (
            foreign_tokenizer(folder, prompt_template, otherwise)
            if is_foreign
            else load_tokenizer(folder)
        )
        if wanted not in (None, tokenizer_fingerprint(tokenizer)):
            continue
        size = record.config["vocab_size"]
        # Others pad their embeddings to round numbers.
        if len(tokenizer) > size or (len(tokenizer) < size and not is_foreign):
            raise UserError(
                f"{folder} has {len(tokenizer)} entries, {base} has {size}; name its own --tokenizer_path"
            )
        return tokenizer
    tried = " or ".join(map(str, folders))
    raise UserError(
        f"{base} was trained with another tokenizer than {tried}; name it with --tokenizer_path"
    )


def foreign_tokenizer(
    name: str | Path, prompt_template: str | None = None, otherwise: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name, with ``prompt_template`` in place of its
    chat template, or ``otherwise`` where it has none.

    Raises ``UserError`` if it cannot be read (see ``read_tokenizer``), ends no text, or has no
    template either.
    """
    tokenizer = read_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} lacks an end-of-text token")
    if prompt_template is None and not tokenizer.chat_template:
        prompt_template = otherwise
    if prompt_template is not None:
        use_template(tokenizer, prompt_template)
    if not tokenizer.chat_template:
        raise UserError(
            f"{name} has no chat template: write one, such as --prompt_template 'Q: {{user}}\\nA: '"
        )
    return tokenizer


def use_template(tokenizer: PreTrainedTokenizerBase, prompt_template: str) -> None:
    """Make ``prompt_template`` the chat template. Raises ``UserError`` as ``template_of`` does."""
    tokenizer.chat_template = template_of(prompt_template, begins=_begins_with_bos(tokenizer))


def template_of(prompt_template: str, begins: bool = False) -> str:
    """The chat template in which a question stands in ``prompt_template`` for ``{user}`` and an
    answer ends the text.

    ``\\n`` in it is a line break. ``begins``: the beginning-of-text token comes first. Raises
    ``UserError`` unless ``{user}`` stands in it once.
    """
    if not isinstance(prompt_template, str):
        raise UserError(
            f"the skill's file gives {prompt_template!r} as prompt_template, which is no text"
        )
    if prompt_template != prompt_template.encode(errors="replace").decode():
        raise UserError("--prompt_template holds bytes that are no text in the terminal's encoding")
    before, *after = prompt_template.replace("\\n", "\n").split("{user}")
    if len(after) != 1:
        raise UserError(
            f"--prompt_template {prompt_template!r} must have one {{user}}, where the question goes"
        )
    question = " + message['content'] + ".join(
        json.dumps(part, ensure_ascii=False) for part in (before, *after)
    )
    return (
        ("{{ bos_token }}" if begins else "")
        + "{% for message in messages %}"
        + f"{{% if message['role'] == 'user' %}}{{{{ {question} }}}}"
        + "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        + "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    )


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [
        tokenizer.bos_token_id
    ]


def read_tokenizer(name: str | Path, **settings) -> PreTrainedTokenizerBase:
    """Any tokenizer of a Hugging Face folder or hub name.

    Raises ``UserError`` if it cannot be read, or is none of the `tokenizers` library.
    """
    name = pretrained_name(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **settings)
    except Exception as error:  # the libraries raise bare Exception for a broken file
        reason = reason_of(error)
        raise UserError(
            f"the tokenizer in {name} cannot be read ({reason}); train or copy it again"
        ) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"the tokenizer of {name} lacks a tokenizer.json")
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 over everything that decides which ids a text or a chat becomes."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: backend[key] for key in ("normalizer", "pre_tokenizer", "model")}
    added = {
        token_id: token.content
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    text = json.dumps(
        [decisive, added, tokenizer.chat_template], sort_keys=True, ensure_ascii=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def check_trained_with(tokenizer: PreTrainedTokenizerBase, meta, skill: str) -> None:
    """Raise ``UserError`` if the ``_meta`` of a skill's file names another tokenizer, or another
    template of it.
    """
    if meta.tokenizer not in (None, tokenizer_fingerprint(tokenizer)):
        raise UserError(
            f"skill {skill} was trained with another tokenizer or chat template; name that one with --tokenizer_path"
            " or pass --allow_base_mismatch"
        )


def reading_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 over everything that decides how a classifier's rows are framed and cut, the ids
    included.
    """
    frame = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
    text = json.dumps(
        [tokenizer_fingerprint(tokenizer), frame, tokenizer.truncation_side, tokenizer.pad_token_id]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def spelled_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """The bytes an id stands for, a part of a character perhaps; a control token's are those of its
    name.

    Byte-level vocabularies spell a byte as a character; those with byte fallback write a space as
    U+2581 and a lone byte as <0xNN>.
    """
    return _bytes_of(tokenizer.convert_ids_to_tokens(token_id), _is_byte_level(tokenizer))


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)


def _bytes_of(token: str, is_byte_level: bool) -> bytes:
    if is_byte_level:
        is_spelled = all(character in BYTE_OF for character in token)
        return bytes(BYTE_OF[character] for character in token) if is_spelled else token.encode()
    lone = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(lone[1]) if lone else token.replace("\u2581", " ").encode()


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that stand for no text: those with a name of their own such as eos, and all that are
    marked special.

    The marked ones are more where a template ends a turn by another token than eos, as those of
    Qwen2's bases do.
    """
    marked = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return marked | set(tokenizer.all_special_ids)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes each id stands for, (vocabulary,) int64; 0 for control tokens."""
    sizes = np.zeros(len(tokenizer), dtype=np.int64)
    is_byte_level = _is_byte_level(tokenizer)
    for token, token_id in tokenizer.get_vocab().items():
        sizes[token_id] = len(_bytes_of(token, is_byte_level))
    sizes[sorted(control_ids(tokenizer))] = 0
    return sizes
