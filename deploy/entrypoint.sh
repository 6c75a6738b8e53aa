#!/bin/sh
# vaopd's command line with the options of $VAOPD_OPTIONS. `train` goes on with the run in $VAOPD_RUN_FOLDER if there is
# one, since whatever supervises a container starts the same command again after a fault.
set -eu
if [ "$1" = train ] && [ -e "${VAOPD_RUN_FOLDER:-}/metrics.jsonl" ]; then
    set -- "$@" --resume
fi
# shellcheck disable=SC2086  # the options are several words
exec vaopd "$@" ${VAOPD_OPTIONS:-}
