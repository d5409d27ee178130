"""The only door to megatron-core: grid of ranks, layers, spec provider, model, datasets."""

import warnings

from megasparse.extras import require

require("megatron", "megasparse.megatron")

# megatron-core says at import, in every process, that Apex and Transformer Engine are missing; what
# is used in their place is said by the run itself.
warnings.filterwarnings("ignore", message=".*Apex.*", module="megatron.*")
warnings.filterwarnings("ignore", message=".*cuda_graph_scope.*", module="megatron.*")
