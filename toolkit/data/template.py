"""Chat templates and tokenization: how a conversation becomes token ids, in one way for every role.

The rule: prompt ids = encode(conversation rendered with the generation prompt); response ids = encode(content) and one
end-of-turn id, nothing after it; a sequence is the two joined. Rendered text is encoded without special tokens, since
the template has put them there already (otherwise: a second BOS). A response's text never becomes a special token.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from toolkit.data.formats import Message
from toolkit.errors import UserError

# What identifies a tokenizer, and what a copy of a model folder needs to have of it.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# Templates that print today's date would give other prompts tomorrow; they print this day, Llama 3's own default.
TODAY = date(2024, 7, 26)

ANSWER = "Forty-two."
PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is six times seven?"}],
    [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "What is six times seven?"},
    ],
)


class TemplateRefusal(UserError):
    """The chat template cannot render a conversation (a role it does not know, turns out of order)."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's and template's files in a model folder, in the order of their names."""
    return [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]


class ChatTemplate:
    """The tokenizer and chat template of a Hugging Face model folder.

    Args:
        template_arguments: what the template is given besides the messages, ``{"enable_thinking": False}`` for one.

    Raises:
        UserError: no such folder, no readable tokenizer in it, or one without a chat template.
    """

    def __init__(self, folder: str | Path, template_arguments: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.template_arguments = dict(template_arguments or {})
        if not self.folder.is_dir():
            raise UserError(f"{folder} is not a folder; expected one with a Hugging Face tokenizer")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # `tokenizers` raises bare Exceptions for a broken file
            raise UserError(f"cannot load a tokenizer from {folder}: {error}") from error
        try:
            self.template: str = self.tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"the tokenizer in {folder} has no (default) chat template; expected chat_template.jinja there, or "
                "chat_template in tokenizer_config.json: take the folder of an instruction-tuned model, or add one"
            ) from error

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """The conversation as text, special tokens included; with ``generation_prompt`` the next answer's opening.

        Raises:
            TemplateRefusal: the template cannot render these messages.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                strftime_now=TODAY.strftime,
                **self.template_arguments,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TemplateRefusal(f"the chat template of {self.folder} refuses the messages: {error}") from error

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts, nothing added; the special tokens written in them are special."""
        return self._encode(texts, split_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of ``template`` (text and arguments) and ``tokenizer`` (names and bytes of its files)."""
        template = json.dumps([self.template, self.template_arguments], sort_keys=True)
        files = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in tokenizer_files(self.folder)]
        return {
            "template": hashlib.sha256(template.encode()).hexdigest(),
            "tokenizer": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        }

    def _encode(self, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


class ChatTokenizer(ChatTemplate):
    """The policy's tokenizer: prompts that end with the generation prompt, and responses that end with one token.

    Attributes:
        end_of_turn: id of the special token that the template puts after an assistant's content.
        stop_ids: the ids that end a sampled response, ascending: ``end_of_turn`` and the EOS ids of the folder's
            generation config (of ``config.json`` where there is none).
        notes: what a person should know of this template; empty when it is as plain as the rule.

    Raises:
        UserError: besides ``ChatTemplate``'s, a template whose generation prompt does not open the full rendering of
            the answered conversation, that does not open the answer's turn, or that does not end it with a special token.
    """

    def __init__(self, folder: str | Path, template_arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__(folder, template_arguments)
        self._special = {
            token.content: token_id for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        before, self.end_of_turn = self._answered(PROBES[0])
        with contextlib.suppress(TemplateRefusal):  # a template may know single turns only
            self._answered(PROBES[1])
        self.stop_ids = tuple(sorted({self.end_of_turn, *_eos_ids(self.folder)}))
        self.notes: tuple[str, ...] = ()
        if before:
            self.notes = (
                f"the chat template of {self.folder} puts {before!r} between the generation prompt and a plain answer; "
                "in training the response follows the generation prompt directly. If the responses have no thinking "
                "block of their own, set template_arguments (enable_thinking: false for Qwen3)",
            )

    def encode_responses(self, contents: Sequence[str]) -> list[list[int]]:
        """Token ids of each content, and the end-of-turn id after them."""
        return [[*ids, self.end_of_turn] for ids in self._encode(contents, split_special_tokens=True)]

    def _answered(self, prompt: list[Message]) -> tuple[str, int]:
        """(text between generation prompt and answer, id of the special token after the answer)."""
        opening = self.render(prompt, generation_prompt=True)
        full = self.render([*prompt, {"role": "assistant", "content": ANSWER}], generation_prompt=False)
        title = f"the chat template of {self.folder} with template_arguments {self.template_arguments}"
        if not full.startswith(opening):
            same = next(i for i in range(len(opening)) if full[i : i + 1] != opening[i])
            raise UserError(
                f"{title}: the generation prompt is not the beginning of the answered conversation. After "
                f"{opening[max(0, same - 40) : same]!r} the generation prompt goes on with {opening[same : same + 80]!r}, "
                f"the answered conversation with {full[same : same + 80]!r}. If it is a thinking block, set "
                "template_arguments (enable_thinking: false for Qwen3), or use a template that renders both alike"
            )
        before, found, after = full[len(opening) :].partition(ANSWER)
        if not found or any(token in before for token in self._special):
            raise UserError(
                f"{title}: the generation prompt must be followed by the answer {ANSWER!r}, but the template goes on "
                f"with {full[len(opening) :][:80]!r}. It must honour add_generation_prompt and render answers as they are"
            )
        after = after.lstrip()
        ends = [token for token in self._special if after.startswith(token)]
        if not ends:
            raise UserError(
                f"{title}: an answer is followed by {after[:80]!r}; expected a special token of the tokenizer that ends "
                f"the turn, one of {', '.join(sorted(self._special)[:20]) or '(it has none)'}"
            )
        return before, self._special[max(ends, key=len)]


class RewardTokenizer(ChatTemplate):
    """A reward model's own tokenizer and template, over messages and decoded text: no id of the policy's enters it."""

    def render_for_reward(self, messages: Sequence[Message], response: str) -> list[int]:
        """Token ids of the conversation answered with the text ``response``. Raises: TemplateRefusal."""
        answered = [*messages, {"role": "assistant", "content": response}]
        return self.encode_rendered([self.render(answered, generation_prompt=False)])[0]


def _eos_ids(folder: Path) -> list[int]:
    """The EOS ids that generation with this folder's model stops at."""
    for name in ("generation_config.json", "config.json"):
        if (path := folder / name).is_file():
            try:
                ids = json.loads(path.read_text()).get("eos_token_id")
            except ValueError as error:
                raise UserError(f"{path} is not readable as JSON: {error}") from error
            return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return []
