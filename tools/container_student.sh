#!/usr/bin/env bash
# Make the lessons of an image those without solutions, and remove what else tells them: the
# Dockerfile runs this with --build-arg EDITION=student. What it deletes is lost.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e .git ]; then
  echo "container_student.sh deletes every solution: run it in an image, never in a clone" >&2
  exit 1
fi
python tools/editions.py build/editions
cp build/editions/student/*.ipynb notebooks/
rm -rf build tests docs/teaching/lessons
