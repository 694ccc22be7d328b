"""`distill train`: train a student on a cache, by the losses of --loss; the same command resumes an interrupted run."""

import argparse
from collections.abc import Sequence

from distill.commands.flags import add_cache, add_template, read_template
from storage_specs.command_line import Parser, parse

RUN = ("model_name_or_path", "cache", "corpus", "cache_dir", "cache_bytes", "exclude_documents", "dtype")
EXPECTED = ("cache_id", "teacher_name", "teacher_tokenizer_digest", "corpus_digest")


def train_parser() -> Parser:
    """The flags of `train` that are its own or most used; `DistillationConfig` holds defaults and checks values."""
    parser = Parser(
        prog="distill train",
        description="Train a student on a cache, by the losses of --loss. The same command resumes an interrupted run.",
        epilog="Every other field of transformers.TrainingArguments is a flag too: --bf16, --max_grad_norm 1 ...",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, metavar="MODEL", help="hub name or local folder of the student")
    add_cache(parser)
    add("--cache_dir", metavar="DIR", help="keep on this disk what is read of a remote cache ($TEACH_ONCE_CACHE_DIR)")
    add("--cache_bytes", type=int, metavar="N", help="at most that much of it ($TEACH_ONCE_CACHE_BYTES, 32 GiB)")
    add("--exclude_documents", metavar="FILE", help="neither train on nor hold out these (doc_ids, a line each)")
    add("--output_dir", required=True, metavar="DIR", help="checkpoints and the trained student")
    add(
        "--loss",
        metavar="MIX",
        help="losses and weights: ce, uld, mapped, hybrid, likelihood; kl, jsd with the teacher's tokenizer "
        "(ce:1,mapped:1; the paper's, which needs no ids: ce:1,uld:1.5)",
    )
    add(
        "--mapping",
        metavar="M",
        help="a teacher's id is the student's word: first_token = of its bytes | equal_bytes = only a whole one "
        "(first_token)",
    )
    add(
        "--align",
        metavar="MODE",
        help="boundary = same byte in both tokenisations | positional = i-th with i-th | merge = groups of tokens over "
        "the same bytes, by the chain rule (boundary)",
    )
    add("--skip_numerals", action="store_true", help="leave the teacher's rows before decimal digits out")
    add(
        "--loss_normalization",
        metavar="N",
        help="tokens = mean over a step's positions | samples = of documents' means (tokens)",
    )
    add(
        "--max_length",
        metavar="N",
        help="tokens per window; longer documents become several, nothing is cut off (1024)",
    )
    add("--window_overlap", metavar="N", help="tokens of context that a later window repeats (max_length / 8)")
    add_template(parser, "the tokenizer's")
    add(
        "--dtype",
        metavar="D",
        help="weights in memory: float32 | bfloat16 | float16 | auto (float32; --bf16 = mixed precision)",
    )
    add("--use_peft", action="store_true", help="train LoRA adapters and nothing else")
    add("--lora_r", metavar="R", help="rank of the adapters (16)")
    add("--lora_alpha", metavar="A", help="scale of the adapters, times 1 / lora_r (32)")
    add("--lora_dropout", metavar="P", help="dropout in front of the adapters (0.05)")
    add(
        "--lora_target_modules",
        nargs="+",
        metavar="M",
        help="modules with adapters, or all-linear (peft's for the model)",
    )
    add("--packing", action="store_true", help="several windows in one row of max_length tokens, kept apart")
    add("--on_corrupt", metavar="DO", help="a shard that breaks: stop with a checkpoint | quarantine it (stop)")
    add("--accept_repaired", action="store_true", help="resume on a repair of the cache that the run began with")
    add("--max_steps", metavar="N", help="optimisation steps; without it --num_train_epochs (3) counts")
    add("--per_device_train_batch_size", metavar="N", help="documents per micro-batch and process (8)")
    add("--gradient_accumulation_steps", metavar="N", help="micro-batches per optimisation step (1)")
    add("--learning_rate", metavar="R", help="peak learning rate (5e-5)")
    add("--eval_strategy", metavar="S", help="held-out bits per byte while training: no | steps | epoch (no)")
    add("--eval_steps", metavar="N", help="steps between two of these")
    add("--probe_steps", metavar="N", help="steps between two probes of what the teacher's losses do (0 = never)")
    add("--look_ahead_steps", metavar="N", help="at evaluations, so many steps of CE alone against the mixture's (0)")
    add("--save_steps", metavar="N", help="steps between checkpoints (500)")
    add("--seed", metavar="N", help="decides the order of documents (42)")
    for name in EXPECTED:
        add(f"--{name}", metavar="X", help=f"refuse a cache whose {name.replace('_', ' ')} is another")
    return parser


def run(arguments: Sequence[str]) -> int:
    def field_names() -> list[str]:
        from distill.config import DistillationConfig

        return list(DistillationConfig.__dataclass_fields__)

    namespace, extras = parse(train_parser(), arguments, field_names)
    values = {name: value for name, value in vars(namespace).items() if name != "config"} | extras
    expected = {name: values.pop(name) for name in EXPECTED if name in values}
    own = {name: values.pop(name) for name in RUN if name in values}
    if "chat_template" in values:
        values["chat_template"] = read_template(values["chat_template"])
    from distill.train import TrainingRun, make_config, train

    train(TrainingRun(**own, config=make_config(values), expected=expected))
    return 0
