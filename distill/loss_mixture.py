"""`--loss ce:1,mapped:1`: which losses a run minimises, with what weights, and what each of them needs.

| name         | what is compared                                                    | needs                       |
|--------------|---------------------------------------------------------------------|-----------------------------|
| `ce`         | nothing: cross entropy on the text                                  |                             |
| `uld`        | sorted values, L1 (`distill.losses`, `distill.merged`)              |                             |
| `mapped`     | the teacher's words as student words, KL (`distill.losses`)         | ids                         |
| `hybrid`     | `mapped`, and sorted values on what has no word (`distill.hybrid`)  | ids                         |
| `likelihood` | the probability of the text between shared boundaries               |                             |
|              | (`distill.likelihood`)                                              |                             |
| `kl`, `jsd`  | the same words (`distill.same_tokenizer`)                           | ids, the teacher's          |
|              |                                                                     | tokenizer                   |
"""

import math
from dataclasses import dataclass

from storage_specs.command_line import nearest
from storage_specs.errors import ConfigError

__all__ = ["LOSSES", "LossMixture"]

LOSSES = ("ce", "uld", "mapped", "hybrid", "likelihood", "kl", "jsd")
_NEED_IDS = {"mapped", "hybrid", "kl", "jsd"}
_SAME_TOKENIZER = {"kl", "jsd"}
# Compared where both sides have read the same text; `merge` compares groups, behind which they have not.
_NO_MERGE = _NEED_IDS


@dataclass(frozen=True)
class LossMixture:
    """Losses and their weights: {name: weight}, weights above 0, in the order of `LOSSES`."""

    weights: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> "LossMixture":
        """From `name:weight,name:weight`; a weight of 0 leaves the name out. Raises ConfigError."""
        weights: dict[str, float] = {}
        for part in str(text).split(","):
            name, colon, number = (piece.strip() for piece in part.partition(":"))
            if name not in LOSSES:
                raise ConfigError(
                    f"--loss {text!r}: unknown loss {name!r}{nearest(name, LOSSES)} (known: {', '.join(LOSSES)})"
                )
            if name in weights:
                raise ConfigError(f"--loss {text!r}: {name} is named twice: give it one weight")
            weights[name] = _weight(text, name, number if colon else "")
        kept = tuple((name, weights[name]) for name in LOSSES if weights.get(name))
        if not kept:
            raise ConfigError(f"--loss {text!r}: all weights are 0: nothing would be learned")
        mixture = cls(kept)
        if mixture.needs_same_tokenizer and (others := {"mapped", "hybrid"} & set(mixture.names)):
            raise ConfigError(
                f"--loss {text!r}: kl and jsd are for the teacher's own tokenizer, {' and '.join(sorted(others))} for "
                "another one: leave out what is not for this student"
            )
        return mixture

    def __getitem__(self, name: str) -> float:
        """The weight of a loss, 0 where it is not part of the mixture."""
        return dict(self.weights).get(name, 0.0)

    def __str__(self) -> str:
        return ",".join(f"{name}:{weight:g}" for name, weight in self.weights)

    @property
    def names(self) -> tuple[str, ...]:
        """The losses of the mixture."""
        return tuple(name for name, _ in self.weights)

    @property
    def of_teacher(self) -> tuple[str, ...]:
        """The losses that read the cache's rows; none = plain cross entropy."""
        return tuple(name for name in self.names if name != "ce")

    @property
    def needs_ids(self) -> bool:
        """Whether the teacher's ids are read."""
        return bool(_NEED_IDS & set(self.names))

    @property
    def needs_same_tokenizer(self) -> bool:
        """Whether the student must have the teacher's tokenizer."""
        return bool(_SAME_TOKENIZER & set(self.names))

    @property
    def not_merged(self) -> tuple[str, ...]:
        """The losses that cannot be computed with `--align merge`."""
        return tuple(name for name in self.names if name in _NO_MERGE)


def _weight(text: str, name: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ConfigError(f"--loss {text!r}: {name}:{number} must be {name}:WEIGHT, a finite number of at least 0")
    return weight
