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
  # The image updates itself when it boots and holds the lock meanwhile.
  sudo apt-get -o DPkg::Lock::Timeout=600 update -q
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qy gcsfuse
fi
if ! mountpoint -q "$mount_point"; then
  sudo mkdir -p "$mount_point"
  sudo chown "$(id -u)" "$mount_point"
  gcsfuse --implicit-dirs "$bucket" "$mount_point"
fi

# The image's own Python is older than 3.11.
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -fsSL https://astral.sh/uv/install.sh | sh
cd "$here"
[ -d .venv ] || uv venv -q --python 3.11 .venv
uv pip install -q --python .venv/bin/python '.[tpu,eval]'
.venv/bin/python -c 'import jax, illada_jax; print("installed: jax", jax.__version__)'
