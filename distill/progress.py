"""A training run's progress in student tokens: a bar on a terminal, plain lines elsewhere."""

import sys
from typing import Any, Protocol

from tqdm import tqdm
from transformers import TrainerCallback


class CountsTokens(Protocol):
    """What the bar needs to know: tokens of all ranks that were fed since the process started."""

    tokens_seen: int


class TokenProgress(TrainerCallback):
    """Tokens, rate and time left; one line per log entry, on the main process only."""

    def __init__(self, counts: CountsTokens) -> None:
        self.counts = counts
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.first_step = state.global_step
            # disable=None: quiet where stderr is not a terminal
            disable = True if args.disable_tqdm else None
            self.bar = tqdm(unit="tok", unit_scale=True, desc="train", disable=disable)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            steps = state.global_step - self.first_step
            self.bar.total = self.counts.tokens_seen // steps * (state.max_steps - self.first_step)
            self.bar.update(self.counts.tokens_seen - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.bar is None or not logs or "train_runtime" in logs:
            return
        hidden = ("epoch", "step", "grad_norm", "tokens", "num_input_tokens_seen")
        shown = [f"{name} {value:.4g}" for name, value in logs.items() if name not in hidden]
        if "tokens" in logs:
            shown.append(f"tokens {logs['tokens']:,}")
        self.bar.write(f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
