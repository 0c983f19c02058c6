"""Tiny models made here, what transformers says about them, and one start of the engines for all tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.inference.engine_process import Remote, start
from toolkit.inference.engine import PolicyEngine, Probe, RewardEngine
from toolkit.inference.settings import EngineSettings

VOCABULARY = 96
CONTEXT = 256
EOS = 1  # in the models' configuration; the stop set of a test is its own

SETTINGS = EngineSettings(dtype="float32", max_model_len=CONTEXT, kv_cache_gib=0.1)


class Model:
    """A model folder, and the same weights in transformers."""

    def __init__(self, folder: Path, seed: int, kind: type = LlamaForCausalLM) -> None:
        self.folder = folder
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,  # of size 32, which vLLM's CPU attention can do
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,  # so that two seeds make two clearly different policies
            tie_word_embeddings=kind is LlamaForCausalLM,
            num_labels=1,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        torch.manual_seed(seed)
        self.model = kind(config).eval()
        self.model.save_pretrained(folder)
        if kind is LlamaForSequenceClassification:  # vLLM's pooling runner insists on a tokenizer
            words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
            words.pre_tokenizer = pre_tokenizers.Whitespace()
            PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)

    @torch.no_grad()
    def logprob(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """Summed log-prob of the response."""
        ids = torch.tensor([[*prompt, *response]])
        logprobs = self.model(ids).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()

    @torch.no_grad()
    def reward(self, ids: Sequence[int]) -> float:
        return self.model(torch.tensor([ids])).logits[0, 0].item()

    @property
    def probes(self) -> list[Probe]:
        sequences = [([5, 6, 7, 8], [9, 10, 11, 2]), (list(range(20, 60)), list(range(60, 90)))]
        return [Probe(prompt, response, self.logprob(prompt, response), "float32") for prompt, response in sequences]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def first(folders: Path) -> Model:
    return Model(folders / "first", seed=1)


@pytest.fixture(scope="session")
def second(folders: Path) -> Model:
    return Model(folders / "second", seed=2)


@pytest.fixture(scope="session")
def judge_model(folders: Path) -> Model:
    return Model(folders / "reward", seed=3, kind=LlamaForSequenceClassification)


@pytest.fixture(scope="session")
def pool(judge_model: Model) -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=start, initargs=(judge_model.folder, SETTINGS)) as pool:
        yield pool


@pytest.fixture
def policy(pool: ProcessPoolExecutor, first: Model) -> PolicyEngine:
    """The policy engine with the first policy loaded."""
    engine = Remote(pool, "policy")
    engine.load(first.folder, first.probes)
    return engine  # type: ignore[return-value]


@pytest.fixture
def reward(pool: ProcessPoolExecutor) -> RewardEngine:
    return Remote(pool, "reward")  # type: ignore[return-value]
