"""A conversation with one model whose skills come and go."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from torch import nn
from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from core.paths import find_skill, lora_path, lora_paths, skill_of, skill_weights, weights_text
from dataset.chat import around_answer, encode_chat, encode_documents, ends_of_answer
from dataset.tokenizer import check_trained_with, use_template
from model.generation import Sampling, generate, generate_all
from model.LMConfig import context_of
from model.lora.library import SkillLibrary
from model.lora.skill_file import Skill, SkillMeta, adapters_in, read_lora


class ChatSession:
    """History, active skill and random state of a chat. The base's weights are never written.

    ``history_cnt`` earlier messages go with each question. With ``continues`` a prompt is continued
    as plain text, without template and history. A skill trained with a ``prompt_template`` is asked
    with it (a mix with that of its first skill), unless the session ``keeps_template``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        seed: int,
        history_cnt: int,
        continues: bool,
        out_dir: Path,
        allow_base_mismatch: bool = False,
        keeps_template: bool = False,
    ):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.history_cnt, self.continues, self.out_dir = history_cnt, continues, out_dir
        self.allow_base_mismatch = allow_base_mismatch
        self.rng = torch.Generator().manual_seed(seed)
        self.messages: list[dict] = []
        self.system: str | None = None  # the system turn that comes first
        self.library = SkillLibrary(model)
        self._template, self._keeps_template = tokenizer.chat_template, keeps_template
        self._read: dict[str, tuple[int, SkillMeta]] = {}  # what is in the library: time of file
        self.weights: dict[str, float] = {}
        self.tokens = 0  # of the last answer

    @property
    def skill(self) -> str:
        """The active skills as they were asked for, empty for the bare base."""
        return weights_text(self.weights)

    def reply(self, text: str) -> Iterator[str]:
        """Stream the answer to ``text``; what was said, even if cut short, joins the history."""
        ids, answer, self.tokens = self.prompt_ids(text), "", 0
        try:
            new = generate(self.model, ids, self.sampling, self.stop_ids(), self.rng)
            for piece in self._spoken(new):
                answer += piece
                yield piece
        finally:
            self.messages += _said(text, answer)

    def reply_all(self, chats: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[str]:
        """The last answer in each of these chats, given its user turns and the seed of its draws.

        They are fresh chats, decoded together; the session's own history stays.
        """
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        answers, histories = [""] * len(chats), [[] for _ in chats]
        for turn in range(max(map(len, chats), default=0)):
            rows = [row for row, chat in enumerate(chats) if turn < len(chat)]
            prompts = [self.prompt_ids(chats[row][turn], histories[row]) for row in rows]
            draws = [rngs[row] for row in rows]
            found = generate_all(self.model, prompts, self.sampling, self.stop_ids(), draws)
            for row, tokens in zip(rows, found, strict=True):
                answers[row] = "".join(self._spoken(tokens))
                histories[row] += _said(chats[row][turn], answers[row])
        return answers

    def _spoken(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of an answer's ``tokens``, in pieces of whole characters."""
        decoder = DecodeStream(skip_special_tokens=True)
        answer, held, begun = "", "", False
        # What the template writes around an answer was learned with it, but is no part of it.
        before, behind = ("", "") if self.continues else around_answer(self.tokenizer)
        for token in tokens:
            self.tokens += 1
            try:
                piece = decoder.step(self.tokenizer.backend_tokenizer, token)
            except Exception:  # it raises no narrower one for bytes that are no text
                decoder, piece = DecodeStream(skip_special_tokens=True), "\ufffd"
            answer += piece or ""
            if not piece or (not begun and before.startswith(answer)):
                continue
            if not begun:
                piece = answer.removeprefix(before)
            begun, piece = True, held + piece
            held = behind if behind and piece.endswith(behind) else ""
            yield piece.removesuffix(held)

    def use_system(self, text: str | None) -> None:
        """Begin each prompt with this system turn. Raises ``UserError`` where there can be none."""
        if text and self.continues:
            raise UserError("a pretrained base continues plain text and takes no system turn")
        before, self.system = self.system, text or None
        try:
            self.prompt_ids("?")
        except UserError as error:
            self.system = before
            raise UserError(f"this system turn is not possible here: {error}") from error

    def use_skill(self, name: str | None, skill: Skill | None = None) -> None:
        """Switch to a skill, to a mix such as ``a=0.7 b=-0.2``, or for None to the bare base.

        ``skill``: what ``read_lora`` gave for the file, if read. A ``UserError`` changes nothing.
        """
        weights, before = skill_weights((name or "").split()), self.tokenizer.chat_template
        try:
            metas = [self._loaded(each, skill) for each in weights]
            self._ask_with(metas[0].prompt_template if metas else None)
            self.library.use(weights)
        except UserError:
            self.tokenizer.chat_template = before
            raise
        self.weights = weights

    def _loaded(self, name: str, skill: Skill | None) -> SkillMeta:
        """Have this skill's file, as it is now, in the library, reading it only if it changed."""
        path = find_skill(self.out_dir, name, self.model.config.hidden_size)
        written = path.stat().st_mtime_ns
        if self._read.get(name, (0,))[0] != written:
            self._read.pop(name, None)
            skill, allowed = skill or read_lora(path), self.allow_base_mismatch
            self._ask_with(skill[1].prompt_template)
            if not (self._keeps_template or allowed):
                check_trained_with(self.tokenizer, skill[1].tokenizer, name)
            meta = self.library.add(name, path, skill, allow_base_mismatch=allowed)
            self._read[name] = written, meta
        return self._read[name][1]

    def skills(self) -> Iterator[tuple[str, str | None]]:
        """Each skill's name, or its file's for another dim, and why it is unfit here, or None."""
        dim = self.model.config.hidden_size
        for path in lora_paths(self.out_dir):
            if path != lora_path(self.out_dir, skill_of(path), dim):
                yield path.name, f"it is for another dim than this base's {dim}"
                continue
            try:
                adapters_in(self.model, path, allow_base_mismatch=self.allow_base_mismatch)
                yield skill_of(path), None
            except UserError as error:
                yield skill_of(path), str(error)

    def _ask_with(self, prompt_template: str | None) -> None:
        self.tokenizer.chat_template = self._template
        if prompt_template is not None and not self._keeps_template:
            use_template(self.tokenizer, prompt_template)

    def stop_ids(self) -> set[int]:
        """The ids that end an answer: the template's and those that the model's makers name."""
        named = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        by_makers = set(named if isinstance(named, list) else [named]) - {None}
        by_template = set() if self.continues else ends_of_answer(self.tokenizer)
        return {self.tokenizer.eos_token_id} | by_makers | by_template

    def prompt_ids(self, text: str, messages: Sequence[dict] | None = None) -> list[int]:
        """The template's ids for ``text``, after as much of its history as the context holds.

        The history is ``messages``; for None, what was said in this session.
        """
        if self.continues:
            ((ids, _),) = encode_documents(self.tokenizer, [text])
            return ids[:-1]  # without the end
        question = {"role": "user", "content": text}
        messages = self.messages if messages is None else messages
        history = messages[-self.history_cnt :] if self.history_cnt else []
        first = [{"role": "system", "content": self.system}] if self.system else []
        room = context_of(self.model.config) - self.sampling.max_new_tokens
        while True:
            chat = [*first, *history, question]
            ids, _ = encode_chat(self.tokenizer, chat, add_generation_prompt=True)
            if not history or len(ids) <= room:
                return ids
            history = history[2:]  # the oldest exchange makes room


def _said(question: str, answer: str) -> list[dict]:
    """What joins a history: both turns, unless the answer is empty."""
    if not answer.strip():
        return []
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
