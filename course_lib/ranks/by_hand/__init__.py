"""The methods of the course as one rank sees them: what lesson 10 derives, cleaned up, and more.

The other packages run every GPU from one program, with lists that have a tensor for each. Here a
function is one rank's part of the work: what the others do, it knows from the order of the calls
alone. It is written with ``torch.distributed``, and nothing else of the course but what counts
targets, so it runs on virtual ranks, and in real processes under ``torchrun``.

* ``messages``          sending to one rank while receiving from another; the ring all-reduce;
* ``data_parallel``     gradients averaged in buckets, while backward still computes the others;
* ``sharded_data_parallel``  a shard of each layer, gathered when the layer is at work: stage 3;
* ``pipeline``          a step of a pipeline, GPipe's or 1F1B's, from the place of one stage;
* ``tensor_parallel``   an MLP of which each rank has some neurons.

PyTorch's own engines for them are ``DistributedDataParallel``, ``fully_shard``,
``torch.distributed.pipelining`` and ``torch.distributed.tensor.parallel``.
"""
