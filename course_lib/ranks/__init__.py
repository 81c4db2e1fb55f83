"""One rank a GPU: a function run as on a cluster, on virtual GPUs or in real processes.

    def train():
        torch.distributed.init_process_group()
        model = Model().to(ranks.device())
        ...

    ranks.run(train, course_lib.devices(4))    # on virtual GPUs, or on real ones
    ranks.run(train, processes=4)              # in four processes, on whatever is there

On virtual GPUs each rank is a thread with one of its own, and ``torch.distributed`` works in it as
between processes: so do the engines above it, ``DistributedDataParallel``, ``fully_shard``,
DTensor, ``torch.distributed.pipelining`` and ``torch.distributed.checkpoint``, unmodified. What
they compute, hold, send and wait for is seen by the meters that see the code written by hand.

Processes are what a cluster has: each with its own Python, and ``gloo`` between them, or ``nccl``
if there is a GPU for each (not tried on real GPUs yet). Nothing is simulated and nothing is
metered. The function may stand in a cell of a notebook all the same, and returns, prints and fails
as on virtual GPUs. :mod:`course_lib.ranks.processes` says how.

How virtual ranks work, in the order to read it:

* ``baton``           one thread runs at a time, in an order that is always the same;
* ``rank_state``      what belongs to a process, and changes hands with the baton;
* ``running``         ranks begin, end, print, fail;
* ``where``, ``errors``, ``interrupting``  a fault, and the line of the program that it is in;
* ``reductions``      sums, means, maxima, as a ring needs them;
* ``calls``           what each collective does, on the ring of ``course_lib.parallel.ring``;
* ``host_ring``       the same for tensors on the CPU;
* ``counted_ring``    the same for GPUs without numbers: bytes, memory and seconds alone;
* ``meetings``        a collective happens when its last rank comes, from the moments of all;
* ``point_to_point``  sending and receiving;
* ``works``           what ``async_op=True`` returns, and what waits for what;
* ``group_identity``, ``process_group``  the class that ``torch.distributed`` calls;
* ``functional``      the collectives that DTensor calls;
* ``store``           keys and values that all ranks share;
* ``distributed``     what of ``torch.distributed`` is each rank's own, while ranks run;
* ``engines``, ``sequence_parts``  what PyTorch's engines take for granted of a process;
* ``own_numbers``     what DDP reads of itself where GPUs have no numbers;
* ``refusals``        what virtual ranks do not do, and would not say by themselves;
* ``script``          a script as each rank's main program, for ``python -m course_lib.ranks``;
* ``cuda_scripts``    a script that says "cuda", read as if it said "vgpu";
* ``launching``, ``output``  ``run`` itself, which chooses between virtual ranks and processes;
* ``by_hand``         what a rank can run: the course's methods, written with ``torch.distributed``.

Faults are named at once. When no rank can go on, that is a deadlock: the error says what each rank
waits for, and at which line. Ranks that call different collectives, or the same on tensors that do
not fit, are both named. The error of the rank that failed first is raised where ``run`` was called,
and ends in the program's own line.

What is modelled: a collective is one launch for each host, takes the bytes and the time of a ring,
on streams of its group, beside whatever the GPUs compute; ``wait`` makes the current stream wait
and not the host, as with NCCL; a barrier makes the hosts wait.

With numbers, every copy of a ring is made, and a recording shows each: that is for up to 16 ranks.
Without (``backing="meta"``) nothing is copied, and a collective is one span for each link that it
uses, one a rank in a ring, with the same bytes, peaks and seconds. So 128 ranks are few enough: an
all-reduce takes about a second of a laptop's time. ``examples/llama_8b_on_paper.py`` is FSDP2 of a
model of 8 billion parameters on eight H100s.

In what virtual ranks differ from processes:

* the current device of a rank is its own GPU from the start, without ``set_device``; ``LOCAL_RANK``
  is the index of that GPU, over all nodes;
* whichever backend a program asks for (``"nccl"``, ``"gloo"``), it gets this one;
* a rank begins with the random numbers, the default dtype and the environment of the caller, and
  shares its modules and global variables with the other ranks;
* what ranks print is shown when all have ended;
* a wait for what never comes is an error at once, which processes only end after a timeout;
* collectives of CPU tensors take no time and are not metered; a barrier sends nothing;
* a send is done when it was received, however small it is;
* ``PREMUL_SUM`` scales the sum and not each number;
* ``get_future()`` outside of a backward pass is waited for before it is returned;
* without numbers, DDP takes it that all ranks sent what its own rank did: the shapes of parameters,
  the order of gradients, which were used;
* a host that reads a value lets its GPU finish all that is enqueued: what another rank, which is
  behind in the program but not in time, adds to the same GPU later comes after that.

And the processes of ``ranks.run`` from those of ``torchrun``:

* they meet through a file in a private folder and not at a port, and talk over the loopback;
* they have the random numbers, the default dtype and the environment of the caller;
* what they print is shown when all have ended, rank by rank;
* collectives that differ are a ``MismatchError``, which costs a message before each: whoever
  measures sets ``TORCH_DISTRIBUTED_DEBUG=OFF``;
* a wait in vain goes on until ``timeout`` or an interrupt; the error says where each rank was;
* the function, and the variables that it uses, are copies: what a rank changes in them stays there.
  A tensor on a virtual GPU cannot be sent;
* macOS and Windows have no fork server, so each process imports PyTorch anew, in seconds; Windows
  cannot say where the ranks were that were stopped. Not tried on either.

What virtual ranks refuse, in one line: a run inside of a rank, ``course_lib.devices`` and ``trace``
inside of a rank, GPUs that are shared, receiving from any source, ``split_group``,
``DistributedDataParallel`` with ``mixed_precision``, ``async_save`` of
``torch.distributed.checkpoint``, ``torch.distributed.rpc``, ``torch.multiprocessing.spawn``,
``torch.compile``, symmetric memory, ``TCPStore``, another ``rank`` or ``world_size`` than the
rank's own.
PyTorch's ``quantization_pertensor_hook`` and ``batched_powerSGD_hook`` failed here, in an error of
their own; its other hooks run.

Scripts that others wrote and that ran here are in ``TRIED.md`` beside this file.

Virtual ranks rest on these names of PyTorch (tried with 2.13), which are private or may change:
``torch.distributed.distributed_c10d``: ``_World``, ``_world``, ``_backend``,
``_default_pg_init_method``, ``BackendConfig``, ``Backend._plugins`` and
``Backend.default_device_backend_map``, and that ``_new_process_group_helper`` takes a
``ProcessGroup`` written in Python as it is; ``torch.distributed.rendezvous._rendezvous_handlers``;
``torch._C._distributed_c10d._set_thread_isolation_mode``; ``torch._C._current_autograd_node`` and
``Variable._execution_engine.queue_callback``; ``torch.autograd._unsafe_preserve_version_counter``
and ``_engine_run_backward``; ``ReduceOp.__getstate__``;
``DTensor._op_dispatcher._custom_op_handlers``, ``torch.distributed.tensor._random._rng_tracker``,
``FakeTensorMode._cached_dispatch_impl``,
``DistributedDataParallel``'s ``_check_comm_hook``, ``_active_ddp_module`` and ``logger``, and its
``forward`` and ``_pre_forward`` are replaced while ranks run, as is
``torch.nn.parallel.distributed._verify_param_shape_across_processes``; the names of
``torch.distributed.tensor.experimental`` that ``sequence_parts`` gives;
``distributed_c10d._get_default_timeout`` and ``_resolve_process_group``, the operators of
``_c10d_functional`` and ``fsdp.all_gather_copy_in``, ``AsyncCollectiveTensor``;
``torch.utils._python_dispatch``'s ``TorchDispatchMode``; and of Python ``os.environ._data``.
"""

from course_lib.ranks.errors import DeadlockError, MismatchError
from course_lib.ranks.launching import device, run

__all__ = ["DeadlockError", "MismatchError", "device", "run"]
