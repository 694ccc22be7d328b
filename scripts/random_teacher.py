"""Random models of two layers under a real tokenizer, all of it or its first words, for tests of the machinery."""

import json
import shutil
from pathlib import Path
from typing import Any


def make_random_teacher(
    folder: Path, tokenizer_folder: Path, words: int | None = None, *, hidden_size: int = 16, seed: int = 0
) -> Path:
    """An ordinary Hugging Face folder in `folder`: a Llama with the tokenizer of another folder, which has `words`.

    With fewer than it has they are its first ones, and a byte-level BPE whose merges come in the order of its words.
    """
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    for file in [*tokenizer_folder.glob("*token*"), *tokenizer_folder.glob("*.jinja")]:
        shutil.copy(file, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    if words is not None:
        _cut(folder / "tokenizer.json", words)
    save_random_llama(
        folder,
        tokenizer,
        seed,
        vocab_size=words or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        initializer_range=0.3,
    )
    return folder


def save_random_llama(folder: Path, tokenizer: Any, seed: int, **config: Any) -> None:
    """A Llama of two layers that speaks a tokenizer's words, 16 wide where `config` does not say otherwise."""
    import torch
    import transformers

    torch.manual_seed(seed)
    small = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small | config)).save_pretrained(folder)


def _cut(file: Path, words: int) -> None:
    """Leave only the first words and the merges that make them."""
    tokenizer = json.loads(file.read_text(encoding="utf8"))
    model = tokenizer["model"]
    model["vocab"] = {word: number for word, number in model["vocab"].items() if number < words}
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) in model["vocab"]]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf8")
