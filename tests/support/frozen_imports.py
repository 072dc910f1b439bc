"""Imports of what tests use late, made at once and exempt from garbage collection, in a process and its forked ranks.

DeepSpeed compiles Muon's kernels whatever the optimizer is; transformers imports an architecture, and MLflow its store,
at first use.
"""

import gc
import importlib

from delayed_collection import exempt_imports

from dskd.tracking.context import _installed

gc.disable()  # again, in a process that has called `exempt_imports` before
for _name in (
    "unsynced",
    "forked_rank",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.llama.modeling_llama",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.system_metrics.system_metrics_monitor",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "setuptools",
    "torch.distributed.checkpoint",
    "dskd.shards.dataset",
):
    importlib.import_module(_name)
_installed()  # kept: each tracked run records the versions of all packages
exempt_imports()
