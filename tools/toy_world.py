"""Makes the toy world: a policy, a reward model, offline pairs and a gold reward, from a seed and with no download.

    python tools/toy_world.py --output toy-world [--seed 0] [--pairs 1536]

The language and the gold reward are `toy_gold.py`. Answers come from writers who slip: a careless one teaches the
policy, which so becomes mediocre and varied, with much to gain; noisy gold labels teach the reward model, which so
becomes a good but imperfect proxy. The output folder holds

    policy/       LlamaForCausalLM with tokenizer and chat template (Hugging Face folder, fp32)
    reward/       LlamaForSequenceClassification with one label, same tokenizer
    pairs.jsonl   offline preference pairs: prompt, chosen, rejected
    gold.py       reward(prompt, response) -> 0..1
    world.json    seed, sizes, digest of the sources, measurements, seconds per step

The same arguments give the same files on the same machine, bit for bit (but for the seconds in world.json). The folder
appears whole or not at all, and a second call with the same arguments finds it and returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
import toy_gold as gold
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

SPECIAL_TOKENS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_NEW_TOKENS = 32
POLICY_CARE = (0.3, 0.7)  # range of the care of the answers that teach the policy
REWARD_CARE = (0.2, 1.0)  # and the reward model, which will see better answers than the policy's first ones
REWARD_LABEL_NOISE = 0.05
ANSWERS_COMPARED = 4  # to each prompt

VERBS = ("find", "give", "say", "write")
THINGS = (
    ("about", "for"),
    ("", "big ", "dark ", "new ", "old ", "red ", "small ", "tall "),
    ("boat", "bridge", "city", "dog", "forest", "garden", "hill", "house", "king", "lake", "road", "sea"),
)
FILLERS = ("er", "hmm", "just", "like", "oh", "really", "so", "stuff", "thing", "um", "very", "well")

# What the offline pairs are worth differs by tone, so that it can pay to replace some by sampled ones: the care of the
# answer set against the policy's, and the share of pairs labelled the wrong way round.
OFFLINE = {"kind": (0.95, 0.02), "calm": (0.85, 0.06), "funny": (0.7, 0.12), "grim": (0.6, 0.25)}
LEAST_GAP = 0.1  # in gold, between the two answers of an offline pair


@dataclass(frozen=True)
class Sizes:
    """Sizes of the world. Batches are counted in prompts."""

    pairs: int = 1536
    hidden: int = 128
    layers: int = 2
    policy_steps: int = 240
    policy_batch: int = 64
    reward_steps: int = 240
    reward_batch: int = 32
    held_out: int = 1024  # prompts of the measurements
    taught: int = 4096  # prompts that the models learn from


# --- text ------------------------------------------------------------------------------------------------------------


def make_prompts(number: int, rng: random.Random) -> list[str]:
    """`number` different prompts. Raises ValueError if there are not so many."""
    prompts = [
        f"{verb} {count} {tone} {'word' if count == 'one' else 'words'} {link} the {adjective}{noun}."
        for verb, count, tone, link, adjective, noun in product(VERBS, gold.COUNTS, gold.TONES, *THINGS)
    ]
    if number > len(prompts):
        raise ValueError(f"expected at most {len(prompts)} prompts in all, got {number}; ask for fewer pairs")
    return rng.sample(prompts, number)


def write_answer(prompt: str, care: float, rng: random.Random) -> str:
    """An answer to `prompt` by a writer who gets each word right with probability `care`, and the count more often."""
    count, tone = gold.parse(prompt)

    def slips() -> bool:
        return rng.random() >= care

    count = max(1, count + (rng.choice((-1, 1)) if slips() and slips() else 0))
    words = rng.sample(_words_of(tone), count)
    for place in range(count):
        if slips():
            words[place] = rng.choice((rng.choice(FILLERS), rng.choice(_words_of(rng.choice(gold.TONES)))))
    return " ".join(words)


def _words_of(tone: str) -> tuple[str, ...]:
    return gold.STRONG_WORDS[tone] + gold.MILD_WORDS[tone]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a token for each word of the toy world; it can spell any text."""
    words = [
        *VERBS,
        *gold.COUNTS,
        *gold.TONES,
        "word",
        "words",
        "the",
        *(word.strip() for part in THINGS for word in part),
    ]
    words += [*FILLERS, *(word for tone in gold.TONES for word in _words_of(tone))]
    tokenizer = Tokenizer(models.BPE())
    # The prefix space makes one token of a word, be it the first of a text or not.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # more than there is to merge
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_max_length=128,
        chat_template=CHAT_TEMPLATE,
    )


# --- models ----------------------------------------------------------------------------------------------------------


