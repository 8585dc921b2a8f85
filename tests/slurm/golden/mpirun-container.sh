#!/bin/bash
# A run of hpclr on 2 nodes with 2 processes each, started by mpirun.
# `sbatch` this file, and the run begins, or goes on where it is.
#SBATCH --job-name=digits
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
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

launch() {
  exec mpirun -n 4 --map-by ppr:2:node --bind-to none \
    apptainer exec --nv --bind /scratch/me '/images/hpclr 0.1.sif' \
    python -m hpclr train --runs-dir /scratch/runs /scratch/runs/digits/submission/run.yaml
}

