"""NEW FILE."""

DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

SOURCE_DTYPE = "source"  # every tensor keeps the dtype it has in the mllm

PRIOR_MODULES = "attn,mlp"  # the published default of DRIFT

MERGE_MODULES = "attn,mlp,norm"

PRIOR = "prior"  # the method of `drift-prior compute`; every other is in the catalog

KEPT_LAYERS = "0:6"  # layer-swap: layers up to k = 5 stay the mllm's (arXiv 2505.05464)

DEFAULT_SHARD_SIZE = "5GB"

DEFAULT_CACHE_SIZE = "20GB"  # --stream: some shards of the usual 5 GB in use, one on its way

LAYER_SWAP = "layer-swap"

TIES = "ties"
