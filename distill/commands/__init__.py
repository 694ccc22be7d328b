"""The commands of `distill`, a module each: `run(arguments)` parses its flags, imports what it needs, and does it."""

SUMMARY = {
    "train": "train a student on a cache; the same command resumes",
    "align-report": "what a student would learn from a cache, and where not, before anything is trained",
    "evaluate": "held-out bits per byte and answers to tasks, of students and of the teacher; the same command resumes",
    "check": "compare two reports of evaluate: exit code 1 where quality fell",
    "review": "the documents about which student and teacher disagree most, for human reviewers",
    "bench": "how fast a cache is read on this machine",
}
