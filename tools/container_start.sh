#!/usr/bin/env bash
# What a container starts with: working copies of the lessons in the learner's own folder, where
# they are not there yet, and then whatever was asked for.
set -euo pipefail
python "$(dirname "$0")/lab.py" --copies
exec "$@"
