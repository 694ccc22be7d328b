"""The transformers engine against a brute-force float32 forward pass, position by position, on both real models.

The brute force knows nothing of `render`, windows or blocks: ids straight from the tokenizer, one `log_softmax` over
all positions, one full sort per position.

Legend: L tokens, R rows, V vocabulary, K top-k ranks.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from cache_builder.engines import choose_engine, make_engine
from cache_builder.engines.base import EngineConfig, WindowScores, window_scores
from cache_builder.rows import Cutter
from storage_specs.document import text_document
from storage_specs.errors import ConfigError, EngineError

K = 64
# dtype: (largest difference of a probability and of the tail mass, of a gold log-probability in nats), against float32.
# float32: 2.2e-6 was seen of a probability of 0.34, on a processor whose kernels sum in another order.
TOLERANCES = {"float32": (5e-6, 5e-5), "bfloat16": (0.1, 1.0)}
TEXT = "The river Aare — 288 km long — flows through Bern.\n日本語 and e\u0301, 😀!"


class BruteForce:
    """log p (L, V) float64 of a model in float32, over explicit ids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizers: dict[bool, Any] = {}

    def cutter(self, with_bos: bool, **values: int) -> Cutter:
        """Gemma's tokenizer puts BOS in front unless its post-processor is lost, SmolLM2's where it is told to."""
        bos_token = "<|endoftext|>" if with_bos and not self.is_gemma else None
        tokenizer = self.tokenizer(bare=self.is_gemma and not with_bos)
        return Cutter(tokenizer=tokenizer, chat_template=None, chat_template_kwargs={}, bos_token=bos_token, **values)

    def tokenizer(self, bare: bool) -> Any:
        """Loaded once each, as Gemma's takes seconds; a bare one puts nothing around a text."""
        if bare not in self.tokenizers:
            self.tokenizers[bare] = transformers.AutoTokenizer.from_pretrained(self.folder)
            if bare:
                self.tokenizers[bare].backend_tokenizer.post_processor = tokenizers.processors.Sequence([])
        return self.tokenizers[bare]

    def ids(self, text: str, with_bos: bool) -> list[int]:
        """Text between BOS (Gemma's id 2, SmolLM2's 0), where wanted, and EOS."""
        bos = [2 if self.is_gemma else 0] if with_bos else []
        body = self.tokenizer(bare=False)(text, add_special_tokens=False)["input_ids"]
        return [*bos, *body, self.model.config.eos_token_id]

    @property
    def is_gemma(self) -> bool:
        return self.model.config.model_type == "gemma3_text"

    def log_probs(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    def config(self, **values: Any) -> EngineConfig:
        defaults = {"dtype": "float32", "max_model_len": 512, "k": K, "vocab_size": self.model.config.vocab_size}
        return EngineConfig(model=str(self.folder), **defaults | values)


@pytest.fixture(scope="module", params=["smollm2_path", "gemma_path"])
def brute_force(request: pytest.FixtureRequest) -> BruteForce:
    return BruteForce(request.getfixturevalue(request.param))


def assert_agrees(scores: WindowScores, ids: list[int], log_probs_LV: np.ndarray, dtype: str) -> None:
    """Row r of `scores` is what position r says of token r + 1."""
    atol, gold_atol = TOLERANCES[dtype]
    rows = len(ids) - 1
    assert scores.probs.shape == scores.token_ids.shape == (rows, K)
    assert (scores.probs.dtype, scores.token_ids.dtype) == (np.float32, np.int64)
    for row in range(rows):
        sorted_V = np.sort(np.exp(log_probs_LV[row]))[::-1]
        np.testing.assert_allclose(scores.probs[row], sorted_V[:K], rtol=0, atol=atol)
        np.testing.assert_allclose(scores.tail_mass[row], sorted_V[K:].sum(), rtol=0, atol=4 * atol)
        np.testing.assert_allclose(
            np.exp(log_probs_LV[row][scores.token_ids[row]]), scores.probs[row], rtol=0, atol=atol
        )
        np.testing.assert_allclose(scores.gold_logprob[row], log_probs_LV[row, ids[row + 1]], rtol=0, atol=gold_atol)
        assert len(set(scores.token_ids[row])) == K
    assert (np.diff(scores.probs, axis=1) <= 0).all()


@pytest.mark.parametrize(("dtype", "own_prefix"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_every_row_equals_the_brute_force_forward(brute_force: BruteForce, dtype: str, own_prefix: bool) -> None:
    """With and without BOS; bfloat16 with what the model expects only: its own rounding moves SmolLM2's row behind a
    BOS by 0.13, in a plain bfloat16 forward just as in the engine."""
    with_bos = brute_force.is_gemma == own_prefix
    engine = make_engine("transformers", brute_force.config(dtype=dtype))
    cutter = brute_force.cutter(with_bos, capacity=engine.config.capacity, overlap=8)
    (window,) = cutter.windows(text_document(TEXT))
    ids = brute_force.ids(TEXT, with_bos)
    assert window.ids.tolist() == ids
    (scores,) = engine.score([window])
    assert_agrees(scores, ids, brute_force.log_probs(ids), dtype)
    description = engine.describe()
    assert description["name"] == "transformers"
    assert (description["dtype"], description["attention_backend"]) == (dtype, "sdpa")


@pytest.mark.parametrize("with_bos", [True, False], ids=["bos", "no_bos"])
def test_windows_of_a_long_document_equal_the_brute_force_forward_of_each(
    brute_force: BruteForce, with_bos: bool
) -> None:
    """Every scored token has exactly one row, predicted from the prefix and at least `overlap` tokens before it."""
    overlap, text = 5, TEXT * 2
    ids = brute_force.ids(text, with_bos)
    prefix = ids[:1] if with_bos else []
    body = ids[len(prefix) :]
    engine = make_engine("transformers", brute_force.config(max_model_len=24))
    cutter = brute_force.cutter(with_bos, capacity=23, overlap=overlap)
    windows = cutter.windows(text_document(text))
    assert len(windows) > 2
    position = 0 if prefix else 1
    for window, scores in zip(windows, engine.score(windows), strict=True):
        start = position - int(window.logits_index[0]) - 1 + len(prefix)
        inside = prefix + body[start : start + len(window.ids) - len(prefix)]
        assert window.ids.tolist() == inside
        assert len(inside) <= 23
        assert start == 0 or position - start >= overlap
        log_probs_LV = brute_force.log_probs(inside)
        for row, index in enumerate(window.logits_index):
            assert inside[index + 1] == body[position]
            expected_V = np.sort(np.exp(log_probs_LV[index]))[::-1]
            np.testing.assert_allclose(scores.probs[row], expected_V[:K], rtol=0, atol=TOLERANCES["float32"][0])
            np.testing.assert_allclose(scores.gold_logprob[row], log_probs_LV[index, body[position]], rtol=0, atol=5e-5)
            position += 1
    assert position == len(body)


def test_window_scores_orders_equal_probabilities_by_id_and_keeps_the_tail() -> None:
    logprobs_RK = np.log(np.array([[0.25, 0.5, 0.125, 0.125]], dtype=np.float32))
    scores = window_scores(np.array([-0.5], np.float32), logprobs_RK[:, [2, 0, 3, 1]], np.array([[9, 4, 3, 1]]))
    assert scores.token_ids.tolist() == [[1, 4, 3, 9]]
    assert scores.tail_mass.tolist() == [0.0]
    assert window_scores(np.zeros(1), logprobs_RK[:, :2], np.array([[4, 1]])).tail_mass.tolist() == [0.25]


def test_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(EngineError, match="not finite"):
        window_scores(np.array([np.nan]), np.zeros((1, 1)), np.zeros((1, 1), np.int64))
    with pytest.raises(EngineError, match=r"sum to 2\.0"):
        window_scores(np.zeros(1), np.zeros((1, 2)), np.zeros((1, 2), np.int64))


def test_config_and_choice_are_checked(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"model": str(smollm2_path), "dtype": "float32", "max_model_len": 8, "vocab_size": 49152}
    with pytest.raises(ConfigError, match="k is 49153, but must be from 1 to the teacher's vocabulary size, 49152"):
        EngineConfig(**values, k=49153)
    with pytest.raises(ConfigError, match="gpu_memory_utilization: an argument of the vllm engine"):
        make_engine("transformers", EngineConfig(**values, k=4, arguments={"gpu_memory_utilization": "0.5"}))
    with pytest.raises(ConfigError, match="engine is 'llama'"):
        choose_engine("llama")
    monkeypatch.setattr("cache_builder.engines._has_gpu", lambda: False)
    assert choose_engine("auto") == "transformers"
    monkeypatch.setattr("cache_builder.engines._has_gpu", lambda: True)
    monkeypatch.setattr("cache_builder.engines.find_spec", lambda name: name)
    assert choose_engine("auto") == "vllm"
