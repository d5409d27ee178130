# The environment of every rank, each variable with its reason. A value that is set already stands.
#
#     . launch/env.sh                        before `deepspeed` or `torchrun` on one node
#     bash launch/env.sh > .deepspeed_env    before `deepspeed --hostfile`: its launcher carries the
#                                            lines of this file to the other nodes, and no variable
#                                            but PATH, PYTHON*, LD_LIBRARY*, NCCL*, UCX*
#
# The Slurm scripts source it themselves.

_names=()
_default() {
    _names+=("$1")
    export "$1=${!1:-$2}"
}

# --- threads and output

# One thread a rank for CPU operators: with the default (all cores) the ranks of a node fight for
# the cores; on 2 cores a training loop was 10 times slower.
_default OMP_NUM_THREADS 1
# Lines arrive in the log when they are written, also those before a kill.
_default PYTHONUNBUFFERED 1
# A lost peer is one line of ours; torch's C++ log would add a stack of its store's to it.
_default TORCH_CPP_LOG_LEVEL ERROR

# --- GPU

# One hardware queue: collectives start in the order in which they were issued and overlap with the
# GEMMs issued after them (Megatron's requirement for tensor parallelism).
_default CUDA_DEVICE_MAX_CONNECTIONS 1
# Triton compiles on every node; a home folder shared by all nodes would make them write the same
# files at the same moment, over the network.
_default TRITON_CACHE_DIR "/tmp/triton-$(id -un)"

# --- network between nodes

# NCCL's warnings name the interface or the adapter that failed; at INFO it writes pages.
_default NCCL_DEBUG WARN
# An InfiniBand link that is lost for a moment (a switch restarts) is waited for a minute
# (4.096 us * 2^22 a try) rather than 1 s; a dead rank is found by the watchdog, not by this.
_default NCCL_IB_TIMEOUT 22

# gloo connects two ranks when they first talk: all with all would take N^2 messages at the start.
_default TORCH_GLOO_LAZY_INIT 1

# Not set here, since they depend on the cluster:
#   GLOO_SOCKET_IFNAME      interface of gloo (agreements, watchdog). Found by itself: the one that
#                           leads to MASTER_ADDR, loopback on one node. Give it where nodes have
#                           other names for it and the way found is wrong (preflight shows it).
#   NCCL_SOCKET_IFNAME      interface of NCCL's start-up; by itself it takes InfiniBand's, then any
#                           but loopback and docker. Give it where nodes have several.
#   NCCL_IB_HCA             adapters to use, e.g. mlx5_0,mlx5_1; for nodes with storage adapters.
#   MASTER_ADDR             an address of rank 0's host that all others reach. Launchers set it.
#   MEGASPARSE_LISTEN_ADDR  address that rank 0 binds its store to, if not MASTER_ADDR's: in a
#                           container or behind a NAT. 0.0.0.0 listens on every interface, which
#                           lets everyone on the network talk to the run: only where that is safe,
#                           and only with --listen-on-all-interfaces.
#   MEGASPARSE_FAULT        injects faults, for tests (megasparse/distributed/faults.py).

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    for _name in "${_names[@]}"; do
        echo "$_name=${!_name}"
    done
fi
unset _names _name
unset -f _default
