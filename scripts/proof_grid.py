"""The grid of scripts/proof.py: tasks, students, arms, what a cell is, and in which order cells are measured.

A cell is one training run and its measurements. Each block of the grid first tries every learning rate of each of its
arms on seed 0; where the lowest of them is an arm's best, half of it is tried, too, where the highest, twice it, up to
three times. An arm's other seeds then take the rate that was best on validation documents, which are neither trained on
nor reported. Cells that vary `k_ids` take the rate of the block they vary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

Row = Mapping[str, str]  # of the CSV
DEFAULT_K_IDS = 16


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What beside the learning rate makes a run another: flags of `distill train`, and whose rows it is given.

    rows: "own", or "shuffled" = the teacher's rows of each document at other places of it (the control).
    """

    loss: str
    align: str = "boundary"
    mapping: str = "first_token"
    rows: str = "own"


ARMS = {
    "ce": Arm(loss="ce:1"),
    "uld": Arm(loss="ce:1,uld:1.5"),
    "mapped": Arm(loss="ce:1,mapped:1"),
    "mapped+likelihood": Arm(loss="ce:1,mapped:1,likelihood:1"),
    "uld shuffled": Arm(loss="ce:1,uld:1.5", rows="shuffled"),
    "uld 0.5": Arm(loss="ce:1,uld:0.5"),
    "uld positional": Arm(loss="ce:1,uld:1.5", align="positional"),
    "hybrid": Arm(loss="ce:1,hybrid:1"),
    "likelihood": Arm(loss="ce:1,likelihood:1"),
    "mapped 3": Arm(loss="ce:1,mapped:3"),
    "mapped alone": Arm(loss="mapped:1"),
    "mapped equal_bytes": Arm(loss="ce:1,mapped:1", mapping="equal_bytes"),
    "mapped+uld 0.5": Arm(loss="ce:1,mapped:1,uld:0.5"),
    "mapped shuffled": Arm(loss="ce:1,mapped:1", rows="shuffled"),
}
CORE_ARMS = ("ce", "uld", "mapped", "mapped+likelihood", "uld shuffled")
STRONGER_ARMS = ("mapped 3", "mapped alone")
OTHER_ARMS = tuple(name for name in ARMS if name not in (*CORE_ARMS, *STRONGER_ARMS))


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a task is trained on: documents of the corpus, documents per step, steps, tokens per window.

    test: documents that are reported. max_new_tokens: of an answer, 0 where none is generated.
    """

    documents: int
    batch: int
    steps: int
    max_length: int
    test: int
    max_new_tokens: int = 0


# Steps are the same for every arm and rate. `gpu`: Wikipedia 2 epochs, the tasks about 5
# (BoolQ 2, NarrativeQA 3); `cpu`: what two cores can do.
SCALES: dict[str, dict[str, Training]] = {
    "gpu": {
        "wikipedia": Training(documents=15_029, batch=32, steps=840, max_length=512, test=700),
        "disfl_qa": Training(documents=400, batch=8, steps=200, max_length=512, test=200, max_new_tokens=24),
        "xsum": Training(documents=600, batch=16, steps=170, max_length=768, test=200, max_new_tokens=64),
        "narrative_qa": Training(documents=1800, batch=16, steps=300, max_length=1024, test=400, max_new_tokens=32),
        "dialogues": Training(documents=90, batch=4, steps=100, max_length=1024, test=40, max_new_tokens=192),
        "pubmed_qa": Training(documents=350, batch=8, steps=175, max_length=768, test=200, max_new_tokens=4),
        "boolq": Training(documents=4000, batch=16, steps=450, max_length=512, test=500, max_new_tokens=4),
    },
    "cpu": {
        "wikipedia": Training(documents=1200, batch=8, steps=80, max_length=256, test=48),
        "disfl_qa": Training(documents=160, batch=4, steps=40, max_length=384, test=40, max_new_tokens=16),
    },
    "tiny": {
        "wikipedia": Training(documents=48, batch=4, steps=3, max_length=64, test=4),
        "disfl_qa": Training(documents=8, batch=4, steps=2, max_length=96, test=4, max_new_tokens=4),
        "xsum": Training(documents=8, batch=4, steps=2, max_length=96, test=4, max_new_tokens=4),
    },
}
# A cut student has everything to learn again, a whole one little to gain by large steps.
RATES = {
    "smollm2-10": (1e-3, 2e-3, 4e-3, 8e-3),
    "smollm2-10-healed": (6e-5, 2e-4, 6e-4, 2e-3),
    "smollm2": (3e-5, 1e-4, 3e-4),
}
MOST_STEPS_BEYOND = 3  # the usual rates: where any training does harm the lowest rate stays the best
MANY_EPOCHS_RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # of the cut student: large steps only overfit sooner
# Scales that have no time for more than one.
NOT_TUNED = {"cpu": {"smollm2-10": 2e-3, "smollm2-10-healed": 2e-4, "smollm2": 3e-5}}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run. answers: "given" (the corpus's own), or "teacher" (written by it, mode generate).
    learning_rate: None where other cells' rows have yet to tell it. longer: times the task's steps."""

    scale: str
    task: str
    student: str
    arm: str
    learning_rate: float | None
    seed: int
    answers: str = "given"
    k_ids: int = DEFAULT_K_IDS
    fraction: float = 1.0
    longer: int = 1

    @property
    def training(self) -> Training:
        usual = SCALES[self.scale][self.task]
        return replace(usual, steps=usual.steps * self.longer)

    @cached_property
    def key(self) -> tuple[str, ...]:
        """What tells this cell's row from others, as the CSV spells it."""
        return tuple(_spelled(value) for value in asdict(self).values())

    def __str__(self) -> str:
        varied = [f"k_ids {self.k_ids}"] if self.k_ids != DEFAULT_K_IDS else []
        varied += [f"{self.fraction:.0%} of the documents"] if self.fraction != 1 else []
        varied += ["the teacher's answers"] if self.answers == "teacher" else []
        varied += [f"{self.longer} times the steps"] if self.longer != 1 else []
        name = " / ".join([self.task, self.student, self.arm, *varied])
        rate = "not yet known" if self.learning_rate is None else f"{self.learning_rate:g}"
        return f"{name}  rate {rate} seed {self.seed}"


