# shellcheck shell=bash
# Settings of your cluster. Copy this file to slurm/site.sh (git ignores it) and edit the copy.
#
# It is read twice: by your shell, once before sbatch (`source slurm/site.sh`), because sbatch takes its defaults from
# SBATCH_* variables; and by the job on its first node, whose environment every process of the job gets.
# IRKD_SITE=/some/where.sh names another file.

# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my-project
# export SBATCH_QOS=normal

if [ -n "${SLURM_JOB_ID:-}" ]; then # in the job
  # module load cuda
  # source .venv/bin/activate
  # python=(apptainer exec --nv irkd.sif python)   # the command that runs Python; an array, so that paths may hold spaces

  # the network that the processes talk over, where a node has several
  # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
  :
fi
