"""Small tokenizers whose ids can be read by eye: a byte is its own id, then come merged pairs, then special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from toolkit.data.formats import Message
from toolkit.data.template import ChatTokenizer

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CHATML_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# As Qwen3 does: only the last answer shows its thinking block, an empty one where it has none.
THINKING = (
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' %}{%- set reasoning = '' %}"
    "{%- if '</think>' in content %}{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.last %}{{- '<|im_start|>assistant\n<think>\n' + reasoning + '\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)


def byte_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def save(
    folder: Path,
    template: str | None,
    special: Sequence[str],
    *,
    eos: str,
    bos: str | None = None,
    merges: Sequence[tuple[str, str]] = (),
    generation: dict | None = None,
) -> Path:
    """A byte-level tokenizer folder. With ``bos`` it is of the kind that adds a BOS by itself, as Llama's."""
    vocab = byte_letters()
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def prompt_ids(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of the conversation and the generation prompt."""
    return tokenizer.encode_rendered([tokenizer.render(messages, generation_prompt=True)])[0]


def response_ids(tokenizer: ChatTokenizer, content: str) -> list[int]:
    """Token ids of the content, and the end-of-turn id after them."""
    return tokenizer.encode_responses([content])[0]


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """``make_tokenizer(name, template, special, eos=…, …)`` saves a tokenizer and returns its folder."""
    return lambda name, *arguments, **options: save(tmp_path / name, *arguments, **options)


@pytest.fixture
def llama3(make_tokenizer: Callable[..., Path]) -> Path:
    generation = {"eos_token_id": [257, 260]}
    bos, eos = LLAMA3_SPECIAL[0], LLAMA3_SPECIAL[4]
    return make_tokenizer("llama3", LLAMA3, LLAMA3_SPECIAL, bos=bos, eos=eos, generation=generation)


@pytest.fixture
def chatml(make_tokenizer: Callable[..., Path]) -> Path:
    return make_tokenizer("chatml", CHATML, CHATML_SPECIAL, eos="<|im_end|>", generation={"eos_token_id": [258, 256]})


@pytest.fixture
def thinking(make_tokenizer: Callable[..., Path]) -> Path:
    return make_tokenizer("thinking", THINKING, CHATML_SPECIAL, eos="<|im_end|>")
