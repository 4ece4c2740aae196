#!/usr/bin/env bash
# A slice of Cloud TPUs from nothing to a run, and away again:
#   ZONE=us-west4-a BUCKET=my-bucket REPO_URL=... configs/launch/gcloud.sh my-slice v5litepod-16
# Not run on a TPU yet. Every line can be run by hand; --worker=all is what makes several hosts one run.
set -euo pipefail
name=${1:?a name for the slice} accelerator=${2:-v5litepod-16}
: "${ZONE:?a zone that has such TPUs}" "${BUCKET:?a bucket that the hosts write to}" "${REPO_URL:?this repository}"
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all --command="$1"; }

gcloud compute tpus tpu-vm create "$name" --zone="$ZONE" --accelerator-type="$accelerator" \
    --version="${VERSION:-v2-alpha-tpuv5-lite}"
# shellcheck disable=SC2016 # $HOME and $PATH are the workers'
on_all 'pip install -q --user uv && export PATH=$HOME/.local/bin:$PATH &&
    git clone -q '"$REPO_URL"' jaxseek && cd jaxseek && uv venv -q --seed --python 3.12 &&
    uv pip install -q -e ".[tpu,data,gcs]" && .venv/bin/jaxseek doctor'
on_all "cd jaxseek && .venv/bin/jaxseek train ${RUN:-pretrain-tiny} --set out=gs://$BUCKET/runs/$name"
gcloud compute tpus tpu-vm delete "$name" --zone="$ZONE" --quiet
