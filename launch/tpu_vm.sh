#!/usr/bin/env bash
# Trains on TPU VMs of Google Cloud, one host or a pod slice, and goes on after every preemption:
#
#   TPU=mobilellm TYPE=v5litepod-256 ZONE=us-west4-a NFS=10.0.0.2:/share \
#       CONFIG=configs/1.5b.py:v5e-256 DATA=/shared/data/corpus WORKDIR=/shared/runs/1.5b \
#       launch/tpu_vm.sh [--config.KEY=VALUE ...]
#
# Needs gcloud, logged in, and an NFS share (Filestore) that the TPU VMs reach: it is mounted at
# /shared on every host. Asks for the slice, installs the committed state of this repository and
# starts training as a service; asks for another slice when that one is preempted. Training does not
# need this script to go on: stop it and run it again at will. Logs: $WORKDIR/logs/HOST.log.
#
# To stop (every host saves first):  gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE \
#                                        --worker=all --command='sudo systemctl stop mobilellm'
# To give the slice back:            gcloud compute tpus queued-resources delete $TPU --zone=$ZONE \
#                                        --force
set -euo pipefail

TPU=${TPU:-mobilellm}
TYPE=${TYPE:-v5litepod-256}                 # v4, v5p count cores: v5p-512 has 256 chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}     # of v5e; v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
ZONE=${ZONE:?the zone of the TPU}
CAPACITY=${CAPACITY---spot}                 # or --reserved, or empty for on demand
NFS=${NFS:?HOST:/SHARE of an NFS server}
CONFIG=${CONFIG:?a config, such as configs/1.5b.py:v5e-256}
DATA=${DATA:?a dataset below /shared}
WORKDIR=${WORKDIR:?a folder below /shared}
POLL=${POLL:-60}                            # seconds

say() { echo "$(date -u +%FT%TZ) $*"; }
queued() { gcloud compute tpus queued-resources "$1" "$TPU" --zone="$ZONE" --quiet "${@:2}"; }
state() { queued describe --format='value(state.state)' 2>/dev/null || echo NONE; }
on() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --quiet --command="$2"; }

start() { # on all hosts; does nothing where it runs
    local source=${TMPDIR:-/tmp}/mobilellm-$TPU.tar.gz
    local run="mkdir -p mobilellm && tar -xzf mobilellm.tar.gz -C mobilellm"
    run+=" && bash mobilellm/launch/tpu_vm_host.sh $(printf '%q ' "$NFS" "$WORKDIR" \
        --config "$CONFIG" --workdir "$WORKDIR" --config.data.path="$DATA" "$@")"
    git archive --format=tar.gz --output="$source" HEAD &&
        gcloud compute tpus tpu-vm scp "$source" "$TPU:mobilellm.tar.gz" --zone="$ZONE" \
            --worker=all --quiet &&
        on all "$run"
}

started=
while true; do
    case $(state) in
    NONE)
        say "asking for $TYPE"
        # shellcheck disable=SC2086 # CAPACITY may be empty or several flags
        queued create --node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" \
            $CAPACITY || say "not taken; asking again"
        ;;
    FAILED | SUSPENDED)
        say "$TPU was preempted or not granted: deleting it to ask again"
        queued delete --force
        started=
        ;;
    ACTIVE)
        if [[ -z $started ]] && start "$@"; then
            started=yes
            say "training; logs: $WORKDIR/logs on $NFS"
        fi
        # Exited: status 0, the last step is saved. Failed: stopped, or a mistake to mend.
        case $(on 0 'systemctl show --property=SubState,ExecMainStatus mobilellm | sort' || true) in
        *SubState=exited*) say "finished; $TPU still costs: delete it (see above)" && exit 0 ;;
        *ExecMainStatus=2*SubState=failed*) say "a mistake; see $WORKDIR/logs on $NFS" && exit 2 ;;
        *SubState=failed*) say "stopped; run this again to go on" && exit 0 ;;
        esac
        ;;
    esac
    sleep "$POLL"
done
