#!/bin/bash
# A run of hpclr on 4 nodes with 4 processes each, started by srun.
# `sbatch` this file, and the run begins, or goes on where it is.
#SBATCH --job-name=digits
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=08:00:00
#SBATCH --partition=accelerated
#SBATCH --account=my-project
#SBATCH --exclusive
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/scratch/runs/digits/logs/%j_0_log.out
#SBATCH --error=/scratch/runs/digits/logs/%j_0_log.err
#SBATCH --export=NONE
set -euo pipefail
for signal in USR1 USR2 TERM; do trap "HPCLR_EARLY=$signal" "$signal"; done

RUN=/scratch/runs/digits
HPCLR_ATTEMPTS=20 # starts that the job may have
HPCLR_CHAIN=no # yes: the next job of a chain goes on; no: this one is requeued
HPCLR_PATIENCE=120 # seconds for which a requeue is tried

# Nothing was taken over from the shell of who submitted this, but srun passes on what is set here.
export SLURM_EXPORT_ENV=ALL
set +eu # sites do not write these for it
type module >/dev/null 2>&1 || . /etc/profile
module load devel/cuda/12.4 mpi/openmpi/5.0 || [ -n "${HPCLR_EARLY:-}" ] || exit 1
set -eu
export NCCL_SOCKET_IFNAME=ib0
export GREETING='it'"'"'s ''$'5
export PATH='/opt/x y/bin:'"${PATH:-}"
export PYTHONPATH=/scratch/runs/digits/submission/code${PYTHONPATH:+:$PYTHONPATH}

launch() {
  exec srun --nodes=4 --ntasks=16 --ntasks-per-node=4 --cpus-per-task=8 --kill-on-bad-exit=1 --mpi=pmix --cpu-bind=cores \
    /home/me/venv/bin/python -m hpclr train --runs-dir /scratch/runs /scratch/runs/digits/submission/run.yaml
}

