#!/bin/sh
# Begins the run FEDCLAW_RUN with the settings given as arguments, or goes on with it where it was begun before: what
# restarts it (systemd, a Kubernetes Job, Docker) gives the same command each time. A run that is done ends at once, 0.
#
#   FEDCLAW_FEDERATION  the coordinator's federation directory
#   FEDCLAW_RUN         the run's name
#   FEDCLAW_RUNS        where run directories go (default: runs)
set -eu
: "${FEDCLAW_FEDERATION:?name the federation directory}" "${FEDCLAW_RUN:?name the run}"
runs=${FEDCLAW_RUNS:-runs}
if [ ! -e "$runs/$FEDCLAW_RUN" ]; then
    exec python -m fedclaw.server "federation=$FEDCLAW_FEDERATION" "runs=$runs" "run=$FEDCLAW_RUN" "$@"
fi
# What was asked of the sites is in the run; where and how to listen may be told anew.
given=$#
while [ "$given" -gt 0 ]; do
    case $1 in
        address=* | tracking=* | tracking.* | limits=* | limits.* | encryption=* | encryption.* | sites.wait=*) set -- "$@" "$1" ;;
    esac
    shift
    given=$((given - 1))
done
exec python -m fedclaw.server "federation=$FEDCLAW_FEDERATION" "resume=$runs/$FEDCLAW_RUN" "$@"
