"""A teacher that loads in no time, for tests of the machinery: two random layers under SmolLM2's real tokenizer."""

import json
import shutil
from pathlib import Path

import torch
import transformers

VOCABULARY = 49152


def make_tiny_teacher(folder: Path, tokenizer_folder: Path, seed: int = 0) -> Path:
    """An ordinary Hugging Face folder in `folder`."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_folder.glob("*token*"):
        shutil.copy(file, folder)
    for file in tokenizer_folder.glob("*.jinja"):
        shutil.copy(file, folder)
    return folder


def write_corpus(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf8")
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: {relative name: bytes}."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
