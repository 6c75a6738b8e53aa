#!/bin/sh
# Runs vaopd's command line with the options of $VAOPD_OPTIONS. `train` resumes the run in $VAOPD_RUN_FOLDER if there is
# one, since a container's supervisor runs the same command again after a fault.
set -eu
if [ "$1" = train ] && [ -e "${VAOPD_RUN_FOLDER:-}/metrics.jsonl" ]; then
    set -- "$@" --resume
fi
# shellcheck disable=SC2086  # the options are several words
exec vaopd "$@" ${VAOPD_OPTIONS:-}
