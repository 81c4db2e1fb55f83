"""One file for each part of PyTorch that takes for granted what kinds of device there are.

Each teaches that part about virtual GPUs: it registers operators, or puts a function of its own in
the place of one of PyTorch's. :mod:`course_lib.virtual.backend` calls them all, once.
"""
