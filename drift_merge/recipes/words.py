"""The words and defaults of requests that several rooms share."""

DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SOURCE_DTYPE = "source"  # every tensor keeps the dtype it has in the mllm
PRIOR_DTYPE = "bfloat16"  # the default output dtype of a prior
PRIOR = "prior"  # the method of `drift-prior compute`; every other is in the table of methods
NORMS = ("frobenius", "nuclear", "none")  # as `maths.spectra.norms` has them
NEAREST, STOCHASTIC = "nearest", "stochastic"  # how a 16-bit output is rounded
PRIOR_MODULES = "attn,mlp"  # the published default of DRIFT
MERGE_MODULES = "attn,mlp,norm"
DEFAULT_SHARD_SIZE = "5GB"
DEFAULT_CACHE_SIZE = "20GB"  # --stream: some shards of the usual 5 GB in use, one on its way
