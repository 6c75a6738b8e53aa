#!/bin/sh
# vaopd's command line with the options of $VAOPD_OPTIONS. `train` goes on from the newest checkpoint below
# $VAOPD_CHECKPOINTS if there is one, since whatever supervises a container starts the same command again after a fault.
set -eu
if [ "$1" = train ]; then
    for state in "${VAOPD_CHECKPOINTS:-}"/step_*/state.json; do
        [ -f "$state" ] && set -- "$@" --resume && break
    done
fi
# shellcheck disable=SC2086  # the options are several words
exec vaopd "$@" ${VAOPD_OPTIONS:-}
