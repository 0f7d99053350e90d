"""Chat templates that behave like those of well-known models, and small tokenizers for them."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from core.paths import TOKENIZER_DIR
from dataset.tokenizer import load_tokenizer


def _same(text: str) -> str:
    return text


def _without_newlines_before(text: str) -> str:
    return text.lstrip("\n")


class Template(NamedTuple):
    """A chat template, the tokenizer it goes with, and what a test may expect of the two."""

    jinja: str | None  # None: the shipped tokenizer with its own
    kind: str  # of tokenizer, a key of BACKENDS
    eos: str
    bos: str | None = None
    special: tuple[str, ...] = ()  # more added tokens, marked special
    plain: tuple[str, ...] = ()  # added tokens that are not
    rstrip: bool = False  # do the tokens in ``special`` swallow the blanks after them?
    system: bool = True  # False: the template refuses a system turn
    writes: Callable[[str], str] = _same  # the answer as the template writes it
    learned: str = "{}"  # what follows the generation prompt, up to the end of the turn
    end: str = ""  # the control token after it
    earlier: bool = True  # are the answers before the last learned?
    earlier_end: str = ""  # the control token after one of them, if it is another
    inserts: bool = False  # is ``end`` put there by us, since the template writes none?
    forces: bool = False  # does the generation prompt hold more than the rendering of an answer?
    moves: bool = False  # does the system turn move on to the last question?
    parses: bool = False  # does the template look for </think> in an answer?


PARTS = {
    "{# take turns #}": """
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and assistant must take turns') }}
{%- endif %}""",
    "{# system apart #}": """
{%- if messages[0].role == 'system' %}
{%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
{%- set turns = messages %}
{%- endif %}""",
    "{# thought apart #}": r"""
{%- set thought, content = '', message.content %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}""",
}


def _filled(jinja: str) -> str:
    for comment, part in PARTS.items():
        jinja = jinja.replace(comment, part)
    return jinja


CHATML = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

ZEPHYR = r"""{% for message in messages %}
{{ '<|' + message.role + '|>\n' + message.content + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

LLAMA_2 = r"""{# system apart #}
{%- for message in turns %}{# take turns #}
{%- set content = message.content %}
{%- if loop.first and system is defined %}
{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}
{%- endif %}
{%- if message.role == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}
{{- ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""

LLAMA_3 = r"""
{%- for message in messages %}
{%- if loop.first %}{{- bos_token }}{% endif %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

MISTRAL_1 = r"""{{- bos_token }}
{%- for message in messages %}{# take turns #}
{%- if message.role == 'user' %}
{{- '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}
{{- message.content + eos_token + ' ' }}
{%- else %}
{{- raise_exception('only user and assistant may speak') }}
{%- endif %}
{%- endfor %}"""

MISTRAL_3 = r"""{# system apart #}
{{- bos_token }}
{%- for message in turns %}{# take turns #}
{%- if message.role == 'assistant' %}
{{- ' ' + message.content + eos_token }}
{%- elif loop.revindex <= 2 and system is defined %}
{{- '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}
{%- else %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- endif %}
{%- endfor %}"""
# The published one: as soon as the answer is there, the system turn is not written any more.
MISTRAL_3_PUBLISHED = MISTRAL_3.replace("loop.revindex <= 2", "loop.last")

MISTRAL_7 = r"""{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.role == 'system' %}
{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
{%- else %}
{{- message.content + eos_token }}
{%- endif %}
{%- endfor %}"""

GEMMA_2 = r"""{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('no system turn') }}{% endif %}
{%- for message in messages %}{# take turns #}
{%- set role = 'model' if message.role == 'assistant' else 'user' %}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""

GEMMA_3 = r"""{{- bos_token }}{# system apart #}
{%- for message in turns %}{# take turns #}
{%- set role = 'model' if message.role == 'assistant' else 'user' %}
{{- '<start_of_turn>' + role + '\n' }}
{{- system + '\n\n' if loop.first and system is defined else '' }}
{{- message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""

PHI_3 = r"""
{%- for message in messages %}
{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% else %}{{- eos_token }}{% endif %}"""

QWEN_2 = r"""
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}""" + CHATML.lstrip("\n")

QWEN_3 = r"""
{%- set last = namespace(query=messages | length - 1) %}
{%- for message in messages %}
{%- set is_result = message.content.startswith('<tool_response>')
    and message.content.endswith('</tool_response>') %}
{%- if message.role == 'user' and not is_result %}{% set last.query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}{# thought apart #}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and loop.index0 > last.query and (loop.last or thought) %}
{{- '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}
{{- content }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}"""

MINIMIND_3 = r"""
{%- for message in messages %}{# thought apart #}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}
{{- '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}
{{- content }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n<think>\n' }}
{%- if not open_thinking %}{{- '\n</think>\n\n' }}{% endif %}
{%- endif %}"""

DEEPSEEK_R1 = r"""
{%- set first = namespace(system='') %}
{%- for message in messages if message.role == 'system' %}
{%- set first.system = message.content %}
{%- endfor %}
{{- bos_token + first.system }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\n' }}{% endif %}"""

SMOLLM_3 = r"""{# system apart #}
{{- '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n' }}
{{- 'Reasoning Mode: /think\n\n## Custom Instructions\n\n' }}
{{- system.rstrip() if system is defined else 'You are a helpful assistant.' }}
{{- '\n\n<|im_end|>\n' }}
{%- for message in turns %}
{%- if message.role == 'user' %}
{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- else %}
{%- generation %}
{{- '<|im_start|>assistant\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}
{%- endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

GLM_4 = r"""[gMASK]<sop>
{%- for message in messages %}
{%- if message.content %}{{- '<|' + message.role + '|>\n' + message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""

ALPACA = r"""{# system apart #}
{{- system if system is defined else 'Below is an instruction. Write a response.' }}
{{- '\n\n' }}
{%- for message in turns %}
{%- if message.role == 'user' %}
{{- '### Instruction:\n' + message.content + '\n\n' }}
{%- else %}
{{- '### Response:\n' + message.content + '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\n' }}{% endif %}"""

THINK = ("<think>", "</think>")
MARKS = ("<|im_start|>", "<|im_end|>")
HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
INST = ("[INST]", "[/INST]")
SYSTEM_PROMPT = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
TURN = ("<start_of_turn>", "<end_of_turn>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")
ROLES = ("<｜User｜>", "<｜Assistant｜>")  # DeepSeek's, not special
SPOKEN = {"bos": "<s>", "eos": "</s>", "end": "</s>"}
CHATTED = {"eos": "<|im_end|>", "end": "<|im_end|>"}
PADDED = {"special": (*MARKS, "<|endoftext|>"), **CHATTED}
TURNS = {"bos": "<bos>", "eos": "<eos>", "end": "<end_of_turn>", "special": TURN}
LLAMA = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "end": "<|eot_id|>", "special": HEADER}
DEEPSEEK = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}
TEXT_ENDS = {"eos": "<|endoftext|>", "end": "<|endoftext|>", "inserts": True}
BEFORE = _without_newlines_before
NO_THOUGHT = "<think>\n\n</think>\n\n{}"

TEMPLATES = {
    "own": Template(None, "shipped", **CHATTED),
    "zephyr": Template(ZEPHYR, "legacy", **SPOKEN),
    "llama-2": Template(LLAMA_2, "legacy", writes=str.strip, learned=" {} ", **SPOKEN),
    "llama-3": Template(LLAMA_3, "bytes", writes=str.strip, **LLAMA),
    "mistral-1": Template(MISTRAL_1, "legacy", system=False, **SPOKEN),
    "mistral-3": Template(MISTRAL_3, "first", learned=" {}", special=INST, moves=True, **SPOKEN),
    "mistral-3-published": Template(
        MISTRAL_3_PUBLISHED, "legacy", learned=" {}", special=INST, moves=True, **SPOKEN
    ),
    "mistral-7": Template(MISTRAL_7, "bytes", special=INST + SYSTEM_PROMPT, **SPOKEN),
    "gemma-2": Template(GEMMA_2, "always", system=False, writes=str.strip, **TURNS),
    "gemma-3": Template(GEMMA_3, "first", writes=str.strip, **TURNS),
    "phi-3": Template(
        PHI_3, "legacy", "<|endoftext|>", "<s>", special=PHI, end="<|end|>", rstrip=True
    ),
    "qwen-2": Template(QWEN_2, "composed", **PADDED),
    "qwen-3": Template(
        QWEN_3,
        "composed",
        plain=THINK,
        writes=BEFORE,
        learned=NO_THOUGHT,
        earlier=False,
        parses=True,
        **PADDED,
    ),
    "minimind-3": Template(
        MINIMIND_3, "bytes", plain=THINK, writes=BEFORE, parses=True, bos="<|im_start|>", **PADDED
    ),
    "deepseek-r1": Template(
        DEEPSEEK_R1,
        "bytes",
        plain=ROLES + THINK,
        end=DEEPSEEK["eos"],
        earlier=False,
        forces=True,
        parses=True,
        **DEEPSEEK,
    ),
    "smollm-3": Template(SMOLLM_3, "bytes", plain=THINK, writes=BEFORE, **PADDED),
    "glm-4": Template(
        GLM_4, "bytes", special=GLM, learned="\n{}", earlier_end="<|user|>", **TEXT_ENDS
    ),
    "alpaca": Template(ALPACA, "bytes", **TEXT_ENDS),
    "alpaca-always": Template(ALPACA, "always", inserts=True, **SPOKEN),
    "chatml-text": Template(CHATML, "legacy", inserts=True, **SPOKEN),
}


TEXT = """The system says who the user is, and the assistant gives an answer to each question.
Below is an instruction that describes a task. Write a response: you are a helpful assistant.
What is the capital of France? Paris is the capital of France. How many days has a week? Seven.
Please think about it before you answer; the reason comes first, then the result. Thank you!
for i in range(10): print(i, "model", [1, 2, 3]) # Metadata, Instruction, Response, INST, SYS
El usuario pregunta y la asistente responde. ¿Cuál es la capital de España? Madrid, claro.
Die Antwort steht nach der Frage. Wie spät ist es? Es ist schön, über die Brücke zu gehen.
Какой сегодня день? Сегодня хороший день, чтобы учить языки. Спасибо за ответ!
你好，世界。今天天气怎么样？今天天气很好。请回答我的问题，谢谢你。不客气。
こんにちは、元気ですか。はい、元気です。 안녕하세요. 오늘은 날씨가 좋습니다.
שלום עולם, מה שלומך היום? مرحبا بالعالم، كيف حالك اليوم؟ نعم، شكرا لك."""
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNKNOWN = "<unk>"


@lru_cache
def _trained(kind: str) -> dict:
    """The model that training on the lines of ``TEXT`` gives, as the fields of its file."""
    settings = {"vocab_size": 700, "show_progress": False}
    if kind == "bytes":
        backend, split = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    elif kind == "legacy":
        backend, split = Tokenizer(models.BPE()), pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(**settings)
    else:
        backend, split = Tokenizer(models.Unigram()), pre_tokenizers.Metaspace()
        unknown = {"unk_token": UNKNOWN, "special_tokens": [UNKNOWN]}
        trainer = trainers.UnigramTrainer(**unknown, **settings)
    backend.pre_tokenizer = split
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    return json.loads(backend.to_str())["model"]


def byte_level(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """As GPT-2's, and with a normalizer as Qwen's."""
    found = _trained("bytes")
    backend = Tokenizer(models.BPE(found["vocab"], list(map(tuple, found["merges"]))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def unigram(prepend_scheme: str, control: list[str]) -> Tokenizer:
    """SentencePiece's Unigram. Bytes spell what no piece spells; its control tokens are pieces."""
    pieces = [(piece, 0.0) for piece in [UNKNOWN, *control, *BYTES]]
    pieces += map(tuple, _trained("unigram")["vocab"][1:])
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoder])
    return backend


def legacy(control: list[str]) -> Tokenizer:
    """As the first Llamas': the normalizer writes spaces as U+2581 and puts one before each text.

    A text is a single word to it; only the added tokens cut it.
    """
    found = _trained("legacy")
    vocab = {piece: n for n, piece in enumerate([UNKNOWN, *control, *BYTES, *found["vocab"]])}
    merges = list(map(tuple, found["merges"]))
    model = models.BPE(vocab, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(space)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return backend


BACKENDS = {
    "bytes": lambda _: byte_level(),
    "composed": lambda _: byte_level(normalizers.NFC()),
    "first": lambda control: unigram("first", control),
    "always": lambda control: unigram("always", control),
    "legacy": legacy,
}


@lru_cache
def tokenizer_of(name: str, kind: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of template ``name``, or one of another kind with its tokens. Do not change."""
    template = TEMPLATES[name]
    if template.jinja is None:
        return load_tokenizer(TOKENIZER_DIR)
    kind = kind or template.kind
    roles = {"bos_token": template.bos, "eos_token": template.eos}
    if kind not in ("bytes", "composed"):
        roles["unk_token"] = UNKNOWN
    control = {text: None for text in (template.bos, template.eos, *template.special) if text}
    backend = BACKENDS[kind](list(control))
    backend.add_tokens([AddedToken(text, normalized=False) for text in template.plain])
    backend.add_special_tokens(
        [AddedToken(text, special=True, rstrip=template.rstrip) for text in template.special]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    tokenizer.chat_template = _filled(template.jinja)
    return tokenizer
