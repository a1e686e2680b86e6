"""What a check of training data finds: all that its tool prints and its report shows.

Lengths are in ids of the tokenizer, or in characters; ids are those of a part by itself, before
anything is cut. Pairs are every chosen with every rejected candidate of a row. Nothing here knows
how a finding was made: `data_checks.py` finds, `data_survey.py` counts, `estimates.py` estimates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from polar_xtuner.records import RowError

FIELDS = ("prompt", "reference", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class DataWarning:
    """Something odd about one row, which training would take."""

    kind: str
    """One of `data_checks.KINDS`, which say what it means."""
    file: str
    line: int
    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.problem} ({self.kind})"


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the texts of a field are; of no text at all, everything is 0."""

    count: int
    min: int
    mean: float
    median: float
    p90: float
    p99: float
    max: int
    edges: tuple[int, ...]
    """0, 1, 2, 4, 8, ...: bin i of the histogram has edges[i] <= length < edges[i + 1]."""
    counts: tuple[int, ...]
    """(edges - 1,) texts of each bin."""


@dataclass(frozen=True, slots=True)
class Giveaway:
    """Something plain to see that tells chosen from rejected answers in a whole data set."""

    feature: str
    """One of `data_checks.FEATURES`, which an answer has or has not."""
    chosen_only: int
    """Pairs of which only the chosen answer has it."""
    rejected_only: int
    """Pairs of which only the rejected answer has it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that the epoch is laid out with; the config's names for them."""

    config: str | None
    """The file they come from, None for POLAR's published limits."""
    max_length: int
    max_response_length: int
    max_packed_length: int
    accumulative_counts: int
    pairs_per_step: int | None
    ranks: int
    """Processes that get packs of their own (GPUs / sequence_parallel_size)."""
    on_bad_row: str
    on_long_group: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU, by the formulas of `estimates.py`; buffers and CUDA's own come on top."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True)
class Estimate:
    """What training would take. Computed, not measured."""

    parameters: int
    trained_parameters: int
    flops: float
    """Operations of an epoch, forward and backward, as the log's `mfu` counts them."""
    epochs: int
    gpus: int
    """ranks * sequence_parallel_size"""
    gpu: str | None
    mfu: float
    """Assumed share of the GPU's peak."""
    seconds: float | None
    """Of an epoch; None without a GPU whose peak is known."""
    zero: int
    """Stage of DeepSpeed's ZeRO; 0 is training without DeepSpeed."""
    memory: Memory


@dataclass(frozen=True, slots=True)
class DataResult:
    """Everything that is known of some files of rows."""

    files: tuple[str, ...]
    rows: int
    """Rows read, good and bad."""
    bad_rows: int
    """Rows that cannot be trained on: `errors` says why."""
    errors: tuple[RowError, ...]
    """All that is wrong, in the order of the files."""
    warnings: tuple[DataWarning, ...]
    """All that is odd, in the order of the files; of each kind the first `data_survey.LISTED`."""
    warning_counts: Mapping[str, int]
    """All warnings of each kind, listed or not, the most frequent kind first."""
    refusals: tuple[str, ...]
    """Why training would refuse the files, a line each; () if it would take them."""

    prompts: int
    """Different prompts."""
    groups: int
    """Different prompts with their reference and wrapper, as they are trained on (in parts where
    one is longer than a pack)."""
    pairs: int
    sources: Mapping[str, int]
    """Good rows of each `source`, "" for rows without one, the largest first."""
    ids: Mapping[str, Lengths]
    """By field (`FIELDS`)."""
    characters: Mapping[str, Lengths]
    """By field (`FIELDS`)."""
    chosen_longer: float
    """Share of the pairs whose chosen candidate has more ids than the rejected one."""
    as_long: float
    """Share of the pairs with as many ids on both sides."""
    cut_rows: int
    """Good rows of which a part is cut to the limits."""

    limits: Limits
    tokens: int
    """Computed in an epoch, shared prefixes once."""
    tokens_alone: int
    """If the two sequences of every pair were computed by themselves."""
    share_ratio: float
    """tokens_alone / tokens"""
    packs: int
    """Of all ranks in an epoch, those that only fill a step included."""
    steps: int
    """Optimizer steps of an epoch."""
    fill: float
    """tokens / (packs * max_packed_length)"""
    estimate: Estimate | None
    """None without a config."""
    giveaways: tuple[Giveaway, ...] = ()
    """What a model could learn in place of what is meant."""

    @property
    def refused(self) -> bool:
        """Whether training would refuse the files."""
        return bool(self.refusals)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and `refused`."""
        return {"refused": self.refused, **asdict(self)}
