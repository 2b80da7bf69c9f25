/* Counts what a process does to files whose path holds a word, and kills it, or refuses it room, at one of them.
   Loaded by LD_PRELOAD; begin() is called by the process itself (ctypes). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char word[256];
static long strike_at = -1, count = 0;
static int refuses = 0;

void begin(const char *path_word, long at, int refuse) {
    strncpy(word, path_word, sizeof word - 1);
    strike_at = at, refuses = refuse, count = 0;
}
long end(void) { word[0] = 0; return count; }

/* 0: go on; 1: refuse */
static int struck(const char *path) {
    if (!word[0] || !path || !strstr(path, word)) return 0;
    if (__atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) != strike_at) return 0; /* files are synced by threads */
    if (!refuses) kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return 1;
}

static const char *path_of(int fd, char *buffer) {
    char link[64];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = word[0] ? readlink(link, buffer, PATH_MAX - 1) : -1;
    errno = saved;
    if (length < 0) return NULL;
    buffer[length] = 0;
    return buffer;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    if (fd > 2 && struck(path_of(fd, path))) return -1;
    return REAL(write)(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    char path[PATH_MAX];
    if (struck(path_of(fd, path))) return -1;
    return REAL(pwrite64)(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int number) {
    char path[PATH_MAX];
    if (fd > 2 && struck(path_of(fd, path))) return -1;
    return REAL(writev)(fd, parts, number);
}
int fsync(int fd) {
    char path[PATH_MAX];
    if (struck(path_of(fd, path))) return -1;
    return REAL(fsync)(fd);
}
static int opens(const char *path, int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && struck(path); }
#define OPEN(name)                                                   \
    int name(const char *path, int flags, ...) {                     \
        va_list rest;                                                \
        va_start(rest, flags);                                       \
        mode_t mode = va_arg(rest, mode_t);                          \
        va_end(rest);                                                \
        if (opens(path, flags)) return -1;                           \
        return REAL(name)(path, flags, mode);                        \
    }
OPEN(open)
OPEN(open64)
int openat(int folder, const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    if (opens(path, flags)) return -1;
    return REAL(openat)(folder, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
    if (mode[0] != 'r' && struck(path)) return NULL;
    return REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    if (mode[0] != 'r' && struck(path)) return NULL;
    return REAL(fopen64)(path, mode);
}
int mkdir(const char *path, mode_t mode) { return struck(path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return struck(from) || struck(to) ? -1 : REAL(rename)(from, to); }
int unlink(const char *path) { return struck(path) ? -1 : REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) { return struck(path) ? -1 : REAL(unlinkat)(folder, path, flags); }
int rmdir(const char *path) { return struck(path) ? -1 : REAL(rmdir)(path); }
