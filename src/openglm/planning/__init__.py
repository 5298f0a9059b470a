"""What a training run needs before it is begun: memory, time, layout, energy and cost. Arithmetic only, no torch.

`hardware.py` GPUs and clusters; `layout.py` how a model is spread and what is impossible; `memory.py` bytes a GPU;
`process.py` bytes of a run in one CPU process; `timing.py` seconds a step and calibration; `plan.py` one layout with all
its figures; `search.py` the layouts that fit, and why the others do not.
"""

from openglm.planning.hardware import GPUS, Cluster, Gpu
from openglm.planning.layout import Layout, Workload
from openglm.planning.plan import Budget, Plan, make_plan
from openglm.planning.process import process_memory
from openglm.planning.search import Search, search
from openglm.planning.timing import Efficiency, calibrate, paper_efficiency

__all__ = [
    "GPUS",
    "Budget",
    "Cluster",
    "Efficiency",
    "Gpu",
    "Layout",
    "Plan",
    "Search",
    "Workload",
    "calibrate",
    "make_plan",
    "paper_efficiency",
    "process_memory",
    "search",
]
