#!/bin/sh
# One process of several: what torchrun would tell it, from what Slurm does.
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE="$SLURM_NTASKS"
exec "$@"
