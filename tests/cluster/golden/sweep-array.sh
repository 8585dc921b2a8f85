#!/bin/bash
# 3 runs of hpclr, each an element of a job array, which requeues itself.
# `sbatch` this file, and they begin, or go on where they are.
#SBATCH --job-name=lr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/scratch/me/runs/lr.sweep/logs/%j_0_log.out
#SBATCH --error=/scratch/me/runs/lr.sweep/logs/%j_0_log.err
#SBATCH --export=NONE
#SBATCH --array=0-2%2
set -euo pipefail

RUNS=(
  /scratch/me/runs/lr-seed-0
  '/scratch/me/runs/lr'"'"'s $(seed)'
  /scratch/me/runs/lr-seed-0
)
RUN=${RUNS[SLURM_ARRAY_TASK_ID]}
mkdir -p "$RUN/logs"
# Its output goes to where that of a job of its own would; what Slurm says of it stays here.
exec >>"$RUN/logs/${SLURM_JOB_ID}_0_log.out" 2>>"$RUN/logs/${SLURM_JOB_ID}_0_log.err"
exec bash "$RUN/submission/job.sh"