def _config(tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> LlamaConfig:
    """A Llama that vLLM's CPU attention (head size 32) and two-way tensor and pipeline parallelism can take."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=0.05,  # with the usual 0.02 so small a network may wait hundreds of steps before it learns
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _render(prompt: str, answer: str | None = None) -> str:
    """The chat template's text; without an answer, up to the assistant's turn."""
    return f"<|user|>{prompt}<|end|><|assistant|>" + ("" if answer is None else f"{answer}<|end|>")


def _batch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Token ids (B, T) int64, padded on the right: under causal attention the padding needs no mask."""
    return tokenizer(texts, padding=True, return_tensors="pt").input_ids


def _optimize(model: PreTrainedModel, losses: Iterator[torch.Tensor], steps: int, lr: float, name: str) -> None:
    """`steps` of AdamW, each on the next loss of `losses`, which are computed with the model as it is by then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  {name}: step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)


def train_policy(
    tokenizer: PreTrainedTokenizerFast, prompts: list[str], sizes: Sizes, rng: random.Random
) -> LlamaForCausalLM:
    """The policy: cross-entropy on the answers of a sloppy writer."""
    model = LlamaForCausalLM(_config(tokenizer, sizes))
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")

    def losses() -> Iterator[torch.Tensor]:
        while True:
            batch = rng.sample(prompts, sizes.policy_batch)
            answers = [write_answer(prompt, rng.uniform(*POLICY_CARE), rng) for prompt in batch]
            ids = _batch(tokenizer, list(map(_render, batch, answers)))
            labels, in_answer = ids[:, 1:], (ids[:, :-1] == assistant).cumsum(1).bool()
            labels = labels.masked_fill(~in_answer | (labels == tokenizer.pad_token_id), -100)
            yield functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), labels.flatten())

    _optimize(model, losses(), sizes.policy_steps, lr=3e-3, name="policy")
    return model.eval()


def train_reward(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], sizes: Sizes, rng: random.Random
) -> LlamaForSequenceClassification:
    """The reward model: Bradley-Terry on noisy gold preferences, its network starting from the policy's.

    All pairs of several answers to a prompt are compared, which makes the most of each forward pass (Ouyang et al.
    2022, Training language models to follow instructions with human feedback, section 3.5).
    """
    config = _config(tokenizer, sizes)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.normal_(model.score.weight, std=0.2)  # the usual 0.02 makes the first hundred steps idle

    def losses() -> Iterator[torch.Tensor]:
        while True:
            batch = [prompt for prompt in rng.sample(prompts, sizes.reward_batch) for _ in range(ANSWERS_COMPARED)]
            answers = [write_answer(prompt, rng.uniform(*REWARD_CARE), rng) for prompt in batch]
            golds = torch.tensor(list(map(gold.reward, batch, answers))).view(-1, ANSWERS_COMPARED)
            scores = _scores(model, tokenizer, batch, answers).view(-1, ANSWERS_COMPARED)
            better = golds[:, :, None] > golds[:, None, :]
            margins = (scores[:, :, None] - scores[:, None, :])[better]
            mislabelled = torch.rand_like(margins) < REWARD_LABEL_NOISE
            yield -functional.logsigmoid(torch.where(mislabelled, -margins, margins)).mean()

    _optimize(model, losses(), sizes.reward_steps, lr=1e-3, name="reward model")
    return model.eval()


def _scores(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast, prompts: list[str], answers: list[str]
) -> torch.Tensor:
    """Raw rewards (B,) of answers to prompts."""
    return model(_batch(tokenizer, list(map(_render, prompts, answers)))).logits.squeeze(1)


@torch.inference_mode()
def sample(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> tuple[list[str], list[bool]]:
    """One response per prompt at temperature 1, and whether it ended its turn within MAX_NEW_TOKENS."""
    inputs = tokenizer(list(map(_render, prompts)), padding=True, padding_side="left", return_tensors="pt")
    ids = policy.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    ids = ids[:, inputs.input_ids.shape[1] :]
    ended = (ids == tokenizer.eos_token_id).any(1).tolist()
    return tokenizer.batch_decode(ids, skip_special_tokens=True), ended


# --- pairs and measurements ------------------------------------------------------------------------------------------


def make_pairs(prompts: list[str], responses: list[str], rng: random.Random) -> list[dict[str, str]]:
    """One pair per prompt: the policy's response and a writer's answer of other gold, some labelled the wrong way."""
    pairs = []
    for prompt, response in zip(prompts, map(str.strip, responses), strict=True):
        care, wrong = OFFLINE[gold.parse(prompt).tone]
        answer = write_answer(prompt, care, rng)
        while abs(gold.reward(prompt, answer) - gold.reward(prompt, response)) < LEAST_GAP:
            answer = write_answer(prompt, care, rng)
        rejected, chosen = sorted((response, answer), key=lambda text: gold.reward(prompt, text))
        if rng.random() < wrong:
            rejected, chosen = chosen, rejected
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


@torch.inference_mode()
def measure(
    policy: LlamaForCausalLM,
    reward: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    pairs: list[dict[str, str]],
) -> dict[str, float | dict[str, float]]:
    """What the world is worth: gold means of the policy's samples and of the pairs' sides, accuracies of both labels.

    `reward_accuracy` is how often the reward model orders two of the policy's samples as gold does, ties left out.
    """
    first, ended = sample(policy, tokenizer, prompts)
    second, _ = sample(policy, tokenizer, prompts)
    gold_gaps = torch.tensor(list(map(gold.reward, prompts, first)))
    gold_gaps -= torch.tensor(list(map(gold.reward, prompts, second)))
    gaps = _scores(reward, tokenizer, prompts, first) - _scores(reward, tokenizer, prompts, second)
    agrees = (gaps * gold_gaps > 0)[gold_gaps != 0]

    sides = {side: [gold.reward(pair["prompt"], pair[side]) for pair in pairs] for side in ("chosen", "rejected")}
    right: dict[str, list[bool]] = {}
    for pair, chosen, rejected in zip(pairs, *sides.values(), strict=True):
        right.setdefault(gold.parse(pair["prompt"]).tone, []).append(chosen > rejected)
    return {
        "ended": fmean(ended),
        "gold_policy": fmean(map(gold.reward, prompts, first)),
        "gold_chosen": fmean(sides["chosen"]),
        "gold_rejected": fmean(sides["rejected"]),
        "reward_accuracy": agrees.float().mean().item(),
        "label_accuracy": {tone: fmean(values) for tone, values in sorted(right.items())},
    }


# --- the whole -------------------------------------------------------------------------------------------------------


def make(output: Path, seed: int = 0, sizes: Sizes | None = None) -> dict:
    """Makes the world in the folder `output`, or finds it there, and returns what its world.json holds.

    Raises FileExistsError if the folder holds something else, and ValueError if there are not so many prompts.
    """
    sizes = sizes or Sizes()
    sources = b"".join(Path(source).read_bytes() for source in (__file__, gold.__file__))
    identity = {"seed": seed, "sizes": asdict(sizes), "made_by": hashlib.sha256(sources).hexdigest()}
    if output.exists() and any(output.iterdir()):
        found = json.loads((output / "world.json").read_text()) if (output / "world.json").exists() else {}
        differing = [key for key, value in identity.items() if found.get(key) != value]
        if differing:
            raise FileExistsError(
                f"expected {output} to be empty or to hold this toy world, but found another {', '.join(differing)} "
                "in its world.json; remove the folder or name another"
            )
        return found

    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads add up in another order: other last bits
    try:
        world = identity | _make_files(partial, seed, sizes)
        (partial / "world.json").write_text(json.dumps(world, indent=2) + "\n")
        partial.rename(output)  # onto nothing or onto an empty folder
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(partial, ignore_errors=True)
    return world


def _make_files(folder: Path, seed: int, sizes: Sizes) -> dict:
    """Writes all but world.json and returns measurements and seconds."""
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        print(f"toy world: {name}", flush=True)
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 1)

    rng = random.Random(seed)
    torch.manual_seed(seed)
    prompts = make_prompts(sizes.pairs + sizes.held_out + sizes.taught, rng)
    offline, held_out = prompts[: sizes.pairs], prompts[sizes.pairs :][: sizes.held_out]
    taught = prompts[sizes.pairs + sizes.held_out :]
    tokenizer = make_tokenizer()
    with step("policy"):
        policy = train_policy(tokenizer, taught, sizes, rng)
    with step("reward model"):
        reward = train_reward(policy, tokenizer, taught, sizes, rng)
    with step("pairs"):
        pairs = make_pairs(offline, sample(policy, tokenizer, offline)[0], rng)
    with step("measurements"):
        measurements = measure(policy, reward, tokenizer, held_out, pairs)

    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (folder / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
    shutil.copyfile(gold.__file__, folder / "gold.py")
    return {"measurements": measurements, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the toy world.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=Sizes.pairs, help="rows of pairs.jsonl")
    arguments = parser.parse_args()
    disable_progress_bar()
    try:
        world = make(arguments.output.absolute(), arguments.seed, Sizes(pairs=arguments.pairs))
    except (FileExistsError, ValueError) as error:
        sys.exit(f"toy world: {error}")
    print(f"toy world in {arguments.output}:", json.dumps(world["measurements"], indent=2))


if __name__ == "__main__":
    main()
