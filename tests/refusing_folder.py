"""A folder mounted in user space that hands everything on to another, but what it refuses, as some file systems do.

    python tests/refusing_folder.py BEHIND MOUNTED OPERATION=ERROR ...       # such as rename_folder=ENOSYS

Operations: fsync (of files), fsync_folder, append, chmod, rename_file, rename_folder, link, lock, replace (onto a file
that is there).
"""

import errno
import os
import stat
import sys

import mfusepy


class Refusing(mfusepy.Operations):
    """The operations of one folder, by path."""

    use_ns = True

    def __init__(self, behind, refused):
        self.behind, self.refused = os.path.realpath(behind), refused

    def _at(self, path):
        return os.path.join(self.behind, path.lstrip("/"))

    def _refuse(self, operation):
        if operation in self.refused:
            raise mfusepy.FuseOSError(self.refused[operation])

    def getattr(self, path, fh=None):
        status = os.lstat(self._at(path))
        keys = ("st_atime", "st_ctime", "st_gid", "st_mode", "st_mtime", "st_nlink", "st_size", "st_uid")
        return {key: int(getattr(status, f"{key}_ns", getattr(status, key))) for key in keys}

    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self._at(path))]

    def mkdir(self, path, mode):
        os.mkdir(self._at(path), mode)

    def rmdir(self, path):
        os.rmdir(self._at(path))

    def unlink(self, path):
        os.unlink(self._at(path))

    def rename(self, old, new):
        is_folder = stat.S_ISDIR(os.lstat(self._at(old)).st_mode)
        self._refuse("rename_folder" if is_folder else "rename_file")
        if os.path.exists(self._at(new)):
            self._refuse("replace")
        os.rename(self._at(old), self._at(new))

    def link(self, target, source):
        self._refuse("link")
        os.link(self._at(source), self._at(target))

    def chmod(self, path, mode):
        self._refuse("chmod")
        os.chmod(self._at(path), mode)

    def chown(self, path, uid, gid):
        self._refuse("chmod")

    def truncate(self, path, length, fh=None):
        os.truncate(self._at(path), length)

    def utimens(self, path, times=None):
        os.utime(self._at(path), ns=times)

    def create(self, path, mode, fi=None):
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def open(self, path, flags):
        if flags & os.O_APPEND:
            self._refuse("append")
        return os.open(self._at(path), flags & ~os.O_APPEND)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def flush(self, path, fh):
        return 0

    def release(self, path, fh):
        os.close(fh)

    def fsync(self, path, datasync, fh):
        self._refuse("fsync")
        os.fsync(fh)

    def fsyncdir(self, path, datasync, fh):
        self._refuse("fsync_folder")
        return 0

    def lock(self, path, fh, cmd, lock):
        self._refuse("lock")
        return 0

    def statfs(self, path):
        status = os.statvfs(self._at(path))
        keys = (
            "f_bavail",
            "f_bfree",
            "f_blocks",
            "f_bsize",
            "f_favail",
            "f_ffree",
            "f_files",
            "f_frsize",
            "f_namemax",
        )
        return {key: getattr(status, key) for key in keys}


if __name__ == "__main__":
    behind, mounted, *habits = sys.argv[1:]
    refused = {
        operation: getattr(errno, name) for operation, _, name in (habit.partition("=") for habit in habits)
    }
    mfusepy.FUSE(Refusing(behind, refused), mounted, foreground=True, nothreads=True, hard_remove=True)
