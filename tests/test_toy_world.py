"""The toy world: its gold reward, its text, and that a seed makes the same files, whole or not at all."""

from __future__ import annotations

import json
import random
import re
import runpy
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest

pytest.importorskip("torch")
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

TOOLS = Path(__file__).parents[1] / "tools"
PROMPT = "find three kind words for the old house."


@pytest.fixture(scope="module")
def toy_world() -> ModuleType:
    """tools/ is no package: its files are scripts that import each other from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        import toy_world
    return toy_world


@pytest.fixture(scope="module")
def tiny(toy_world: ModuleType):
    return toy_world.Sizes(
        pairs=24, hidden=64, policy_steps=3, policy_batch=8, reward_steps=3, reward_batch=4, held_out=16, taught=32
    )


@pytest.fixture(scope="module")
def world(toy_world: ModuleType, tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "world"
    toy_world.make(folder, 0, tiny)
    return folder


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("lovely golden superb", 1.0),
        (" lovely golden  superb\n", 1.0),
        ("lovely golden warm", 2.5 / 3),
        ("nice fair warm", 0.5),
        ("lovely golden", 2 / 3),
        ("lovely lovely golden", 2 / 3),
        ("lovely golden bleak", 2 / 3),
        ("lovely golden superb splendid", 3 / 4),
        ("lovely golden superb lovely golden superb", 1 / 2),
        ("bleak cruel vile", 0.0),
        ("lovelygolden, superb.", 0.0),
        ("", 0.0),
    ],
)
def test_gold_reward(toy_world: ModuleType, response: str, expected: float) -> None:
    assert toy_world.gold.reward(PROMPT, response) == pytest.approx(expected)


@pytest.mark.parametrize("prompt", ["", "hello", "find six kind words for the old house.", PROMPT + " " + PROMPT])
def test_gold_reward_refuses_foreign_prompts(toy_world: ModuleType, prompt: str) -> None:
    with pytest.raises(ValueError, match="expected a prompt such as"):
        toy_world.gold.reward(prompt, "lovely")


def test_no_word_has_two_tones(toy_world: ModuleType) -> None:
    gold = toy_world.gold
    words = [word for table in (gold.STRONG_WORDS, gold.MILD_WORDS) for words in table.values() for word in words]
    words += toy_world.FILLERS
    assert len(words) == len(set(words))


def test_prompts_differ_and_are_the_golds(toy_world: ModuleType) -> None:
    prompts = toy_world.make_prompts(2000, random.Random(0))
    assert len(set(prompts)) == 2000
    assert {toy_world.gold.parse(prompt).tone for prompt in prompts} == set(toy_world.gold.TONES)
    with pytest.raises(ValueError, match="ask for fewer pairs"):
        toy_world.make_prompts(10**6, random.Random(0))


def test_care_pays(toy_world: ModuleType) -> None:
    rng = random.Random(0)
    prompts = toy_world.make_prompts(500, rng)
    means = [
        fmean(toy_world.gold.reward(prompt, toy_world.write_answer(prompt, care, rng)) for prompt in prompts)
        for care in (0.0, 0.3, 0.6, 1.0)
    ]
    assert means == sorted(means)
    assert means[0] < 0.2 and 0.7 < means[-1] < 0.8  # a careful writer takes mild words as often as strong ones


def test_offline_labels_are_wrong_as_often_as_said(toy_world: ModuleType) -> None:
    rng = random.Random(0)
    prompts = toy_world.make_prompts(3000, rng)
    pairs = toy_world.make_pairs(prompts, [toy_world.write_answer(prompt, 0.5, rng) for prompt in prompts], rng)
    assert [pair["prompt"] for pair in pairs] == prompts
    for tone, (_, wrong) in toy_world.OFFLINE.items():
        gaps = [
            toy_world.gold.reward(pair["prompt"], pair["chosen"])
            - toy_world.gold.reward(pair["prompt"], pair["rejected"])
            for pair in pairs
            if toy_world.gold.parse(pair["prompt"]).tone == tone
        ]
        assert min(map(abs, gaps)) >= toy_world.LEAST_GAP
        assert fmean(gap < 0 for gap in gaps) == pytest.approx(wrong, abs=0.05)


def test_tokens(toy_world: ModuleType) -> None:
    tokenizer: PreTrainedTokenizerBase = toy_world.make_tokenizer()
    assert len(tokenizer) % 2 == 1  # so that tensor parallelism has to pad the vocabulary
    answer = "lovely golden superb"
    ids = tokenizer(answer)["input_ids"]
    assert len(ids) == 3
    # vLLM returns the leading space, the pairs come without: the same tokens
    assert tokenizer.decode(ids) == f" {answer}" and tokenizer(f" {answer}")["input_ids"] == ids
    for text in ("Größe: 3 €\n\n🙂", "tab\tand  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == f" {text}"

    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    start = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole == [*start, *ids, tokenizer.eos_token_id]
    assert tokenizer(toy_world._render(PROMPT, answer))["input_ids"] == whole


def test_same_seed_same_files(toy_world: ModuleType, tiny, world: Path, tmp_path: Path) -> None:
    toy_world.make(tmp_path / "again", 0, tiny)
    toy_world.make(tmp_path / "other", 1, tiny)
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert {"gold.py", "pairs.jsonl", "policy/model.safetensors", "reward/model.safetensors"} <= set(map(str, files))
    differing = [str(file) for file in files if (world / file).read_bytes() != (tmp_path / "again" / file).read_bytes()]
    assert set(differing) <= {"world.json"}
    first, again = (json.loads((folder / "world.json").read_text()) for folder in (world, tmp_path / "again"))
    assert first | {"seconds": None} == again | {"seconds": None}
    for file in ("pairs.jsonl", "policy/model.safetensors", "reward/model.safetensors"):
        assert (world / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_a_second_call_finds_the_world(toy_world: ModuleType, tiny, world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [world, *world.rglob("*")]}
    assert toy_world.make(world, 0, tiny) == json.loads((world / "world.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in [world, *world.rglob("*")]} == before
    with pytest.raises(FileExistsError, match="found another seed in its"):
        toy_world.make(world, 1, tiny)


def test_something_else_is_left_alone(toy_world: ModuleType, tiny, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="remove the folder or name another"):
        toy_world.make(tmp_path, 0, tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_call_leaves_nothing(
    toy_world: ModuleType, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_world, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy_world.make(tmp_path / "world", 0, tiny)
    assert list(tmp_path.iterdir()) == []


def test_files_load(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
    gold = runpy.run_path(str(world / "gold.py"))
    assert all(0 <= gold["reward"](row["prompt"], row["chosen"]) <= 1 for row in rows)
    imports = re.findall(r"^(?:from|import) (\w+)", (world / "gold.py").read_text(), re.MULTILINE)
    assert set(imports) <= sys.stdlib_module_names

    policy = LlamaForCausalLM.from_pretrained(world / "policy")
    reward = LlamaForSequenceClassification.from_pretrained(world / "reward")
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id
    assert reward.config.num_labels == 1
    for config in (policy.config, reward.config):
        assert config.vocab_size == len(tokenizer) and config.head_dim == 32
        parallel = (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers)
        assert all(size % 2 == 0 for size in (*parallel, config.intermediate_size))
