"""Keep the first layers of a student: a smaller, broken model with much to learn, fast enough for two cores.

    python scripts/cut_student.py HuggingFaceTB/SmolLM2-135M student-10 --layers 10

Writes an ordinary model folder with the tokenizer; one that is there already is kept if it was made in the same way.
"""

import argparse
import json
import sys
from pathlib import Path


def cut_student(student: str, layers: int, output: Path) -> Path:
    """The first `layers` layers of a student, with its tokenizer, as an ordinary model folder (0 = all of them)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    # The report of weights that were not loaded is the purpose here, and the bars would only blink.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    made_from = {"student": student, "layers": layers}
    record = output / "made_from.json"
    if record.exists() and json.loads(record.read_text(encoding="utf8")) != made_from:
        sys.exit(f"error: {output} holds another student: {record.read_text(encoding='utf8')}; choose another --output")
    if not record.exists():
        keep = {"num_hidden_layers": layers} if layers else {}
        model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, **keep)
        scratch = output.with_name(f".{output.name}")
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(student).save_pretrained(scratch)
        (scratch / record.name).write_text(json.dumps(made_from), encoding="utf8")
        scratch.rename(output)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="hub name or local folder")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--layers", type=int, default=10, help="first layers kept; 0 keeps all (default: 10)")
    options = parser.parse_args()
    cut_student(options.student, options.layers, options.output)


if __name__ == "__main__":
    main()
