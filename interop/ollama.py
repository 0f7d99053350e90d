"""A Modelfile: what Ollama is told of a GGUF file, its chat template above all."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from core.errors import UserError, reason_of
from core.options import require

ROLES = {"s": "system", "u": "user", "a": "assistant"}
CONTENT = " \n\ue000 \n"  # of private use, so that no template contains it; with blanks to trim
# Chats that tell whether all that a template writes around a message depends on its role alone.
TRIALS = ("u", "su", "uau", "suau", "uauau", "suauau")


def write_modelfile(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    base: str,
    adapter: str | None = None,
) -> None:
    """Write ``modelfile`` as ``path``; where none can tell the chat template, print so instead."""
    try:
        text = modelfile(tokenizer, context, base, adapter)
    except UserError as error:
        print(f"note: no {path.name}, without which Ollama cannot chat: {error}")
    else:
        path.write_bytes(text.encode())


def modelfile(
    tokenizer: PreTrainedTokenizerBase, context: int, base: str, adapter: str | None = None
) -> str:
    """The text of a Modelfile for the GGUF files ``base`` and ``adapter`` in the same folder.

    Raises ``UserError`` if the chat template is none that Ollama could be told.
    """
    template = go_template(tokenizer)
    control = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    lines = [f"FROM ./{base}", *([f"ADAPTER ./{adapter}"] if adapter else [])]
    lines += [f'TEMPLATE """{template}"""', f"PARAMETER num_ctx {context}"]
    lines += [f'PARAMETER stop "{token}"' for token in control if token in template]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template in Ollama's language, Go's, that writes what the tokenizer's own does.

    It always ends with the prompt for an answer. Raises ``UserError`` unless all that the
    tokenizer's writes beside the messages is a text before and behind each, by its role, one at
    the end, and one at the beginning of a chat without a system message, the same every day.
    """

    def shown(chat: str, prompt: bool = False) -> str:
        turns = [{"role": ROLES[letter], "content": CONTENT} for letter in chat]
        settings = {"tokenize": False, "add_generation_prompt": prompt}
        return tokenizer.apply_chat_template(turns, **settings)

    try:
        dated = "strftime_now" in str(tokenizer.chat_template)
        require(not dated, "it writes the date of each day")
        system, user = shown("s"), shown("su").removeprefix(shown("s"))
        pieces = {"s": system, "u": user, "a": shown("ua").removeprefix(shown("u"))}
        default, end = shown("u").removesuffix(user), shown("u", True).removeprefix(shown("u"))
        for chat in TRIALS:
            wanted = default * ("s" not in chat) + "".join(pieces[x] for x in chat) + end
            require(shown(chat, True) == wanted, f"it writes a chat {chat} otherwise")
        whole = "".join([default, end, *pieces.values()])
        once = all(text.count(CONTENT) == 1 for text in pieces.values())
        require(once and whole.count(CONTENT) == 3, "it changes what a message says")
        require("{{" not in whole and '"' not in whole, "it writes quotes or braces")
    except Exception as error:  # templates raise many kinds
        reason = f"the chat template has no equal in a Modelfile ({reason_of(error)})"
        raise UserError(reason) from error
    go = {role: pieces[x].replace(CONTENT, "{{ .Content }}") for x, role in ROLES.items()}
    if all(text == go["user"].replace("user", role) for role, text in go.items()):
        turn = go["user"].replace("user", "{{ .Role }}")
    else:
        first, second = (f'if eq .Role "{role}" }}}}{go[role]}' for role in ("system", "user"))
        turn = f"{{{{ {first}{{{{ else {second}{{{{ else }}}}{go['assistant']}{{{{ end }}}}"
    begin = f"{{{{ if not .System }}}}{default}{{{{ end }}}}" if default else ""
    return f"{begin}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{end}"
