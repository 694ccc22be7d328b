"""What a training run is told: every field of `transformers.TrainingArguments`, and the ones below."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from distill.alignment import MODES
from distill.loss_mixture import LOSSES, LossMixture
from distill.word_map import MAPPINGS
from storage_specs.errors import ConfigError

NORMALIZATIONS = ("tokens", "samples")
ON_CORRUPT = ("stop", "quarantine")
STRATEGIES = ("random", "group_by_length")
METRIC = "bits_per_byte"


@dataclass
class DistillationConfig(TrainingArguments):
    """Training arguments of `CachedDistillationTrainer`. Raises ConfigError for values that cannot be."""

    # The simplest that beat CE on plain text (distill/README.md, "What paid"); the paper's is ce:1,uld:1.5.
    loss: str = field(
        default="ce:1,mapped:1", metadata={"help": f"losses and weights, of {', '.join(LOSSES)} (ce:1,mapped:1)"}
    )
    mapping: str = field(
        default="first_token", metadata={"help": f"which student word a teacher's id is: {' | '.join(MAPPINGS)}"}
    )
    jsd_beta: float = field(default=0.5, metadata={"help": "the teacher's part in the mixture of jsd, in (0, 1)"})
    likelihood_temperature: float = field(
        default=100.0, metadata={"help": "tau of the likelihood loss: probabilities to the power of 1 / tau (100)"}
    )
    probe_steps: int = field(
        default=0,
        metadata={
            "help": "every N steps: the teacher's gradients against CE's, and what both do to held-out text (0 = never)"
        },
    )
    look_ahead_steps: int = field(
        default=0,
        metadata={
            "help": "at each evaluation, try so many steps of CE alone beside as many of the mixture (0 = never; try 4)"
        },
    )
    max_eval_documents: int | None = field(
        default=None, metadata={"help": "--eval_steps scores the first N held-out documents; default all"}
    )
    align: str = field(default="boundary", metadata={"help": f"which positions are compared: {' | '.join(MODES)}"})
    skip_numerals: bool = field(
        default=False, metadata={"help": "leave the teacher's rows before decimal digits out (sorted L1 harms there)"}
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "tokens per window; longer documents become several windows, nothing is cut off"},
    )
    window_overlap: int | None = field(
        default=None, metadata={"help": "tokens of context that a later window repeats; default max_length / 8"}
    )
    packing: bool = field(
        default=False, metadata={"help": "several windows in one row of max_length tokens, kept apart by the model"}
    )
    use_peft: bool = field(default=False, metadata={"help": "train LoRA adapters and nothing else"})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the adapters, times 1 / lora_r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout in front of the adapters"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "modules that get adapters, or all-linear; default: peft's for the model"}
    )
    loss_normalization: str = field(
        default="tokens",
        metadata={
            "help": "tokens: the mean over all positions of a step; samples: the mean of documents' means (paper)"
        },
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja text of the student's chat template, instead of its tokenizer's"}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON arguments of the student's chat template"}
    )
    on_corrupt: str = field(
        default="stop",
        metadata={
            "help": "a shard that breaks during training: stop with a checkpoint | quarantine: leave its documents out "
            "and list them in quarantine.jsonl"
        },
    )
    accept_repaired: bool = field(
        default=False, metadata={"help": "resume on a repair of the cache that the run began with"}
    )
    # 16 x 1,024 tokens take one core 37 ms; each more thread takes Python's lock from the training loop more often.
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "threads that prepare batches (0 = 1); more where data_wait stays above 0.02"}
    )
    # Batches hold documents, not columns; nothing may be removed from them.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay false: batches are whole documents"}
    )
    # A loss that is not finite stops the run here; filtering it out of the log would only cost a second look at it.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "NaN losses end the run with an error"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of the log"})

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs"]  # noqa: RUF012 (HF's own list)

    def __post_init__(self) -> None:
        self._choose_metric()
        try:
            super().__post_init__()
        except Exception as error:  # every backend and integration that it looks for has errors of its own
            raise ConfigError(f"training arguments: {error}") from error
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} is {value}: must be a finite number")
        if self.auto_find_batch_size:
            raise ConfigError("auto_find_batch_size must be false: what a step learns from would depend on the machine")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ConfigError("use_liger_kernel needs the package liger-kernel: install it, or leave the flag out")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: must not be negative")
        if self.max_steps == 0:
            raise ConfigError("max_steps is 0: nothing would be learned (-1 counts by num_train_epochs)")
        if self.max_steps < 0 and self.num_train_epochs <= 0:
            raise ConfigError(f"num_train_epochs is {self.num_train_epochs}: nothing would be learned")
        if self.chat_template_kwargs is not None and not isinstance(self.chat_template_kwargs, dict):
            raise ConfigError(f"chat_template_kwargs is {self.chat_template_kwargs!r}: must be a JSON object, {{...}}")
        if self.label_smoothing_factor:
            raise ConfigError("label_smoothing_factor must be 0: the teacher's distributions are what smooths here")
        self.loss = str(self.mixture)
        if self.mapping not in MAPPINGS:
            raise ConfigError(f"mapping is {self.mapping!r}: must be one of {', '.join(MAPPINGS)}")
        if not 0 < self.jsd_beta < 1:
            raise ConfigError(f"jsd_beta is {self.jsd_beta}: must lie between 0 and 1 (the forward KL is --loss kl:1)")
        if not 0 < self.likelihood_temperature < float("inf"):
            raise ConfigError(f"likelihood_temperature is {self.likelihood_temperature}: must be finite and above 0")
        if self.probe_steps < 0:
            raise ConfigError(f"probe_steps is {self.probe_steps}: must not be negative (0 = never)")
        if self.look_ahead_steps < 0:
            raise ConfigError(f"look_ahead_steps is {self.look_ahead_steps}: must not be negative (0 = never)")
        if self.look_ahead_steps and self.eval_strategy == "no":
            raise ConfigError(
                f"look_ahead_steps is {self.look_ahead_steps}, but eval_strategy is 'no', and a look-ahead is part of "
                "an evaluation: add --eval_strategy steps --eval_steps N, or leave it out"
            )
        if self.max_eval_documents is not None and self.max_eval_documents < 1:
            raise ConfigError(f"max_eval_documents is {self.max_eval_documents}: must be at least 1")
        if self.align not in MODES:
            raise ConfigError(f"align is {self.align!r}: must be one of {', '.join(MODES)}")
        if self.align == "merge" and self.mixture.not_merged:
            raise ConfigError(
                f"align is 'merge' with {' and '.join(self.mixture.not_merged)}: merged rows stand behind different "
                "texts of the two sides, so their words cannot be compared; use --align boundary, or --loss "
                "ce:1,uld:1.5"
            )
        if self.loss_normalization not in NORMALIZATIONS:
            raise ConfigError(
                f"loss_normalization is {self.loss_normalization!r}: must be one of {', '.join(NORMALIZATIONS)}"
            )
        if self.on_corrupt not in ON_CORRUPT:
            raise ConfigError(f"on_corrupt is {self.on_corrupt!r}: must be one of {', '.join(ON_CORRUPT)}")
        if self.train_sampling_strategy not in STRATEGIES:
            raise ConfigError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}: must be one of {', '.join(STRATEGIES)}"
            )
        if self.lora_r < 1 or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_r is {self.lora_r} and lora_dropout {self.lora_dropout}: need at least 1, and [0, 1)"
            )
        if self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}: a window holds at least one token and the next")
        if self.window_overlap is None:
            self.window_overlap = max(1, self.max_length // 8)
        if not 1 <= self.window_overlap < self.max_length:
            raise ConfigError(f"window_overlap is {self.window_overlap}: must be at least 1 and below max_length")
        if self.dataloader_num_workers < 0 or self.dataloader_prefetch_factor is not None:
            raise ConfigError(
                f"dataloader_num_workers is {self.dataloader_num_workers}, dataloader_prefetch_factor "
                f"{self.dataloader_prefetch_factor}: threads of this process prepare batches, always as far ahead: "
                "give a number of threads, and no factor"
            )
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns must be false: batches are whole documents, not columns")

    @property
    def mixture(self) -> LossMixture:
        """What `loss` says."""
        return LossMixture.parse(self.loss)

    def _choose_metric(self) -> None:
        """The only metric there is, and that less of it is better. Raises ConfigError for another."""
        wanted = self.load_best_model_at_end or self.save_strategy == "best"
        if self.metric_for_best_model is None and not wanted:
            return
        metric = (self.metric_for_best_model or METRIC).removeprefix("eval_")
        if metric != METRIC or self.greater_is_better:
            raise ConfigError(
                f"metric_for_best_model is {metric!r}, greater_is_better {self.greater_is_better}: held-out "
                f"{METRIC} is what is measured, and less of it is better; leave both out"
            )
        self.metric_for_best_model, self.greater_is_better = METRIC, False
