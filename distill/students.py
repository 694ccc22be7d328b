"""A student on this machine: its tokenizer, its weights whole or not at all, its adapters, its digest."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from distill.config import DistillationConfig
from storage_specs.document import canonical_json
from storage_specs.errors import ConfigError
from storage_specs.model_identity import file_digest, model_digest, weights_digest

ADAPTER_CONFIG = "adapter_config.json"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises ConfigError where there is none; one without a fast backend is refused where its spans are needed."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises no class of its own
        raise ConfigError(f"the tokenizer of {name} cannot be loaded: {error}") from error


def load_config(name: str) -> Any:
    """A model's configuration, read before its weights. Raises ConfigError."""
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # every file format has errors of its own
        raise ConfigError(f"the configuration of the model {name} cannot be loaded: {error}") from error


def load_model(name: str, dtype: str) -> transformers.PreTrainedModel:
    """A causal language model or an encoder-decoder; a folder of LoRA adapters is merged into the model they belong to.

    Raises ConfigError where it cannot be loaded whole.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if is_adapter(name):
        return _with_merged_adapters(name, dtype)
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    kind = _kind_of(load_config(name))
    try:
        model, loading = kind.from_pretrained(name, dtype=wanted, output_loading_info=True)
    except Exception as error:  # every file format has errors of its own
        raise ConfigError(f"the model {name} cannot be loaded as a language model: {error}") from error
    # transformers gives them random values; tied weights that are stored once are not among them
    unread = sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]}))
    if unread:
        raise ConfigError(
            f"the model {name}: {len(unread)} weights are missing from its files or have the wrong shape "
            f"({', '.join(unread[:3])}{', ...' if len(unread) > 3 else ''}): fetch the model again"
        )
    return model


def is_adapter(name: str) -> bool:
    """Whether a folder holds LoRA adapters and not a model."""
    return (Path(name) / ADAPTER_CONFIG).exists()


def _with_merged_adapters(name: str, dtype: str) -> transformers.PreTrainedModel:
    peft, base = _peft(), _base_of(name)
    try:
        return peft.PeftModel.from_pretrained(load_model(base, dtype), name).merge_and_unload()
    except ConfigError as error:
        raise ConfigError(f"the adapters {name}: {error}") from error
    except Exception as error:  # peft's, safetensors', missing files
        raise ConfigError(f"the adapters {name} cannot be loaded: {error}") from error


def with_adapters(model: transformers.PreTrainedModel, config: DistillationConfig) -> Any:
    """The model, or with `use_peft` the model with new LoRA adapters, which alone are trained.

    Raises ConfigError: peft is missing, or there is no such module in the model.
    """
    if not config.use_peft:
        return model
    peft = _peft()
    targets = config.lora_target_modules
    lora = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    try:
        adapted = peft.get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"--lora_target_modules {targets or 'by default'}: {error}") from error
    if config.gradient_checkpointing:
        adapted.enable_input_require_grads()  # frozen embeddings would leave checkpointed blocks without gradients
    return adapted


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA adapters need peft: pip install peft") from None
    return peft


def student_digest(name: str) -> str:
    """What tells a student from another under the same name: its files' digest, or the commit of a hub name.

    Raises ConfigError where there is no such model, or only adapters.
    """
    if is_adapter(name):
        raise ConfigError(
            f"{name} holds LoRA adapters and no model: train from the model that they belong to, or merge them first"
        )
    if not Path(name).is_dir():
        return model_folder(name).name
    try:
        return model_digest(Path(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model {name} cannot be read: {error}") from error


def evaluated_digest(name: str) -> str:
    """The same for a model that is only asked: of adapters, a digest of them and of the model they belong to."""
    if not is_adapter(name):
        return student_digest(name)
    folder = Path(name)
    parts = [file_digest(folder / ADAPTER_CONFIG), weights_digest(folder), student_digest(_base_of(name))]
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def model_folder(name: str) -> Path:
    """Where a model's files are: its folder, or the snapshot of a hub name. Raises ConfigError."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(transformers.utils.cached_file(name, "config.json")).parent
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model {name} cannot be read: {error}") from error


def parameter_count(name: str) -> int:
    """How many parameters a model has, without its weights."""
    config = load_config(_base_of(name) if is_adapter(name) else name)
    with torch.device("meta"):
        return _kind_of(config).from_config(config).num_parameters()


def _kind_of(config: Any) -> type:
    """The class that loads a model of this configuration."""
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def _base_of(adapters: str) -> str:
    """The model that LoRA adapters belong to. Raises ConfigError."""
    peft = _peft()
    try:
        return str(peft.PeftConfig.from_pretrained(adapters).base_model_name_or_path)
    except Exception as error:  # peft's, JSON's
        raise ConfigError(f"the adapters {adapters} cannot be loaded: {error}") from error
