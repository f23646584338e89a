/* Stands between Python and the C library: locks that fail, another host, another boot. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

static int lock_error(void) {
    const char *text = getenv("FAKE_LOCK_ERRNO");
    return text ? atoi(text) : 0;
}

static int is_lock(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_GETLK;
}

#define FCNTL(NAME)                                                        \
    int NAME(int fd, int command, ...) {                                   \
        va_list more;                                                      \
        va_start(more, command);                                           \
        void *argument = va_arg(more, void *);                             \
        va_end(more);                                                      \
        if (is_lock(command) && lock_error()) {                            \
            errno = lock_error();                                          \
            return -1;                                                     \
        }                                                                  \
        int (*real)(int, int, ...) = dlsym(RTLD_NEXT, #NAME);              \
        return real(fd, command, argument);                                \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

int flock(int fd, int operation) {
    if (lock_error()) {
        errno = lock_error();
        return -1;
    }
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return real(fd, operation);
}

int gethostname(char *name, size_t size) {
    const char *fake = getenv("FAKE_HOST");
    if (fake) {
        strncpy(name, fake, size);
        return 0;
    }
    int (*real)(char *, size_t) = dlsym(RTLD_NEXT, "gethostname");
    return real(name, size);
}

static const char *redirect(const char *path) {
    const char *fake = NULL;
    if (!strcmp(path, "/proc/sys/kernel/random/boot_id")) fake = getenv("FAKE_BOOT");
    if (!strcmp(path, "/proc/self/mountinfo")) fake = getenv("FAKE_MOUNTS");
    return fake ? fake : path;
}

#define OPEN(NAME)                                                         \
    int NAME(const char *path, int flags, ...) {                           \
        va_list more;                                                      \
        va_start(more, flags);                                             \
        int mode = va_arg(more, int);                                      \
        va_end(more);                                                      \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #NAME);     \
        return real(redirect(path), flags, mode);                          \
    }
OPEN(open)
OPEN(open64)
