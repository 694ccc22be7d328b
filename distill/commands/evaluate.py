"""`distill evaluate`: models beside each other on a cache's held-out text, on a task, or on both.

distill evaluate --cache my-cache --task questions.jsonl --model before=student --model after=out --output_file e.json
"""

from collections.abc import Sequence
from pathlib import Path

from distill.commands.flags import add_cache, add_template, check_file, count, json_object, models_of, read_template
from storage_specs.command_line import Parser, parse
from storage_specs.errors import ConfigError

TABLES = (".md", ".html")


def evaluate_parser() -> Parser:
    """The flags of `evaluate`."""
    parser = Parser(
        prog="distill evaluate",
        description="With --cache: bits per byte on its held-out documents, over bytes that the teacher and all models "
        "score. With --task: answers to a JSONL file's prompts (prompt or messages; references, reference or answer; "
        "choices where one of few is to be picked). With --lm_eval_tasks: lm-eval's own. The same command resumes.",
    )
    add = parser.add_argument
    add_cache(parser, required=False)
    add("--task", type=Path, metavar="FILE", help="questions and right answers, a JSON object a line")
    add(
        "--model",
        required=True,
        action="append",
        metavar="NAME=MODEL",
        help="name in the table = hub name or folder; repeat",
    )
    add("--teacher", metavar="MODEL", help="the live teacher beside the models; its bits per byte are the cache's")
    add(
        "--metric",
        action="append",
        default=[],
        metavar="M",
        help="of the task: exact_match | f1 | rouge1 | rouge2 | rougeL | accuracy; repeat (accuracy where there are "
        "choices, rouge where references are long, else exact_match and f1)",
    )
    add("--max_new_tokens", type=count, default=64, metavar="N", help="tokens of the longest answer (default: 64)")
    add("--stop", action="append", default=[], metavar="TEXT", help="an answer ends before it; repeat")
    add("--lm_eval_tasks", metavar="T,...", help="tasks of lm-eval, by lm-eval: hellaswag,arc_easy")
    add("--lm_eval_include_path", type=Path, metavar="DIR", help="task files (YAML) of your own for lm-eval")
    add("--lm_eval_limit", type=count, metavar="N", help="take the first N documents of each of its tasks")
    add(
        "--lm_eval_num_fewshot",
        type=int,
        metavar="N",
        help="examples in front of each document (the task's)",
    )
    add("--sheet", action="store_true", help="measure size, memory, tokens/s and latency on this machine too")
    add("--output_file", type=Path, metavar="FILE.json", help="write the report; answers go to FILE.predictions")
    add("--table", type=Path, metavar="FILE", help="write the table as .md or .html")
    add("--max_length", type=count, default=1024, metavar="N", help="tokens per scored window (default: 1024)")
    add("--batch_size", type=count, default=8, metavar="N", help="windows or prompts per forward pass (default: 8)")
    add("--max_documents", type=count, metavar="N", help="take the first N held-out documents")
    add("--exclude_documents", type=Path, metavar="FILE", help="leave these held-out documents out (a doc_id a line)")
    add("--max_examples", type=count, metavar="N", help="take the first N examples of the task")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        metavar="D",
        help="of the weights in memory (default: bfloat16 on a GPU, float32 elsewhere)",
    )
    add_template(parser, "the models'")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code. Raises what `distill.evaluation.evaluate` raises."""
    namespace, _ = parse(evaluate_parser(), arguments)
    models = models_of(namespace.model)
    check_file("--output_file", namespace.output_file)
    check_file("--table", namespace.table)
    if namespace.table is not None and namespace.table.suffix not in TABLES:
        raise ConfigError(f"--table {namespace.table}: its name must end in {' or '.join(TABLES)}")
    template = read_template(namespace.chat_template)
    template_kwargs = json_object("--chat_template_kwargs", namespace.chat_template_kwargs)
    if namespace.lm_eval_tasks is None and namespace.lm_eval_include_path is not None:
        raise ConfigError("--lm_eval_include_path without --lm_eval_tasks: name the tasks to run")
    from distill.evaluation.lm_eval_tasks import LmEvalTasks
    from distill.evaluation.tasks import read_task

    task = None if namespace.task is None else read_task(namespace.task)
    lm_eval = None
    if namespace.lm_eval_tasks is not None:
        lm_eval = LmEvalTasks(
            [name.strip() for name in namespace.lm_eval_tasks.split(",") if name.strip()],
            include_path=namespace.lm_eval_include_path,
            limit=namespace.lm_eval_limit,
            num_fewshot=namespace.lm_eval_num_fewshot,
        )
    from distill.evaluation.answering import Answering
    from distill.evaluation.evaluate import Evaluation, evaluate
    from distill.evaluation.report_format import as_html, as_markdown, as_text
    from distill.exclusions import Exclusions, read_exclusions
    from distill.text_files import write_text
    from storage_specs.reader import open_cache

    cache = None if namespace.cache is None else open_cache(namespace.cache, corpus=namespace.corpus)
    excluded = None
    if (listed := namespace.exclude_documents) is not None:
        if cache is None:
            raise ConfigError("--exclude_documents without --cache: it names a cache's documents")
        excluded = Exclusions(cache, read_exclusions(listed), listed)
    evaluation = Evaluation(
        models=models,
        teacher=namespace.teacher,
        cache=cache,
        task=task,
        lm_eval=lm_eval,
        sheet=namespace.sheet,
        metrics=tuple(namespace.metric),
        max_documents=namespace.max_documents,
        excluded=excluded,
        max_examples=namespace.max_examples,
        dtype=namespace.dtype,
        how=Answering(
            max_new_tokens=namespace.max_new_tokens,
            stop=tuple(namespace.stop),
            batch_size=namespace.batch_size,
            max_length=namespace.max_length,
            chat_template=template,
            chat_template_kwargs=template_kwargs,
        ),
    )
    report = evaluate(evaluation, namespace.output_file)
    print(as_text(report))
    if namespace.table is not None:
        html = namespace.table.suffix == ".html"
        write_text(namespace.table, as_html(report, "Evaluation") if html else as_markdown(report))
    return 0
