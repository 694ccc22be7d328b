"""A training run to be killed: it logs a digest of every batch that it feeds, a line each."""

import hashlib
import threading
from pathlib import Path

from training import trainer

from distill.checkpoint import last_whole_checkpoint

STEPS, MICRO_BATCHES = 30, 2


def train_and_log(cache: Path, student: Path, out: Path, log: Path, hold: int | None = None) -> None:
    """Train from the last whole checkpoint on; after `hold` lines stand still, until somebody kills this process."""
    one = trainer(
        cache,
        student,
        out,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        lr_scheduler_type="cosine",
        loss="ce:1,uld:1.5,mapped:0.5",
    )
    real, lines = one.compute_loss, 0

    def compute_loss(model, inputs, *arguments, **options):
        nonlocal lines
        digest = hashlib.sha256("".join(inputs["doc_ids"]).encode())
        for name in sorted(inputs):
            if hasattr(inputs[name], "numpy"):
                digest.update(inputs[name].numpy().tobytes())
        with log.open("a") as file:
            file.write(f"{one.state.global_step} {digest.hexdigest()}\n")
        lines += 1
        if lines == hold:
            threading.Event().wait()
        return real(model, inputs, *arguments, **options)

    one.compute_loss = compute_loss
    one.train(last_whole_checkpoint(out))
    one.save_model()
