"""Virtual GPUs: a PyTorch device type, ``vgpu``, written in Python.

The core, in the order to read it; it takes half an hour:

* ``spec``     what a GPU can do: speeds and sizes, as data;
* ``tasks``    operations whose times are not known yet, and the order in which they get them;
* ``streams``  queues of work, events, and what waits for what;
* ``clock``    simulated time: how long each thing takes, and when it runs;
* ``memory``   bytes in use on each device;
* ``machine``  the simulated computer: all its state, which is swapped whole;
* ``cost``     the operations and bytes of one operator;
* ``tensor``   the tensor: numbers inside, a device's rules around them;
* ``execution``  unwrap, check, run on the backing device, wrap, account.

What the core rests on, each for whoever needs it:

* ``operators``  one operator: what it does to its arguments, and who runs it;
* ``arguments``  the tensors among an operator's arguments, and whether they may come together;
* ``room``     whether what an operator returns will fit, asked before it runs;
* ``storages``  what ``untyped_storage()`` gives;
* ``copies``   to and from the device, and the reads that make the host wait;
* ``pinned``   host memory that can be copied from while the host goes on;
* ``host_copies``  copies that the host does not wait for, and what it does too early with them;
* ``hazards``  waits between streams that a program lacks;
* ``special_operators``  indices, dropout and others that do more than compute;
* ``random_states``  a generator whose state is CUDA's, a seed and an offset;
* ``generators``  each device's random numbers;
* ``network``  what joins machines: network cards, and which GPU uses which;
* ``achieved``  what of a data sheet measured training reaches;
* ``known_forms``  what an operator answered before, where there are no numbers;
* ``paper``    GPUs without tensors, a thousand of them: their clocks and links alone;
* ``paper_tensor``  what collectives sum and send there: a size;
* ``backend``  what tells PyTorch that all this is a device;
* ``adapters`` one file for each part of PyTorch that takes for granted what devices there are:
  ``torch.accelerator``, attention, autocast, Ctrl-C, ``Module.to``, ``torch.load`` and so on.

The numbers are those of an ordinary tensor inside each virtual one. It is on the CPU (``backing``
``"cpu"``), on a real GPU that several virtual ones share (``"cuda:0"``), or has a shape alone
(``"meta"``).

What is modelled: streams and events; a GPU's cores, which take one operation at a time, and the two
directions of its links, which work beside them; network cards, which a node's GPUs share in the
order in which their copies are ready; the host that fills the queues; reads that make the
host wait; a roofline time for each operator; memory counted once for each piece of storage.

What is not: caches, kernels that reach less than the peak, two kernels that share the cores,
contention inside NVLink or in a switch, the rounding of allocations and the fragmentation of
memory, CUDA graphs, ``torch.compile``, sparse, nested and quantized tensors, and the order in which
a real GPU adds numbers up: results here are the CPU's, bit for bit.

What differs from CUDA in use:

* backward enqueues its work on the streams that are current where ``backward()`` is called; CUDA's
  autograd enqueues each part on the stream of its forward;
* the current stream of a device is the same for all threads;
* random numbers are the CPU's, so an offset counts other steps than CUDA's (see ``random_states``);
* what the host reads or overwrites while a copy is on its way is reported where a function of
  PyTorch does it, on the thread that copied; what NumPy does with an array that shares the memory,
  or another thread with the tensor, is not seen;
* pageable host memory, and every blocking copy, makes the host wait until the copy is done; CUDA
  may go on once it has staged a small one;
* memory is refused before the work where that is known at little cost (factories, products,
  broadcasting, views with more numbers than memory, what is told how much to return), and after it
  elsewhere: where it depends on the numbers, or where no more comes out than went in;
* a tensor freed while another stream still reads it is not reported: on a GPU its memory could be
  given away, unless ``record_stream`` was called;
* optimizers run parameter by parameter, as on the CPU, unless they are told ``foreach=True``;
* a gradient that a hook of a ``grad_fn`` puts on another device is not refused; one of a tensor's
  hook is;
* a graph recorded before its model moved hands its gradients to the parameters that were, and the
  parameters where they are now get none of them;
* a parameter of a virtual GPU is one by ``isinstance(p, nn.Parameter)``, not by ``type(p)``;
* ``torch.device("vgpu:0")`` is PyTorch's error before the first ``devices()``: to register the
  name alone would break ``torch.accelerator`` and ``pin_memory`` on the CPU and on real GPUs;
* ``copy.deepcopy`` of a parameter leaves out what the program has set on it, as PyTorch's does;
* a signal may come a few bytecodes later than elsewhere (see ``adapters.interrupt``).

What is proven: ``tests/conformance`` runs PyTorch's own databases of operators, modules and
optimizers; its ``exceptions.py`` lists what is not equal to the CPU bit for bit. How close the
times are to a real GPU's is for ``MEASURED.md`` to say.

Rests on these APIs of PyTorch (tried with 2.13), some of them private:
``torch.utils.backend_registration._setup_privateuseone_for_python_backend``,
``torch.Tensor._make_wrapper_subclass``, ``__torch_dispatch__``, ``torch.library.Library.impl``,
``torch.autograd._engine_run_backward``, ``torch.utils.flop_counter.flop_registry``; the adapters
name theirs.
"""
