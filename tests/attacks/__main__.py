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
from trials import LIMIT_MIB, LIMIT_MILLISECONDS, refusals


def main(wanted: str) -> int:
    attacks = [attack for attack in ATTACKS if wanted in attack.name]
    with tempfile.TemporaryDirectory() as folder:
        found = refusals(attacks, Path(folder))
    failed = 0
    for attack, refusal in found.items():
        good = refusal.typed and refusal.milliseconds < LIMIT_MILLISECONDS and refusal.mib < LIMIT_MIB
        failed += not good
        print(
            f"{'refused' if good else 'FAILED ':8}{attack.name:34}{attack.store:6}"
            f"{refusal.milliseconds:7.1f} ms {refusal.mib:6.1f} MiB  {refusal.error or 'was read'}"
        )
        if not good:
            print(f"        {refusal.message}")
    print(f"{len(found) - failed} of {len(found)} refused by a typed error within the limits")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
