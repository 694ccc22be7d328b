"""The loop of distill/README.md runs as it stands, on a tiny cache and student, and learns."""

import contextlib
import io
import re
from pathlib import Path

import distill

README = (Path(distill.__file__).parent / "README.md").read_text(encoding="utf8")


def test_the_readmes_loop_runs_and_learns(cache_path, student_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.split("## In your own loop")[1], re.DOTALL)
    for named, real in (("my-cache", cache_path), ("HuggingFaceTB/SmolLM2-135M", student_path)):
        assert code.count(f'"{named}"') == 1
        code = code.replace(f'"{named}"', repr(str(real)))
    # Long and fast enough to see it learn.
    code = code.replace("range(4):\n    batch", "range(9):\n    batch").replace("lr=1e-3", "lr=1e-2")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "distill/README.md", "exec"), {})
    lines = re.findall(r"step \d+: ce ([\d.]+)  uld ([\d.]+) \(certain to ([\d.]+)\)  mapped ([\d.]+)", said.getvalue())
    assert len(lines) == 9
    assert float(lines[-1][0]) < float(lines[0][0])


def test_every_function_that_the_readme_names_is_public():
    named = set(re.findall(r"`(\w+_loss)`", README))
    losses = ("uld", "merged_uld", "mapped", "hybrid", "likelihood", "kl", "jsd")
    assert named == {f"{loss}_loss" for loss in losses}
    assert named <= set(distill.__all__)
    for name in distill.__all__:
        assert getattr(distill, name).__doc__
