"""The planner as virtual GPUs compute: what the data sheet promises, each operation for itself."""

from dataclasses import replace

from course_lib.planner.constants import fitted

SHEET = replace(
    fitted(),
    product_a100=1.0,
    attention_a100=1.0,
    wave=0.0,
    product_traffic=0.0,
    eager_traffic=1.0,
    fixed_layer=0.0,
    host_layer=0.0,
    step=0.0,
)
