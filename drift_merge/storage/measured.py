"""What is recorded of one output tensor: in a run's results, in its journal, in a manifest.

All entries are optional, since methods measure different things; only their names and types are
said here. A record is plain data, and JSON keeps it as it is.
"""

from typing import Literal, TypedDict

StoredKey = Literal["fingerprint", "fingerprint_delta"]  # of a tensor's bytes: a merge's, a prior's
SourceKey = Literal["fingerprint_mllm", "fingerprint_reasoner", "fingerprint_base"]
InputKey = Literal[SourceKey, "fingerprint_reasoners"]


class TensorRecord(TypedDict, total=False):
    """What is recorded of one output tensor. Norms are L2; None: not finite."""

    # What a step measures while it makes the tensor.
    fingerprint: str  # of the bytes written
    fingerprint_scale: str  # of the scales beside them, in a compressed prior
    fingerprint_v: str  # of V, in a prior of low rank; `fingerprint` is then U's
    fingerprint_mllm: str
    fingerprint_reasoner: str  # of a prior's only one
    fingerprint_reasoners: list[str]  # of a merge's, in the order of the step's inputs
    fingerprint_base: str
    norm_delta: float | None
    norm_mllm: float | None
    norm_reasoner: float | None
    cosine: float | None  # of reasoner and mllm, in [-1, 1]
    max_abs_delta: float | None
    equal: float | None  # share of entries of delta that are exactly 0, in [0, 1]
    norm_stored: float | None  # of delta as a compressed or low-rank prior stores it
    cosine_stored: float | None  # of delta and its stored form; None where delta is zero, too
    energy: float  # share of |delta|^2 in the directions that are kept, in [0, 1]
    dtype_mllm: str  # dtype code of the mllm's tensor
    sample_mllm: list[float | None]  # a few of its values, see `maths.measures.positions`
    change_kept: float | None  # fraction of the change that rounding kept, on a sample
    change_kept_error: float  # its standard error, of stochastic rounding
    rounding_noise: float  # |rounded - exact| / |change|, likewise
    matrices: int  # that were taken one by one, by their singular directions; absent if none
    stable_rank: float  # least of its matrices, where the method amplifies what is beyond it
    norm_made: float | None  # of what was made of them, and added
    weights: list[float]  # of the reasoners, as used
    mllm_weight: float
    nonfinite: dict[str, int]  # NaN and Inf by where they are; absent if there are none
    # Of a file that is pulled from the Hub, which the same journal serves.
    digest: str
    # Of a manifest alone.
    fingerprint_delta: str  # what a prior calls `fingerprint`
    shape: list[int]
    dtype: str  # dtype code
    module: str
    scale: str  # name of the scales
    rank: int  # of the factors that stand for it; absent where it is dense
    places: list[str]  # of its matrices (`storage.forms.factored.Place`); absent where it is one
    reasoner: list[str]  # stored names of the reasoner's tensors
    mllm: str  # stored name
    rows_matched: int | list[int]  # of a vocabulary; of a merge input by input
    rows_unmatched: int | list[int]
    rows_unexplained: (
        int  # of these, rows that no tokenizer file of the mllm explains; absent where 0
    )
    method: str  # of a merge: its name, or copy, or cast
    canonical: str
    second_name_of: str  # the tensor that is the same parameter
    reasoners: list[list[str]]  # stored names, reasoner by reasoner


Results = dict[str, TensorRecord]  # by output tensor
