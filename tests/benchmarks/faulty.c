/* Preloaded: makes the n-th call on files below a directory fail, be short, or change its file.

   FAULT_UNDER  directory (real path); FAULT_CALLS "read", "write" or "sync"; FAULT_AT  from 1
   FAULT_DO     an errno, "short", "end" (of file: 0 bytes), "shrink", "replace" (by another file
                with another last byte) or "touch" (write it); FAULT_ALWAYS  every later call too
   FAULT_CLOCK  the wall clock goes back by so many seconds a call */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long calls, ticks;

static int is_under(int fd) {
    const char *under = getenv("FAULT_UNDER");
    char link[64], path[4096];
    if (!under) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return strncmp(path, under, strlen(under)) == 0;
}

static void change(int fd, const char *what) {
    char link[64], path[4096], other[4104];
    struct stat status;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0 || fstat(fd, &status) || status.st_size < 1) return;
    path[n] = 0;
    if (!strcmp(what, "shrink")) {
        if (truncate(path, status.st_size / 2)) return;
    } else if (!strcmp(what, "touch")) {
        int to = open(path, O_WRONLY);
        if (pwrite(to, "\1", 1, status.st_size - 1) == 1) close(to);
    } else {
        char *data = malloc(status.st_size);
        snprintf(other, sizeof other, "%s.new", path);
        int to = open(other, O_WRONLY | O_CREAT, 0644);
        if (data && pread(fd, data, status.st_size, 0) == status.st_size) {
            data[status.st_size - 1] ^= 1;
            if (write(to, data, status.st_size) == status.st_size) rename(other, path);
        }
        free(data);
        close(to);
    }
}

/* 0: go on; 1: fail with errno set; 2: be short; 3: nothing is left */
static int struck(const char *kind, int fd) {
    const char *wanted = getenv("FAULT_CALLS"), *at = getenv("FAULT_AT"), *what = getenv("FAULT_DO");
    if (!wanted || !at || !what || strcmp(wanted, kind) || !is_under(fd)) return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (number < atol(at) || (number > atol(at) && !getenv("FAULT_ALWAYS"))) return 0;
    if (!strcmp(what, "short")) return 2;
    if (!strcmp(what, "end")) return 3;
    if (!strcmp(what, "shrink") || !strcmp(what, "replace") || !strcmp(what, "touch")) {
        change(fd, what);
        return 0;
    }
    errno = atoi(what);
    return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define SHORT(n) ((n) > 1 ? 1 : (n))

ssize_t read(int fd, void *to, size_t n) {
    REAL(read);
    int s = struck("read", fd);
    return s == 1 ? -1 : real(fd, to, s == 3 ? 0 : s == 2 ? SHORT(n) : n);
}
ssize_t pread64(int fd, void *to, size_t n, off64_t at) {
    REAL(pread64);
    int s = struck("read", fd);
    return s == 1 ? -1 : real(fd, to, s == 3 ? 0 : s == 2 ? SHORT(n) : n, at);
}
static ssize_t vector(int fd, const struct iovec *v, int count, off64_t at, int s) {
    if (s == 3) return 0;
    return s == 2 && count ? pread64(fd, v[0].iov_base, SHORT(v[0].iov_len), at) : -2;
}
ssize_t preadv64(int fd, const struct iovec *v, int count, off64_t at) {
    REAL(preadv64);
    int s = struck("read", fd);
    ssize_t n = s == 1 ? -1 : vector(fd, v, count, at, s);
    return n == -2 ? real(fd, v, count, at) : n;
}
ssize_t preadv64v2(int fd, const struct iovec *v, int count, off64_t at, int flags) {
    REAL(preadv64v2);
    int s = struck("read", fd);
    ssize_t n = s == 1 ? -1 : vector(fd, v, count, at, s);
    return n == -2 ? real(fd, v, count, at, flags) : n;
}
ssize_t preadv(int fd, const struct iovec *v, int count, off_t at) { return preadv64(fd, v, count, at); }
ssize_t pread(int fd, void *to, size_t n, off_t at) { return pread64(fd, to, n, at); }
ssize_t write(int fd, const void *from, size_t n) {
    REAL(write);
    int s = struck("write", fd);
    return s == 1 ? -1 : real(fd, from, s == 2 ? SHORT(n) : n);
}
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
    REAL(pwrite64);
    int s = struck("write", fd);
    return s == 1 ? -1 : real(fd, from, s == 2 ? SHORT(n) : n, at);
}
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) { return pwrite64(fd, from, n, at); }
int fsync(int fd) {
    REAL(fsync);
    return struck("sync", fd) == 1 ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    return struck("sync", fd) == 1 ? -1 : real(fd);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    const char *back = clock == CLOCK_REALTIME ? getenv("FAULT_CLOCK") : NULL;
    if (back) now->tv_sec -= atol(back) * atomic_fetch_add(&ticks, 1);
    return result;
}
