"""Predictions for training runs that fit no laptop, with their errors on the table.

``plan(model, cluster, layout)`` says what a step takes, in seconds by parts and in bytes by holder;
``search(model, cluster, batch, sequence_length)`` looks for the fastest layout. Models, GPUs and
links are data with sources. What no data sheet says is a handful of constants, fitted on published
runs; ``python -m course_lib.planner.fit`` prints how far off they are on runs that nobody fitted.
"""

from course_lib.planner.clusters import GPUS, Cluster, cluster
from course_lib.planner.configs import from_config, model_named
from course_lib.planner.layouts import Layout
from course_lib.planner.models import MODELS, Model, gpt, llama
from course_lib.planner.planning import Plan, plan
from course_lib.planner.searching import Search, search

__all__ = [
    "GPUS",
    "MODELS",
    "Cluster",
    "Layout",
    "Model",
    "Plan",
    "Search",
    "cluster",
    "from_config",
    "gpt",
    "llama",
    "model_named",
    "plan",
    "search",
]
