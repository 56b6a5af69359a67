#!/usr/bin/env bash
# What tpu_vm.sh runs on every TPU VM: mounts the share, installs, starts training as a service.
#
#   tpu_vm_host.sh HOST:/SHARE WORKDIR ARGUMENTS-OF-TRAIN...
set -euo pipefail

NFS=$1 WORKDIR=$2
shift 2
SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
UNIT=/etc/systemd/system/mobilellm.service

case $(systemctl show --property=SubState --value mobilellm) in
running | auto-restart) echo "$(hostname): training already" && exit 0 ;;
esac
if ! grep -q ' /shared ' /etc/fstab; then
    sudo apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet nfs-common
    echo "$NFS /shared nfs defaults,_netdev 0 0" | sudo tee -a /etc/fstab
    sudo mkdir -p /shared
fi
mountpoint -q /shared || sudo mount /shared
mkdir -p "$WORKDIR/logs"

# The VM's Python may be older than 3.11.
python3 -m pip install --quiet --user uv==0.13.9
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/venv
~/.local/bin/uv pip install --quiet --python ~/venv/bin/python "${SOURCE}[tpu]"

printf '%q ' exec ~/venv/bin/python "$SOURCE/launch/train.py" "$@" >~/train.sh
# Started again after a crash, a lost peer, or a reboot for maintenance. A stop or a shutdown sends
# SIGTERM to Python alone, and gives it time to save. RemainAfterExit: status 0 ends the run.
sudo tee "$UNIT" >/dev/null <<END
[Unit]
Description=mobilellm train
RequiresMountsFor=/shared
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
User=$USER
WorkingDirectory=$SOURCE
Environment=PYTHONUNBUFFERED=1
ExecStart=/bin/bash $HOME/train.sh
RemainAfterExit=yes
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec=120
StandardOutput=append:$WORKDIR/logs/$(hostname).log
StandardError=inherit

[Install]
WantedBy=multi-user.target
END
sudo systemctl daemon-reload
sudo systemctl enable --quiet mobilellm
sudo systemctl restart mobilellm
echo "$(hostname): training; log: $WORKDIR/logs/$(hostname).log"
