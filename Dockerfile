# The course, ready to run, for one learner or behind a JupyterHub (docs/teaching/hub.md).
#
#   docker build -t multi-gpu-by-hand .
#   docker run --rm -p 127.0.0.1:8888:8888 -v "$PWD/mine:/home/jovyan" multi-gpu-by-hand
#
# The learner's folder is /home/jovyan, as hubs have it. They mount a disk over it, so the course
# itself is elsewhere.
FROM python:3.11-slim

# git: nbgitpuller fetches lessons with it. Its version is the distribution's affair.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends git \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 jovyan

COPY . /srv/course
RUN /srv/course/tools/container_setup.sh jupyterhub nbgitpuller

# For a class: docker build --build-arg EDITION=student ... has the lessons without solutions.
ARG EDITION=complete
RUN if [ "$EDITION" = student ]; then /srv/course/tools/container_student.sh; fi

ENV OMP_NUM_THREADS=1 \
    COURSE_DEVICES=virtual \
    COURSE_LESSONS=/home/jovyan/my_lessons
# jovyan, as a number: a cluster asks whether it is root.
USER 1000
WORKDIR /home/jovyan
EXPOSE 8888
ENTRYPOINT ["/srv/course/tools/container_start.sh"]
CMD ["jupyter", "lab", "--ServerApp.ip=0.0.0.0", "--no-browser", \
     "--LabApp.default_url=/lab/tree/my_lessons/00_meet_your_gpus.ipynb"]
