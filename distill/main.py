"""`distill COMMAND ...`: students that learn from a cache.

    distill train --model_name_or_path HuggingFaceTB/SmolLM2-135M --cache my-cache --output_dir student
    distill align-report --cache my-cache --student HuggingFaceTB/SmolLM2-135M --html report.html
    distill evaluate --cache my-cache --model before=HuggingFaceTB/SmolLM2-135M --model after=student
    distill review --cache my-cache --model after=student --output_file sheet.html
    distill bench reader my-cache

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.bench import bench
from distill.review_command import review
from storage_specs.command_line import Parser, nearest, parse, run
from storage_specs.errors import ConfigError

SUMMARY = {
    "train": "train a student on a cache; the same command resumes",
    "align-report": "what a student would learn from a cache, and where not, before anything is trained",
    "evaluate": "held-out bits per byte of students and of the teacher",
    "review": "the documents about which student and teacher disagree most, for human reviewers",
    "bench": "how fast a cache is read on this machine",
}
RUN = ("model_name_or_path", "cache", "corpus", "cache_dir", "cache_bytes", "exclude_documents", "dtype")
EXPECTED = ("cache_id", "teacher_name", "teacher_tokenizer_digest", "corpus_digest")


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code. Raises TeachOnceError for what the user can mend."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, SUMMARY))
        print("usage: distill COMMAND ...\n")
        print("\n".join(f"  {name:{width}}  {line}" for name, line in SUMMARY.items()))
        print("\ndistill COMMAND --help lists the command's flags (dashes and underscores are the same)")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in SUMMARY:
        raise ConfigError(f"distill: unknown command {command!r}{nearest(command, SUMMARY)}")
    commands = {
        "train": _train,
        "align-report": _align_report,
        "evaluate": _evaluate,
        "review": review,
        "bench": bench,
    }
    return commands[command](rest)


def entry() -> None:
    """The console script."""
    run(main)


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
    add("--cache", required=True, metavar="PLACE", help="a finished cache: folder or URL (s3://, gs://, az://, hf://)")
    add("--corpus", metavar="PATH", help="the texts of a cache that keeps none: what it was built from")
    add("--cache_dir", metavar="DIR", help="keep on this disk what is read of a remote cache ($TEACH_ONCE_CACHE_DIR)")
    add("--cache_bytes", type=int, metavar="N", help="at most that much of it ($TEACH_ONCE_CACHE_BYTES, 32 GiB)")
    add("--exclude_documents", metavar="FILE", help="neither train on nor hold out these (doc_ids, a line each)")
    add("--output_dir", required=True, metavar="DIR", help="checkpoints and the trained student")
    add(
        "--loss",
        metavar="MIX",
        help="losses and weights: ce, uld, mapped, hybrid, likelihood; kl, jsd with the teacher's tokenizer "
        "(ce:1,uld:1.5, the paper's)",
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
    add("--chat_template", type=Path, metavar="FILE", help="Jinja template for chats, instead of the tokenizer's own")
    add("--chat_template_kwargs", metavar="JSON", help="arguments of the template")
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
    add("--save_steps", metavar="N", help="steps between checkpoints (500)")
    add("--seed", metavar="N", help="decides the order of documents (42)")
    for name in EXPECTED:
        add(f"--{name}", metavar="X", help=f"refuse a cache whose {name.replace('_', ' ')} is another")
    return parser


def evaluate_parser() -> Parser:
    """The flags of `evaluate`."""
    parser = Parser(
        prog="distill evaluate",
        description="Bits per byte on a cache's held-out documents, over bytes that the teacher and all models score.",
    )
    add = parser.add_argument
    add("--cache", required=True, metavar="PLACE", help="a finished cache: folder or URL (s3://, gs://, az://, hf://)")
    add("--corpus", metavar="PATH", help="the texts of a cache that keeps none: what it was built from")
    add(
        "--model",
        required=True,
        action="append",
        metavar="NAME=MODEL",
        help="name in the table = hub name or folder; repeat",
    )
    add("--output_file", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--max_length", type=_count, default=1024, metavar="N", help="tokens per window (default: 1024)")
    add("--batch_size", type=_count, default=8, metavar="N", help="windows per forward pass (default: 8)")
    add("--max_documents", type=_count, metavar="N", help="take the first N held-out documents")
    add("--chat_template", type=Path, metavar="FILE", help="Jinja template for chats, instead of the models' own")
    add("--chat_template_kwargs", metavar="JSON", help="arguments of the template")
    return parser


def align_report_parser() -> Parser:
    """The flags of `align-report`."""
    parser = Parser(
        prog="distill align-report",
        description="Put a teacher's rows and a student's tokens side by side: and a verdict.",
    )
    add = parser.add_argument
    add("--cache", required=True, metavar="PLACE", help="a finished cache: folder or URL (s3://, gs://, az://, hf://)")
    add("--corpus", metavar="PATH", help="the texts of a cache that keeps none: what it was built from")
    add("--student", required=True, metavar="MODEL", help="hub name or folder; only its tokenizer is loaded")
    add("--html", type=Path, metavar="FILE", help="write the report as one HTML file")
    add("--json", action="store_true", help="print one JSON object")
    add("--max_length", type=int, default=1024, metavar="N", help="tokens per window in training (default: 1024)")
    add("--max_documents", type=int, metavar="N", help="take the first N documents (default: all)")
    add("--chat_template", type=Path, metavar="FILE", help="Jinja template for chats, instead of the tokenizer's own")
    return parser


def _align_report(arguments: Sequence[str]) -> int:
    namespace, _ = parse(align_report_parser(), arguments)
    template = None if namespace.chat_template is None else _read(namespace.chat_template)
    import json

    from distill.alignment_report import alignment_report
    from distill.dataset import CachedDocuments
    from distill.report_format import as_html, as_text
    from distill.students import load_tokenizer
    from storage_specs.reader import open_cache

    cache = open_cache(namespace.cache, corpus=namespace.corpus)
    documents = CachedDocuments(cache, documents=namespace.max_documents)
    facts = alignment_report(
        documents,
        load_tokenizer(namespace.student),
        teacher_digest=documents.cache.manifest.tokenizer.get("digest"),
        max_length=namespace.max_length,
        chat_template=template,
    )
    print(json.dumps(facts, indent=2, ensure_ascii=False) if namespace.json else as_text(facts))
    if namespace.html is not None:
        namespace.html.parent.mkdir(parents=True, exist_ok=True)
        title = f"{documents.cache.manifest.teacher.get('name')} to {namespace.student}"
        namespace.html.write_text(as_html(facts, title), encoding="utf8")
    return 0


def _train(arguments: Sequence[str]) -> int:
    def field_names() -> list[str]:
        from distill.config import DistillationConfig

        return list(DistillationConfig.__dataclass_fields__)

    namespace, extras = parse(train_parser(), arguments, field_names)
    values = {name: value for name, value in vars(namespace).items() if name != "config"} | extras
    expected = {name: values.pop(name) for name in EXPECTED if name in values}
    own = {name: values.pop(name) for name in RUN if name in values}
    if "chat_template" in values:
        values["chat_template"] = _read(values["chat_template"])
    from distill.train import TrainingRun, make_config, train

    train(TrainingRun(**own, config=make_config(values), expected=expected))
    return 0


def _evaluate(arguments: Sequence[str]) -> int:
    namespace, _ = parse(evaluate_parser(), arguments)
    models = {}
    for pair in namespace.model:
        name, equals, model = pair.partition("=")
        if not (name and equals and model) or name == "teacher" or name in models:
            raise ConfigError(f"--model {pair!r}: expected NAME=MODEL, each name once and none of them 'teacher'")
        models[name] = model
    if namespace.output_file is not None:
        _check_output_file(namespace.output_file)
    template = None if namespace.chat_template is None else _read(namespace.chat_template)
    template_kwargs = _json_object("--chat_template_kwargs", namespace.chat_template_kwargs)
    from distill.evaluate import evaluate, table, write_figures
    from storage_specs.reader import open_cache

    figures = evaluate(
        open_cache(namespace.cache, corpus=namespace.corpus),
        models,
        max_length=namespace.max_length,
        batch_size=namespace.batch_size,
        max_documents=namespace.max_documents,
        chat_template=template,
        chat_template_kwargs=template_kwargs,
    )
    print(table(figures))
    if namespace.output_file is not None:
        write_figures(namespace.output_file, figures)
    return 0


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _check_output_file(path: Path) -> None:
    """Make the folder of a file to be written, before the work whose result it takes. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"--output_file {path} is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_file {path}: its folder cannot be made ({error.strerror})") from None


def _json_object(flag: str, value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """A flag's JSON object, or a config file's mapping."""
    import json

    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(f"{flag} {value}: not JSON: {error}") from None
    if parsed is not None and not isinstance(parsed, dict):
        raise ConfigError(f"{flag} {value}: must be a JSON object, {{...}}")
    return parsed


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat_template {path}: cannot be read: {error}") from None
