"""Runs the attack gallery and prints how each malicious cache is refused.

python -m tests.attacks            # every attack
python -m tests.attacks bomb       # those with that in their name
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "storage_specs"))
sys.path.insert(0, str(Path(__file__).parent))

from gallery import ATTACKS
from trials import problem_of, refusals


def main(wanted: str, verbose: bool) -> int:
    attacks = [attack for attack in ATTACKS if wanted in attack.name]
    with tempfile.TemporaryDirectory() as folder:
        found = refusals(attacks, Path(folder))
    failed = 0
    for attack, refusal in found.items():
        problem = problem_of(attack, refusal)
        failed += problem is not None
        print(
            f"{'FAILED' if problem else 'refused':8}{attack.name:34}{attack.store:6}{refusal.milliseconds:7.1f} ms "
            f"{refusal.mib:6.1f} MiB  {', '.join(sorted(set(refusal.errors.values()))) or 'was read'}"
        )
        if problem or verbose:
            print(f"        {attack.naive}\n        {problem or refusal.message}")
    print(f"{len(found) - failed} of {len(found)} refused by a typed error within the limits")
    return 1 if failed else 0


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(" ".join(word for word in words if word != "-v"), "-v" in words))
