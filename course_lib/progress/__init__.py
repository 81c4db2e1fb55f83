"""A class at a glance: who solved which exercise.

    python -m course_lib.progress FOLDER                  what the learners' notebooks say
    python -m course_lib.progress FOLDER --again          judge every answer anew
    python -m course_lib.progress FOLDER --csv class.csv  the same, for a gradebook

``FOLDER`` holds a folder for each learner, or notebooks named like ``alice_02_data_parallelism``.
Nothing in it is changed. In the order to read:

* ``lessons``   the exercises that the course has;
* ``saved``     what the learners' notebooks say of them;
* ``again``     the same answers judged anew, each notebook in a process of its own, with limits;
* ``judge``     what runs in that process;
* ``tables``    the table, and the file for a gradebook.

A notebook's verdicts are what its learner saved, and can be typed by hand. ``--again`` takes the
answers alone and gives them to the checks of this installation. It limits their time and memory,
which stops accidents; it is no prison. Whoever does not trust a class runs it in a container.
"""
