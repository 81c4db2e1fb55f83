"""Virtual GPUs: a PyTorch device type, ``vgpu``, written in Python.

How it works, in the order to read it:

* ``spec``     what a GPU can do: speeds and sizes, as data;
* ``clock``    simulated time: what waits for what, and how long each thing takes;
* ``memory``   bytes in use on each device;
* ``machine``  the simulated computer: some GPUs, their memories, their clock, their dice;
* ``cost``     the operations and bytes of one operator;
* ``tensor``   the tensor: unwrap, check, run on the CPU, account, wrap;
* ``autocast`` which operators ``torch.autocast`` runs in bfloat16;
* ``interrupt`` Ctrl-C at a moment that can bear it;
* ``backend``  what tells PyTorch that all this is a device.

What is modelled: one queue (CUDA's default stream) a device, the host that fills the queues, copies
that keep both ends busy, reads that make the host wait, a roofline time for each operator, memory
counted once for each piece of storage.

What is not: caches, kernels that reach less than the peak, contention between links, the rounding
of allocations and the fragmentation of memory, side streams and events, pinned memory, CUDA graphs,
``torch.compile``, sparse and quantized tensors, and the order in which a real GPU adds numbers up:
results here are the CPU's, bit for bit.

Three things that differ from CUDA in use. ``Module.to`` refuses to move a parameter while an older
autograd graph holds on to it: move the model before you use it. A random number generator of your
own (``generator=``) is refused: each device has one, seeded by ``torch.manual_seed``. And
interrupting (Ctrl-C) is safe only with the handler that ``interrupt`` sets: where a program sets
one of its own that raises, PyTorch's C++ code can end the process.

Rests on these APIs of PyTorch (tried with 2.13), some of them private:
``torch.utils.backend_registration._setup_privateuseone_for_python_backend``,
``torch.Tensor._make_wrapper_subclass``, ``__torch_dispatch__``, ``torch.library.Library.impl``,
``torch.autograd._engine_run_backward``, ``torch.utils.flop_counter.flop_registry`` and
``torch.__future__.set_swap_module_params_on_conversion``.
"""
