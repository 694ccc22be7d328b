"""Fine-tune a teacher on a task's documents, with plain `transformers.Trainer`: what a base model cannot do it learns.

Only what the documents score is learned (the answers and their end), as everywhere in the house.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

from storage_specs import cut_windows, render
from storage_specs.document import Document
from storage_specs.errors import NonFiniteLossError

NO_LABEL = -100
ATTENDED = 16 << 20  # pairs of positions at once, whose attention is kept for the backward pass


def fine_tune(
    base: Path,
    documents: Sequence[Document],
    output: Path,
    *,
    batch: int,
    max_length: int,
    epochs: int,
    rate: float,
    seed: int = 0,
) -> None:
    """Write a fine-tuned copy of the model in `base` into the folder `output`, tokenizer included.

    Documents of more than `max_length` tokens keep the last ones, where the answer stands. Raises NonFiniteLossError
    where training ends in weights that are not finite.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    # torch's fused attention gave NaN gradients on an H200: batches padded on the left have rows that see no position.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    examples = [example_of(tokenizer, document, max_length) for document in documents]
    at_once = math.gcd(batch, 2 ** int(math.log2(max(1, ATTENDED // max_length**2))))
    with tempfile.TemporaryDirectory() as scratch:
        config = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=batch // at_once,
            learning_rate=rate,
            warmup_steps=10,
            lr_scheduler_type="cosine",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=seed,
        )
        trainer = Trainer(model, config, data_collator=padded, train_dataset=examples)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    if broken := [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
        raise NonFiniteLossError(f"the fine-tuned teacher's {broken[0]} (and {len(broken) - 1} more) are not finite")
    model.to(torch.bfloat16).save_pretrained(output)
    for file in (*base.glob("*token*"), *base.glob("*.jinja")):  # as they are: a class would rebuild what it thinks fit
        (output / file.name).write_bytes(file.read_bytes())


def example_of(tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int) -> dict[str, np.ndarray]:
    """The window of a document that ends with its answer; labels where it is scored."""
    window = cut_windows(render(tokenizer, document), max_length, max_length // 8)[-1]
    labels = np.full(len(window.ids), NO_LABEL)
    labels[window.logits_index + 1] = window.target_ids
    return {"input_ids": window.ids, "labels": labels}


def padded(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor | int]:
    """Padded on the left, so that all answers end together: only there are logits of the whole vocabulary made."""
    longest = max(len(example["input_ids"]) for example in examples)

    def column(name: str, fill: int) -> torch.Tensor:
        rows = [np.pad(example[name], (longest - len(example[name]), 0), constant_values=fill) for example in examples]
        return torch.from_numpy(np.stack(rows))

    labels = column("labels", NO_LABEL)
    first = int((labels != NO_LABEL).any(0).nonzero()[0])
    kept = longest - first + 1  # the position before the first label predicts it
    sizes = [len(example["input_ids"]) for example in examples]
    mask = np.stack([np.arange(longest) >= longest - size for size in sizes]).astype(np.int64)
    return {
        "input_ids": column("input_ids", 0),
        "attention_mask": torch.from_numpy(mask),
        "labels": labels[:, -kept:],
        "logits_to_keep": kept,
    }
