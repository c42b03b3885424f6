"""The NVMe tier: what it lies on, whether it has room, how fast it is."""

from __future__ import annotations

from deploy.doctor.facts import DiskFacts, DiskSpeed
from deploy.doctor.finding import MADE_EACH_SECOND, Finding, gigabytes

FILE_SYSTEM, SPACE, SPEED = "disk file system", "disk space", "disk speed"
WANTED = 6e9
"""Where a 70B model on eight A800 begins to gain by reading what it could compute (Mooncake, FAST '25)."""

_MEMORY = ("tmpfs", "ramfs")
_LAYERS = ("overlay", "aufs")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "afs", "9p", "virtiofs", "ocfs2", "gfs2")
_NOTHING_DIRECT = "; no O_DIRECT here, so through the page cache"


def file_system(facts: DiskFacts) -> Finding:
    """Whether it is a disk of this machine."""
    measured = f"{facts.folder}: {facts.kind}"
    if facts.kind in _MEMORY:
        return Finding(FILE_SYSTEM, "bad", measured, "this is memory, not a disk: set cache.local_disk on NVMe, or raise max_local_cpu_size instead")
    if facts.kind in _NETWORK or facts.kind.startswith("fuse."):
        return Finding(
            FILE_SYSTEM, "warn", measured, "a network file system: set cache.local_disk on a disk of this machine; remote_url is for sharing"
        )
    if facts.kind in _LAYERS:
        return Finding(FILE_SYSTEM, "warn", measured, "a container's own layer is slow and goes with it: mount a volume for cache.local_disk")
    return Finding(FILE_SYSTEM, "ok", measured)


def space(facts: DiskFacts, wanted: int) -> Finding:
    """Whether ``wanted`` bytes have room, those that the tier has taken already included."""
    room = facts.free + facts.taken
    measured = f"room for {gigabytes(room)}; max_local_disk_size is {gigabytes(wanted)}"
    values = {"free": float(facts.free), "taken": float(facts.taken), "wanted": float(wanted)}
    if room < wanted:
        return Finding(SPACE, "bad", measured, "the tier goes read-only when the disk is full: lower cache.max_local_disk_size or make room", values)
    return Finding(SPACE, "ok", measured, "", values)


def speed(facts: DiskSpeed) -> Finding:
    """Whether reading is faster than computing."""
    if facts.error:
        return Finding(SPEED, "bad", facts.error, "give cache.local_disk a folder that can be written and read")
    measured = (
        f"reads {facts.read / 1e9:.2f} GB/s, writes {facts.written / 1e9:.2f} GB/s "
        f"({gigabytes(facts.size)}, {facts.streams} readers){'' if facts.direct else _NOTHING_DIRECT}"
    )
    values = {"read": facts.read, "written": facts.written, "size": float(facts.size), "direct": float(facts.direct)}
    if facts.read < MADE_EACH_SECOND:
        return Finding(SPEED, "bad", measured, "computing is faster, even with a 70B model: use another disk, or no cache.local_disk", values)
    if facts.read < WANTED:
        return Finding(SPEED, "warn", measured, "a 70B model wants 6 GB/s: use a faster NVMe disk, or several as RAID 0", values)
    if not facts.direct:
        return Finding(SPEED, "warn", measured, "this may be the page cache's speed: use a file system with O_DIRECT (ext4, xfs)", values)
    return Finding(SPEED, "ok", measured, "", values)
