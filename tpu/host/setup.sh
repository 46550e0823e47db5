#!/bin/sh
# Runs on a TPU VM: installs Python and this package for TPUs and mounts the bucket. Safe to repeat.
# usage: setup.sh BUCKET MOUNT_POINT
set -eu
bucket=$1
mount_point=$2
here=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)

if ! command -v gcsfuse >/dev/null; then
  keys=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" >/dev/null
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # The image updates itself when it boots and holds two locks meanwhile; `update` cannot wait for its own.
  tries=1
  until sudo apt-get update -q; do
    [ $tries -lt 60 ] || exit 1
    tries=$((tries + 1))
    sleep 10
  done
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qy gcsfuse
fi
if ! mountpoint -q "$mount_point"; then
  sudo mkdir -p "$mount_point"
  # In fstab, so that it is there after a boot. By default gcsfuse refuses to rename directories of a bucket (EMFILE).
  options="rw,_netdev,nofail,allow_other,uid=$(id -u),gid=$(id -g),implicit_dirs,rename_dir_limit=100000"
  grep -q " $mount_point gcsfuse " /etc/fstab ||
    echo "$bucket $mount_point gcsfuse $options 0 0" | sudo tee -a /etc/fstab >/dev/null
  sudo mount "$mount_point"
fi

# The image's own Python is older than 3.11.
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -fsSL https://astral.sh/uv/install.sh | sh
cd "$here"
rm -f installed
[ -d .venv ] || uv venv -q --python 3.11 .venv
uv pip install -q --python .venv/bin/python '.[tpu,eval]'
.venv/bin/python -c 'import jax, illada_jax; print("installed: jax", jax.__version__)'
date -u >installed