KEY = tuple(Cell.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Cells that stand in one table. tuned: every rate is tried on seed 0; else it is that of the block they vary.
    rates: where they are others than the student's usual ones."""

    task: str
    student: str
    arms: Sequence[str]
    answers: str = "given"
    k_ids: int = DEFAULT_K_IDS
    fraction: float = 1.0
    longer: int = 1
    tuned: bool = True
    rates: Sequence[float] = ()
    seeds: Sequence[int] = (0, 1, 2)
    core: bool = False

    def rates_at(self, scale: str) -> Sequence[float]:
        """The learning rates that every arm is tried at, ascending."""
        return (NOT_TUNED[scale][self.student],) if scale in NOT_TUNED else self.rates or RATES[self.student]


VARIED = ("task", "student", "answers", "k_ids", "fraction", "longer")  # what all cells of a block have in common


def _blocks() -> tuple[Block, ...]:
    healed, whole = "smollm2-10-healed", "smollm2"
    cut = {"task": "wikipedia", "student": "smollm2-10"}
    few_arms = ("ce", "mapped", "mapped 3", "uld")
    many_epochs = {**cut, "arms": few_arms, "rates": MANY_EPOCHS_RATES}
    other_tasks = ("narrative_qa", "pubmed_qa", "boolq", "dialogues")
    blocks = [
        # The longest cells first. CE overfits at every rate over many epochs, and where text is scarce.
        Block(**many_epochs | {"arms": few_arms[:3]}, longer=4),
        Block(**cut, arms=CORE_ARMS, core=True),
        Block(task="disfl_qa", student=healed, arms=CORE_ARMS, core=True),
        Block(task="xsum", student=healed, arms=CORE_ARMS, core=True),
        Block(**many_epochs, fraction=0.25),
    ]
    # The paper's regime: a whole student, a small set, several epochs, answers that the teacher wrote.
    blocks += [
        Block(task="disfl_qa", student=whole, arms=("ce", "uld", "uld positional", "mapped"), answers=answers)
        for answers in ("teacher", "given")
    ]
    blocks += [
        Block(**cut, arms=STRONGER_ARMS),
        Block(**cut, arms=("mapped 3",), k_ids=64, tuned=False),
        Block(**many_epochs | {"arms": ("mapped alone",)}, longer=4),
        Block(**many_epochs | {"arms": ("mapped 3",)}, longer=4, k_ids=64, tuned=False),
        # Every kind of task before any is complete.
        *[Block(task=task, student=healed, arms=few_arms) for task in other_tasks],
        *[Block(**cut, arms=("mapped",), k_ids=k_ids, tuned=False) for k_ids in (64, 4, 32, 8)],
        Block(task="wikipedia", student=whole, arms=few_arms),
        *[Block(task=task, student=healed, arms=STRONGER_ARMS) for task in ("disfl_qa", "xsum")],
        Block(**many_epochs, longer=4),
        Block(**cut, arms=OTHER_ARMS),
        Block(task="disfl_qa", student=healed, arms=few_arms, fraction=0.25),
        Block(**cut, arms=few_arms, fraction=0.5),
        Block(task="disfl_qa", student=healed, arms=few_arms, fraction=0.5),
    ]
    blocks += [Block(task=task, student=student, arms=CORE_ARMS) for task in other_tasks for student in (healed, whole)]
    blocks += [Block(task=task, student=whole, arms=CORE_ARMS) for task in ("wikipedia", "xsum")]
    return tuple(blocks)


BLOCKS = _blocks()


def cells_of(block: Block, scale: str, rows: Sequence[Row]) -> Iterator[Cell]:
    """The cells of a block in the order in which they are measured."""
    usual = block.rates_at(scale)
    middle_first = sorted(usual, key=lambda rate: rate != usual[len(usual) // 2])
    if block.tuned:
        for rate in middle_first:
            for arm in block.arms:
                yield _cell(block, scale, arm, rate, 0)
        for arm in block.arms:
            for rate in rates_to_try(block, scale, arm, rows):
                if rate not in usual:
                    yield _cell(block, scale, arm, rate, 0)
    for seed in block.seeds[1:] if block.tuned else block.seeds:
        for arm in block.arms:
            tuned = block if block.tuned else replace(block, k_ids=DEFAULT_K_IDS)
            rates = rates_to_try(tuned, scale, arm, rows)
            rate = best_rate([_cell(tuned, scale, arm, rate, 0) for rate in rates], rows)
            yield _cell(block, scale, arm, rate, seed)


def rates_to_try(block: Block, scale: str, arm: str, rows: Sequence[Row]) -> list[float]:
    """The learning rates of an arm, ascending: the block's, and while the best of them is an end, one beyond it."""
    rates = sorted(block.rates_at(scale))
    for _ in range(MOST_STEPS_BEYOND if len(rates) > 1 else 0):
        best = best_rate([_cell(block, scale, arm, rate, 0) for rate in rates], rows)
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
        else:
            break
    return rates


def best_rate(tried: Sequence[Cell], rows: Sequence[Row]) -> float | None:
    """The learning rate of the fewest validation bits per byte; None before all of `tried` have rows."""
    bits = {tuple(row[name] for name in KEY): float(row["validation_bits_per_byte"]) for row in rows}
    if any(cell.key not in bits for cell in tried):
        return None
    return min(tried, key=lambda cell: bits[cell.key]).learning_rate


def _cell(block: Block, scale: str, arm: str, rate: float | None, seed: int) -> Cell:
    varied = {name: getattr(block, name) for name in VARIED}
    return Cell(scale=scale, arm=arm, learning_rate=rate, seed=seed, **varied)


def _spelled(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
