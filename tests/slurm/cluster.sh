#!/usr/bin/env bash
# A real Slurm of several nodes on one machine, for the tests. Root on Debian or Ubuntu.
#
#   cluster.sh install                the packages that it needs, and those of tests of containers
#   cluster.sh up DIRECTORY           starts it; stays in the foreground, and all of it ends with this process
#   cluster.sh kill-node DIRECTORY N      ends all of a node at once, as a power cut would
#   cluster.sh start-node DIRECTORY N     starts it again
#   cluster.sh kill-controller DIRECTORY  ends slurmctld
#   cluster.sh start-controller DIRECTORY
#
# Once DIRECTORY/ready exists, DIRECTORY/bin has sbatch, squeue and the others, to be put first on PATH.
#
# The cluster has a network and a table of processes of its own, and each node n1, n2, … in it has again: with its own
# host name, address, /dev/shm and processes. They share the file system. Nothing outside of DIRECTORY is changed, several
# clusters do not get in one another's way, and the end of the first process is the end of all.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
NODES=4 CPUS=4 MEMORY=4000 GPUS=2 # of each node; not real ones
NET=10.77.0                       # in the cluster's own network
CONTROLLER=$NET.254
# Slurm's plugin for PMIx opens libpmix.so, which only the -dev package has.
PACKAGES=(slurmctld slurmd slurm-client munge libpmix-dev libpmi2-0 iproute2 bubblewrap charliecloud-runtime debootstrap)
COMMANDS=(sbatch squeue scontrol sinfo scancel srun salloc)

die() {
  echo "cluster.sh: $*" >&2
  exit 1
}

install() {
  local apt=(apt-get -qq -o Acquire::http::Timeout=20 -o Acquire::Retries=1 -o DPkg::Lock::Timeout=120)
  local wanted=(install -y --no-install-recommends "${PACKAGES[@]}")
  ! dpkg -s "${PACKAGES[@]}" >/dev/null 2>&1 || return 0
  command -v apt-get >/dev/null || die "cannot install ${PACKAGES[*]}: this is not Debian or Ubuntu"
  [ "$(id -u)" = 0 ] || die "cannot install ${PACKAGES[*]}: root can, with 'make slurm'"
  echo "cluster.sh: installing ${PACKAGES[*]}"
  export DEBIAN_FRONTEND=noninteractive
  "${apt[@]}" "${wanted[@]}" >/dev/null 2>&1 && return
  "${apt[@]}" update && "${apt[@]}" "${wanted[@]}" >/dev/null || die "apt-get has failed"
}

