"""Ranks in processes of their own, as on a cluster: ``ranks.run(function, processes=4)``.

In the order to read it:

* ``calling``           a run from beginning to end, as the caller sees it;
* ``starting``, ``fork_server``  processes that start in milliseconds;
* ``place``             who a process is, and where its files are;
* ``job``, ``sending``  what it is to do, and how a function of a cell comes to it;
* ``rank_process``      what it does;
* ``rendezvous``        how ``init_process_group()`` finds the others;
* ``reports``, ``remote_traceback``  what it returned, or its error with the learner's line;
* ``process``, ``outcome``  what the caller knows of it, and makes of it;
* ``whereabouts``       the line at which a rank was stopped;
* ``checked_collectives``  collectives that differ are named;
* ``impatience``        Ctrl-C at the wrong moment.

A run leaves nothing behind: its files are in one temporary folder, its processes are stopped when
the first one fails, and end by themselves when the caller is gone.
"""
