"""The system-call filter: a classic-BPF program (struct sock_filter, linux/filter.h) that bubblewrap loads before the sandboxed interpreter starts.

What is named here is allowed, everything else is refused: EPERM for a call that was known when the table was written, ENOSYS for a newer one and for
clone3, whose flags lie in memory that a filter cannot read (the C library then takes clone).  A call by the conventions of another architecture
(int 0x80 on x86-64) kills the process.  Not in the table, so refused: ptrace, process_vm_*, mount and its relatives, unshare, setns, bpf, io_uring,
userfaultfd, perf_event_open, keyctl and its relatives, module loading, kcmp, and what allocates memory that no limit counts (memfd_create, System V
shared memory and queues).  Arguments are looked at in five: clone may make no namespace, sockets are AF_UNIX only, prlimit64 reaches the caller
alone, and ioctl may push no characters into a terminal.
"""

import functools
import struct

from athanor.errors import UserError

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
# name, number on x86-64, number on aarch64; - where the architecture lacks it.  tests/test_sandbox.py compares it with the kernel's headers.
TABLE = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215
brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -
pipe 22 -, select 23 -, sched_yield 24 124, mremap 25 216, msync 26 227, mincore 27 232, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -
nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172, sendfile 40 71, connect 42 203, accept 43 202, sendto 44 206
recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, bind 49 200, listen 50 201, getsockname 51 204, getpeername 52 205
setsockopt 54 208, getsockopt 55 209, fork 57 -, vfork 58 -, execve 59 221, exit 60 93, wait4 61 260, kill 62 129, uname 63 160, fcntl 72 25
flock 73 32, fsync 74 82, fdatasync 75 83, truncate 76 45, ftruncate 77 46, getdents 78 -, getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -
mkdir 83 -, rmdir 84 -, creat 85 -, link 86 -, unlink 87 -, symlink 88 -, readlink 89 -, chmod 90 -, fchmod 91 52, chown 92 -, fchown 93 55
lchown 94 -, umask 95 166, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176
setuid 105 146, setgid 106 144, geteuid 107 175, getegid 108 177, setpgid 109 154, getppid 110 173, getpgrp 111 -, setsid 112 157
setreuid 113 145, setregid 114 143, getgroups 115 158, setgroups 116 159, setresuid 117 147, getresuid 118 148, setresgid 119 149
getresgid 120 150, getpgid 121 155, getsid 124 156, capget 125 90, rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigqueueinfo 129 138
rt_sigsuspend 130 133, sigaltstack 131 132, utime 132 -, statfs 137 43, fstatfs 138 44, getpriority 140 141, setpriority 141 140
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126, sched_rr_get_interval 148 127
prctl 157 167, arch_prctl 158 -, setrlimit 160 164, gettid 186 178, getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11
llistxattr 195 12, flistxattr 196 13, tkill 200 130, time 201 -, futex 202 98, sched_setaffinity 203 122, sched_getaffinity 204 123
epoll_create 213 -, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223, timer_create 222 107
timer_settime 223 110, timer_gettime 224 108, timer_getoverrun 225 109, timer_delete 226 111, clock_gettime 228 113, clock_getres 229 114
clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, tgkill 234 131, utimes 235 -, waitid 247 95, openat 257 56
mkdirat 258 34, newfstatat 262 79, unlinkat 263 35, renameat 264 38, linkat 265 37, symlinkat 266 36, readlinkat 267 78, fchmodat 268 53
fchownat 260 54, futimesat 261 -, faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99, get_robust_list 274 100
utimensat 280 88, epoll_pwait 281 22, eventfd 284 -, fallocate 285 47, timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87
accept4 288 242, signalfd4 289 74, eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70
recvmmsg 299 243, sendmmsg 307 269, getcpu 309 168, renameat2 316 276, getrandom 318 278, execveat 322 281, membarrier 324 283
copy_file_range 326 285, preadv2 327 286, pwritev2 328 287, statx 332 291, rseq 334 293, pidfd_send_signal 424 424, pidfd_open 434 434
close_range 436 436, openat2 437 437, faccessat2 439 439, epoll_pwait2 441 441, futex_waitv 449 449, fchmodat2 452 452
"""
_LAST_KNOWN = 452
_NEW_NAMESPACE = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
# (x86-64, aarch64) of the calls that are decided by an argument
_CLONE, _CLONE3 = (56, 220), (435, 435)
_SOCKETS = ((41, 198), (53, 199))
_PRLIMIT64, _IOCTL = (302, 261), (16, 29)
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_AF_UNIX, _EPERM, _ENOSYS = 1, 1, 38

# instruction codes of linux/bpf_common.h: load a word at a fixed offset, jump if equal / greater or equal / any bit set, return a constant
_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _ARGS = 0, 4, 16  # offsets in struct seccomp_data


def allowed_calls(machine: str) -> dict[str, int]:
    """Calls that are allowed whatever their arguments, by name, for "x86_64" or "aarch64"."""
    column = list(MACHINES).index(machine) + 1
    rows = [entry.split() for line in TABLE.strip().splitlines() for entry in line.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


@functools.lru_cache(maxsize=2)
def filter_program(machine: str) -> bytes:
    """Assemble the filter for a machine as os.uname() names it.  Raises UserError for one that the table does not know."""
    if machine not in MACHINES:
        raise UserError(f"sandbox: no system-call table for {machine}, wanted one of {', '.join(MACHINES)}")
    column = list(MACHINES).index(machine)
    eperm, enosys = _ERRNO | _EPERM, _ERRNO | _ENOSYS
    code = [(_LOAD, 0, 0, _ARCH), (_JEQ, 1, 0, MACHINES[machine]), (_RETURN, 0, 0, _KILL_PROCESS), (_LOAD, 0, 0, _NUMBER)]
    code += _when(_JGE, _LAST_KNOWN + 1, enosys)  # the x32 calls, whose numbers bear a high bit, included
    code += _when(_JEQ, _CLONE3[column], enosys)
    for number in sorted(allowed_calls(machine).values()):
        code += _when(_JEQ, number, _ALLOW)
    code += _by_argument(_CLONE[column], 0, [(_JSET, _NEW_NAMESPACE, eperm)], _ALLOW)
    for socket in _SOCKETS:
        code += _by_argument(socket[column], 0, [(_JEQ, _AF_UNIX, _ALLOW)], eperm)
    code += _by_argument(_PRLIMIT64[column], 0, [(_JEQ, 0, _ALLOW)], eperm)
    code += _by_argument(_IOCTL[column], 1, [(_JEQ, request, eperm) for request in _TERMINAL_INPUT], _ALLOW)
    code.append((_RETURN, 0, 0, eperm))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _when(jump: int, value: int, verdict: int) -> list[tuple]:
    """Return `verdict` if the loaded word passes the test, otherwise go on."""
    return [(jump, 0, 1, value), (_RETURN, 0, 0, verdict)]


def _by_argument(number: int, argument: int, tests: list[tuple], otherwise: int) -> list[tuple]:
    """Decide one call by the low word of an argument: both architectures are little-endian, and the kernel reads no more of these."""
    body = [(_LOAD, 0, 0, _ARGS + 8 * argument)]
    for test in tests:
        body += _when(*test)
    body.append((_RETURN, 0, 0, otherwise))
    return [(_JEQ, 0, len(body), number), *body]
