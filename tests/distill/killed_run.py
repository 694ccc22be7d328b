"""A training run to be killed: `python killed_run.py CACHE STUDENT OUT LOG` logs a digest of every batch it feeds."""

import hashlib
import sys
from pathlib import Path

from training import trainer

from distill.checkpoint import last_whole_checkpoint


def main(cache, student, out, log):
    one = trainer(
        Path(cache),
        Path(student),
        Path(out),
        max_steps=30,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        lr_scheduler_type="cosine",
        loss="ce:1,uld:1.5,mapped:0.5",
    )
    real = one.compute_loss

    def compute_loss(model, inputs, *arguments, **options):
        digest = hashlib.sha256("".join(inputs["doc_ids"]).encode())
        for name in sorted(inputs):
            if hasattr(inputs[name], "numpy"):
                digest.update(inputs[name].numpy().tobytes())
        with Path(log).open("a") as file:
            file.write(f"{one.state.global_step} {digest.hexdigest()}\n")
        return real(model, inputs, *arguments, **options)

    one.compute_loss = compute_loss
    one.train(last_whole_checkpoint(Path(out)))
    one.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