configure() {
  mkdir -p "$D"/{bin,dev,log,run,spool,state,tmp}
  chmod 755 "$D" "$D"/*
  cat >"$D/slurm.conf" <<CONF
ClusterName=hpclr
SlurmctldHost=controller($CONTROLLER)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# what is left of a credential's life is also what a requeued job waits before it starts; 5 s is the least
AuthInfo=socket=$D/run/munge.sock,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
MailProg=/bin/true
# where PMIx keeps its directories, which nodes with a common /tmp would fight over
TmpFS=$D/tmp/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=1
KillWait=5
MinJobAge=86400
GresTypes=gpu
NodeName=n[1-$NODES] CPUs=$CPUS RealMemory=$MEMORY Gres=gpu:$GPUS State=UNKNOWN
PartitionName=main Nodes=n[1-$NODES] Default=YES MaxTime=7-00:00:00 State=UP
PartitionName=short Nodes=n[1-2] MaxTime=10 MaxNodes=1 State=UP
CONF
  # slurmd of 22.05 looks for cgroups of the second version even where none are used, and gives up if there are none
  echo "CgroupPlugin=cgroup/v1" >"$D/cgroup.conf"
  echo "NodeName=n[1-$NODES] Name=gpu Flags=nvidia_gpu_env File=$D/dev/gpu[0-$((GPUS - 1))]" >"$D/gres.conf"
  local i
  for ((i = 0; i < GPUS; i++)); do mknod "$D/dev/gpu$i" c 1 3; done # a second /dev/null: Slurm wants a device
  {
    echo "127.0.0.1 localhost"
    echo "$CONTROLLER controller"
    for ((i = 1; i <= NODES; i++)); do echo "$NET.$i n$i"; done
  } >"$D/hosts"
  # a name server that cannot be reached costs many seconds at each question
  { grep -v '^hosts:' /etc/nsswitch.conf || true; echo "hosts: files"; } >"$D/nsswitch.conf"
  head -c 1024 /dev/urandom >"$D/munge.key"
  chmod 600 "$D/munge.key"
}

# Commands for use from outside, which enter the cluster's network; a job's processes are in it.
write_commands() {
  local name program
  for name in "${COMMANDS[@]}"; do
    program=$(command -v "$name") || die "$name is not installed"
    cat >"$D/bin/$name" <<COMMAND
#!/bin/sh
if [ -n "\$SLURM_JOB_ID" ]; then exec $program "\$@"; fi
SLURM_CONF='$D/slurm.conf' exec nsenter --net=/proc/$1/ns/net $program "\$@"
COMMAND
    chmod 755 "$D/bin/$name"
  done
}

own_names() {
  mount --bind "$D/hosts" /etc/hosts
  mount --bind "$D/nsswitch.conf" /etc/nsswitch.conf
  hostname "$1"
  ip link set lo up
}

start_controller() { SLURM_CONF=$D/slurm.conf slurmctld "$@"; }

start_node() {
  local node=$1 i=${1#n} pid
  rm -f "$D/run/$node.connected"
  mkdir -p "$D/spool/$node" "$D/tmp/$node"
  unshare --mount --uts --ipc --pid --net --fork --kill-child=KILL --mount-proc "$0" node "$D" "$node" &
  pid=$!
  echo "$pid" >"$D/run/$node.pid"
  while [ "$(readlink "/proc/$pid/ns/net")" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
  ip link add "to-$node" type veth peer name eth0 netns "$pid"
  ip link set "to-$node" master bridge up
  nsenter --target "$pid" --net ip addr add "$NET.$i/24" dev eth0
  nsenter --target "$pid" --net ip link set eth0 up
  touch "$D/run/$node.connected"
}

# The first process of a node.
node() {
  own_names "$1"
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  while [ ! -e "$D/run/$1.connected" ]; do sleep 0.01; done
  SLURM_CONF=$D/slurm.conf slurmd -D -N "$1" &
  wait_for_ever
}

kill_node() {
  kill -KILL "$(cat "$D/run/$1.pid")"
  while ip link del "to-$1" 2>/dev/null; do :; done
  ip route replace unreachable "$NET.${1#n}/32" # else whoever asks it waits for an answer
}

# The first process of the cluster.
inside() {
  own_names controller
  ip link add bridge type bridge
  ip addr add "$CONTROLLER/24" dev bridge
  ip link set bridge up
  munged --force --key-file="$D/munge.key" --socket="$D/run/munge.sock" --pid-file="$D/run/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/run/munged.seed" --origin=127.0.0.1
  start_controller -i -c
  for ((i = 1; i <= NODES; i++)); do start_node "n$i"; done
  until [ "$(SLURM_CONF=$D/slurm.conf sinfo -h -N -o %T 2>/dev/null | sort -u)" = idle ]; do sleep 0.1; done
  touch "$D/ready"
  wait_for_ever
}

wait_for_ever() { # and see to processes that have lost their parents
  while :; do
    sleep 3600 &
    wait $!
  done
}

up() {
  configure
  echo $$ >"$D/run/cluster.pid"
  write_commands $$
  exec unshare --mount --uts --ipc --pid --net --fork --kill-child=KILL --mount-proc "$0" inside "$D" >>"$D/log/daemons" 2>&1
}

enter() { # COMMAND NODE: in the cluster, as its first process would
  local pid
  pid=$(cat "$D/run/cluster.pid")
  pid=$(cat "/proc/$pid/task/$pid/children")
  exec nsenter --target "${pid%% *}" --all --wd=/ setsid "$0" "in-$1" "$D" "${2:-}" </dev/null >>"$D/log/daemons" 2>&1
}

D=${2:-}
case ${1:-} in
  install) install ;;
  up) [ "$(id -u)" = 0 ] || die "needs root"; up ;;
  inside) inside ;;
  node) node "$3" ;;
  kill-node | start-node | kill-controller | start-controller) enter "$1" "${3:-}" ;;
  in-kill-node) kill_node "$3" ;;
  in-start-node) ip route del unreachable "$NET.${3#n}/32" 2>/dev/null || true; start_node "$3" ;;
  in-kill-controller) kill -KILL "$(cat "$D/run/slurmctld.pid")" ;;
  in-start-controller) start_controller ;;
  *) die "up, install, kill-node, start-node, kill-controller or start-controller, see its first lines" ;;
esac
