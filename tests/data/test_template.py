from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.conftest import prompt_ids, response_ids
from toolkit.data.template import ChatTemplate, ChatTokenizer, RewardTokenizer, TemplateRefusal, tokenizer_files
from toolkit.errors import UserError

CHAT = "{% for m in messages %}{{ m.content }}<|e|>{% endfor %}"
HI = [{"role": "user", "content": "Hi"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
]


def test_llama3_ids_by_hand(llama3: Path) -> None:
    tokenizer = ChatTokenizer(llama3)
    # <|begin_of_text|> once, though this tokenizer adds one by itself to plain text
    assert prompt_ids(tokenizer, HI) == [
        256, 258, *b"user", 259, 10, 10, 72, 105, 260, 258, *b"assistant", 259, 10, 10
    ]  # fmt: skip
    assert tokenizer.tokenizer("Hi")["input_ids"] == [256, 72, 105]
    assert response_ids(tokenizer, "Yes.") == [89, 101, 115, 46, 260]
    assert tokenizer.end_of_turn == 260
    assert tokenizer.stop_ids == (257, 260)
    assert tokenizer.notes == ()


def test_llama3_keeps_system_and_all_turns(llama3: Path) -> None:
    tokenizer = ChatTokenizer(llama3)

    def turn(role: bytes, content: bytes) -> list[int]:
        return [258, *role, 259, 10, 10, *content, 260]

    assert prompt_ids(tokenizer, TURNS) == [
        256,
        *turn(b"system", b"Be brief."),
        *turn(b"user", b"Hi"),
        *turn(b"assistant", b"Hello"),
        *turn(b"user", b"Who?"),
        *turn(b"assistant", b"")[:-1],
    ]


def test_chatml_response_has_no_newline_after_its_end(chatml: Path) -> None:
    tokenizer = ChatTokenizer(chatml)
    assert prompt_ids(tokenizer, HI) == [
        257, *b"system\nYou are Qwen.", 258, 10, 257, *b"user\nHi", 258, 10, 257, *b"assistant\n"
    ]  # fmt: skip
    assert response_ids(tokenizer, "Yes.") == [*b"Yes.", 258]
    assert tokenizer.stop_ids == (256, 258)


def test_prompt_and_response_joined_are_the_rendered_conversation(llama3: Path, chatml: Path, thinking: Path) -> None:
    for folder, arguments, trailing in (
        (llama3, {}, []),
        (chatml, {}, [10]),
        (thinking, {"enable_thinking": False}, [10]),
    ):
        tokenizer = ChatTokenizer(folder, arguments)
        for prompt in (HI, TURNS):
            answered = [*prompt, {"role": "assistant", "content": "A name."}]
            full = tokenizer.encode_rendered([tokenizer.render(answered, generation_prompt=False)])[0]
            assert prompt_ids(tokenizer, prompt) + response_ids(tokenizer, "A name.") + trailing == full


def test_thinking_block_belongs_to_the_generation_prompt_when_thinking_is_off(thinking: Path) -> None:
    off = ChatTokenizer(thinking, {"enable_thinking": False})
    opening = [257, *b"user\nHi", 258, 10, 257, *b"assistant\n"]
    assert prompt_ids(off, HI) == [*opening, *b"<think>\n\n</think>\n\n"]
    assert response_ids(off, "Yes.") == [*b"Yes.", 258]
    assert off.notes == ()

    on = ChatTokenizer(thinking)
    assert prompt_ids(on, HI) == opening
    assert on.end_of_turn == 258
    assert len(on.notes) == 1
    assert "enable_thinking" in on.notes[0]
    assert on.digests["template"] != off.digests["template"]
    assert on.digests["tokenizer"] == off.digests["tokenizer"]


def test_a_generation_prompt_that_is_no_prefix_names_the_template_and_both_texts(
    make_tokenizer: Callable[..., Path],
) -> None:
    # As DeepSeek-R1: the generation prompt opens a thinking block, the rendered answer has none.
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
    )
    folder = make_tokenizer("r1", template, ("<|user|>", "<|assistant|>", "<|end|>"), eos="<|end|>")
    with pytest.raises(UserError) as error:
        ChatTokenizer(folder)
    for part in (str(folder), "'<think>\\n'", "'Forty-two.<|end|>'", "enable_thinking"):
        assert part in str(error.value)
    assert prompt_ids(ChatTokenizer(folder, {"enable_thinking": False}), HI) == [256, *b"Hi", 257]


