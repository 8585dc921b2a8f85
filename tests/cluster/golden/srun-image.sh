#!/bin/bash
# A run of hpclr on 2 nodes with 4 processes each, started by srun.
# `sbatch` this file, and the run begins, or goes on where it is.
#SBATCH --job-name=run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=08:00:00
#SBATCH --partition=gpu
#SBATCH --account=me
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/run/logs/%j_0_log.out
#SBATCH --error=/home/me/runs/run/logs/%j_0_log.err
#SBATCH --export=NONE
set -euo pipefail
for signal in USR1 USR2 TERM; do trap "HPCLR_EARLY=$signal" "$signal"; done

RUN=/home/me/runs/run
HPCLR_ATTEMPTS=20 # starts that the job may have
HPCLR_CHAIN=no # yes: the next job of a chain goes on; no: this one is requeued
HPCLR_PATIENCE=120 # seconds for which a requeue is tried

# Nothing was taken over from the shell of who submitted this, but srun passes on what is set here.
export SLURM_EXPORT_ENV=ALL
set +eu # sites do not write these for it
type module >/dev/null 2>&1 || . /etc/profile
module load GCC/13.3.0 CUDA || [ -n "${HPCLR_EARLY:-}" ] || exit 1
set -eu
export PYTHONUNBUFFERED=1
export NCCL_DEBUG=WARN
export PYTHONPATH=/home/me/runs/run/submission/code${PYTHONPATH:+:$PYTHONPATH}

launch() {
  exec srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=16 --kill-on-bad-exit=1 --mpi=pmix --cpu-bind=cores \
    bash -p -c 'for name in $(compgen -e); do case $name in SLURM*|PMI*|PALS_*|OMPI_*|PRTE_*|MPI_LOCAL*|MPICH_*|MV2_*|I_MPI_*|MPI4PY_*|MASTER_ADDR|MASTER_PORT|RANK|WORLD_SIZE|LOCAL_*|GROUP_*|ROLE_*|TORCH*|CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|ROCR_VISIBLE_DEVICES|HIP_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|NCCL_*|RCCL_*|GLOO_*|UCX_*|FI_*|HPCLR_*|OMP_*|MKL_*|PYTORCH_*|MIOPEN_*|HDF5_*|PYTHONPATH|PYTHONUNBUFFERED|NCCL_DEBUG) export "SINGULARITYENV_$name=${!name}" ;; esac; done
export SINGULARITY_NO_EVAL=1
exec "$@"
' container singularity exec --no-home --cleanenv --nv --bind=/home/me/digits.h5:/home/me/digits.h5:ro --bind=/home/me/runs/run:/home/me/runs/run --bind=/home/me/runs/run/submission:/home/me/runs/run/submission:ro --bind=/scratch:/scratch --bind=/extra:/extra /home/me/image.sif \
    python -m hpclr train --runs-dir /home/me/runs /home/me/runs/run/submission/run.yaml
}

