"""A seccomp filter that leaves a Python program the system calls that computing needs, and no others.

The filter is an allow-list in the kernel's classic BPF (seccomp(2), linux/seccomp.h). A system call that is
not named here fails with EPERM, so there are no sockets, no processes, no signals to others, no changed
files, no ptrace and no io_uring, and calls of newer kernels are denied too. Files open for reading only;
Landlock decides which can be read (jail.py). Memory is what the limit on address space counts: neither
locked, nor of the host's huge pages, nor shared and writable, and advice is about giving it back.

A filter cannot count, so each new thread is asked for: the kernel stops the call and notifies whoever has the
listener (seccomp_unotify(2)), which is the process that started the program. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import struct

# AUDIT_ARCH_* of linux/audit.h, and the column of the machine's numbers in the tables below.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Numbers of asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64); None: no such call.
ALLOWED: dict[str, tuple[int, int | None]] = {
    # open files, and queries about paths
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "close": (3, 57), "lseek": (8, 62), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "stat": (4, None), "lstat": (6, None), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "getdents64": (217, 61), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "fadvise64": (221, 223),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # memory
    "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "brk": (12, 214),
    # threads of this process
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "set_tid_address": (218, 96), "membarrier": (324, 283),
    # signals to itself, from timers only
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "alarm": (37, None),
    "setitimer": (38, 103), "getitimer": (36, 102),
    # time, randomness, identity, exit
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getrusage": (98, 165), "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getrandom": (318, 278), "sysinfo": (99, 179), "uname": (63, 160), "exit": (60, 93),
    "exit_group": (231, 94),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
OPEN, OPENAT = (2, None), (257, 56)
IOCTL, FCNTL = (16, 29), (72, 25)
MMAP, MADVISE, PRLIMIT64 = (9, 222), (28, 233), (302, 261)
# Calls that jail.py makes by number before the filter is in force.
SETUP = {"seccomp": (317, 277), "capset": (126, 91), "timer_create": (222, 107), "timer_settime": (223, 110)}

O_CHANGES = 0o3 | 0o100 | 0o1000 | 0o2000  # O_WRONLY and O_RDWR, O_CREAT, O_TRUNC, O_APPEND
CLONE_THREAD = 0x10000
TCGETS = 0x5401  # isatty
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC = 0, 1, 2, 3, 1030
PROT_WRITE, MAP_SHARED, MAP_LOCKED, MAP_HUGETLB = 0x2, 0x1, 0x2000, 0x40000
RLIMIT_STACK = 3
# MADV_NORMAL, _RANDOM, _SEQUENTIAL, _WILLNEED, _DONTNEED, _FREE, _GUARD_INSTALL and _GUARD_REMOVE
ADVICE = [0, 1, 2, 3, 4, 8, 102, 103]

RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
RET_USER_NOTIF = 0x7FC00000
LOAD, EQUAL, SET, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

THREADS = 64  # tasks of a program, its first thread included
NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_*
NOTIF, FLAG_CONTINUE = 80, 1  # size of struct seccomp_notif

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, k
DENIED = RET_ERRNO | errno.EPERM


def numbers(machine: str) -> dict[str, int]:
    """Return the numbers of the calls in SETUP."""
    return {name: both[MACHINES[machine][1]] for name, both in SETUP.items()}


def thread_filter(machine: str) -> bytes:
    """Build the filter that asks the listener for each `clone`, and leaves the rest to `program`."""
    arch, column = MACHINES[machine]
    return _assembled([
        (LOAD, 0, 0, ARCH),
        (EQUAL, 0, 3, arch),
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 1, CLONE[column]),
        (RETURN, 0, 0, RET_USER_NOTIF),
        (RETURN, 0, 0, RET_ALLOW),
    ])  # fmt: skip


def grant_thread(listener: int) -> bool:
    """Answer one request for a thread: granted up to THREADS. Returns False if nobody can ask any more.

    Threads that ask at the same moment do not see each other, so there are twice as many at most.
    """
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    if not any(event & select.POLLIN for _, event in poll.poll(0)):
        return False
    notice = bytearray(NOTIF)
    with contextlib.suppress(FileNotFoundError):  # the one who asked has ended
        fcntl.ioctl(listener, NOTIF_RECV, notice)
        number, thread = struct.unpack_from("=QI", notice)
        try:
            granted = len(os.listdir(f"/proc/{thread}/task")) < THREADS
        except OSError:
            granted = False
        reply = (0, FLAG_CONTINUE) if granted else (-errno.EAGAIN, 0)
        fcntl.ioctl(listener, NOTIF_SEND, struct.pack("=QqiI", number, 0, *reply))
    return True


def program(machine: str, opens: bool, threads: bool = True) -> bytes:
    """Build the filter for `machine` (a key of MACHINES) as an array of struct sock_filter.

    With `opens`, files may be opened for reading; with `threads`, `thread_filter` decides about threads. Both
    machines are little-endian, so the low word of an argument comes first, and the arguments that are checked
    are 32 bits wide.
    """
    arch, column = MACHINES[machine]

    def argument(call: tuple[int, int | None], index: int, rest: list[Instruction]) -> list[Instruction]:
        """Apply `rest` to argument `index` of `call`; other calls jump past it."""
        number = call[column]
        if number is None:
            return []
        return [(EQUAL, 0, 1 + len(rest), number), (LOAD, 0, 0, ARGUMENTS + 8 * index), *rest]

    def one_of(values: list[int]) -> list[Instruction]:
        tests = [(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        return [*tests, (RETURN, 0, 0, DENIED), (RETURN, 0, 0, RET_ALLOW)]

    reading = [(SET, 0, 1, O_CHANGES), (RETURN, 0, 0, DENIED), (RETURN, 0, 0, RET_ALLOW)]
    thread = [(SET, 1, 0, CLONE_THREAD), (RETURN, 0, 0, DENIED), (RETURN, 0, 0, RET_ALLOW)]
    own_stack = [  # programs that recurse raise it; address space limits it all the same
        (EQUAL, 0, 3, 0),
        (LOAD, 0, 0, ARGUMENTS + 8),
        (EQUAL, 0, 1, RLIMIT_STACK),
        (RETURN, 0, 0, RET_ALLOW),
        (RETURN, 0, 0, DENIED),
    ]
    mapping = [
        (SET, 3, 0, MAP_LOCKED | MAP_HUGETLB),
        (SET, 0, 3, MAP_SHARED),
        (LOAD, 0, 0, ARGUMENTS + 8 * 2),
        (SET, 0, 1, PROT_WRITE),
        (RETURN, 0, 0, DENIED),
        (RETURN, 0, 0, RET_ALLOW),
    ]
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, arch),
        (RETURN, 0, 0, RET_KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
        *(argument(OPEN, 1, reading) + argument(OPENAT, 2, reading) if opens else []),
        *(argument(CLONE, 0, thread) if threads else []),
        *argument(PRLIMIT64, 0, own_stack),
        *argument(MMAP, 3, mapping),
        *argument(MADVISE, 2, one_of(ADVICE)),
        *argument(IOCTL, 1, one_of([TCGETS])),
        *argument(FCNTL, 1, one_of([F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC])),
        # A filter cannot see the flags of clone3; on ENOSYS glibc falls back to clone.
        (EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, RET_ERRNO | errno.ENOSYS),
    ]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, RET_ALLOW)]
    code.append((RETURN, 0, 0, DENIED))
    return _assembled(code)


def _assembled(code: list[Instruction]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