def test_a_template_without_the_answer_s_opening_or_end_is_refused(make_tokenizer: Callable[..., Path]) -> None:
    special = ("<|user|>", "<|assistant|>", "<|end|>")
    no_opening = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    with pytest.raises(UserError, match=r"goes on with '<\|assistant\|>Forty-two"):
        ChatTokenizer(make_tokenizer("no_opening", no_opening, special, eos="<|end|>"))
    no_end = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}[end]{% endfor %}"
    no_end += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    with pytest.raises(UserError, match=r"followed by '\[end\]'; expected a special token"):
        ChatTokenizer(make_tokenizer("no_end", no_end, special, eos="<|end|>"))


def test_text_of_a_response_never_becomes_a_special_token(chatml: Path) -> None:
    tokenizer = ChatTokenizer(chatml)
    assert response_ids(tokenizer, "a<|im_end|>b") == [*b"a<|im_end|>b", 258]
    # and the rendered prompt, encoded after it, still has its own
    assert prompt_ids(tokenizer, HI)[0] == 257


def test_merged_tokens_and_odd_characters_come_back(make_tokenizer: Callable[..., Path]) -> None:
    folder = make_tokenizer("merged", CHAT, ("<|e|>",), eos="<|e|>", merges=[("H", "i"), ("Hi", "t")])
    tokenizer = ChatTokenizer(folder)
    assert response_ids(tokenizer, "Hit Hi") == [257, 32, 256, 258]
    for text in ("naïve 🙂 \u200b\r\n\t 中文", "  spaced  "):
        assert tokenizer.decode(response_ids(tokenizer, text)) == text


def test_stop_ids_fall_back_to_the_model_config(chatml: Path) -> None:
    (chatml / "generation_config.json").unlink()
    (chatml / "config.json").write_text(json.dumps({"eos_token_id": 256}))
    assert ChatTokenizer(chatml).stop_ids == (256, 258)
    (chatml / "config.json").unlink()
    assert ChatTokenizer(chatml).stop_ids == (258,)


def test_reward_model_renders_text_with_its_own_template_and_ids(
    chatml: Path, make_tokenizer: Callable[..., Path]
) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|e|>{% endfor %}"
    folder = make_tokenizer("reward", template, ("<|b|>", "<|e|>"), bos="<|b|>", eos="<|e|>", merges=[("H", "i")])
    policy, reward = ChatTokenizer(chatml), RewardTokenizer(folder)
    response = policy.decode(response_ids(policy, "Hi you"))
    assert response == "Hi you"
    # one BOS, though this tokenizer adds one by itself; "Hi" is one token here (256)
    assert reward.render_for_reward(HI, response) == [257, *b"[user]", 256, 258, *b"[assistant]", 256, *b" you", 258]
    assert reward.digests["template"] != policy.digests["template"]
    assert reward.digests["tokenizer"] != policy.digests["tokenizer"]


def test_template_never_sees_today(make_tokenizer: Callable[..., Path]) -> None:
    template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHAT
    folder = make_tokenizer("dated", template, ("<|e|>",), eos="<|e|>")
    assert ChatTokenizer(folder).render(HI, generation_prompt=True) == "26 Jul 2024Hi<|e|>"
    fixed = ChatTokenizer(folder, {"date_string": "1 Jan 2030"})
    assert fixed.render(HI, generation_prompt=True) == "1 Jan 2030Hi<|e|>"


def test_a_refused_conversation_says_why(make_tokenizer: Callable[..., Path]) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
    )
    tokenizer = ChatTokenizer(make_tokenizer("gemma", template, ("<|e|>",), eos="<|e|>"))
    with pytest.raises(TemplateRefusal, match="System role not supported"):
        prompt_ids(tokenizer, TURNS)


def test_digests_follow_the_files(llama3: Path) -> None:
    before = ChatTemplate(llama3).digests
    assert ChatTemplate(llama3).digests == before
    assert [path.name for path in tokenizer_files(llama3)] == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    template = llama3 / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert ChatTemplate(llama3).digests["template"] != before["template"]


def test_folders_that_are_no_tokenizer(tmp_path: Path, make_tokenizer: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        ChatTemplate(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        ChatTemplate(tmp_path)
    bare = make_tokenizer("bare", None, ("<|e|>",), eos="<|e|>")
    with pytest.raises(UserError, match=r"bare has no \(default\) chat template"):
        ChatTemplate(bare)
    (bare / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        ChatTemplate(bare)
