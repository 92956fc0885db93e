# What torch.distributed, NCCL and gloo read from the environment, in one place: every launch file takes it from here.
#
#     eval "$(python -m athanor.launch environment)"
#
# before torchrun, on every node.  What is set already stays.  How long ranks wait for each other is the recipe's deadlines.collective_s, which the
# process group gets as its timeout; nothing here repeats it.

# The network interface between the nodes (eth0, ib0 ...), where the library's own choice is wrong: the one that the host's name resolves to.
if [ -n "${ATHANOR_INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$ATHANOR_INTERFACE}"
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$ATHANOR_INTERFACE}"
fi

# Every start of the ranks has a store of its own: after --max-restarts, the launcher's would still hold the addresses of dead ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# A collective that fails or times out ends the process (3, PyTorch's own choice: without waiting for NCCL to clean up), so that torchrun starts all again.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# A thread of NCCL's that hangs in the driver is given up after ten minutes.
export TORCH_NCCL_ENABLE_MONITORING="${TORCH_NCCL_ENABLE_MONITORING:-1}"
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-600}"
# The last 2,000 collectives of a rank, written to PREFIX<rank> on a timeout: `torchfrtrace` says which rank did not come.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-/tmp/athanor-nccl-}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
